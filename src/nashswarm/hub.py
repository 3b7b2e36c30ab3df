"""Pinned, verified, resumable downloads from the Hugging Face hub; nothing else in the project talks to it.

The hub lists a repository at a commit with every file's size and digest: the SHA-256 of an LFS file, the git
blob SHA-1 of any other. Files are streamed into a staging folder, compared with the listing, and moved into
place together.

Listing, addresses, token, offline switch, proxies and errors are huggingface_hub's. The bytes are streamed
here, in its session, and not by `hf_hub_download`, since that (read in 2.4.0)
- deletes its partial file on every failure, so that nothing is left to resume;
- checks the size of what came, not its digest;
- waits on a silent server for 6 timeouts and 5 pauses, and asks again for the headers with 60 s timeouts;
- hands files of xet repositories to hf_xet, and keeps a `.cache` folder with timestamps beside them.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nashswarm.types import NashSwarmError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoSibling

logger = logging.getLogger(__name__)

RepoType = Literal["model", "dataset"]
OnBytes = Callable[[str, int, int], None]  # file name, bytes there so far, bytes in all

# Formats that can run code when opened, or that hold weights in a form which the project does not read.
PICKLES = (".bin", ".pt", ".pth", ".ot", ".pkl", ".pickle", ".joblib", ".ckpt", ".msgpack", ".h5")
CONNECTIONS = 6  # per file and call; as many as huggingface_hub makes, but each must have brought new bytes
CHUNK = 1 << 20  # bytes read at a time when hashing
LIBRARY = "nash-swarm"  # in the user agent
WAYS_OUT = (
    "set HF_ENDPOINT to a mirror, or run where the hub can be reached, or do without it: `source: path` or "
    "`source: embedded`; files received so far are kept, and the next run goes on from there"
)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as it lies on disk: its name within the repository, bytes, and the SHA-256 of its content."""

    name: str
    size: int
    sha256: str


class HubError(NashSwarmError, RuntimeError):
    """The hub did not, or must not, deliver."""


class HubUnreachable(HubError):
    """No usable answer: no network, offline mode, a stalled or broken connection, an error of the server."""


class RepositoryNotFound(HubError):
    """The hub has no repository of that id and type, or shows it only to others."""


class AccessDenied(HubError):
    """The repository is there, but gated or closed to this token."""


class RevisionNotFound(HubError):
    """The repository has no such commit."""


class UnpinnedRevision(HubError):
    """A branch, a tag or an abbreviation: it may name other files tomorrow."""


class NoSuchFile(HubError):
    """No file of the repository, or of the directory, fits."""


class UnsafeFile(HubError):
    """A pickle, or a name that leads out of the directory."""


class ChecksumMismatch(HubError):
    """The bytes that came are not those that the hub lists."""


class NoSpace(HubError):
    """The disk cannot hold what is still to come."""


class StagingBusy(HubError):
    """Another process is downloading into the same staging folder."""


class BadDataset(HubError):
    """A fetched data set does not hold what is asked of it."""


@dataclass(frozen=True, slots=True)
class _Repository:
    id: str
    revision: str
    type: RepoType
    endpoint: str  # without a slash at the end

    def __str__(self) -> str:
        return f"{self.type} {self.id} at {self.revision[:8]}"


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the listing says of one file; just one of the digests is not None."""

    name: str
    size: int
    sha256: str | None  # LFS
    git_sha1: str | None  # sha1(b"blob <size>\0" + content)


# --- fetch --------------------------------------------------------------------------------------------------


def check_revision(revision: str) -> None:
    """Raise UnpinnedRevision unless `revision` is a full commit: 40 lower-case hexadecimal digits."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UnpinnedRevision(
            f"revision {revision!r} is not pinned: expected the 40 hexadecimal digits of a commit, as the "
            "hub shows them under Files > History (https://huggingface.co/ID/commits/main)"
        )


def fetch(
    repo_id: str,
    revision: str,
    *,
    repo_type: RepoType = "model",
    patterns: Sequence[str],
    directory: Path,
    staging: Path,
    endpoint: str | None = None,
    timeout: float = 10.0,
    progress: OnBytes | None = None,
) -> tuple[HubFile, ...]:
    """Bring the files of a pinned repository that match `patterns` into `directory`, verified, sorted.

    Nothing lands in `directory` before every file has come and is verified, and nothing but these files. One
    that lies there already is kept if its digest is right; strangers are left alone. Until then files wait in
    `staging`, whole or in part, and a later call goes on from them.

    Arguments: `patterns`, shell patterns for each part of a name ("*.json" means the top folder, "a/*.json"
    folder a); pickles never match. `directory` and `staging` must share a file system, and `staging` must not
    lie within an output of DVC, which deletes those before a run. `endpoint`, in place of HF_ENDPOINT or
    huggingface.co. `timeout`, seconds to wait for a connection and for each next byte. `progress`, called as
    bytes arrive. HF_TOKEN and HF_HUB_OFFLINE are honoured.

    Raises UnpinnedRevision, HubUnreachable, RepositoryNotFound, AccessDenied, RevisionNotFound, NoSuchFile
    (no file matches), UnsafeFile (pickles only, a pickle asked for, a name that leaves the directory),
    ChecksumMismatch (the bad bytes are deleted), NoSpace, StagingBusy.
    """
    from huggingface_hub import constants

    check_revision(revision)
    _check_patterns(patterns)
    repository = _Repository(repo_id, revision, repo_type, (endpoint or constants.ENDPOINT).rstrip("/"))
    entries = _select(repository, _list(repository, timeout), patterns)
    waiting = staging / "--".join([repo_type, *repo_id.split("/")]) / revision
    _check_same_device(directory, waiting)
    waiting.mkdir(parents=True, exist_ok=True)
    with _locked(waiting):
        missing = [entry for entry in entries if not _is_in_place(directory / entry.name, entry)]
        _check_space(missing, waiting)
        for entry in missing:
            _obtain(repository, entry, waiting / entry.name, timeout, progress or _silent)
        for entry in missing:
            _move(waiting / entry.name, directory / entry.name)
    return tuple(_record(directory / entry.name, entry) for entry in entries)


def _obtain(repository: _Repository, entry: _Entry, path: Path, timeout: float, progress: OnBytes) -> None:
    """Complete the staged file at `path` and verify it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # an empty file needs no request
    with _in_our_words(repository):
        _transfer(repository, entry, path, timeout, progress)
    _verify(repository, entry, path)


def _silent(name: str, done: int, size: int) -> None:
    pass


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


# --- before anything is downloaded --------------------------------------------------------------------------


def _check_patterns(patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if pattern.lower().endswith(PICKLES):
            raise UnsafeFile(
                f"pattern {pattern!r} asks for a format that is refused, since it can run code or is not "
                "read here; ask for *.safetensors"
            )


def _list(repository: _Repository, timeout: float) -> list[RepoSibling]:
    """Every file of the repository, by one request without retries."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=repository.endpoint, library_name=LIBRARY)
    with _in_our_words(repository):
        try:
            info = api.repo_info(
                repository.id,
                repo_type=repository.type,
                revision=repository.revision,
                files_metadata=True,
                timeout=timeout,
            )
        except HFValidationError as error:
            raise RepositoryNotFound(f"{repository.id!r} cannot be a repository's id: {error}") from error
        except HfHubHTTPError:  # some of these are ValueErrors, too
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # HTML of a login page, other JSON
            raise HubUnreachable(
                f"{repository.endpoint} does not answer like a hub ({error!r}); check the proxy and "
                f"HF_ENDPOINT, or {WAYS_OUT}"
            ) from error
    if info.sha != repository.revision:
        raise RevisionNotFound(
            f"{repository.endpoint} answered with commit {info.sha} for {repository.revision}; it is no "
            "hub, or the revision is not a commit"
        )
    return list(info.siblings or ())


def _select(repository: _Repository, siblings: list[RepoSibling], patterns: Sequence[str]) -> list[_Entry]:
    names = sorted(sibling.rfilename for sibling in siblings)
    for name in names:
        _check_name(repository, name)
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if repository.type == "model" and pickles and not any(name.endswith(".safetensors") for name in names):
        raise UnsafeFile(
            f"{repository} has no safetensors, only {', '.join(pickles[:3])}, which run code when opened; "
            "pin a revision that has safetensors (e.g. the commit of a conversion under the repository's "
            "Community tab), or convert with save_pretrained(DIR) where you trust the pickle, and use "
            "`source: path`"
        )
    chosen = {name for name in names if name not in pickles and any(_matches(name, p) for p in patterns)}
    if not chosen:
        held = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise NoSuchFile(
            f"{repository} has no file that matches {', '.join(patterns)}; it has: {held or 'none'}; "
            "check `id`, `config` and `revision`"
        )
    entries = [_entry(repository, sibling) for sibling in siblings if sibling.rfilename in chosen]
    return sorted(entries, key=lambda entry: entry.name)


def _entry(repository: _Repository, sibling: RepoSibling) -> _Entry:
    name, lfs = sibling.rfilename, sibling.lfs
    if lfs is not None:
        return _Entry(name, lfs.size, lfs.sha256, None)
    if sibling.size is None or sibling.blob_id is None:
        raise HubUnreachable(
            f"{repository.endpoint} lists {name} without size and digest, so that it cannot be verified; use "
            "huggingface.co or a mirror that passes them on (HF_ENDPOINT)"
        )
    return _Entry(name, sibling.size, None, sibling.blob_id)


def _check_name(repository: _Repository, name: str) -> None:
    strange = "\\" in name or any(ord(c) < 32 for c in name)
    if strange or any(part in ("", ".", "..") for part in name.split("/")):
        raise UnsafeFile(
            f"{repository} lists a file {name!r}, which leads out of the directory; do not trust it, and "
            "use another repository"
        )


def _matches(name: str, pattern: str) -> bool:
    """Part by part: plain fnmatch lets '*' cross folders, and "*.json" would bring gpt2's onnx/*.json too."""
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _check_same_device(directory: Path, staging: Path) -> None:
    if _existing(directory).stat().st_dev != _existing(staging).stat().st_dev:
        raise HubError(
            f"{staging} and {directory} lie on different file systems, so that files cannot be moved from "
            "one to the other in one step; choose a staging folder beside the directory"
        )


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)


def _check_space(entries: Iterable[_Entry], staging: Path) -> None:
    needed = sum(max(0, entry.size - _size(staging / entry.name)) for entry in entries)
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise NoSpace(f"{staging}: {needed:,} bytes are still to come and {free:,} are free; make room")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two processes that append to one file would spoil it. The lock ends with its process in any case."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StagingBusy(f"{folder}: another process is downloading here; wait for its end") from None
        yield
    finally:
        os.close(handle)


# --- the transfer -------------------------------------------------------------------------------------------


def _transfer(repository: _Repository, entry: _Entry, path: Path, timeout: float, progress: OnBytes) -> None:
    """Append to `path` until it has `entry.size` bytes, or the server has no more.

    A connection that broke after bringing bytes is made again at once. Silence is not waited for twice: the
    user had better know, and the next run resumes. Raises what the http library raises.
    """
    import httpx2

    for connection in range(1, CONNECTIONS + 1):
        before = _size(path)
        if before >= entry.size:
            return
        try:
            return _append(repository, entry, path, timeout, progress)
        except (httpx2.RemoteProtocolError, httpx2.ReadError) as error:
            if connection == CONNECTIONS or _size(path) == before:
                raise
            logger.warning("%s: connection broken at byte %d (%s); resuming", entry.name, _size(path), error)


def _append(repository: _Repository, entry: _Entry, path: Path, timeout: float, progress: OnBytes) -> None:
    """One GET, from the end of `path` on; where the server ignores the range, from the beginning."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(
        repository.id,
        entry.name,
        repo_type=repository.type,
        revision=repository.revision,
        endpoint=repository.endpoint,
    )
    done = _size(path)
    headers = build_hf_headers(library_name=LIBRARY)
    headers["Accept-Encoding"] = "identity"  # a range of compressed bytes could not be appended
    if done:
        headers["Range"] = f"bytes={done}-"
    # The library retries 5 times, with pauses of up to 8 s or as the server's Retry-After says: not here.
    once = {"max_retries": 0, "retry_on_exceptions": (), "retry_on_status_codes": ()}
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout, **once) as response:
        if response.status_code == 416:  # the server's file ends before ours: let the check of the size speak
            return
        hf_raise_for_status(response)
        if response.status_code != 206:
            done = 0
        with path.open("ab" if done else "wb") as file:
            progress(entry.name, done, entry.size)
            for chunk in response.iter_bytes():  # as they come: a size given here would hold bytes back
                file.write(chunk)
                done += len(chunk)
                progress(entry.name, done, entry.size)
                if done > entry.size:  # too long, perhaps endless
                    break
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _in_our_words(repository: _Repository) -> Iterator[None]:
    """Errors of huggingface_hub and of its http library, as HubErrors that name the endpoint and the fix."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    endpoint = repository.endpoint
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubUnreachable(
            f"{repository} is needed from {endpoint}, but HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set; "
            f"unset it, or {WAYS_OUT}"
        ) from error
    except HfHubHTTPError as error:
        raise _http_error(repository, error) from error
    except httpx2.TimeoutException as error:
        raise HubUnreachable(f"{endpoint} fell silent while {repository} was fetched; {WAYS_OUT}") from error
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        why = str(error) or type(error).__name__
        raise HubUnreachable(f"{endpoint} cannot be reached for {repository} ({why}); {WAYS_OUT}") from error


def _http_error(repository: _Repository, error: HfHubHTTPError) -> HubError:
    from huggingface_hub import errors

    response = error.response
    status = response.status_code
    if isinstance(error, (errors.GatedRepoError, errors.DisabledRepoError)) or status == 403:
        return AccessDenied(
            f"{repository.endpoint} does not give {repository} to this account (status {status}); accept "
            "its terms on the hub and set HF_TOKEN to a token that may read it"
        )
    # The hub hides private repositories behind 401; the library knows that of https addresses only.
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return RepositoryNotFound(
            f"{repository.endpoint} has no {repository.type} {repository.id!r}; check `id`, and set HF_TOKEN "
            "if the repository is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        page = f"{'datasets/' if repository.type == 'dataset' else ''}{repository.id}/commits/main"
        return RevisionNotFound(
            f"{repository.type} {repository.id} has no commit {repository.revision} at "
            f"{repository.endpoint}; choose one of https://huggingface.co/{page}"
        )
    wait = "wait, or set HF_TOKEN for a higher limit; " if status == 429 else ""
    what = response.request.url.path
    return HubUnreachable(f"{repository.endpoint} answers {what} with status {status}; {wait}{WAYS_OUT}")


# --- verification -------------------------------------------------------------------------------------------


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _hashed(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(path: Path, entry: _Entry) -> str:
    """The digest of a file that is comparable with the listing's: SHA-256 or git blob SHA-1."""
    if entry.sha256 is not None:
        return _hashed(path, hashlib.sha256())
    # SHA-1 withstands accidents, not a determined forger; it is all that git gives for files outside of LFS.
    return _hashed(path, hashlib.sha1(b"blob %d\0" % _size(path), usedforsecurity=False))


def _is_in_place(path: Path, entry: _Entry) -> bool:
    expected = entry.sha256 or entry.git_sha1
    return path.is_file() and _size(path) == entry.size and _digest(path, entry) == expected


def _verify(repository: _Repository, entry: _Entry, path: Path) -> None:
    """Compare size and digest with the listing; on a mismatch delete the file and raise ChecksumMismatch."""
    size = _size(path)
    kind = "SHA-256" if entry.sha256 is not None else "git SHA-1"
    expected, got = f"{entry.size} bytes", f"{size} bytes"
    if size == entry.size:
        expected, got = f"{kind} {entry.sha256 or entry.git_sha1}", f"{kind} {_digest(path, entry)}"
    if expected != got:
        path.unlink()
        raise ChecksumMismatch(
            f"{entry.name} of {repository}: expected {expected}, got {got} from {repository.endpoint}; "
            "the bad copy was deleted, so run again; if this stays, the mirror or a proxy alters files: use "
            "another (HF_ENDPOINT)"
        )


def _record(path: Path, entry: _Entry) -> HubFile:
    """Of a verified file: an LFS file's SHA-256 has just been compared, so gigabytes are not read again."""
    return HubFile(entry.name, entry.size, entry.sha256 or _hashed(path, hashlib.sha256()))


# --- data sets ----------------------------------------------------------------------------------------------


def read_dataset(directory: Path, split: str) -> list[str]:
    """The `text` column of a split in stored order, rows untouched: empty ones and trailing newlines stay.

    Reads `<split>-<i>-of-<n>.parquet` from `directory` or from the one folder below it that has them. The
    `datasets` package copies what it reads; the copy lies in a temporary folder and is deleted.

    Raises NoSuchFile where the split has no files, BadDataset where shards are missing, mixed or unreadable,
    or where `text` is missing or is not text.
    """
    shards = _shards(directory, split)
    for path in shards:
        _check_text_column(path)
    with tempfile.TemporaryDirectory(prefix="nash-swarm-") as cache, _without_bars():
        from datasets import Dataset

        dataset = Dataset.from_parquet([str(path) for path in shards], cache_dir=cache, columns=["text"])
        texts = list(dataset["text"])
    if None in texts:
        raise BadDataset(f"{shards[0].parent}: row {texts.index(None)} of split {split} has no text (null)")
    return texts


def _shards(directory: Path, split: str) -> list[Path]:
    """The files of a split, in order and complete."""
    name = re.compile(rf"{re.escape(split)}-(\d{{5}})-of-(\d{{5}})\.parquet")
    found = sorted(path for path in directory.rglob("*.parquet") if name.fullmatch(path.name))
    if not found:
        held = ", ".join(sorted(str(path.relative_to(directory)) for path in directory.rglob("*.parquet")))
        raise NoSuchFile(f"{directory}: no {split}-*-of-*.parquet; there is: {held or 'no parquet file'}")
    count = int(found[0].stem[-5:])
    if [path.name for path in found] != [f"{split}-{i:05d}-of-{count:05d}.parquet" for i in range(count)]:
        held = ", ".join(str(path.relative_to(directory)) for path in found)
        raise BadDataset(
            f"{directory}: the shards of split {split} are incomplete or of several configurations ({held}); "
            "delete the folder and fetch it again"
        )
    return found


def _check_text_column(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise BadDataset(f"{path}: not a parquet file ({error}); delete it and fetch it again") from error
    if "text" not in schema.names:
        held = ", ".join(schema.names)
        raise BadDataset(f"{path}: no column `text` among {held}; use another configuration")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadDataset(f"{path}: column `text` holds {kind}, expected strings; use another configuration")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep `datasets` from drawing its own progress bars: stages draw ours."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
