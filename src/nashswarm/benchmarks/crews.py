"""What everything waits for behind the quantized prefix, by crews of more and more threads; see `nashswarm.threads`.

One block of GPT-2 XL's width is packed as on a cluster, by a driver and a worker that are this process. Models run with
one thread; rounding, the driver's regressions and its sums have the crew. Seconds are the clock's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nashswarm import artifacts
from nashswarm.benchmarks import workers
from nashswarm.benchmarks.apart import alone
from nashswarm.benchmarks.quantization import Shape, open_model, write_model
from nashswarm.benchmarks.recording import METHODS, TINY, packed_once, units
from nashswarm.benchmarks.workload import CHAINED
from nashswarm.config import parse_method
from nashswarm.engine import Local
from nashswarm.threads import set_crew
from nashswarm.types import Progress

SHAPE = Shape(1, 1600, 25, 4096)
ALONE = {("add", "seconds"), ("correct", "gap"), ("_encode", "seconds")}  # labels of calls, and whose seconds


def measure(
    counts: Sequence[int], progress: Progress, methods: Sequence[str] = CHAINED, shape: Shape = SHAPE
) -> dict[str, dict[str, float]]:
    """Number of threads -> method, call, whose seconds, and matrix -> seconds."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="nashswarm-") as scratch:
        root, tiny = Path(scratch) / "model", Path(scratch) / "tiny"
        for place, own in ((tiny, TINY), (root, shape)):
            write_model(place / "model", own)
            alone(max(counts), _prepare, place, max(counts), tuple(methods))
        for count in counts:
            for name in progress(list(methods), f"{count} threads"):
                found.setdefault(str(count), {}).update(alone(1, _pack, (tiny, root), name, count))
    return found


def _prepare(root: Path, threads: int, methods: tuple[str, ...]) -> None:
    workers.score(root, workers.SCORED, Local(threads))
    for name in methods:
        workers.allocate(root, name, Local(threads))


def _pack(roots: tuple[Path, ...], name: str, count: int) -> dict[str, float]:
    """Of the last root; those before it load what is needed."""
    set_crew(count)
    for root in roots:
        found = dict(_calls(root, name))
    return found


def _calls(root: Path, name: str) -> Iterator[tuple[str, float]]:
    model, method = open_model(root), parse_method(name, METHODS[name])
    allocation = artifacts.read_allocation(workers.bits(root, name))
    for unit in units(packed_once(model, method, allocation, root / name, time.perf_counter)):
        if (unit.label, unit.part) in ALONE:
            yield f"{name} {unit.label} {unit.part} {unit.at.role}", float(f"{unit.seconds:.4g}")
