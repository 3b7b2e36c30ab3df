"""Paired 95 % intervals by a bootstrap over blocks of windows, and the digits that figures are kept to.

Needs numpy only: `evaluation` draws from windows, the report from the blocks that the metrics hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


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
    """Percentile interval of sum(rises) / sum(targets): as many blocks as there are, drawn `resamples` times."""
    count = of.rises.size
    draws = np.random.default_rng(seed).integers(0, count, (resamples, count))
    ratios = of.rises[draws].sum(1) / of.targets[draws].sum(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Interval(float(of.rises.sum() / of.targets.sum()), float(low), float(high))


def bootstrap(differences: np.ndarray, targets: np.ndarray, block: int, resamples: int, seed: int) -> Interval:
    """Percentile interval of sum(differences) / sum(targets), both [windows], over blocks of `block` windows."""
    return draw(blocks(differences, targets, block), resamples, seed)


def rounded(value: float | np.floating[Any], digits: int = 6) -> float:
    """Six significant digits: what float32 arithmetic on another machine may change is left out."""
    return float(f"{float(value):.{digits}g}")
