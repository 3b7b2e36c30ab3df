"""One process with more and more cores of one machine: what they do for each stage."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nashswarm.benchmarks import workers
from nashswarm.benchmarks.apart import alone
from nashswarm.benchmarks.quantization import Shape, write_model
from nashswarm.benchmarks.recording import TINY
from nashswarm.benchmarks.workload import CHAINED
from nashswarm.engine import Engine, Local
from nashswarm.types import Progress

SHAPE = Shape(1, 1600, 25, 4096)  # a block of GPT-2 XL
METHODS = {"gptq4-g128": ("pack",), **dict.fromkeys(CHAINED, ("allocate", "pack"))}  # and the stages that count

Stage = Callable[[Path, Any, Engine], None]  # of a model's folder, and the tokens or the method


def measure(counts: Sequence[int], progress: Progress, shape: Shape = SHAPE) -> list[dict[str, Any]]:
    """Rows: a stage, and its seconds by the number of cores, each in a process of its own that has so many threads."""
    with tempfile.TemporaryDirectory(prefix="nashswarm-") as scratch:
        root, tiny = Path(scratch) / "model", Path(scratch) / "tiny"
        for place, own in ((root, shape), (tiny, TINY)):
            write_model(place / "model", own)
        seconds: dict[str, dict[str, float]] = {}
        for count in counts:
            for name, stage, what in progress(list(_stages()), f"{count} cores"):
                took = alone(count, _timed, stage, what, count, root, tiny)
                seconds.setdefault(name, {})[str(count)] = round(took, 2)
    return [{"stage": name, "seconds": by_count} for name, by_count in seconds.items()]


def _stages() -> Iterator[tuple[str, Stage, Any]]:
    """Each needs those before it."""
    yield f"score {workers.SCORED} tokens", workers.score, workers.SCORED
    for name, stages in METHODS.items():
        for stage in stages:
            yield f"{stage} {name}", getattr(workers, stage), name


def _timed(stage: Stage, what: Any, cores: int, root: Path, tiny: Path) -> float:
    """Seconds of a stage in this process, behind the same on a tiny model."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    engine = Local(cores)
    stage(tiny, what, engine)
    started = time.perf_counter()
    stage(root, what, engine)
    return time.perf_counter() - started
