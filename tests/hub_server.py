"""A small Hugging Face hub on 127.0.0.1 for tests: lists and serves files as the real one does, or fails to.

As on the hub, `/api/{models,datasets}/ID/revision/COMMIT?blobs=True` lists files with sizes and digests,
`/ID/resolve/COMMIT/FILE` redirects: a git file to a path of the same host, an LFS file to another origin
(here "localhost" in place of "127.0.0.1") that must not see the token. LFS files also claim to lie in xet
storage.

    with HubServer() as hub:
        hub.add(Repository("me/tiny", COMMIT, tiny_model(folder)))
        hub.faults["model.safetensors"] = Fault("stall", after=1000)
        hub_client_call(endpoint=hub.endpoint)
        assert hub.gets("model.safetensors")[-1].range == "bytes=1000-"
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = r"(?P<kind>models|datasets)/(?P<id>.+?)/(?P<commit>[0-9a-f]{40})/(?P<file>.+)"
LONG = 1 << 24  # bytes: more than the buffers of a connection hold
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".h5", ".msgpack")
TINY_TEXTS: dict[str, list[str]] = {
    "train": [
        "",
        " = A heading = \n",
        "",
        " plain text \n",
        "  two  spaces\n\n",
        "déjà vu \u2028 日本\n",
        "",
    ],
    "validation": ["", "one row without a newline"],
    "test": ["", "", "\n", "last\n"],
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a file's bytes.

    wrong: the right size, but one bit flipped; short: an honest answer with one byte less; long: with LONG
    bytes more; whole: the range asked for is ignored;
    stall: `after` bytes, then silence; drop: `after` bytes, then the connection closes; status: an error.
    """

    kind: Literal["wrong", "short", "long", "whole", "stall", "drop", "status"]
    after: int = 0
    status: int = 503
    times: int = 1_000_000  # the first that many requests; later ones are served well


@dataclass(frozen=True)
class Request:
    method: str
    host: str
    path: str
    file: str  # of the repository; "" for the listing
    range: str | None
    token: str | None
    encoding: str | None


@dataclass
class Repository:
    id: str
    commit: str
    files: Mapping[str, bytes]
    type: Literal["model", "dataset"] = "model"
    gated: bool = False
    listing: bytes | None = None  # answer this in place of the listing

    @property
    def prefix(self) -> str:
        return "/datasets" if self.type == "dataset" else ""

    def lfs(self, name: str) -> bool:
        return name.endswith(LFS_SUFFIXES)

    def etag(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest() if self.lfs(name) else git_sha1(self.files[name])

    def siblings(self, blobs: bool) -> list[dict[str, object]]:
        return [self._sibling(name, blobs) for name in self.files]

    def _sibling(self, name: str, blobs: bool) -> dict[str, object]:
        if not blobs:
            return {"rfilename": name}
        size = len(self.files[name])
        if not self.lfs(name):
            return {"rfilename": name, "size": size, "blobId": self.etag(name)}
        version = "version https://git-lfs.github.com/spec/v1"
        pointer = f"{version}\noid sha256:{self.etag(name)}\nsize {size}\n".encode()
        lfs = {"sha256": self.etag(name), "size": size, "pointerSize": len(pointer)}
        return {"rfilename": name, "size": size, "blobId": git_sha1(pointer), "lfs": lfs}


@dataclass
class HubServer:
    """Serves the repositories added to it, from a thread per connection; records every request."""

    faults: dict[str, Fault] = field(default_factory=dict)  # by file name; "" is the listing
    requests: list[Request] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)  # bytes of content by file name
    repositories: list[Repository] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.http = _Http(("127.0.0.1", 0), _Handler)
        self.http.hub = self
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def add(self, repository: Repository) -> Repository:
        self.repositories.append(repository)
        return repository

    def gets(self, file: str) -> list[Request]:
        """The requests that were to bring a file's content: those behind the redirect."""
        gets = [r for r in self.requests if r.method == "GET" and r.file == file]
        return [r for r in gets if "/resolve/" not in r.path]

    def forget(self) -> None:
        self.requests.clear()
        self.sent.clear()

    def fault(self, file: str) -> Fault | None:
        """The fault to commit now, if any is left."""
        with self.lock:
            fault = self.faults.get(file)
            if fault is None or fault.times <= 0:
                return None
            self.faults[file] = Fault(fault.kind, fault.after, fault.status, fault.times - 1)
            return fault


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def log_message(self, *_: object) -> None:
        """Silent: pytest shows what failed."""

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for pattern, answer in (
            (r"/api/(?P<kind>models|datasets)/(?P<id>.+?)/revision/(?P<commit>[^/]+)", self._listing),
            (r"/api/resolve-cache/" + CONTENT, self._content),
            (r"/cdn/" + CONTENT, self._content),
            (r"/(?P<kind>datasets(?=/))?/?(?P<id>.+?)/resolve/(?P<commit>[^/]+)/(?P<file>.+)", self._resolve),
        ):
            if match := re.fullmatch(pattern, path):
                words = match.groupdict()
                self._record(words.get("file", ""))
                repository = self._find(words["kind"], words["id"], words["commit"])
                if repository is not None:
                    answer(repository, words.get("file", ""))
                return
        self._record("")
        self._error(404, "", f"no such route: {path}")

    def _record(self, file: str) -> None:
        h = self.headers
        self.server.hub.requests.append(
            Request(
                self.command,
                h.get("Host", "").split(":")[0],
                self.path,
                file,
                h.get("Range"),
                h.get("Authorization"),
                h.get("Accept-Encoding"),
            )
        )

    def _find(self, kind: str | None, name: str, commit: str) -> Repository | None:
        wanted = "dataset" if kind == "datasets" else "model"
        found = [r for r in self.server.hub.repositories if r.id == name and r.type == wanted]
        at = [r for r in found if r.commit == commit]
        if not found:
            self._error(404, "RepoNotFound", "Repository not found")
        elif found[0].gated and not self.headers.get("Authorization") and "/cdn/" not in self.path:
            self._error(401, "GatedRepo", "Access to this repository is restricted.")
        elif not at:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {commit}")
        else:
            return at[0]
        return None

    def _listing(self, repository: Repository, _: str) -> None:
        fault = self.server.hub.fault("")
        if fault and fault.kind == "status":
            return self._error(fault.status, "", "Service Unavailable")
        if fault and fault.kind == "stall":
            self.server.hub.closing.wait(30)
            return None
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        answer = {"id": repository.id, "sha": repository.commit, "siblings": repository.siblings(blobs)}
        body = json.dumps(answer).encode() if repository.listing is None else repository.listing
        self._headers(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _resolve(self, repository: Repository, name: str) -> None:
        if name not in repository.files:
            return self._error(404, "EntryNotFound", "Entry not found")
        etag, size = f'"{repository.etag(name)}"', str(len(repository.files[name]))
        where = quote(f"{repository.type}s/{repository.id}/{repository.commit}/{name}")
        headers = {
            "X-Repo-Commit": repository.commit,
            "X-Linked-Etag": etag,
            "X-Linked-Size": size,
            "Content-Length": "0",
        }
        if not repository.lfs(name):
            return self._headers(307, {**headers, "Location": f"/api/resolve-cache/{where}"})
        xet = {"X-Xet-Hash": "ab" * 32, "X-Xet-Refresh-Route": "https://xet.invalid/refresh"}
        cdn = f"http://localhost:{self.server.server_port}/cdn/{where}"
        return self._headers(302, {**headers, **xet, "Location": cdn})

    def _content(self, repository: Repository, name: str) -> None:
        hub = self.server.hub
        fault = hub.fault(name) if self.command == "GET" else None
        if fault and fault.kind == "status":
            return self._error(fault.status, "", "Service Unavailable")
        content = _spoil(repository.files[name], fault)
        start = 0 if fault and fault.kind == "whole" else self._range_start()
        headers = {"ETag": f'"{repository.etag(name)}"', "X-Repo-Commit": repository.commit}
        if start >= len(content) > 0:
            headers["Content-Range"] = f"bytes */{len(content)}"
            return self._headers(416, {**headers, "Content-Length": "0"})
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._headers(206 if start else 200, {**headers, "Content-Length": str(len(content) - start)})
        if self.command == "HEAD":
            return None
        body = content[start:]
        if fault and fault.kind in ("stall", "drop"):
            body = body[: fault.after]
            self.close_connection = True
        hub.sent[name] = hub.sent.get(name, 0) + len(body)
        with contextlib.suppress(ConnectionError):  # the client may have seen enough
            self.wfile.write(body)
        if fault and fault.kind == "stall":
            hub.closing.wait(30)
        return None

    def _range_start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else 0

    def _headers(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _error(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        known = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._headers(status, {**known, "Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)


def _spoil(content: bytes, fault: Fault | None) -> bytes:
    if fault and fault.kind == "wrong":
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if fault and fault.kind == "short":
        return content[:-1]
    return content + bytes(LONG) if fault and fault.kind == "long" else content


def git_sha1(content: bytes) -> str:
    """The id that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# --- what to serve ------------------------------------------------------------------------------------------


def tiny_model(folder: Path, seed: int = 0) -> dict[str, bytes]:
    """GPT-2 of 2 layers and width 16, random weights, and a byte-level tokenizer; left in `folder`."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    corpus = ["the hub serves the files", "files of the hub"] * 8
    bpe.train_from_iterator(corpus, vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=64, **ids)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def tiny_dataset(
    texts: Mapping[str, Sequence[str]] = TINY_TEXTS, config: str = "wikitext-2-raw-v1"
) -> dict[str, bytes]:
    """A data set laid out as Salesforce/wikitext is: one parquet file per split, with a `text` column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = {"README.md": b"tiny\n"}
    for split, rows in texts.items():
        buffer = io.BytesIO()
        pq.write_table(pa.table({"text": pa.array(list(rows), pa.string())}), buffer)
        files[f"{config}/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    return files
