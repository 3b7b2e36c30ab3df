"""Paired 95 % intervals over blocks of windows, two ways, and the digits that figures are kept to.

One is drawn (block bootstrap), the other reckoned (Student's t of the ratio of sums). Both know that 30 blocks are few.
`evaluation` draws from windows, the report from the blocks that the metrics hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, stdtrit

COVERAGE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A paired difference of losses with its 95 % interval, nats per token."""

    difference: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes 0, or all of it is exactly 0. One without width, of one block, says nothing."""
        if self.low == self.high:
            return self.difference == self.low == 0
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sums over blocks of neighbouring windows: what a block bootstrap draws from.

    Two models measured on the same tokens have the same targets; the difference of their rises is the difference of
    their blocks', so that the interval between any two needs no windows.
    """

    rises: np.ndarray  # float64 [blocks], nats, summed over the block's targets
    targets: np.ndarray  # int64 [blocks]


def blocks(differences: np.ndarray, targets: np.ndarray, block: int) -> Blocks:
    """Sum `differences` (nats) and `targets`, both [windows], over each `block` contiguous windows."""
    starts = np.arange(0, differences.size, block)
    return Blocks(np.add.reduceat(differences, starts), np.add.reduceat(targets, starts))


def draw(of: Blocks, resamples: int, seed: int) -> Interval:
    """Percentile interval of sum(rises) / sum(targets): as many blocks as there are, drawn `resamples` times.

    Its percentiles lie a little farther out than 2.5 and 97.5, as few blocks ask for: at Phi(-t sqrt(n / (n - 1))) with
    Student's t for n blocks (the expanded percentile interval of Hesterberg, 2015, arXiv:1411.5279, section 4.1).
    """
    count = of.rises.size
    draws = np.random.default_rng(seed).integers(0, count, (resamples, count))
    ratios = of.rises[draws].sum(1) / of.targets[draws].sum(1)
    tail = float(ndtr(-_student(count) * math.sqrt(count / (count - 1)))) if count > 1 else (1 - COVERAGE) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return Interval(_ratio(of), float(low), float(high))


def student(of: Blocks) -> Interval:
    """The interval of the same ratio r by Student's t: r +- t s, s^2 = n / (n - 1) sum (rise - r target)^2 / targets^2.

    The linearised variance of a ratio estimator (Cochran, Sampling Techniques, 6.4), blocks being the units.
    """
    count, ratio = of.rises.size, _ratio(of)
    half = _student(count) * _deviation(of) if count > 1 else 0.0
    return Interval(ratio, ratio - half, ratio + half)


def tokens_needed(of: Blocks, gap: float) -> float:
    """How many targets of this kind of text would make the interval's half width `gap`, nats per token."""
    half = _student(of.rises.size) * _deviation(of) if of.rises.size > 1 else math.inf
    return float(of.targets.sum()) * (half / gap) ** 2 if gap else math.inf


def _ratio(of: Blocks) -> float:
    return float(of.rises.sum() / of.targets.sum())


def _deviation(of: Blocks) -> float:
    """Of the ratio of sums."""
    count, rest = of.rises.size, of.rises - _ratio(of) * of.targets
    return math.sqrt(count / (count - 1) * float(rest @ rest)) / float(of.targets.sum())


def _student(count: int) -> float:
    """The quantile of Student's t beyond which half of what COVERAGE leaves lies, for `count` blocks."""
    return float(stdtrit(count - 1, (1 + COVERAGE) / 2))


def bootstrap(differences: np.ndarray, targets: np.ndarray, block: int, resamples: int, seed: int) -> Interval:
    """Percentile interval of sum(differences) / sum(targets), both [windows], over blocks of `block` windows."""
    return draw(blocks(differences, targets, block), resamples, seed)


def rounded(value: float | np.floating[Any], digits: int = 6) -> float:
    """Six significant digits: what float32 arithmetic on another machine may change is left out."""
    return float(f"{float(value):.{digits}g}")
