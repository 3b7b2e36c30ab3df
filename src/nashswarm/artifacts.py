"""The only module that knows where the pipeline's files lie and what is in them.

Every file is written under a temporary name, synced, and renamed: a reader sees the old file or the new one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nashswarm.types import (
    Allocation,
    Choice,
    InputError,
    ModelIndex,
    NashSwarmError,
    Statistics,
    TensorSpec,
    TokenizedSplit,
    VectorSpec,
)

T = TypeVar("T")

# What a model directory has beside its weights, and a packed one needs to stand alone; absent ones are skipped.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
REMOTE_CODE = "auto_map"  # in a config: which Python files of the directory transformers should run


@dataclass(frozen=True, slots=True)
class Layout:
    """Every path of the pipeline, below one root."""

    root: Path = Path()

    @property
    def params(self) -> Path:
        """params.yaml."""
        return self.root / "params.yaml"

    @property
    def reference(self) -> Path:
        """The embedded model and its texts."""
        return self.root / "data/reference"

    @property
    def staging(self) -> Path:
        """Downloads under way; outside of DVC's outputs, which DVC deletes before a stage runs."""
        return self.root / "data/staging"

    @property
    def imports(self) -> Path:
        """What the imports stage writes: for each stage its code, file by file with its SHA-256."""
        return self.root / "data/imports"

    @property
    def methods(self) -> Path:
        """What the methods stage writes: one recipe per method."""
        return self.root / "data/methods"

    def download(self, model: str) -> Path:
        """Source record, index, tokens, and a hub model's files."""
        return self.root / "data/downloads" / model

    def scores(self, model: str) -> Path:
        """Statistics of the original model."""
        return self.root / "data/scores" / model

    def baseline(self, model: str) -> Path:
        """What the original model says on the test texts."""
        return self.root / "data/baselines" / model

    def allocation(self, model: str, method: str) -> Path:
        """Directory of one allocation."""
        return self.root / "data/allocations" / model / method

    def packed(self, model: str, method: str) -> Path:
        """Directory of one packed model."""
        return self.root / "data/packed" / model / method

    def peer(self, model: str, peer: str) -> Path:
        """What another tool made of a model: weights, and the bytes that it stores for them."""
        return self.root / "data/peers" / model / peer

    def windows(self, model: str, method: str) -> Path:
        """Losses per window of one packed model."""
        return self.root / "data/evaluations" / model / method

    def metrics(self, model: str, method: str) -> Path:
        """The tracked figures of one packed model."""
        return self.root / "metrics" / model / f"{method}.json"

    def times(self, run: str) -> Path:
        """Seconds, host and versions of one stage's last run; neither git nor DVC watches them."""
        return self.root / "data/times" / f"{run}.json"

    @property
    def report(self) -> Path:
        """Directory of the report."""
        return self.root / "report"


def asking_for_code(directory: Path) -> Path | None:
    """The config in a model directory that asks transformers to run code from there, if one does."""
    for path in (directory / "config.json", directory / "tokenizer_config.json"):
        with suppress(OSError, ValueError, RecursionError):  # what is no JSON is said by those who need it
            document = json.loads(path.read_bytes())
            if isinstance(document, dict) and REMOTE_CODE in document:
                return path
    return None


# --- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the disk refuses within (no space, no right, too large) as a NashSwarmError that names `path`."""
    try:
        yield
    except OSError as error:
        raise NashSwarmError(
            f"{path}: cannot be written ({error.strerror or error}); what was there is kept"
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically. Raises NashSwarmError that names the file where the disk refuses."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise


def write_json(path: Path, document: object) -> None:
    """Sorted keys, so that equal content is equal bytes."""
    write_bytes(path, (json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a file that a stage wrote."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run `dvc repro` to make it again") from error


def read_tracked(path: Path) -> Any:
    """As `read_json`, of a file that need not be there; None where it is not."""
    return read_json(path) if path.is_file() else None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Named arrays as safetensors."""
    write_bytes(path, save({k: np.asarray(v, order="C") for k, v in arrays.items()}))


def _load(path: Path, without: str = "", mapped: bool = False) -> dict[str, np.ndarray]:
    """Arguments: `mapped`, whether arrays are the file's own pages, which are read when they are used."""
    try:
        with safe_open(path, framework="pt" if mapped else "numpy") as file:
            found = {key: file.get_tensor(key) for key in sorted(set(file.keys()) - {without})}
            return {key: value.numpy() for key, value in found.items()} if mapped else found
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run `dvc repro` to make it again") from error


class Busy(NashSwarmError):
    """Another process is writing the same directory."""


@contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """A new directory that takes the place of `path` only if the block succeeds; until then, what was there is kept.

    Raises Busy while another process is at it, NashSwarmError where the disk refuses.
    """
    temporary, former = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    with naming(path):
        handle = _claim(path, temporary)
        try:
            (temporary / WRITER).write_text(str(os.getpid()))
            _restore(path, former)
            yield temporary
            (temporary / WRITER).unlink(missing_ok=True)
            if path.exists():
                path.rename(former)
            temporary.rename(path)
            shutil.rmtree(former, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(handle)


WRITER = ".writer"  # in a directory under way: the process that is writing it


def _claim(path: Path, temporary: Path) -> int:
    """An empty temporary directory that is this process' alone, by a lock that ends with it in any case."""
    while True:
        temporary.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            with suppress(OSError):
                raise Busy(
                    f"{path}: process {(temporary / WRITER).read_text()} is writing here; wait for its end"
                ) from None
            raise Busy(f"{path}: another process is writing here; wait for its end") from None
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == temporary.stat().st_ino:  # not just renamed by the one before
                break
        os.close(handle)
    for left in temporary.iterdir():  # by a process that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return handle


def _restore(path: Path, former: Path) -> None:
    """Undo what a process left that was killed between its last two renames."""
    if former.exists() and not path.exists():
        former.rename(path)
    shutil.rmtree(former, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a directory that must not be used."""
    shutil.rmtree(path)


def link_files(source: Path, target: Path) -> None:
    """The files of `source` in `target` too: hard links where the file system has them, copies elsewhere."""
    for path in sorted(p for p in source.iterdir() if p.is_file()):
        link_file(path, target / path.name)


def link_file(source: Path, target: Path) -> None:
    """As `link_files`, one of them."""
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def reserved(path: Path, size: int) -> Path:
    """A file of `size` bytes, whose space is taken now: what is mapped later cannot meet a full disk."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(size)
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
    return path


@dataclass(frozen=True, slots=True)
class Journal:
    """Finished steps of a run, one file each, in a directory of the run's fingerprint."""

    directory: Path

    @classmethod
    def of(cls, parent: Path, purpose: str, *facts: object) -> Journal:
        """The journal of a run of which `facts` are all that decides what it computes. Others' journals are removed."""
        text = json.dumps(facts, sort_keys=True, default=dataclasses.asdict)
        directory = parent / f"{purpose}@{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        for other in parent.glob(f"{purpose}@*"):
            if other != directory:
                shutil.rmtree(other, ignore_errors=True)
        return cls(directory)

    def read(self, step: str) -> dict[str, np.ndarray] | None:
        """What was kept of a step, if it was finished."""
        path = self._file(step)
        return _load(path) if path.is_file() else None

    def keep(self, step: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Note a step as finished."""
        write_arrays(self._file(step), arrays)

    def link(self, step: str, target: Path) -> bool:
        """Put what was kept of a step where it is wanted, too, without taking space twice. Returns: if it was kept."""
        path = self._file(step)
        if found := path.is_file():
            link_file(path, target)
        return found

    def _file(self, step: str) -> Path:
        return self.directory / f"{step}.safetensors"

    def scratch(self, name: str, size: int) -> Path:
        """A file of `size` bytes, as the last run left it."""
        return reserved(self.directory / name, size)

    def close(self) -> None:
        """The run is over: nothing of it is needed."""
        shutil.rmtree(self.directory, ignore_errors=True)


def copy_files(source: Path, target: Path) -> None:
    """The files of `source` in `target` too."""
    for path in sorted(p for p in source.iterdir() if p.is_file()):
        shutil.copyfile(path, target / path.name)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_code(layout: Layout, stage: str) -> None:
    """Raise InputError where code of a stage changed since data/imports/<stage>.json was written, if it was.

    DVC compares that file, not the code that it lists: a stage run now would leave results under the old code's hash.
    """
    path = layout.imports / f"{stage}.json"
    for name, expected in (read_tracked(path) or {}).items():
        file = layout.root / name
        if not file.is_file() or sha256_file(file) != expected:
            raise InputError(f"{name}: changed since {path} was written; run `dvc repro imports`, then this again")


# --- the record of a download --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """Which files a model is, wherever they lie."""

    source: str  # embedded, hub or path
    directory: str  # as it was given; relative to the project's root or absolute
    id: str | None
    revision: str | None
    files: Mapping[str, str]  # name -> SHA-256

    def open(self, root: Path) -> Path:
        """The directory, after every file's SHA-256 was compared. Raises InputError for one that changed."""
        directory = root / self.directory
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file() or sha256_file(path) != expected:
                state = "is gone" if not path.is_file() else "changed"
                raise InputError(
                    f"{path} {state} since it was downloaded; run `dvc repro --force -s` on that model's download stage"
                )
        return directory


def write_source(directory: Path, record: SourceRecord, index: ModelIndex) -> None:
    """source.json and index.json of a download."""
    write_json(directory / "source.json", dataclasses.asdict(record))
    write_json(directory / "index.json", dataclasses.asdict(index))


def read_source(directory: Path) -> SourceRecord:
    """Inverse of `write_source`, the record."""
    return SourceRecord(**read_json(directory / "source.json"))


def read_index(directory: Path) -> ModelIndex:
    """Inverse of `write_source`, the index."""
    raw = read_json(directory / "index.json")
    raw["tensors"] = tuple(
        TensorSpec(**{**t, "shape": tuple(t["shape"]), "tied": tuple(t["tied"])}) for t in raw["tensors"]
    )
    raw["vectors"] = tuple(VectorSpec(v["name"], tuple(v["shape"])) for v in raw["vectors"])
    return ModelIndex(**raw)


# --- tokens --------------------------------------------------------------------------------------------------------


def write_tokens(directory: Path, corpus: str, splits: Mapping[str, TokenizedSplit]) -> None:
    """tokens/<corpus>.safetensors, and tokens/<corpus>.json with counts and hashes for people."""
    arrays = {f"{split}.{f.name}": getattr(t, f.name) for split, t in splits.items() for f in dataclasses.fields(t)}
    write_arrays(directory / "tokens" / f"{corpus}.safetensors", arrays)
    facts = {
        split: {"sha256": digest(t.ids), "tokens": t.ids.size, "texts": t.text_ends.size} for split, t in splits.items()
    }
    write_json(directory / "tokens" / f"{corpus}.json", facts)


def digest(ids: np.ndarray) -> str:
    """SHA-256 of token ids as little-endian int32, hexadecimal."""
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()


def read_tokens(directory: Path, corpus: str, split: str) -> TokenizedSplit:
    """One split. Raises InputError where the corpus has no such split."""
    arrays = _load(directory / "tokens" / f"{corpus}.safetensors")
    if f"{split}.ids" not in arrays:
        raise InputError(
            f"corpora.{corpus}.{split}: this corpus has no {split} split; name a file for it in params.yaml"
        )
    return TokenizedSplit(**{f.name: arrays[f"{split}.{f.name}"] for f in dataclasses.fields(TokenizedSplit)})


# --- statistics ----------------------------------------------------------------------------------------------------


def write_statistics(directory: Path, tensor: str, statistics: Statistics, journal: Journal | None = None) -> None:
    """One file per tensor. Arguments: `journal`, which may have it already, under the tensor's name."""
    path = directory / f"{tensor}.safetensors"
    if not (journal and journal.link(tensor, path)):
        write_arrays(path, statistics.arrays())


def read_statistics(directory: Path, tensor: str, second_moment: np.ndarray | None = None) -> Statistics:
    """One tensor's statistics, mapped: moments are large, and read by all threads that use them.

    Arguments: `second_moment`, one that takes the place of that which is stored.
    """
    path = directory / f"{tensor}.safetensors"
    if second_moment is None:
        return Statistics(**_load(path, mapped=True))
    return Statistics(**_load(path, without="second_moment", mapped=True), second_moment=second_moment)


# --- records of arrays ---------------------------------------------------------------------------------------------


def write_record(path: Path, record: Any) -> None:
    """A dataclass whose fields are arrays and floats."""
    write_arrays(path, {f.name: np.asarray(getattr(record, f.name)) for f in dataclasses.fields(record)})


def read_record(path: Path, cls: type[T]) -> T:
    """Inverse of `write_record`."""
    return cls(**_load(path))


# --- peers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """What came of another tool: the bytes stored by part, or the reason for which it was not run."""

    tool: str
    settings: Mapping[str, Any]
    version: str | None = None
    notes: tuple[str, ...] = ()
    reason: str | None = None
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)


def write_peer(directory: Path, record: PeerRecord, weights: Mapping[str, np.ndarray]) -> None:
    """peer.json and weights.safetensors: float32, matrices in canonical orientation, the dequantized parameters."""
    write_arrays(directory / "weights.safetensors", weights)
    write_json(directory / "peer.json", dataclasses.asdict(record))


def read_peer(directory: Path) -> PeerRecord:
    """Inverse of `write_peer`, the record."""
    raw = read_json(directory / "peer.json")
    return PeerRecord(**{**raw, "notes": tuple(raw["notes"])})


def read_peer_weights(directory: Path) -> dict[str, np.ndarray]:
    """Inverse of `write_peer`, the weights; empty for a peer that was not run."""
    return _load(directory / "weights.safetensors")


def write_request(directory: Path, request: Mapping[str, Any], index: ModelIndex, ids: np.ndarray) -> None:
    """request.json, index.json and ids.safetensors: a task for another process."""
    write_json(directory / "request.json", request)
    write_json(directory / "index.json", dataclasses.asdict(index))
    write_arrays(directory / "ids.safetensors", {"ids": ids})


def read_request(directory: Path) -> tuple[dict[str, Any], ModelIndex, np.ndarray]:
    """Inverse of `write_request`."""
    return read_json(directory / "request.json"), read_index(directory), _load(directory / "ids.safetensors")["ids"]


# --- allocations ---------------------------------------------------------------------------------------------------


CERTIFICATE = ("price", "largest_deviation_gain", "duality_gap", "predicted_rise", "asked_bytes", "bought_bytes")


def allocation_document(allocation: Allocation) -> dict[str, Any]:
    """The allocation as JSON."""
    certificate = {k: getattr(allocation, k) for k in CERTIFICATE}
    return {
        "choices": {name: dataclasses.asdict(choice) for name, choice in allocation.choices.items()},
        "histogram": {str(bits): count for bits, count in sorted(allocation.histogram.items())},
        **certificate,
    }


def write_allocation(directory: Path, allocation: Allocation) -> None:
    """allocation.json."""
    write_json(directory / "allocation.json", allocation_document(allocation))


def read_allocation(directory: Path) -> Allocation:
    """Inverse of `write_allocation`."""
    raw = read_json(directory / "allocation.json")
    choices = {name: _choice(choice) for name, choice in raw.pop("choices").items()}
    histogram = {int(bits): count for bits, count in raw.pop("histogram").items()}
    return Allocation(choices, histogram, **raw)


def _choice(raw: Mapping[str, Any]) -> Choice:
    return Choice(
        bits=raw["bits"],
        classes=tuple(raw["classes"]),
        thresholds=tuple(raw["thresholds"]),
        step=raw["step"],
        size=raw["size"],
        slope=raw["slope"],
        tiles=tuple(raw["tiles"]),
    )
