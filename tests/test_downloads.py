"""Models and texts of the hub, in the download stage and in the command, against a hub on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import COMMIT, Fault, HubServer, Repository, tiny_dataset, tiny_model

from nashswarm import artifacts, packed

PROJECT = Path(__file__).parents[1]
WORDS = ("the", "hub", "serves", "files", "of", "many", "kinds", "to", "those", "who", "ask", "in", "time")
WEIGHTS = "model.safetensors"


def sentences(start: int, count: int = 60) -> list[str]:
    """Rows as WikiText has them: empty ones between, line ends kept; no two splits share a run of 50 tokens."""
    rows = []
    for i in range(start, start + count):
        words = [WORDS[(i * k * k + i // (k + 1) + k) % len(WORDS)] for k in range(1, 12)]
        rows += ["", f" {i} " + " ".join(words) + " \n"]
    return rows


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    (tmp_path / "model").mkdir()
    splits = {"train": sentences(0), "validation": sentences(1000), "test": sentences(2000)}
    with HubServer() as running:
        running.add(Repository("me/tiny", COMMIT, tiny_model(tmp_path / "model")))
        running.add(Repository("me/texts", COMMIT, tiny_dataset(splits), type="dataset"))
        yield running


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for name in ("src", "stages"):
        shutil.copytree(PROJECT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    params["models"]["tiny"] = {"source": "hub", "id": "me/tiny", "revision": COMMIT}
    texts = {"source": "hub", "id": "me/texts", "config": "wikitext-2-raw-v1", "revision": COMMIT}
    params["corpora"]["texts"] = texts
    params["active"] |= {"models": ["tiny"], "calibration": "texts", "corpora": ["texts"]}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def download(project: Path, server: HubServer) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    environment = {**keep, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(project / "home"), "PYTHONPATH": "src"}
    command = [sys.executable, "stages/download.py", "tiny"]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def test_model_and_texts_come_from_the_hub_once(project: Path, server: HubServer) -> None:
    done = download(project, server)
    assert done.returncode == 0, done.stderr
    layout = artifacts.Layout(project)
    record = artifacts.read_source(layout.download("tiny"))
    directory = record.open(project)
    assert (record.source, record.id, record.revision) == ("hub", "me/tiny", COMMIT)
    assert (directory / WEIGHTS).stat().st_nlink > 1  # the same bytes as in the staging folder, not a copy
    assert not (project / "home/hub").exists()
    assert artifacts.read_tokens(layout.download("tiny"), "texts", "test").text_ends.size == 120  # empty rows kept
    again = download(project, server)
    assert again.returncode == 0, again.stderr
    assert len(server.gets(WEIGHTS)) == 1


def test_wrong_bytes_stop_the_stage_and_leave_nothing(project: Path, server: HubServer) -> None:
    server.faults[WEIGHTS] = Fault("wrong")
    done = download(project, server)
    assert done.returncode == 2
    assert WEIGHTS in done.stderr
    assert done.stderr.count("\n") == 1
    assert not artifacts.Layout(project).download("tiny").exists()


# --- a name on the command line ------------------------------------------------------------------------------------


def command(server: HubServer, tmp_path: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    environment = {**keep, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = str(PROJECT / "src")
    call = [sys.executable, "-c", "from nashswarm.cli import main; main()", *map(str, words)]
    return subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_a_model_of_the_hub_is_fetched_once_and_packed(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(s for s in sentences(0) if s), encoding="utf-8")
    (tmp_path / "method.yaml").write_text("rtn: {codec: grouped, allocator: uniform, bits: 4, group: 64}")
    words = ("quantize", "me/tiny", "--text", "text.txt", "--method", "method.yaml", "--tokens", 256)
    for number in range(2):
        done = command(server, tmp_path, *words, "--revision", COMMIT, "--cache", "cache", "-o", f"packed-{number}")
        assert done.returncode == 0, done.stderr
    assert len(server.gets(WEIGHTS)) == 1
    first, second = (packed.open_packed(tmp_path / f"packed-{number}") for number in range(2))
    found = first.provenance
    assert (found.model, found.source, found.id, found.revision) == ("tiny", "hub", "me/tiny", COMMIT)
    assert first.size == second.size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("me/tiny",), "add --revision and its full commit"),
        (("me/tiny", "--revision", "main"), "revision: 'main' is no full commit"),
        (("me/none", "--revision", COMMIT), "me/none"),
        (("./nowhere",), "no such directory, and no name on the hub"),
    ],
)
def test_a_name_that_cannot_be_fetched_is_refused(
    words: tuple[str, ...], message: str, server: HubServer, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("a text", encoding="utf-8")
    done = command(server, tmp_path, "quantize", *words, "--text", "text.txt", "--cache", "cache", "-o", "packed")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "packed").exists()
