"""Tasks in this process and on a Ray cluster of two nodes: the same bytes, and also where workers are killed."""

from __future__ import annotations

import copy
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
from nashswarm import statistics as stats
from nashswarm.config import Compute, Evaluation, PaperProtocol, Params, Scoring, parse_method
from nashswarm.engine import AHEAD, Engine, Local, Ray, make_engine
from nashswarm.loading import open_for_evaluation
from nashswarm.models import describe, load_streamed
from nashswarm.statistics import gather
from nashswarm.threads import crew, set_crew
from nashswarm.types import InputError, NashSwarmError, Statistics, TokenizedSplit

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

CORES = max(torch.get_num_threads(), 2)  # of a node; the miniature's stages ask for two
KILLS, STORM = 1, 20  # rounds: in the small version, behind the marker
SCORING = Scoring(tokens=512, batch_tokens=2 * CONTEXT)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes, one of which has a GPU, as far as Ray knows."""
    own = {"num_cpus": CORES, "object_store_memory": 300 * 2**20}
    found = cluster_utils.Cluster(initialize_head=True, head_node_args={**own, "include_dashboard": False})
    found.add_node(**own, num_gpus=1)
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


def crew_here(_: object) -> int:
    return crew()


def test_a_task_that_is_alone_has_the_cores_of_its_node(cluster: Any) -> None:
    one = Ray(Compute(1, "ray", cluster.address))
    try:
        for alone, expected in ((True, CORES), (False, 1), (True, CORES)):
            assert list(one.map(crew_here, one.share(object), [()], alone=alone)) == [expected]
        assert crew() == CORES  # of the driver, for which workers wait
    finally:
        set_crew(0)
    assert crew() == torch.get_num_threads()


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


# --- sums on workers -----------------------------------------------------------------------------------------------

KEYS = ("a", "b")


class Sum:
    """Order matters: float64 sums of numbers of very different sizes."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None
        self.places: set[int] = set()  # processes that added

    def add(self, part: np.ndarray) -> None:
        self.places.add(os.getpid())
        self.value = part.astype(np.float64) if self.value is None else self.value + part

    def result(self) -> tuple[bytes, set[int]]:
        assert self.value is not None
        return self.value.tobytes(), self.places


class SumOnce(Sum):
    """Its process dies at the third part, once."""

    flag: Path

    def add(self, part: np.ndarray) -> None:
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().add(part)


def parts_of(_: object, number: int) -> tuple[int, dict[str, np.ndarray]]:
    rng = np.random.default_rng(number)
    sizes = 10.0 ** rng.integers(-8, 8, (2, 40_000))  # more than Ray returns in messages: they lie in the object store
    return number, dict(zip(KEYS, (rng.standard_normal((2, 40_000)) * sizes).astype(np.float32), strict=True))


def parts_with_others(_: object, number: int) -> tuple[int, dict[str, np.ndarray]]:
    own, parts = parts_of(_, number)
    return own, {**parts, "c": parts["a"]}


def folded(engine: Engine, count: int, total: Callable[[], Sum] = Sum) -> dict[Any, tuple[bytes, set[int]]]:
    folding = engine.fold(parts_of, engine.share(object), ((n,) for n in range(count)), KEYS, total)
    assert list(folding) == list(range(count))
    return folding.totals()


def sums(found: dict[Any, tuple[bytes, set[int]]]) -> dict[Any, bytes]:
    return {key: value for key, (value, _) in found.items()}


@pytest.mark.parametrize("windows", [0.5, 1, 1.25, 3])
def test_sums_on_workers_are_the_same(windows: float, engine: Ray) -> None:
    count = int(AHEAD * engine.slots * windows)
    there = folded(engine, count)
    assert sums(there) == sums(folded(Local(), count))
    assert list(there) == list(KEYS)
    assert all(os.getpid() not in places for _, places in there.values())


def test_no_more_than_a_window_is_ahead(engine: Ray) -> None:
    """As `items` are taken when their tasks begin: one window, and the next one's first item."""
    for one, most in ((engine, AHEAD * engine.slots + 1), (Local(), 1)):
        taken: list[int] = []
        items = ((taken.append(n) or n,) for n in range(6 * engine.slots))  # type: ignore[func-returns-value]
        for number in one.fold(parts_of, one.share(object), items, KEYS, Sum):
            assert len(taken) - number <= most


def test_a_worker_that_dies_while_it_adds_changes_nothing(engine: Ray, tmp_path: Path) -> None:
    count, flag = AHEAD * engine.slots + 3, tmp_path / "died"
    assert sums(folded(engine, count, partial(dying, flag))) == sums(folded(Local(), count))
    assert flag.exists()


def dying(flag: Path) -> Sum:
    made = SumOnce()
    made.flag = flag
    return made


def test_a_node_that_dies_with_parts_changes_nothing(cluster: Any, engine: Ray) -> None:
    """Ray runs again the tasks whose parts lay there."""
    extra = cluster.add_node(num_cpus=CORES, object_store_memory=100 * 2**20)
    wider = Ray(Compute(engine.threads, "ray", cluster.address))
    assert wider.slots > engine.slots
    count = AHEAD * wider.slots
    folding = wider.fold(parts_of, wider.share(object), ((n,) for n in range(count)), KEYS, Sum)
    own = iter(folding)
    assert [next(own) for _ in range(count)] == list(range(count))  # all are made, none is added
    cluster.remove_node(extra, allow_graceful=False)
    assert list(own) == []
    assert sums(folding.totals()) == sums(folded(Local(), count))


@pytest.mark.parametrize("cluster_wide", [False, True])
def test_parts_of_other_keys_are_refused(cluster_wide: bool, engine: Ray) -> None:
    one: Engine = engine if cluster_wide else Local()
    with pytest.raises(ValueError, match=r"^parts of \['a', 'b', 'c'\], expected \['a', 'b'\]$"):
        list(one.fold(parts_with_others, one.share(object), [(1,)], KEYS, Sum))


@pytest.mark.parametrize("cluster_wide", [False, True])
def test_errors_of_tasks_whose_parts_are_added_are_ours(cluster_wide: bool, engine: Ray) -> None:
    one: Engine = engine if cluster_wide else Local()
    with pytest.raises(InputError, match=r"^7: no$"):
        list(one.fold(refuse, one.share(object), [(7,)], KEYS, Sum))


# --- the pipeline's steps ------------------------------------------------------------------------------------------


def statistics_of(directory: Path, ids: np.ndarray, *engine: Ray, scoring: Scoring = SCORING) -> dict[str, Statistics]:
    index = describe(directory)
    load = partial(load_streamed, directory, index)
    return {t.name: s for t, s in gather(load, index, ids, scoring, no_progress, None, *engine)}


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


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_several_windows_are_the_same(
    family: str, cluster: Any, checkpoint: Checkpoints, split: Callable[..., TokenizedSplit], monkeypatch: Any
) -> None:
    """Sums are handed on from window to window, in stripes; the last window is not full."""
    monkeypatch.setattr(stats, "STRIPE", 1000)
    engine = Ray(Compute(CORES, "ray", cluster.address))
    directory, ids = checkpoint(family), split(family).ids
    scoring = Scoring(tokens=(2 * AHEAD * engine.slots + 1) * CONTEXT, batch_tokens=CONTEXT)
    assert ids.size >= scoring.tokens
    there = statistics_of(directory, ids, engine, scoring=scoring)
    assert same(statistics_of(directory, ids, scoring=scoring), there)


@pytest.mark.parametrize("taken", [1, 3, 6, 10])
def test_an_interrupted_run_goes_on_to_the_same_statistics(
    taken: int, engine: Ray, checkpoint: Checkpoints, split: Callable[..., TokenizedSplit], tmp_path: Path
) -> None:
    """Though the next block was begun before this one's statistics were handed on."""
    directory, ids = checkpoint("gpt2"), split("gpt2").ids
    index = describe(directory)
    load = partial(load_streamed, directory, index)
    found: dict[str, Statistics] = {}
    for count in (taken, 100):
        journal = artifacts.Journal.of(tmp_path, "scores", SCORING)
        made = gather(load, index, ids, SCORING, no_progress, journal, engine)
        found = {tensor.name: own for tensor, own in (next(made, (None, None)) for _ in range(count)) if tensor}
        made.close()
        if count == taken:
            assert len(found) == taken
            assert journal.read("state") is not None
    assert same(statistics_of(directory, ids), found)


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


def test_codes_are_trained_by_a_worker_as_here(
    engine: Ray, quantizable: Models, split: Callable[..., TokenizedSplit], tmp_path: Path
) -> None:
    model, ids = quantizable("opt"), split("opt", seed=3).ids
    block = {"allocator": "market", "codec": "coded", "budget": 3.0, "prefix_tokens": 0}
    method = parse_method("mine", block | {"tuning_steps": 3, "tuning_tokens": 64, "tuning_rate": 0.005})
    allocation = quantize.allocate(model, method, no_progress)
    for name, one in (("here", Local(torch.get_num_threads())), ("there", engine)):
        quantize.pack(model, method, allocation, ids, tmp_path / name, no_progress, None, one)
    assert files(tmp_path / "here") == files(tmp_path / "there")


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
    busy = (
        "ray::_forward",
        "ray::_head",
        "ray::_block",
        "ray::fold",
        "ray::_encode",
        "ray::_candidates",
        "ray::_Host.call",
    )
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


def test_a_member_that_is_opened_again_is_new_in_the_same_process(engine: Ray) -> None:
    member = engine.member(Total)
    begun = [member.result(member.submit("process"))]
    assert member.result(member.submit("add", 7)) == 7
    member.open()
    assert member.result(member.submit("add", 1)) == 1
    begun.append(member.result(member.submit("process")))
    assert begun[0] == begun[1]
    member.close()


def process(shared: object, number: int) -> int:
    del shared, number
    return os.getpid()


@pytest.fixture
def on_gpu(engine: Ray, monkeypatch: pytest.MonkeyPatch) -> Ray:
    """Whose tasks and members ask for the one GPU, and have a minute to get it."""
    one = copy.copy(engine)
    one.gpus = one.slots = 1
    monkeypatch.setattr(one, "get", partial(ray.get, timeout=60))
    return one


def test_tasks_on_a_gpu_have_the_same_process(on_gpu: Ray) -> None:
    """And with it what they share, and what the GPU was made ready for."""
    shared = on_gpu.share(dict, on_device=True)
    assert len(set(on_gpu.map(process, shared, ((n,) for n in range(6))))) == 1


def test_a_task_that_members_wait_for_has_a_gpu_beside_them(on_gpu: Ray) -> None:
    member = on_gpu.member(Total)
    assert member.result(member.submit("add", 1)) == 1
    assert len(list(on_gpu.map(process, on_gpu.share(dict, on_device=True), [(0,)], alone=True))) == 1
    member.close()


def test_two_members_do_not_share_a_gpu(on_gpu: Ray) -> None:
    first, second = on_gpu.member(Total), on_gpu.member(Total)
    assert first.result(first.submit("add", 1)) == 1
    waiting = second.submit("add", 1)
    assert not ray.wait([waiting[0]], timeout=3)[0]
    first.close()
    assert second.result(waiting) == 1
    second.close()


class Total:
    """Adds up; dies when it is told to."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, number: int) -> int:
        self.value += number
        return self.value

    def process(self) -> int:
        return os.getpid()

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
    member.open()
    assert member.result(member.submit("add", 5), lasting=True) == 5
    assert member.result(member.submit("die_once", tmp_path / "another")) == 5  # nor is what came before it was opened
    directory = Path(member._kept.name)
    member.close()
    assert not directory.exists()
