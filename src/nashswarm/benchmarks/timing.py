"""Interleaved rounds: in each, every contestant has its turn, and only times of one round are compared.

What else a machine does then falls on all contestants alike, and shows in the spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeVar

import numpy as np

T = TypeVar("T")
Turn = Callable[[int], object]  # with the number of the round
READING = "reading as many bytes as packed"
DIGITS = 4  # of a figure in the metrics; none of them repeats so well


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """Of [rounds]."""
        low, median, high = np.percentile(values, [25, 50, 75])
        return cls(*(significant(float(v)) for v in (median, low, high)))

    def __str__(self) -> str:
        return f"{self.median:6.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant at one piece of work."""

    what: str
    contestant: str
    seconds: Spread | None = None
    ratio: Spread | None = None  # the reference's seconds over these, round by round: above 1 is faster
    bytes: int | None = None  # that have to be read, or made
    rate: float | None = None  # bytes over the median of seconds
    share: Spread | None = None  # bytes over seconds, over those of the reader, round by round
    items: int | None = None  # weights or tokens, from which other sizes can be projected
    note: str | None = None  # why there are no figures


@dataclass(frozen=True, slots=True)
class Reader:
    """Who only reads: times in the same rounds, and how many bytes."""

    seconds: np.ndarray
    bytes: int

    def of(self, size: int) -> np.ndarray:
        """Seconds [rounds] for so many bytes."""
        return self.seconds * (size / self.bytes)


def significant(value: float) -> float:
    """A number with DIGITS digits."""
    return float(f"{value:.{DIGITS}g}")


def in_turn(copies: Sequence[T], use: Callable[[T], object], place: int = 0, users: int = 1) -> Turn:
    """A turn with the next of several copies, which another user did not have just before.

    Arguments: `place` of this one among `users` of the same copies: what one has read the next would find in the cache.
    """
    return lambda i: use(copies[(i * users + place) % len(copies)])


def interleaved(contestants: Mapping[str, Turn], rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each; a round before them is not counted."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, turn in contestants.items():
            started = time.perf_counter()
            turn(i)
            found[name].append(time.perf_counter() - started)
    return {name: np.array(times[1:]) for name, times in found.items()}


def rows(
    what: str,
    times: Mapping[str, np.ndarray],
    reference: str,
    sizes: Mapping[str, int],
    reader: Reader | None = None,
    items: int | None = None,
) -> list[Row]:
    """One row for each contestant. Arguments: `times`, seconds [rounds]; `sizes`, bytes, of those that have a rate."""
    return [_row(what, name, found, times[reference], sizes.get(name), reader, items) for name, found in times.items()]


def _row(
    what: str,
    name: str,
    found: np.ndarray,
    reference: np.ndarray,
    size: int | None,
    reader: Reader | None,
    items: int | None,
) -> Row:
    return Row(
        what,
        name,
        Spread.of(found),
        Spread.of(reference / found),
        size,
        None if size is None else significant(size / float(np.median(found))),
        None if size is None or reader is None else Spread.of(reader.of(size) / found),
        items,
    )


def plain(record: Any) -> dict[str, Any]:
    """A record as the metrics hold it, without what it has not."""
    return {key: value for key, value in asdict(record).items() if value is not None}
