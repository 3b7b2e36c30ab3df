"""The paper's rule: rank single weights by importance and cut the ranking at fixed shares.

Thresholds are quantiles of `sample` weights of the tensor drawn without replacement; with the paper's shares, weights
at or above the 0.90 quantile get 8 bits, at or above the 0.70 quantile 4 bits, the rest 2 bits. Since the quantiles
come from a draw, the average width varies with the seed: 2.95 to 3.05 bits at 10,000 weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nashswarm.types import Allocation, Choice, Offer

BUYS = "classes"
NEEDS_IMPORTANCE = True


@dataclass(frozen=True, slots=True)
class Settings:
    """`shares` of the weights, in rising importance, get the widths in `bits`."""

    bits: tuple[int, ...] = (2, 4, 8)
    shares: tuple[float, ...] = (0.7, 0.2, 0.1)
    sample: int = 10_000  # weights drawn for the quantiles
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.bits):
            raise ValueError(f"shares: {len(self.shares)} shares for {len(self.bits)} widths; give one for each")
        if abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError(f"shares: {list(self.shares)} sum to {sum(self.shares):.6g}, not to 1")
        if min(self.shares) < 0:
            raise ValueError(f"shares: {list(self.shares)} holds a negative share")
        if self.sample < 1:
            raise ValueError(f"sample: {self.sample} is too small; at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is too small; at least 0")


def widths(settings: Settings) -> tuple[int, ...]:
    """Every width in bits that `settings` can lead to."""
    return settings.bits


def allocate(offers: Iterable[Offer], settings: Settings) -> Allocation:
    """Thresholds for every tensor, and the true counts that they lead to."""
    choices: dict[str, Choice] = {}
    histogram: Counter[int] = Counter()
    for index, offer in enumerate(offers):
        assert offer.importance is not None
        # One stream for each tensor, so that a tensor's draw does not depend on what came before it.
        generator = np.random.default_rng([settings.seed, index])
        thresholds = _thresholds(offer.importance, settings, generator)
        choices[offer.tensor.name] = Choice(classes=settings.bits, thresholds=tuple(map(float, thresholds)))
        counts = np.bincount(np.searchsorted(thresholds, offer.importance, side="right"), minlength=len(settings.bits))
        for bits, count in zip(settings.bits, counts, strict=True):
            histogram[bits] += int(count)
    return Allocation(choices, dict(histogram))


def _thresholds(importance: np.ndarray, settings: Settings, generator: np.random.Generator) -> np.ndarray:
    """float32 [classes - 1], ascending: the quantiles at the cumulated shares of a seeded draw."""
    count = min(settings.sample, importance.size)
    draw = importance[generator.choice(importance.size, size=count, replace=False, shuffle=False)]
    return np.asarray(np.quantile(draw, np.cumsum(settings.shares)[:-1]), np.float32)
