"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nashswarm.benchmarks.matrices import packed
from nashswarm.benchmarks.timing import Reader, Spread, Turn, in_turn, interleaved, plain
from nashswarm.kernels.matrix import Matrix

PACKAGES = ("torch", "onnxruntime", "transformers", "numpy", "numba")
COLUMNS = 4096  # of what is read: a product with 1024 reads a tenth slower
COPIES = 4  # that what is cold is cut into; of blocks of 8 MiB, waking threads takes half the time


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine and what runs on it; neither its name nor the date."""

    processor: str
    cores: int  # that the process may use
    threads: int  # that it does use
    instructions: str  # of the kernels
    memory_bytes: int
    load: float  # the system's load before the first round; above 0.5 others were at work
    reading: Spread  # bytes per second, weights cold: the faster of two readers, round by round


def machine(threads: int, cold_mib: int, rounds: int) -> Machine:
    """The machine at hand. Reads `cold_mib` MiB `rounds` times in two ways."""
    import psutil

    load = os.getloadavg()[0]
    made = Readers.make((cold_mib << 20) // COPIES, COPIES)
    times = made.best(interleaved(made.turns, COPIES * rounds)).seconds
    return Machine(
        _processor(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads,
        Matrix(packed((16, 128), np.random.default_rng(0))).instructions(),
        psutil.virtual_memory().total,
        round(load, 2),
        Spread.of(made.bytes / times),
    )


@dataclass(frozen=True, slots=True)
class Readers:
    """Two ways to read `bytes` bytes with torch's threads; which one is faster follows the machine."""

    turns: dict[str, Turn]
    bytes: int

    @classmethod
    def make(cls, size: int, copies: int) -> Readers:
        """Of about `size` bytes, from as many copies."""
        made = [torch.ones(max(1, size // (4 * COLUMNS)), COLUMNS) for _ in range(copies)]
        vector = torch.ones(COLUMNS)
        ways: tuple[Callable[[Tensor], object], ...] = (Tensor.sum, lambda block: torch.mv(block, vector))
        turns = {f"reading {i}": in_turn(made, way, i, len(ways)) for i, way in enumerate(ways)}
        return cls(turns, made[0].nbytes)

    def best(self, times: dict[str, np.ndarray]) -> Reader:
        """The faster of the two, round by round; takes both out of `times`."""
        return Reader(np.minimum(*(times.pop(name) for name in self.turns)), self.bytes)


def document(found: Machine, settings: Any, records: Sequence[Any]) -> dict[str, Any]:
    """A kind's metrics: the machine, the packages that were used, what was asked for, a row for each contestant."""
    packages = {name: str(sys.modules[name].__version__) for name in PACKAGES if name in sys.modules}
    return {
        "machine": plain(found) | {"packages": packages},
        "settings": plain(settings),
        "rows": [plain(record) for record in records],
    }


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
