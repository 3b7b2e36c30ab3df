"""Runs that are killed, that meet a full disk, or that meet each other: nothing is lost, nothing is mixed.

The small versions run always; `make storm` has a hundred kills.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, Checkpoints, Models, Packed, no_progress
from miniature import Project, make, ran

from nashswarm import artifacts, packed, quantize
from nashswarm.artifacts import Busy, fresh_directory
from nashswarm.types import NashSwarmError

PackedModels = Callable[[str, str], Packed]

KILLS, BATCH, BATCHES = 1, 10, 10  # in the small version; in each of the storm's batches; their number


# --- kills ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoints) -> Project:
    """A miniature that nothing was run in, and is not to be run in."""
    project = make(tmp_path_factory.mktemp("fresh"), tmp_path_factory.mktemp("home"), checkpoint("gpt2"))
    project.set(active={"methods": ["rtn4-g64"]})
    project.commit()
    return project


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbs: where it was, what it made, and its seconds."""

    project: Project
    files: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(fresh: Project, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    project = fresh.copy(tmp_path_factory.mktemp("undisturbed"))
    started = time.perf_counter()
    project.dvc("repro")
    return Undisturbed(project, outputs(project), time.perf_counter() - started)


def outputs(project: Project) -> dict[str, bytes]:
    """What counts: all files but times, DVC's own and a download's staging."""
    return {n: b for n, b in project.files().items() if not n.startswith(("data/times/", "data/staging/"))}


def kill_and_run_again(fresh: Project, directory: Path, after: float) -> dict[str, bytes]:
    """Kill `dvc repro` and all that it started after some seconds, then let it run to its end."""
    project = fresh.copy(directory)
    with subprocess.Popen(
        ["dvc", "repro"],
        cwd=project.root,
        env=project.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as running:
        try:
            running.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
    project.call(sys.executable, str(PROJECT / "tools/mend.py"))  # as `make reproduce` does
    project.dvc("repro")
    assert ran(project.dvc("repro")) == []
    found = outputs(project)
    shutil.rmtree(project.root)
    return found


def storm(fresh: Project, undisturbed: Undisturbed, directory: Path, kills: int, seed: int) -> None:
    expected, generator = undisturbed.files, random.Random(seed)
    for number in range(kills):
        after = generator.uniform(0, undisturbed.seconds)
        found = kill_and_run_again(fresh, directory / str(number), after)
        assert found.keys() == expected.keys(), f"killed after {after:.2f} s"
        differing = [name for name in expected if found[name] != expected[name]]
        assert differing == [], f"killed after {after:.2f} s"


@pytest.mark.pipeline
def test_a_killed_run_goes_on_to_the_same_files(fresh: Project, undisturbed: Undisturbed, tmp_path: Path) -> None:
    storm(fresh, undisturbed, tmp_path, KILLS, seed=0)


@pytest.mark.storm
@pytest.mark.parametrize("batch", range(1, BATCHES + 1))
def test_a_hundred_killed_runs_go_on_to_the_same_files(
    fresh: Project, undisturbed: Undisturbed, tmp_path: Path, batch: int
) -> None:
    """In batches with a seed each, so that several processes can share them."""
    storm(fresh, undisturbed, tmp_path, BATCH, seed=batch)


@pytest.mark.pipeline
def test_half_a_lockfile_is_mended(fresh: Project, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """DVC writes dvc.lock in place; a kill may leave any beginning of it."""
    project = fresh.copy(tmp_path)
    whole = undisturbed.files["dvc.lock"]
    half = whole[: whole.index(b"outs:") + len(b"outs:\n    -")]
    (project.root / "dvc.lock").write_bytes(half)
    (project.root / ".dvc/tmp").mkdir(parents=True)
    (project.root / ".dvc/tmp/rwlock").write_bytes(b'{"')
    said = project.call(sys.executable, str(PROJECT / "tools/mend.py")).stdout
    assert said.count("half written by a run that was killed") == 2
    assert not (project.root / ".dvc/tmp/rwlock").exists()
    project.dvc("status")
    (project.root / "dvc.lock").write_bytes(whole)
    assert project.call(sys.executable, str(PROJECT / "tools/mend.py")).stdout == ""
    assert (project.root / "dvc.lock").read_bytes() == whole


@pytest.mark.pipeline
def test_two_runs_at_once_are_not_mixed(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """DVC's own lock: the one that comes second ends, and says which process holds it."""
    project = undisturbed.project.copy(tmp_path)
    (project.root / "metrics/reference/rtn4-g64.json").unlink()  # which DVC does not keep: a stage must run
    start = [
        subprocess.Popen(
            ["dvc", "repro"],
            cwd=project.root,
            env=project.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    texts = [process.communicate()[0].decode() for process in start]
    codes = [process.returncode for process in start]
    assert 0 in codes
    for code, text in zip(codes, texts, strict=True):
        assert code == 0 or "lock" in text, text
    project.dvc("repro")
    assert outputs(project) == undisturbed.files


# --- two writers of one directory ----------------------------------------------------------------------------------


HOLD = """
import sys, time
from pathlib import Path
from nashswarm.artifacts import fresh_directory
with fresh_directory(Path(sys.argv[1])) as target:
    (target / "x").write_text("first")
    print("holding", flush=True)
    sys.stdin.readline()
"""


def holding(path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


def test_the_second_writer_is_told_of_the_first(tmp_path: Path) -> None:
    with holding(tmp_path / "out") as first:
        named = rf"out: process {first.pid} is writing here; wait for its end"
        with pytest.raises(Busy, match=named), fresh_directory(tmp_path / "out"):
            pass
        first.communicate("\n")
    assert (tmp_path / "out/x").read_text() == "first"
    with fresh_directory(tmp_path / "out") as target:
        (target / "x").write_text("second")
    assert (tmp_path / "out/x").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    with holding(tmp_path / "out") as first:
        first.kill()
    assert [p.name for p in tmp_path.iterdir()] == [".out.tmp"]
    with fresh_directory(tmp_path / "out") as target:
        assert [p.name for p in target.iterdir()] == [".writer"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    with fresh_directory(tmp_path / "out") as target:
        (target / "x").write_text("old")
    (tmp_path / "out").rename(tmp_path / ".out.old")  # where a kill may have left it
    with pytest.raises(RuntimeError), fresh_directory(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out/x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- disks that refuse ---------------------------------------------------------------------------------------------


def pack(model: quantize.Model, directory: Path, name: str) -> None:
    from nashswarm.config import parse_method

    method = parse_method(name, {"allocator": "uniform", "codec": "grouped", "bits": 4, "scope": "all"})
    allocation = quantize.allocate(model, method, no_progress)
    quantize.pack(model, method, allocation, np.zeros(1, np.int32), directory, no_progress)


def test_whichever_write_fails_nothing_is_lost(quantizable: Models, tmp_path: Path) -> None:
    """EFBIG of the real system, at every byte count that a write ends on, for each file of a packed directory."""
    model = quantizable("gpt2")
    pack(model, tmp_path / "out", "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    pack(model, tmp_path / "new", "new")
    largest = max(p.stat().st_size for p in (tmp_path / "new").iterdir())
    limits = sorted({*range(0, largest, 1 << 13), *(p.stat().st_size - 1 for p in (tmp_path / "new").iterdir())})
    with limited_files() as set_limit:
        for limit in limits:
            set_limit(limit)
            with pytest.raises(NashSwarmError, match=r"cannot be written \(File too large\)"):
                pack(model, tmp_path / "out", "new")
            assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before, limit
            assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"], limit
    packed.open_packed(tmp_path / "out")


class limited_files:
    """Within, no file of this process can grow beyond a limit in bytes."""

    def __enter__(self) -> Callable[[int], None]:
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        return lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


@pytest.mark.parametrize("name", ["x.json", "arrays"])
def test_a_full_disk_keeps_a_stages_old_file(name: str, tmp_path: Path) -> None:
    artifacts.write_bytes(tmp_path / name, b"old")
    with limited_files() as set_limit:
        for limit in range(0, 100, 7):
            set_limit(limit)
            with pytest.raises(NashSwarmError, match=rf"{name}: cannot be written \(File too large\)"):
                artifacts.write_bytes(tmp_path / name, b"n" * 100)
            assert (tmp_path / name).read_bytes() == b"old"
            assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_full_disk_is_named(quantizable: Models, tmp_path: Path) -> None:
    """ENOSPC of a real file system of 64 KiB, where the test may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        with pytest.raises(NashSwarmError, match=r"No space left on device|make room"):
            pack(quantizable("gpt2"), disk / "out", "new")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
