"""Packings that break off: the next run writes the undisturbed one's bytes, and rounds nothing twice."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILIES, Checkpoints, Models, Packed, no_progress, tiny_text

from nashswarm import artifacts, direct, packed, payload, quantize
from nashswarm.config import Method, Params, Scoring, load_room, parse_method
from nashswarm.quantize import Model
from nashswarm.types import Allocation, Job

PackedModels = Callable[[str, str], Packed]
Splits = Callable[..., Any]

METHODS = ["rtn4-g64", "gptq3-g128", "nash", "market-tiles-3_25", "market-coded-3_0"]  # the last two behind a prefix


class Stop(Exception):
    """Breaks a packing off."""


class Rounding:
    """Notes every matrix that a method's codec rounds; breaks off when one is at hand and `last` are done."""

    def __init__(self, method: Method, patch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.last: int | None = None
        codec = load_room("codecs", method.codec)
        name = "round_one" if hasattr(codec, "round_one") else "encode"
        real = getattr(codec, name)

        def watched(job: Job, settings: Any) -> Any:
            if self.last is not None and len(self.done) == self.last:
                raise Stop
            made = real(job, settings)
            self.done.append(job.tensor.name)
            return made

        patch.setattr(codec, name, watched)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def opened(place: Path, method: Method, allocation: Allocation, ids: np.ndarray, **changes: Any) -> artifacts.Journal:
    """The journal of a packing; `changes` replace what decides it."""
    (place / "scores").mkdir(exist_ok=True)
    (place / "scores/some.safetensors").write_bytes(changes.get("statistics", b"s"))
    hashes = changes.get("files", {"model.safetensors": "a"})
    return quantize.open_journal(place / "staging", "m", method, allocation, ids, hashes, place / "scores")


@pytest.fixture(scope="module")
def allocated(quantizable: Models, params: Params) -> Callable[[str, str], Allocation]:
    """(family, method) -> what its allocator buys."""
    return cache(lambda family, name: quantize.allocate(quantizable(family), params.methods[name], no_progress))


@pytest.fixture(scope="module")
def rounded(
    quantizable: Models,
    params: Params,
    split: Splits,
    allocated: Callable[[str, str], Allocation],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], list[str]]:
    """(family, method) -> the matrices that its codec rounds where nothing disturbs it, in their order."""

    def find(family: str, name: str) -> list[str]:
        own = quantizable(family), params.methods[name], allocated(family, name), split(family, seed=3).ids
        with pytest.MonkeyPatch.context() as patch:
            rounding = Rounding(own[1], patch)
            quantize.pack(*own, tmp_path_factory.mktemp("undisturbed") / "p", no_progress)
        return rounding.done

    return cache(find)


@pytest.fixture
def setting(
    request: pytest.FixtureRequest,
    quantizable: Models,
    params: Params,
    split: Splits,
    allocated: Callable[[str, str], Allocation],
) -> Setting:
    """Of (family, method): all that a packing starts from."""
    family, name = request.param
    return quantizable(family), params.methods[name], allocated(family, name), split(family, seed=3).ids


Setting = tuple[Model, Method, Allocation, np.ndarray]


@pytest.mark.parametrize("place", [0, 1, 2, 4, 7, -1], ids=lambda k: f"after {k}" if k >= 0 else "before the last")
@pytest.mark.parametrize("setting", [(f, m) for f in FAMILIES for m in METHODS], indirect=True, ids="-".join)
def test_a_packing_that_breaks_off_goes_on_to_the_same_bytes(
    setting: Setting,
    place: int,
    rounded: Callable[[str, str], list[str]],
    packed: PackedModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, method, allocation, ids = setting
    every, rounding = rounded(model.name, method.name), Rounding(method, monkeypatch)
    rounding.last = place % len(every)
    with pytest.raises(Stop):
        quantize.pack(model, method, allocation, ids, tmp_path / "p", no_progress, opened(tmp_path, *setting[1:]))
    rounding.last = None
    journal = opened(tmp_path, *setting[1:])
    quantize.pack(model, method, allocation, ids, tmp_path / "p", no_progress, journal)
    assert rounding.done == every  # each once, in the first run or in the second
    assert files(tmp_path / "p") == files(packed(model.name, method.name).directory)
    journal.close()
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize("broken", ["add", "finish"])
@pytest.mark.parametrize("setting", [("gpt2", m) for m in METHODS], indirect=True, ids="-".join)
def test_a_packing_that_breaks_off_in_writing_goes_on(
    setting: Setting,
    broken: str,
    rounded: Callable[[str, str], list[str]],
    packed: PackedModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the spool, at the third array; and when all is rounded: then the next run only writes."""
    model, method, allocation, ids = setting
    rounding, calls = Rounding(method, monkeypatch), [0]
    real = getattr(payload.Payload, broken)

    def stop(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == (3 if broken == "add" else 1):
            raise Stop
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(payload.Payload, broken, stop)
        with pytest.raises(Stop):
            quantize.pack(model, method, allocation, ids, tmp_path / "p", no_progress, opened(tmp_path, *setting[1:]))
    assert rounding.done
    quantize.pack(model, method, allocation, ids, tmp_path / "p", no_progress, opened(tmp_path, *setting[1:]))
    assert rounding.done == rounded(model.name, method.name)
    assert files(tmp_path / "p") == files(packed(model.name, method.name).directory)


def test_rounds_that_missed_the_budget_are_not_packed_again(
    quantizable: Models, split: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expected sizes are wrong by 15 %, so that the first rounds miss; broken off within each of the rounds."""
    model, ids = quantizable("gpt2"), split("gpt2", seed=3).ids
    settings = {"allocator": "market", "codec": "coded", "budget": 4.0, "prefix_tokens": 512}
    method = parse_method("mine", settings)
    bought = quantize.allocate(model, method, no_progress)
    choices = {n: dataclasses.replace(c, size=(c.size or 0) * 0.85) for n, c in bought.choices.items()}
    allocation = dataclasses.replace(bought, choices=choices)
    rounding = Rounding(method, monkeypatch)
    quantize.pack(model, method, allocation, ids, tmp_path / "undisturbed", no_progress)
    every, count = rounding.done, len(model.index.tensors)
    assert len(every) > count
    rounding.done = []
    for stop in range(2, len(every), count // 2):
        rounding.last, journal = stop, opened(tmp_path, method, allocation, ids)
        with pytest.raises(Stop):
            quantize.pack(model, method, allocation, ids, tmp_path / "p", no_progress, journal)
    rounding.last = None
    quantize.pack(
        model, method, allocation, ids, tmp_path / "p", no_progress, opened(tmp_path, method, allocation, ids)
    )
    assert rounding.done == every
    assert files(tmp_path / "p") == files(tmp_path / "undisturbed")


CHANGES: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "weights": lambda _: {"files": {"model.safetensors": "b"}},
    "statistics": lambda _: {"statistics": b"t"},
    "text": lambda setting: {"ids": setting[3][1:]},
    "settings": lambda setting: {"method": dataclasses.replace(setting[1], scope="linear")},
    "allocation": lambda setting: {"allocation": dataclasses.replace(setting[2], asked_bytes=5)},
    "code": lambda _: {"code": {"quantize.py": "b"}},
    "threads": lambda _: {"get_num_threads": 77},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("setting", [("gpt2", "rtn4-g64")], indirect=True)
def test_what_another_run_left_is_not_used_and_swept(
    setting: Setting, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, method, allocation, ids = setting
    first = opened(tmp_path, method, allocation, ids)
    quantize.pack(model, method, allocation, ids, tmp_path / "p", no_progress, first)
    step = f"matrix-{model.index.tensors[0].name}"
    assert opened(tmp_path, method, allocation, ids).read(step) is not None
    changes = CHANGES[change](setting)
    if "code" in changes:
        monkeypatch.setattr(quantize, "code", lambda _: changes["code"])
    if "get_num_threads" in changes:
        monkeypatch.setattr(quantize.torch, "get_num_threads", lambda: changes["get_num_threads"])
    facts = [changes.pop(key, value) for key, value in zip(("method", "allocation", "ids"), setting[1:], strict=True)]
    other = opened(tmp_path, *facts, **changes)
    assert other.read(step) is None
    assert not first.directory.exists()


def test_the_code_of_a_packing_is_that_of_its_codec_too(params: Params) -> None:
    one, other = (quantize.code(params.methods[name]) for name in ("rtn4-g64", "market-coded-3_0"))
    assert {"nashswarm/quantize.py", "nashswarm/propagation.py", "nashswarm/codecs/grouped.py"} <= one.keys()
    assert {"nashswarm/codecs/coded.py", "nashswarm/rans.py"} <= other.keys() - one.keys()


# --- a process that is killed --------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from test_resume import quantized
from nashswarm import quantize
from nashswarm.config import load_room
from pathlib import Path

source, text, output, name, last = sys.argv[1:]
pack, done = quantize.pack, [0]

def packing(model, method, *rest):
    codec = load_room("codecs", method.codec)
    step = "round_one" if hasattr(codec, "round_one") else "encode"
    real = getattr(codec, step)

    def watched(job, settings):
        if done[0] == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
        done[0] += 1
        return real(job, settings)

    setattr(codec, step, watched)
    pack(model, method, *rest)

quantize.pack = packing
quantized(Path(source), Path(text), name, Path(output))
"""


def quantized(source: Path, text: Path, name: str, output: Path) -> None:
    """What `nashswarm quantize` does, with 8 bits at most, so that no chance of a tiny model ends it."""
    from conftest import PROJECT

    from nashswarm.config import load_params

    method = load_params(PROJECT / "params.yaml").methods[name]
    if method.allocator == "market":
        settings = dataclasses.replace(method.allocator_settings, budget=6.0)
        method = dataclasses.replace(method, allocator_settings=settings)
    direct.quantize_directory(source, text, method, "m", Scoring(tokens=512), output, no_progress)


@pytest.mark.parametrize("name", ["rtn4-g64", "market-tiles-3_25", "market-coded-3_0"])
def test_a_process_that_was_killed_goes_on_to_the_same_bytes(
    name: str, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text, last = checkpoint("gpt2"), tmp_path / "text.txt", 5
    text.write_text("\n".join(tiny_text(60, 10)), encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    done: list[str] = []
    pack = quantize.pack

    def packing(model: Model, method: Method, *rest: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            rounding = Rounding(method, patch)
            pack(model, method, *rest)
            done.extend(rounding.done)

    monkeypatch.setattr(quantize, "pack", packing)
    quantized(source, text, name, tmp_path / "a/out")
    every, done[:] = [*done], []
    script = KILLED.format(paths=[*sys.path])
    words = [sys.executable, "-c", script, str(source), str(text), str(tmp_path / "b/out"), name, str(last)]
    killed = subprocess.run(words, check=False, capture_output=True, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = sorted(path.name.partition("@")[0] for path in (tmp_path / "b").iterdir())
    assert left == [".out.pack", ".out.score", ".out.tmp"]
    quantized(source, text, name, tmp_path / "b/out")
    assert done == every[last:]
    assert files(tmp_path / "b/out") == files(tmp_path / "a/out")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["out"]
    packed.open_packed(tmp_path / "b/out")
    shutil.rmtree(tmp_path / "b")
