"""The market against the field: who is compared with whom, and intervals between two methods from blocks alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from nashswarm.comparison import Match, between, matches
from nashswarm.intervals import Interval, blocks, bootstrap

TARGETS = np.array([255] * 40)


def measured(size: int, rise: float, noise: np.ndarray | None = None) -> dict[str, Any]:
    differences = TARGETS * (rise + (0 if noise is None else noise))
    summed = blocks(differences, TARGETS, 8)
    quality = {
        "delta_loss": rise,
        "window_blocks": {"rises": summed.rises.tolist(), "targets": summed.targets.tolist()},
    }
    return {"size": {"file_bytes": size}, "quality": {"text": quality}}


def found(documents: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], str | None]:
    return {(m.baseline, m.codec): m.market for m in matches(documents, "text", 2000, 0)}


def test_the_best_market_of_no_more_bytes() -> None:
    documents = {
        "fp32": measured(3200, 0.0),
        "rtn3-g64": measured(350, 0.2),
        "gptq2-g64": measured(250, 0.7),
        "market-coded-2_0": measured(200, 0.4),
        "market-coded-2_5": measured(250, 0.1),  # as large as gptq2: no more bytes
        "market-coded-3_0": measured(300, 0.12),  # larger than coded-2_5 and worse
        "market-coded-4_0": measured(400, 0.01),  # too large for any
        "market-tiles-3_25": measured(325, 0.15),
        "my-market": measured(10, 0.0),
    }
    assert found(documents) == {
        ("rtn3-g64", "market-coded"): "market-coded-2_5",
        ("rtn3-g64", "market-tiles"): "market-tiles-3_25",
        ("gptq2-g64", "market-coded"): "market-coded-2_5",
        ("gptq2-g64", "market-tiles"): None,
    }


@pytest.mark.parametrize("methods", [["rtn3-g64"], ["market-coded-3_0"], ["fp32", "nash"], []])
def test_without_both_sides_there_is_no_match(methods: list[str]) -> None:
    assert matches({m: measured(300, 0.1) for m in methods}, "text", 2000, 0) == []


def test_a_match_has_the_ratio_of_rises() -> None:
    documents = {"rtn3-g64": measured(350, 0.2), "market-coded-3_0": measured(300, 0.05)}
    expected = Match(
        "rtn3-g64",
        "market-coded",
        "market-coded-3_0",
        pytest.approx(0.25),
        Interval(*[pytest.approx(-0.15)] * 3),  # type: ignore[arg-type]
    )
    assert matches(documents, "text", 2000, 0) == [expected]
    documents["rtn3-g64"] = measured(350, -0.01)
    assert matches(documents, "text", 2000, 0)[0].ratio is None


def test_the_interval_is_that_of_windows() -> None:
    rng = np.random.default_rng(0)
    noises = rng.normal(0, 0.1, (2, TARGETS.size))
    ours, theirs = (measured(1, r, n)["quality"]["text"] for r, n in zip((0.05, 0.08), noises, strict=True))
    expected = bootstrap(TARGETS * (0.05 - 0.08 + noises[0] - noises[1]), TARGETS, 8, 2000, seed=3)
    got = between(ours, theirs, 2000, seed=3)
    assert got is not None
    assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(expected), rel=1e-12)
    assert between(theirs, ours, 2000, seed=3).low == pytest.approx(-got.high)  # type: ignore[union-attr]


def test_pairing_sees_what_two_intervals_apart_do_not() -> None:
    """Both rises swing by 0.3 with the text, together; their difference of 0.02 does not."""
    swing = np.random.default_rng(0).normal(0, 0.3, TARGETS.size)
    ours, theirs = (measured(1, rise, swing)["quality"]["text"] for rise in (0.10, 0.12))
    alone = bootstrap(TARGETS * (0.10 + swing), TARGETS, 8, 2000, seed=0)
    assert alone.high > alone.difference + 0.02
    got = between(ours, theirs, 2000, seed=0)
    assert got is not None
    assert got.resolved
    assert got.high == pytest.approx(-0.02)


@pytest.mark.parametrize("change", ["missing", "other tokens", "fewer blocks"])
def test_other_tokens_give_no_interval(change: str) -> None:
    ours, theirs = (measured(1, rise)["quality"]["text"] for rise in (0.1, 0.2))
    if change == "missing":
        del theirs["window_blocks"]
    elif change == "other tokens":
        theirs["window_blocks"]["targets"][0] += 1
    else:
        theirs["window_blocks"] = {k: v[:-1] for k, v in theirs["window_blocks"].items()}
    assert between(ours, theirs, 2000, 0) is None
