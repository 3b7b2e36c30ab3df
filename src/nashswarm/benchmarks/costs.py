"""A cost model: seconds as a sum of terms, each of which is what a rate of the machine makes of a count.

    seconds = a products / (rate of products) + b interaction / (rate of products) + c weights / (rate of rounding)
              + d bytes / (rate of reading) + fixed

No coefficient is negative. Errors count over the square root of the seconds: long tasks, from which larger models are
predicted, weigh more than by relative errors, and short ones are not lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one core of a machine."""

    products: float  # floating-point operations a second of a float32 product of matrices
    rounding: float  # weights a second that the trellis rounds
    reading: float  # bytes a second


@dataclass(frozen=True, slots=True)
class Counts:
    """What a task does."""

    products: float = 0.0  # operations of products and factorisations, those in float64 twice
    interaction: float = 0.0  # operations of errors handed on from row to row, one at a time
    weights: float = 0.0
    bytes: float = 0.0
    fixed: float = 1.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, n) + getattr(other, n) for n in TERMS))

    def seconds(self, rates: Rates) -> np.ndarray:
        """float64 [terms]: of each term where its coefficient is 1."""
        per = (rates.products, rates.products, rates.rounding, rates.reading, 1.0)
        return np.array([getattr(self, n) / r for n, r in zip(TERMS, per, strict=True)])


TERMS = ("products", "interaction", "weights", "bytes", "fixed")


@dataclass(frozen=True, slots=True)
class Cost:
    """A fitted sum."""

    coefficients: Mapping[str, float]  # term -> coefficient; seconds where it is `fixed`
    residuals: Sequence[float]  # of each measurement: predicted over measured, less 1

    def of(self, counts: Counts, rates: Rates) -> float:
        """Seconds."""
        return float(counts.seconds(rates) @ [self.coefficients.get(n, 0.0) for n in TERMS])


def fit(measured: Sequence[tuple[Counts, float]], rates: Rates) -> Cost:
    """The sum that is nearest to measured (counts, seconds): least squares of errors / sqrt(seconds), none negative."""
    from scipy.optimize import nnls

    seconds = np.array([s for _, s in measured])
    terms = np.array([counts.seconds(rates) for counts, _ in measured])
    weights = seconds**-0.5
    rows = terms * weights[:, None]
    scale = np.where(rows.any(0), np.abs(rows).max(0), 1.0)
    found = nnls(rows / scale, seconds * weights)[0] / scale
    residuals = terms @ found / seconds - 1
    return Cost({n: float(c) for n, c in zip(TERMS, found, strict=True) if c > 0}, residuals.tolist())


SIZE = 2048  # rows and columns of a product
SIDE = 1 << 10  # rows and columns to round
READ = 1 << 26  # numbers to add up: 256 MiB


def rates() -> Rates:
    """Of one core of the machine at hand: the best of a few tries, in seconds of the processor."""
    import torch

    from nashswarm import trellis
    from nashswarm.patches import Patch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix, numbers = torch.randn(SIZE, SIZE), torch.ones(READ)
    values, ones = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32), np.ones(SIDE, np.float32)

    def snap() -> None:
        patch = Patch.alone(values.copy())
        trellis.round_patch(patch, ones, ones, np.full(SIDE, trellis.START, np.uint8), trellis.machine(32))

    products, rounding, reading = (_best(work) for work in (lambda: matrix @ matrix, snap, numbers.sum))
    torch.set_num_threads(before)
    return Rates(2.0 * SIZE**3 / products, SIDE**2 / rounding, 4.0 * READ / reading)


def _best(work: Callable[[], object]) -> float:
    found = []
    for _ in range(6):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found[1:])
