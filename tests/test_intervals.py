"""Intervals that hold what they promise, whether drawn from windows or from blocks of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nashswarm.intervals import Blocks, Interval, bootstrap, draw, rounded, student, tokens_needed


def test_the_interval_contains_the_truth_95_times_in_100() -> None:
    """200 runs of 400 windows whose differences hang together within texts of 5 windows; blocks of 10.

    A percentile interval of 40 blocks holds about 94 %; 200 runs spread by 1.7 % around it, so 0.89 to 0.99 are three
    standard deviations. Blocks of one window, which take windows for independent, hold far less: the test can fail.
    """
    rng, truth = np.random.default_rng(0), 0.02
    held = {1: 0, 10: 0}
    for run in range(200):
        targets = rng.integers(20, 60, 400)
        text = np.repeat(rng.normal(size=80), 5)
        differences = targets * (truth + 0.3 * text + 0.1 * rng.normal(size=400))
        for block in held:
            interval = bootstrap(differences, targets, block, 400, seed=run)
            held[block] += interval.low <= truth <= interval.high
    assert 0.89 <= held[10] / 200 <= 0.99
    assert held[1] / 200 < 0.75


@pytest.mark.parametrize("way", ["drawn", "reckoned"])
@pytest.mark.parametrize("tail", ["normal", "heavy"])
def test_both_intervals_hold_the_truth_93_to_97_times_in_100(way: str, tail: str) -> None:
    """1,000 runs of 30 blocks, as the embedded texts have them, of unequal length; binomial spread is 0.7 %."""
    rng, truth, held = np.random.default_rng(1), 0.02, 0
    for run in range(1000):
        targets = rng.integers(1500, 2100, 30)
        noise = rng.normal(size=30) if tail == "normal" else rng.standard_t(5, size=30)
        found = Blocks(targets * (truth + 0.01 * noise), targets)
        interval = draw(found, 2000, seed=run) if way == "drawn" else student(found)
        held += interval.low <= truth <= interval.high
    assert 0.93 <= held / 1000 <= 0.97


def test_the_plain_percentiles_would_hold_less() -> None:
    """So widening them is no ornament: at 10 blocks it is a tenth of the width."""
    rng = np.random.default_rng(0)
    found = Blocks(rng.normal(size=10), np.full(10, 100))
    plain = np.quantile(found.rises[np.random.default_rng(0).integers(0, 10, (2000, 10))].mean(1) / 100, [0.025, 0.975])
    wide = draw(found, 2000, seed=0)
    assert wide.high - wide.low > 1.1 * (plain[1] - plain[0])


def test_students_interval_of_equal_blocks_is_the_textbooks() -> None:
    rises = np.array([1.0, 2.0, 4.0, 5.0])
    found = student(Blocks(rises, np.full(4, 10)))
    half = 3.182446 * rises.std(ddof=1) / 2 / 10  # t of three degrees of freedom
    assert (found.difference, found.high - found.difference) == (pytest.approx(0.3), pytest.approx(half, rel=1e-6))
    assert not student(Blocks(rises[:1], np.array([10]))).resolved


def test_four_times_the_tokens_halve_the_gap_that_is_resolved() -> None:
    rng = np.random.default_rng(0)
    found = Blocks(rng.normal(5, 3, 30), np.full(30, 100))
    interval = student(found)
    half = interval.high - interval.difference
    assert tokens_needed(found, half) == pytest.approx(3000)
    assert tokens_needed(found, half / 2) == pytest.approx(12000)
    assert math.isinf(tokens_needed(found, 0))


def test_the_interval_is_of_the_ratio_of_sums() -> None:
    """All windows rise by 0.5 a token, whatever their length: there is nothing to resample."""
    targets = np.array([10, 20, 30, 40, 1, 7])
    interval = bootstrap(0.5 * targets, targets, 2, 2000, seed=0)
    assert interval == Interval(0.5, pytest.approx(0.5), pytest.approx(0.5))  # type: ignore[arg-type]


def test_long_windows_weigh_more_than_short_ones() -> None:
    """Half of the windows rise by 1 on one target, half by 0 on nine: 0.1 a token, not the windows' mean of 0.5."""
    interval = bootstrap(np.tile([1.0, 0], 100), np.tile([1, 9], 100), 1, 2000, seed=0)
    assert interval.difference == 0.1
    assert 0.07 < interval.low < 0.1 < interval.high < 0.14  # 100 +- 7 short windows in a draw of 200


def test_the_interval_is_drawn_by_its_seed() -> None:
    rng = np.random.default_rng(0)
    targets, differences = np.full(50, 31), rng.normal(size=50)
    one, same, other = (bootstrap(differences, targets, 8, 2000, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert one.low < one.difference < one.high


@pytest.mark.parametrize(
    ("low", "high", "resolved"),
    [
        (0.1, 0.2, True),
        (-0.2, -0.1, True),
        (-0.1, 0.1, False),
        (0.0, 0.1, False),
        (0, 0, True),
        (0.1, 0.1, False),
        (-0.1, -0.1, False),
    ],
)
def test_resolved_is_an_interval_without_zero_or_no_difference_at_all(low: float, high: float, resolved: bool) -> None:
    assert Interval((low + high) / 2, low, high).resolved == resolved


def test_one_block_resolves_nothing() -> None:
    """Resampling one block gives the same block: an interval of no width is no evidence."""
    interval = bootstrap(np.array([0.3, -0.2, 0.4]), np.array([31, 31, 31]), 8, 2000, seed=0)
    assert not interval.resolved


def test_rounding_keeps_six_significant_digits() -> None:
    assert [rounded(x) for x in (5941.8231, 0.00123456789, 0.0, np.float32(0.1), -12345678)] == [
        5941.82,
        0.00123457,
        0.0,
        0.1,
        -12345700.0,
    ]
