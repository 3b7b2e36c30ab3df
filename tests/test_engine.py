"""Tasks in this process and on a Ray cluster of two nodes: the same bytes, and also where workers are killed."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import CONTEXT, FAMILIES, METHODS, Checkpoints, Models, Packed, no_progress
from miniature import make

from nashswarm import artifacts, evaluation, quantize
from nashswarm.config import Compute, Evaluation, PaperProtocol, Params, Scoring
from nashswarm.engine import AHEAD, Local, Ray, make_engine
from nashswarm.loading import open_for_evaluation
from nashswarm.models import describe, load_streamed
from nashswarm.statistics import gather
from nashswarm.types import InputError, NashSwarmError, Statistics, TokenizedSplit

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

CORES = max(torch.get_num_threads(), 2)  # of a node; the miniature's stages ask for two
KILLS, STORM = 1, 20  # rounds: in the small version, behind the marker
SCORING = Scoring(tokens=512, batch_tokens=2 * CONTEXT)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes."""
    own = {"num_cpus": CORES, "object_store_memory": 300 * 2**20}
    found = cluster_utils.Cluster(initialize_head=True, head_node_args={**own, "include_dashboard": False})
    found.add_node(**own)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which no worker can import
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def engine(cluster: Any) -> Ray:
    found = make_engine(Compute(torch.get_num_threads(), "ray", cluster.address), "pack")
    assert isinstance(found, Ray)
    return found


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- tasks ---------------------------------------------------------------------------------------------------------


def slow_square(_: object, number: int) -> tuple[int, int]:
    time.sleep(0.05 * (number % 3))
    return number * number, os.getpid()


def meet(_: object, place: Path) -> int:
    """This process, once another one is there, too."""
    (place / str(os.getpid())).touch()
    end = time.monotonic() + 60  # the first task may have to wait for a worker to start
    while len(list(place.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    return os.getpid()


def refuse(_: object, number: int) -> None:
    raise InputError(f"{number}: no")


@pytest.mark.parametrize("at_once", [False, True])
def test_results_come_in_order_and_few_tasks_are_ahead(at_once: bool, engine: Ray) -> None:
    for one in (engine, Local(3)):
        taken: list[int] = []
        items = ((taken.append(n) or n,) for n in range(12))  # type: ignore[func-returns-value]
        results = one.map(slow_square, one.share(object), items, at_once)
        for number, (square, _) in enumerate(results):
            assert square == number * number
            running = one.slots * (one.threads if at_once else 1)
            assert len(taken) - number <= max(AHEAD * running, 4)


def threads_here(_: object, number: int) -> tuple[int, int]:
    return number, torch.get_num_threads()


@pytest.mark.parametrize(("at_once", "threads"), [(False, CORES), (True, 1)])
def test_tasks_at_once_compute_with_one_thread(at_once: bool, threads: int, cluster: Any) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    try:
        for one in (Ray(Compute(CORES, "ray", cluster.address)), Local(CORES)):
            found = list(one.map(threads_here, one.share(object), [(n,) for n in range(5)], at_once))
            assert found == [(n, threads) for n in range(5)]
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(torch.get_num_threads).result() == CORES
    finally:
        torch.set_num_threads(before)


def test_both_nodes_work(cluster: Any, tmp_path: Path) -> None:
    engine = Ray(Compute(CORES, "ray", cluster.address))  # a task fills a node
    assert engine.slots == 2
    found = set(engine.map(meet, engine.share(object), [(tmp_path,)] * 2))
    assert len(found) == 2
    assert os.getpid() not in found


def test_errors_of_tasks_are_ours(engine: Ray) -> None:
    with pytest.raises(InputError, match=r"^7: no$"):
        list(engine.map(refuse, engine.share(object), [(7,)]))


def test_tasks_larger_than_any_node_are_refused(cluster: Any, engine: Ray) -> None:
    with pytest.raises(NashSwarmError, match=r"compute.threads: 999 threads for each task, but the largest node has"):
        Ray(Compute(999, "ray", cluster.address))


# --- the pipeline's steps ------------------------------------------------------------------------------------------


def statistics_of(directory: Path, ids: np.ndarray, *engine: Ray) -> dict[str, Statistics]:
    index = describe(directory)
    load = partial(load_streamed, directory, index)
    return {t.name: s for t, s in gather(load, index, ids, SCORING, no_progress, None, *engine)}


def same(one: dict[str, Statistics], other: dict[str, Statistics]) -> bool:
    def equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
        return (a is None and b is None) or (a is not None and b is not None and a.tobytes() == b.tobytes())

    fields = [f.name for f in dataclasses.fields(Statistics)]
    return list(one) == list(other) and all(
        equal(getattr(one[n], f), getattr(other[n], f)) for n in one for f in fields
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_the_same(
    family: str, engine: Ray, checkpoint: Checkpoints, split: Callable[..., TokenizedSplit]
) -> None:
    directory, ids = checkpoint(family), split(family).ids
    assert same(statistics_of(directory, ids), statistics_of(directory, ids, engine))


OFTEN = {
    "gpt2": ("fp32", "nash", "market-coded-3_0"),
    "opt": ("gptq3-g128",),
    "llama": ("rtn4-g64", "market-tiles-3_25"),
}
PAIRS = [
    pytest.param(family, name, marks=[] if name in OFTEN[family] else [pytest.mark.storm])
    for family in FAMILIES
    for name in METHODS
]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_packed_files_are_the_same(
    family: str,
    name: str,
    engine: Ray,
    quantizable: Models,
    packed: Callable[[str, str], Packed],
    params: Params,
    split: Callable[..., TokenizedSplit],
    tmp_path: Path,
) -> None:
    model, method = quantizable(family), params.methods[name]
    allocation = quantize.allocate(model, method, no_progress, engine)
    here = quantize.allocate(model, method, no_progress)
    assert artifacts.allocation_document(allocation) == artifacts.allocation_document(here)
    ids = split(family, seed=3).ids
    quantize.pack(model, method, allocation, ids, tmp_path / "p", no_progress, None, engine)
    assert files(tmp_path / "p") == files(packed(family, name).directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_same(
    family: str,
    engine: Ray,
    quantizable: Models,
    packed: Callable[[str, str], Packed],
    split: Callable[..., TokenizedSplit],
    tmp_path: Path,
) -> None:
    model, texts = quantizable(family), split(family)
    settings = Evaluation(context=CONTEXT, batch_tokens=3 * CONTEXT, paper=PaperProtocol(texts=(9,), length=8))
    source, found = model.checkpoint.directory, []
    for number, own in enumerate([(), (engine,)]):
        load, rest = partial(load_streamed, source, model.index), (texts, settings, CONTEXT, no_progress, *own)
        path = tmp_path / f"{number}.safetensors"
        artifacts.write_record(path, evaluation.original_outputs(load, *rest))
        said = partial(artifacts.read_record, path, evaluation.Baseline)
        load = partial(open_for_evaluation, packed(family, "rtn3-g64").directory, source, model.index)
        losses = evaluation.measure(load, partial(evaluation.open_original, source, model.index, said), *rest)
        artifacts.write_record(tmp_path / "losses.safetensors", losses)
        found.append((path.read_bytes(), (tmp_path / "losses.safetensors").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.storm
def test_the_pipelines_files_are_the_same(cluster: Any, checkpoint: Checkpoints, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    here = make(tmp_path / "local", home, checkpoint("gpt2"))
    here.set(active={"methods": ["fp32", "rtn4-g64", "gptq3-g128", "market-coded-8_0"]})
    here.commit()
    there = here.copy(tmp_path / "ray")
    there.set(compute={"engine": "ray", "address": cluster.address, "threads": here.raw()["compute"]["threads"]})
    found = []
    for project in (here, there):
        project.dvc("repro")
        found.append({n: b for n, b in project.files().items() if not n.startswith("data/times/")})
        found[-1].pop("params.yaml")
    assert found[0] == found[1]
    assert "data/packed/reference/market-coded-8_0/manifest.json" in found[0]


# --- workers that are lost -----------------------------------------------------------------------------------------


def workers() -> list[psutil.Process]:
    """Those that compute at the moment."""
    busy = ("ray::_forward", "ray::_head", "ray::_block", "ray::_encode", "ray::_candidates", "ray::_Host.call")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if words[0].startswith(busy):
            found.append(process)
    return found


def with_kills(rounds: int, seed: int, run: Callable[[], Any]) -> tuple[Any, int]:
    """What a run gives while workers are killed at random moments, and how many were."""
    over, killed, rng = threading.Event(), [0], random.Random(seed)

    def kill() -> None:
        while killed[0] < rounds and not over.wait(rng.uniform(0.05, 0.5)):
            if found := workers():
                os.kill(rng.choice(found).pid, signal.SIGKILL)
                killed[0] += 1

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        return run(), killed[0]
    finally:
        over.set()
        thread.join()


def survive(
    rounds: int,
    engine: Ray,
    model: quantize.Model,
    ids: np.ndarray,
    params: Params,
    expected: tuple[dict[str, Statistics], dict[str, bytes]],
    directory: Path,
) -> None:
    """Score and pack again and again until enough workers were killed."""
    method, killed, turn = params.methods["market-coded-3_0"], 0, 0
    allocation = quantize.allocate(model, method, no_progress)
    while killed < rounds:
        turn += 1
        assert turn < 10 * rounds + 10, "no worker was caught at work"
        found, number = with_kills(1, turn, lambda: statistics_of(model.checkpoint.directory, ids, engine))
        killed += number
        assert same(found, expected[0])
        target = directory / str(turn)
        again = partial(quantize.pack, model, method, allocation, ids, target, no_progress, None, engine)
        killed += with_kills(1, -turn, again)[1]
        assert files(target) == expected[1]


@pytest.fixture
def expected(
    quantizable: Models, packed: Callable[[str, str], Packed], split: Callable[..., TokenizedSplit]
) -> tuple[dict[str, Statistics], dict[str, bytes]]:
    scores = statistics_of(quantizable("gpt2").checkpoint.directory, split("gpt2", seed=3).ids)
    return scores, files(packed("gpt2", "market-coded-3_0").directory)


@pytest.mark.parametrize("rounds", [KILLS, pytest.param(STORM, marks=pytest.mark.storm)])
def test_lost_workers_change_nothing(
    rounds: int,
    engine: Ray,
    quantizable: Models,
    params: Params,
    split: Callable[..., TokenizedSplit],
    expected: tuple[dict[str, Statistics], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    survive(rounds, engine, quantizable("gpt2"), split("gpt2", seed=3).ids, params, expected, tmp_path)


class Total:
    """Adds up; dies when it is told to."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, number: int) -> int:
        self.value += number
        return self.value

    def die_once(self, flag: Path) -> int:
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.value


def test_a_lost_members_lasting_calls_are_repeated(engine: Ray, tmp_path: Path) -> None:
    member = engine.member(Total)
    assert [member.result(member.submit("add", n), lasting=n < 3) for n in (1, 2, 3)] == [1, 3, 6]
    assert member.result(member.submit("die_once", tmp_path / "flag")) == 3  # what was not to last is gone
    assert member.result(member.submit("add", 4)) == 7
    directory = Path(member._kept.name)
    member.close()
    assert not directory.exists()
