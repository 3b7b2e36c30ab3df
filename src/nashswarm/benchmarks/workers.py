"""Two Ray workers of one thread each against this process with two threads, on one machine.

The cluster is up and its workers are warm: a round before the first that counts has loaded what they need. They are
as nice as this process, where Ray would give way to everything else on the machine (niceness 15).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nashswarm import artifacts, evaluation, loading, models, quantize, statistics
from nashswarm.benchmarks.quantization import Shape, open_model, random_text, write_model
from nashswarm.benchmarks.recording import METHODS, READING, split_of
from nashswarm.benchmarks.timing import Spread, interleaved, plain
from nashswarm.benchmarks.workload import BATCH
from nashswarm.config import Compute, Scoring, parse_method
from nashswarm.console import quiet
from nashswarm.engine import Engine, Local, Ray
from nashswarm.threads import set_threads

SHAPE = Shape(2, 768, 12, 4096)
DEEP = replace(SHAPE, layers=12)  # where two blocks are packed too soon to tell
SCORED = 4 * BATCH  # tokens
EVALUATED = (4 * BATCH, 32 * BATCH)  # tokens: each worker loads and decodes the model once, whatever they are
BEHIND = 16384  # tokens of the prefix
STORE = 4 << 30  # bytes of the object store
PINGS = 200


def compare(rounds: int, methods: tuple[str, ...] = ("gptq4-g128", "market-coded-3_0")) -> dict[str, Any]:
    """Rows of stages: seconds of both, and local's over Ray's, round by round. And seconds of a task of nothing."""
    set_threads(2)
    with tempfile.TemporaryDirectory(prefix="nashswarm-") as scratch, _cluster() as ray:
        root, deep = Path(scratch) / "shallow", Path(scratch) / "deep"
        write_model(root / "model", SHAPE)
        write_model(deep / "model", DEEP)
        score(deep, BATCH, Local(2))
        quick = f"pack {methods[0]}, {DEEP.layers} blocks"
        stages = {**_stages(root, methods), quick: partial(pack, deep, methods[0])}
        found = []
        for name, stage in stages.items():
            engines: dict[str, Engine] = {"local": Local(2), "ray": ray}
            turns = {key: partial(lambda run, engine, _: run(engine), stage, engine) for key, engine in engines.items()}
            times = interleaved(turns, rounds)
            row = {key: plain(Spread.of(own)) for key, own in times.items()}
            found.append({"stage": name, **row, "ratio": plain(Spread.of(times["local"] / times["ray"]))})
        return {"rows": found, "round_trip": plain(Spread.of(np.array(_pings(ray)))), "rounds": rounds}


@contextmanager
def _cluster() -> Iterator[Ray]:
    """One node of two cores."""
    from ray import cluster_utils

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray spells it so)
    own: dict[str, Any] = {"num_cpus": 2, "object_store_memory": STORE, "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=own)
    made = Ray(Compute(1, "ray", cluster.address))
    try:
        yield made
    finally:
        made.ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call, unused-ignore]


def _stages(root: Path, methods: tuple[str, ...]) -> dict[str, Callable[[Engine], None]]:
    """Each needs those before it to have run once."""
    packing = {f"pack {name}": partial(pack, root, name) for name in methods}
    evaluating = {f"evaluate {tokens} tokens": partial(evaluate, root, methods[0], tokens) for tokens in EVALUATED}
    return {f"score {SCORED} tokens": partial(score, root, SCORED), **packing, **evaluating}


def score(root: Path, tokens: int, engine: Engine) -> None:
    """Gather statistics."""
    index = models.describe(root / "model")
    load, ids = partial(models.load_streamed, root / "model", index), random_text(index, tokens)
    for tensor, found in statistics.gather(load, index, ids, Scoring(tokens=tokens), quiet, None, engine):
        artifacts.write_statistics(root, tensor.name, found)


def allocate(root: Path, name: str, engine: Engine) -> None:
    """Decide the bits of a method."""
    model, method = open_model(root), parse_method(name, METHODS[name])
    with artifacts.fresh_directory(bits(root, name)) as target:
        artifacts.write_allocation(target, quantize.allocate(model, method, quiet, engine))


def pack(root: Path, name: str, engine: Engine) -> None:
    """Pack by a method, whose bits are decided once."""
    model, method = open_model(root), parse_method(name, METHODS[name])
    if not bits(root, name).exists():
        allocate(root, name, Local(2))
    allocation = artifacts.read_allocation(bits(root, name))
    quantize.pack(model, method, allocation, random_text(model.index, BEHIND), root / name, quiet, None, engine)


def bits(root: Path, name: str) -> Path:
    """Where `allocate` writes those of a method."""
    return root / f"{name}-bits"


def evaluate(root: Path, name: str, tokens: int, engine: Engine) -> None:
    """Measure what was packed by a method."""
    index = models.describe(root / "model")
    ids, path = random_text(index, tokens), root / f"said-{tokens}.safetensors"
    if not path.exists():
        load = partial(models.load_streamed, root / "model", index)
        artifacts.write_record(path, evaluation.original_outputs(load, split_of(ids), READING, index.context, quiet))
    said = partial(artifacts.read_record, path, evaluation.Baseline)
    load = partial(loading.open_for_evaluation, root / name, root / "model", index)
    original = partial(evaluation.open_original, root / "model", index, said)
    evaluation.measure(load, original, split_of(ids), READING, index.context, quiet, engine)


def nothing(shared: object, number: int) -> int:
    """A task that does not compute."""
    del shared
    return number


def _pings(ray: Ray) -> list[float]:
    """Seconds of one such task at a time, there and back."""
    shared, found = ray.share(dict), []
    for number in range(PINGS):
        started = time.perf_counter()
        list(ray.map(nothing, shared, [(number,)]))
        found.append(time.perf_counter() - started)
    return found[PINGS // 10 :]
