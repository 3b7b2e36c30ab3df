"""The hub's client against a hub on this machine: right bytes, wrong bytes, silence, and what is resumed."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import (
    COMMIT,
    LONG,
    TINY_TEXTS,
    Fault,
    HubServer,
    Repository,
    git_sha1,
    tiny_dataset,
    tiny_model,
)

from nashswarm import hub
from nashswarm.types import NashSwarmError

MODEL, DATASET = "me/tiny", "me/texts"
PATTERNS = ("*.json", "*.safetensors")
WEIGHTS = "model.safetensors"
SOON = 3.0  # seconds within which a dead end must be reported


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def dataset_files() -> dict[str, bytes]:
    return tiny_dataset()


@pytest.fixture(autouse=True)
def _clean_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy, no token of the developer's, and no connection left over from the test before."""
    from huggingface_hub import close_session

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    close_session()
    yield
    close_session()


@pytest.fixture
def server(model_files: dict[str, bytes], dataset_files: dict[str, bytes]) -> Iterator[HubServer]:
    with HubServer() as started:
        started.add(Repository(MODEL, COMMIT, model_files))
        started.add(Repository(DATASET, COMMIT, dataset_files, type="dataset"))
        yield started


def fetch(
    server: HubServer | str,
    root: Path,
    repo_id: str = MODEL,
    **changes: Any,
) -> tuple[hub.HubFile, ...]:
    """hub.fetch into root/out by way of root/staging."""
    endpoint = server if isinstance(server, str) else server.endpoint
    revision = changes.pop("revision", COMMIT)
    arguments: dict[str, Any] = {"patterns": PATTERNS, "timeout": 2.0, "endpoint": endpoint, **changes}
    return hub.fetch(repo_id, revision, directory=root / "out", staging=root / "staging", **arguments)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def staged(root: Path) -> dict[str, bytes]:
    """Staged files, by their name in the repository."""
    return {name.split("/", 2)[2]: content for name, content in tree(root / "staging").items()}


# --- what goes well -----------------------------------------------------------------------------------------


def test_fetch_brings_the_listed_bytes_and_nothing_else(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    files = fetch(server, tmp_path)
    wanted = {name: c for name, c in model_files.items() if name.endswith((".json", ".safetensors"))}
    assert tree(tmp_path / "out") == wanted  # so no .cache folder with timestamps either
    assert WEIGHTS in wanted
    assert "tokenizer.json" in wanted
    expected = [(name, len(c), hashlib.sha256(c).hexdigest()) for name, c in sorted(wanted.items())]
    assert [(f.name, f.size, f.sha256) for f in files] == expected
    assert tree(tmp_path / "staging") == {}


def test_fetched_model_loads_in_transformers(server: HubServer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fetch(server, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert tokenizer.decode(tokenizer("the hub")["input_ids"]) == "the hub"


def test_weights_are_fetched_once(server: HubServer, tmp_path: Path, model_files: dict[str, bytes]) -> None:
    first = fetch(server, tmp_path)
    assert len(server.gets(WEIGHTS)) == 1
    assert server.sent[WEIGHTS] == len(model_files[WEIGHTS])
    server.forget()
    assert fetch(server, tmp_path) == first  # files in place are verified and kept
    assert [r.path.split("?")[0] for r in server.requests] == [f"/api/models/{MODEL}/revision/{COMMIT}"]


def test_a_changed_file_in_place_is_fetched_anew(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    fetch(server, tmp_path)
    for name in (WEIGHTS, "config.json"):  # an LFS and a git file, both of unchanged size
        (tmp_path / "out" / name).write_bytes(bytes(len(model_files[name])))
    server.forget()
    fetch(server, tmp_path)
    assert sorted(server.sent) == ["config.json", WEIGHTS]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == model_files[WEIGHTS]
    assert (tmp_path / "out/config.json").read_bytes() == model_files["config.json"]


def test_nothing_is_left_in_the_users_cache(server: HubServer, tmp_path: Path) -> None:
    """Weights lie once on disk, and reading a data set leaves no copy: in a process with its own home."""
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys; from pathlib import Path; from nashswarm import hub\n"
        "root, commit, staging = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[1], 's')\n"
        f"hub.fetch({MODEL!r}, commit, patterns=['*.safetensors'], directory=root/'m', staging=staging)\n"
        f"hub.fetch({DATASET!r}, commit, repo_type='dataset', patterns=['*/*.parquet'],\n"
        "          directory=root/'d', staging=staging)\n"
        "assert not {'hf_xet', 'torch', 'datasets'} & set(sys.modules)\n"
        "print(len(hub.read_dataset(root/'d', 'train')))"
    )
    variables = {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": server.endpoint}
    done = python(code, str(tmp_path), COMMIT, **variables)
    assert (done.stdout, done.stderr) == (f"{len(TINY_TEXTS['train'])}\n", "")
    assert [p for p in home.rglob("*") if p.is_file()] == []


def test_progress_counts_every_file_to_its_end(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    seen: list[tuple[str, int, int]] = []
    files = fetch(server, tmp_path, progress=lambda *step: seen.append(step))
    for file in files:
        steps = [done for name, done, size in seen if name == file.name and size == file.size]
        assert steps[0] == 0
        assert steps == sorted(steps)
        assert steps[-1] == len(model_files[file.name])


def test_patterns_stay_within_their_folder(server: HubServer, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "onnx/config.json": b"{ }", "onnx/deep/a.json": b"[]", "empty.json": b""}
    server.add(Repository("me/nested", COMMIT, files))
    assert [f.name for f in fetch(server, tmp_path / "a", "me/nested")] == ["config.json", "empty.json"]
    (inner,) = fetch(server, tmp_path / "b", "me/nested", patterns=["onnx/*"])
    assert inner.name == "onnx/config.json"
    (empty,) = fetch(server, tmp_path / "c", "me/nested", patterns=["empty.json"])
    assert (empty.size, empty.sha256) == (0, hashlib.sha256().hexdigest())


def test_token_goes_to_the_hub_and_not_to_its_storage(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_files: dict[str, bytes]
) -> None:
    server.add(Repository("me/gated", COMMIT, model_files, gated=True))
    with pytest.raises(hub.AccessDenied, match=r"model me/gated at 01234567 .*HF_TOKEN"):
        fetch(server, tmp_path, "me/gated")
    server.forget()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(server, tmp_path, "me/gated")
    assert {r.token for r in server.requests if r.host == "127.0.0.1"} == {"Bearer hf_secret"}
    assert [(r.host, r.token) for r in server.gets(WEIGHTS)] == [("localhost", None)]
    assert {r.encoding for r in server.gets(WEIGHTS)} == {"identity"}  # else a range could not be appended


def test_the_local_hub_satisfies_the_librarys_own_client(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_files: dict[str, bytes]
) -> None:
    """The server of these tests speaks the protocol as huggingface_hub does, not merely as hub.py does."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    for name, etag in (
        (WEIGHTS, hashlib.sha256(model_files[WEIGHTS]).hexdigest()),
        ("config.json", git_sha1(model_files["config.json"])),
    ):
        metadata = get_hf_file_metadata(hf_hub_url(MODEL, name, revision=COMMIT, endpoint=server.endpoint))
        assert (metadata.etag, metadata.size, metadata.commit_hash) == (etag, len(model_files[name]), COMMIT)
        path = hf_hub_download(MODEL, name, revision=COMMIT, endpoint=server.endpoint, local_dir=tmp_path)
        assert Path(path).read_bytes() == model_files[name]


# --- wrong bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_wrong_bytes_of_the_right_size_are_refused(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes], name: str
) -> None:
    kind = "SHA-256" if name == WEIGHTS else "git SHA-1"
    right = hashlib.sha256(model_files[name]).hexdigest() if name == WEIGHTS else git_sha1(model_files[name])
    server.faults[name] = Fault("wrong", times=1)
    with pytest.raises(hub.ChecksumMismatch) as caught:
        fetch(server, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{name} of model me/tiny at 01234567: expected {kind} {right}, got {kind} ")
    assert server.endpoint in message
    assert "run again" in message
    assert name not in staged(tmp_path)
    assert not (tmp_path / "out").exists()
    fetch(server, tmp_path)  # the fault is over
    assert (tmp_path / "out" / name).read_bytes() == model_files[name]


def test_a_truncated_file_is_refused(
    server: HubServer,
    tmp_path: Path,
    model_files: dict[str, bytes],
) -> None:
    size = len(model_files[WEIGHTS])
    server.faults[WEIGHTS] = Fault("short")
    with pytest.raises(hub.ChecksumMismatch, match=f"expected {size} bytes, got {size - 1} bytes"):
        fetch(server, tmp_path)
    assert WEIGHTS not in staged(tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_overlong_file_is_cut_off_and_refused(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    size = len(model_files[WEIGHTS])
    server.faults[WEIGHTS] = Fault("long")
    received: list[int] = []
    with pytest.raises(hub.ChecksumMismatch, match=rf"expected {size} bytes, got \d+ bytes"):
        fetch(server, tmp_path, progress=lambda name, done, total: received.append(done))
    assert size < max(received) < size + LONG // 2  # not all that an endless answer would bring
    assert WEIGHTS not in staged(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_spoilt_partial_file_is_deleted_not_kept(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    server.faults[WEIGHTS] = Fault("stall", after=5000, times=1)
    with pytest.raises(hub.HubUnreachable):
        fetch(server, tmp_path, timeout=0.3)
    (partial,) = (tmp_path / "staging").rglob(WEIGHTS)
    partial.write_bytes(bytes(5000))  # as after a loss of power
    with pytest.raises(hub.ChecksumMismatch):
        fetch(server, tmp_path)
    fetch(server, tmp_path)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == model_files[WEIGHTS]


def test_a_server_whose_file_ends_before_the_partial_one(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    size = len(model_files[WEIGHTS])
    server.faults[WEIGHTS] = Fault("stall", after=size - 1, times=1)
    with pytest.raises(hub.HubUnreachable):
        fetch(server, tmp_path, timeout=0.3)
    server.faults[WEIGHTS] = Fault("short")  # answers 416
    with pytest.raises(hub.ChecksumMismatch, match=f"expected {size} bytes, got {size - 1} bytes"):
        fetch(server, tmp_path)


# --- interruptions ------------------------------------------------------------------------------------------


def test_a_stalled_transfer_ends_in_time_and_is_resumed(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    size = len(model_files[WEIGHTS])
    server.faults[WEIGHTS] = Fault("stall", after=10_000, times=1)
    started = time.monotonic()
    with pytest.raises(hub.HubUnreachable, match=r"fell silent .* the next run goes on from there"):
        fetch(server, tmp_path, timeout=0.5)
    assert 0.4 < time.monotonic() - started < SOON
    assert staged(tmp_path)[WEIGHTS] == model_files[WEIGHTS][:10_000]
    assert not (tmp_path / "out").exists()

    others = set(staged(tmp_path)) - {WEIGHTS}
    assert others  # complete files wait beside the partial one
    server.forget()
    steps: list[tuple[str, int, int]] = []
    fetch(server, tmp_path, progress=lambda *step: steps.append(step))
    assert [r.range for r in server.gets(WEIGHTS)] == ["bytes=10000-"]
    assert server.sent[WEIGHTS] == size - 10_000
    assert not others & set(server.sent)  # not fetched again either
    assert steps[0] == (steps[0][0], 10_000 if steps[0][0] == WEIGHTS else 0, steps[0][2])
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == model_files[WEIGHTS]


def test_a_server_that_ignores_the_range_starts_anew(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    server.faults[WEIGHTS] = Fault("stall", after=7_000, times=1)
    with pytest.raises(hub.HubUnreachable):
        fetch(server, tmp_path, timeout=0.3)
    server.faults[WEIGHTS] = Fault("whole")
    fetch(server, tmp_path)
    assert server.gets(WEIGHTS)[-1].range == "bytes=7000-"
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == model_files[WEIGHTS]


def test_a_dropped_connection_is_resumed_within_the_call(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    server.faults[WEIGHTS] = Fault("drop", after=7_000, times=2)
    fetch(server, tmp_path)
    assert [r.range for r in server.gets(WEIGHTS)] == [None, "bytes=7000-", "bytes=14000-"]
    assert server.sent[WEIGHTS] == len(model_files[WEIGHTS])
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == model_files[WEIGHTS]


@pytest.mark.parametrize(("after", "connections"), [(100, hub.CONNECTIONS), (0, 1)])
def test_a_connection_that_always_drops_is_given_up(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes], after: int, connections: int
) -> None:
    server.faults[WEIGHTS] = Fault("drop", after=after)
    with pytest.raises(hub.HubUnreachable, match="cannot be reached"):
        fetch(server, tmp_path)
    assert len(server.gets(WEIGHTS)) == connections
    assert staged(tmp_path)[WEIGHTS] == model_files[WEIGHTS][: after * connections]


def test_a_killed_process_leaves_what_the_next_resumes(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    server.faults[WEIGHTS] = Fault("stall", after=20_000, times=1)
    code = (
        "import sys; from pathlib import Path; from nashswarm import hub; root = Path(sys.argv[1])\n"
        f"hub.fetch({MODEL!r}, sys.argv[2], patterns=['*.safetensors'], directory=root/'out',"
        " staging=root/'staging', timeout=60, progress=lambda name, done, size: print(done, flush=True))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), COMMIT],
        env=environment(HF_ENDPOINT=server.endpoint),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    while child.stdout.readline() not in ("20000\n", ""):
        pass
    child.kill()
    child.communicate()
    kept = len(staged(tmp_path)[WEIGHTS])  # what Python had not yet handed to the kernel is lost
    assert kept > 0
    server.forget()
    fetch(server, tmp_path)
    assert [r.range for r in server.gets(WEIGHTS)] == [f"bytes={kept}-"]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == model_files[WEIGHTS]


def test_two_downloads_do_not_share_a_staging_folder(server: HubServer, tmp_path: Path) -> None:
    server.faults[WEIGHTS] = Fault("stall", after=100, times=1)
    errors: list[BaseException] = []

    def first() -> None:
        try:
            fetch(server, tmp_path, timeout=1.0)
        except hub.HubUnreachable as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    while not server.gets(WEIGHTS):
        time.sleep(0.01)
    with pytest.raises(hub.StagingBusy, match="another process"):
        fetch(server, tmp_path)
    thread.join()
    assert len(errors) == 1
    fetch(server, tmp_path)  # the lock went with the first


# --- no answer ----------------------------------------------------------------------------------------------


def test_a_closed_port_is_reported_at_once(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(hub.HubUnreachable) as caught:
        fetch(endpoint, tmp_path, timeout=10.0)
    assert time.monotonic() - started < SOON
    for hint in (endpoint, "HF_ENDPOINT", "source: path", "source: embedded", "refused"):
        assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_host_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(hub.HubUnreachable, match=r"https://hub\.invalid cannot .*service not known"):
        fetch("https://hub.invalid", tmp_path)


@pytest.mark.parametrize("endpoint", ["hub.example", "ftp://hub.example", "http://", "http://hub:port"])
def test_an_endpoint_that_is_no_address(tmp_path: Path, endpoint: str) -> None:
    with pytest.raises(hub.HubUnreachable, match="HF_ENDPOINT"):
        fetch(endpoint, tmp_path)


def test_a_hub_that_accepts_and_stays_silent(server: HubServer, tmp_path: Path) -> None:
    server.faults[""] = Fault("stall")
    started = time.monotonic()
    with pytest.raises(hub.HubUnreachable, match="fell silent"):
        fetch(server, tmp_path, timeout=0.5)
    assert time.monotonic() - started < SOON


@pytest.mark.parametrize("file", ["", WEIGHTS])
@pytest.mark.parametrize(("status", "hint"), [(400, "status 400"), (503, "status 503"), (429, "HF_TOKEN")])
def test_errors_of_the_server_are_not_retried(
    server: HubServer, tmp_path: Path, file: str, status: int, hint: str
) -> None:
    server.faults[file] = Fault("status", status=status)
    started = time.monotonic()
    with pytest.raises(hub.HubUnreachable, match=hint):
        fetch(server, tmp_path)
    assert time.monotonic() - started < SOON
    assert len(server.gets(file)) == 1


@pytest.mark.parametrize("listing", [b"<html>Log in</html>", b"[1]", b"{}", b'{"id": "x", "siblings": [3]}'])
def test_an_answer_that_is_no_listing(server: HubServer, tmp_path: Path, listing: bytes) -> None:
    server.add(Repository("me/portal", COMMIT, {}, listing=listing))
    with pytest.raises(hub.HubError, match=r"does not answer like a hub|answered with commit None"):
        fetch(server, tmp_path, "me/portal")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_mode_is_honoured(server: HubServer, tmp_path: Path, variable: str) -> None:
    code = (
        "import sys; from pathlib import Path; from nashswarm import hub\n"
        "root = Path(sys.argv[1])\n"
        f"try: hub.fetch('me/tiny', {COMMIT!r}, patterns=['*'], directory=root, staging=root)\n"
        "except hub.HubUnreachable as error: print(error)"
    )
    done = python(code, str(tmp_path), HF_ENDPOINT=server.endpoint, **{variable: "1"})
    assert "HF_HUB_OFFLINE" in done.stdout, done.stderr
    assert server.endpoint in done.stdout
    assert server.requests == []


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "revision",
    ["main", "refs/pr/1", COMMIT[:7], COMMIT.upper(), COMMIT + "0", COMMIT + "\n", ""],
)
def test_only_full_commits_are_revisions(server: HubServer, tmp_path: Path, revision: str) -> None:
    with pytest.raises(hub.UnpinnedRevision, match="40 hexadecimal digits"):
        hub.check_revision(revision)
    with pytest.raises(hub.UnpinnedRevision):
        fetch(server, tmp_path, revision=revision)
    assert server.requests == []


def test_a_full_commit_is_a_revision() -> None:
    hub.check_revision(COMMIT)


def test_unknown_revision(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(
        hub.RevisionNotFound, match=rf"me/tiny has no commit f{{40}} at {server.endpoint}.*/commits/main"
    ):
        fetch(server, tmp_path, revision="f" * 40)
    assert not (tmp_path / "staging").exists()


def test_a_hub_that_answers_with_another_commit(server: HubServer, tmp_path: Path) -> None:
    listing = b'{"id": "me/moved", "sha": "main", "siblings": []}'
    server.add(Repository("me/moved", COMMIT, {}, listing=listing))
    with pytest.raises(hub.RevisionNotFound, match="answered with commit main"):
        fetch(server, tmp_path, "me/moved")


@pytest.mark.parametrize("repo_id", ["me/nothing", "nothing", "a/b/c", "../tiny", "me/ti ny", "me--x/tiny"])
def test_unknown_repository(server: HubServer, tmp_path: Path, repo_id: str) -> None:
    with pytest.raises(hub.RepositoryNotFound, match=repo_id):
        fetch(server, tmp_path, repo_id)


def test_a_model_is_no_dataset(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(hub.RepositoryNotFound, match="no dataset 'me/tiny'"):
        fetch(server, tmp_path, repo_type="dataset")


def test_a_repository_of_pickles_is_refused(server: HubServer, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "pytorch_model.bin": b"x", "tf_model.h5": b"y"}
    server.add(Repository("me/old", COMMIT, files))
    with pytest.raises(hub.UnsafeFile, match=r"no safetensors, only pytorch_model\.bin, tf_.*source: path"):
        fetch(server, tmp_path, "me/old")
    assert len(server.requests) == 1  # the listing


def test_pickles_beside_safetensors_are_left_there(
    server: HubServer, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    server.add(Repository("me/both", COMMIT, {**model_files, "pytorch_model.bin": b"x", "A.PT": b"x"}))
    names = {file.name for file in fetch(server, tmp_path, "me/both", patterns=["*"])}
    assert names == set(model_files)
    with pytest.raises(hub.UnsafeFile, match=r"pattern '\*\.bin'"):
        fetch(server, tmp_path, "me/both", patterns=["*.json", "*.bin"])


def test_no_file_matches(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(hub.NoSuchFile, match=r"no file that matches \*\.gguf; it has: config\.json"):
        fetch(server, tmp_path, patterns=["*.gguf"])


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//x", "./x", "a/..", "..\\x", "a\nx", ""])
def test_names_that_leave_the_directory(server: HubServer, tmp_path: Path, name: str) -> None:
    server.add(Repository("me/evil", COMMIT, {"config.json": b"{}", name: b"evil"}))
    with pytest.raises(hub.UnsafeFile, match="leads out of the directory"):
        fetch(server, tmp_path, "me/evil", patterns=["*", "*/*", "*/*/*"])
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_without_digests_is_refused(server: HubServer, tmp_path: Path) -> None:
    listing = {"id": "me/poor", "sha": COMMIT, "siblings": [{"rfilename": "config.json", "size": 2}]}
    server.add(Repository("me/poor", COMMIT, {}, listing=json.dumps(listing).encode()))
    with pytest.raises(hub.HubUnreachable, match=r"config\.json without size and digest"):
        fetch(server, tmp_path, "me/poor")


def test_a_full_disk_is_noticed_beforehand(
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("nashswarm.hub.shutil.disk_usage", lambda _: usage)
    with pytest.raises(hub.NoSpace, match="1,000 are free"):
        fetch(server, tmp_path)
    assert server.sent == {}


def test_every_error_ends_a_stage_with_one_line() -> None:
    """stages/common.py turns NashSwarmError into one line; other callers may expect a RuntimeError."""
    assert issubclass(hub.HubError, NashSwarmError)
    assert issubclass(hub.HubError, RuntimeError)


# --- data sets ----------------------------------------------------------------------------------------------


def test_dataset_splits_come_back_exactly(server: HubServer, tmp_path: Path) -> None:
    fetch(server, tmp_path, DATASET, repo_type="dataset", patterns=["wikitext-2-raw-v1/*.parquet"])
    for directory in (tmp_path / "out", tmp_path / "out/wikitext-2-raw-v1"):
        for split, texts in TINY_TEXTS.items():
            assert hub.read_dataset(directory, split) == texts
    assert "" in TINY_TEXTS["train"]
    assert any(text.endswith("\n") for text in TINY_TEXTS["train"])


def test_reading_a_split_follows_its_file(tmp_path: Path) -> None:
    """The copy that `datasets` makes is not mistaken for the data after the file has changed."""
    for texts in (["old\n"], ["new\n"]):
        write(tmp_path, tiny_dataset({"train": texts}))
        assert hub.read_dataset(tmp_path, "train") == texts


def test_shards_are_read_in_order_and_must_be_complete(tmp_path: Path) -> None:
    for i in (1, 0):
        (content,) = (c for n, c in tiny_dataset({"train": [f"{i}", ""]}).items() if n.endswith("parquet"))
        (tmp_path / f"train-{i:05d}-of-00002.parquet").write_bytes(content)
    assert hub.read_dataset(tmp_path, "train") == ["0", "", "1", ""]
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(hub.BadDataset, match="incomplete"):
        hub.read_dataset(tmp_path, "train")


def test_two_configurations_are_not_mixed(tmp_path: Path) -> None:
    for config in ("a", "b"):
        write(tmp_path, tiny_dataset({"train": [config]}, config))
    with pytest.raises(hub.BadDataset, match="several configurations"):
        hub.read_dataset(tmp_path, "train")
    assert hub.read_dataset(tmp_path / "b", "train") == ["b"]


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, tiny_dataset({"train": ["x"]}))
    with pytest.raises(hub.NoSuchFile, match=r"no test-.* there is: wikitext-2-raw-v1/train-00000-of-00001"):
        hub.read_dataset(tmp_path, "test")


def test_columns_that_are_no_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "train-00000-of-00001.parquet"
    for column, values, message in (
        ("label", ["x"], "no column `text` among label"),
        ("text", [1, 2], "holds int64"),
        ("text", ["x", None], "row 1 of split train has no text"),
    ):
        pq.write_table(pa.table({column: values}), path)
        with pytest.raises(hub.BadDataset, match=message):
            hub.read_dataset(tmp_path, "train")
    path.write_bytes(b"not parquet at all")
    with pytest.raises(hub.BadDataset, match="not a parquet file"):
        hub.read_dataset(tmp_path, "train")


# --- helpers ------------------------------------------------------------------------------------------------


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def environment(**changes: str) -> dict[str, str]:
    """This one's, without its HF_ and proxy settings, and with `src` to import from."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return {**ours, "PYTHONPATH": str(Path(hub.__file__).parents[1]), **changes}


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=60, check=False
    )
