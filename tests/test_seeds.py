"""Calibration seeds: what each takes, how figures are summed up, and which of them the report shows."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from conftest import CONTEXT, Checkpoints

from nashswarm import seeds
from nashswarm.blocks import Blocks
from nashswarm.models import describe, load_streamed
from nashswarm.rendering import Block, Table, Text

TAKEN = seeds.Calibration("sampled", 256, 128, 234)
RISES = {0: 0.035, 1: 0.034, 2: 0.0375}


def metrics(rise: float, bits: float = 3.0, loss: float = 3.0) -> dict[str, Any]:
    quality = {
        "tokens": 1000,
        "loss": loss + rise,
        "delta_loss": rise,
        "delta_loss_percent": 100 * rise / loss,
        "delta_loss_ci95": [rise - 0.003, rise + 0.003],
        "kl_mean": 1.1 * rise,
    }
    return {"size": {"bits_per_weight": bits}, "quality": {"sampled": quality}}


def tracked() -> dict[str, Any]:
    """What was measured with three seeds; bits per weight follow the seed in the fourth decimal."""
    measured = {seed: metrics(rise, 3.0 + seed / 10_000) for seed, rise in RISES.items()}
    return seeds.document(measured, TAKEN, {"sampled": "aa"}, {"model.safetensors": "bb"})


def section(own: Mapping[str, Any], found: Mapping[str, Any] | None) -> list[Block]:
    return seeds.section({"m": {"market": own}}, {("m", "market"): found}, ["sampled"])


def texts(blocks: list[Block]) -> str:
    return " ".join(block.text for block in blocks if isinstance(block, Text))


# --- what a seed takes ---------------------------------------------------------------------------------------------


def test_a_seed_orders_whole_windows_and_loses_nothing() -> None:
    ids = np.arange(1007, dtype=np.int32)
    found = seeds.redrawn(ids, 100, 1)
    assert found.dtype == np.int32
    assert sorted(found.tolist()) == ids.tolist()
    starts = found[:1000:100]
    assert sorted(starts.tolist()) == list(range(0, 1000, 100))
    assert starts.tolist() != list(range(0, 1000, 100))
    assert np.array_equal(found[:1000].reshape(10, 100), starts[:, None] + np.arange(100))
    assert found[1000:].tolist() == list(range(1000, 1007))


def test_seeds_differ_and_repeat_and_the_first_is_the_run() -> None:
    ids = np.arange(3200, dtype=np.int32)
    found = [seeds.redrawn(ids, 32, seed) for seed in range(4)]
    assert np.array_equal(found[0], ids)
    assert len({f.tobytes() for f in found}) == 4
    assert all(np.array_equal(f, seeds.redrawn(ids, 32, seed)) for seed, f in enumerate(found))


@pytest.mark.parametrize("tokens", [CONTEXT, 10 * CONTEXT + 5, 10**6, 1])
def test_windows_are_counted_as_scoring_takes_them(tokens: int, checkpoint: Checkpoints) -> None:
    directory = checkpoint("gpt2")
    index = describe(directory)
    ids = np.zeros(20 * CONTEXT + 3, np.int32)
    taken = seeds.calibration("c", ids, index.context, tokens)
    windows = Blocks.prepare(load_streamed(directory, index), index, ids, tokens, CONTEXT).windows
    assert (taken.windows, taken.window) == tuple(windows.shape)
    assert taken.available == 20


# --- the figures ---------------------------------------------------------------------------------------------------


def test_spread_is_that_of_the_seeds() -> None:
    found = tracked()
    assert found["original"] == {"model.safetensors": "bb"}
    assert found["calibration"] == {"corpus": "sampled", "window": 256, "windows": 128, "available": 234}
    of = found["quality"]["sampled"]
    assert (of["text"], of["tokens"], of["original_loss"]) == ("aa", 1000, 3.0)
    assert list(of["seeds"]) == ["0", "1", "2"]
    assert all(set(figures) == set(seeds.FIGURES) for figures in of["seeds"].values())
    assert of["mean"]["delta_loss"] == pytest.approx(statistics.fmean(RISES.values()), abs=1e-7)
    assert (of["min"]["delta_loss"], of["max"]["delta_loss"]) == (0.034, 0.0375)
    # (0.0355 less each: 0.0005, 0.0015, 0.002; squares 6.5e-6, over 2)
    assert of["standard_deviation"]["delta_loss"] == pytest.approx(3.25e-6**0.5, rel=1e-5)
    assert of["standard_deviation"]["bits_per_weight"] == pytest.approx(1e-4)


# --- the report ----------------------------------------------------------------------------------------------------


def test_the_table_has_the_tracked_figures() -> None:
    blocks = section(metrics(RISES[0]), tracked())
    (table,) = (block for block in blocks if isinstance(block, Table))
    assert table.caption == "Calibration seeds: m on sampled"
    assert list(zip(seeds.COLUMNS, table.rows[0], strict=True)) == [
        ("Method", "market"),
        ("Seeds", "3"),
        ("True bits", "3.000"),
        ("Rise %, the run", "+1.17"),
        ("Mean", "+1.18"),
        ("Least", "+1.13"),
        ("Most", "+1.25"),
        ("Standard deviation", "0.060"),
        ("Half the run's 95 % interval", "0.100"),
        ("KL mean", "0.03905"),
        ("Its standard deviation", "0.00198"),
    ]
    assert "128 of the 234 windows of 256 tokens in the calibration split of sampled" in texts(blocks)
    assert "share 55 % of theirs on average" in texts(blocks)


def test_where_all_of_the_text_is_taken_the_report_says_so() -> None:
    found = tracked()
    found["calibration"]["windows"] = 234
    assert "the same text, so that labels and order alone differ" in texts(section(metrics(RISES[0]), found))


def test_nothing_is_said_where_nothing_was_measured() -> None:
    assert section(metrics(RISES[0]), None) == []
    assert seeds.section({"m": {"market": metrics(0.035)}}, {}, ["sampled"]) == []


def _other_text(found: dict[str, Any]) -> None:
    found["quality"]["sampled"]["tokens"] = 1001


def _other_original(found: dict[str, Any]) -> None:
    found["quality"]["sampled"]["original_loss"] = 3.0002


def _other_corpus(found: dict[str, Any]) -> None:
    found["quality"] = {"wikitext2": found["quality"]["sampled"]}


def _other_rise(found: dict[str, Any]) -> None:
    found["quality"]["sampled"]["seeds"]["0"]["delta_loss"] += 1.1e-4


def _other_bits(found: dict[str, Any]) -> None:
    found["quality"]["sampled"]["seeds"]["0"]["bits_per_weight"] += 0.0004


REASONS = {
    _other_text: "measured on another sampled: 1,001 tokens, 1,000 here",
    _other_original: "measured on another original, whose loss on sampled is 3.0002; 3.0000 here",
    _other_corpus: "not measured on sampled",
    _other_rise: "its seed 0 was another run's: +0.03511 nats at 3.000 bits, here +0.03500 at 3.000",
    _other_bits: "its seed 0 was another run's",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_what_belongs_to_another_run_is_left_out_and_named(change: Any) -> None:
    found = copy.deepcopy(tracked())
    change(found)
    blocks = section(metrics(RISES[0]), found)
    assert not any(isinstance(block, Table) for block in blocks)
    assert f"Left out for m, market: {REASONS[change]}" in texts(blocks)


def test_late_digits_of_another_machine_are_the_same_run() -> None:
    own = metrics(RISES[0] + 0.9e-4, 3.0002)
    own["quality"]["sampled"]["loss"] = 3.0 * (1 + 1e-5) + own["quality"]["sampled"]["delta_loss"]
    assert any(isinstance(block, Table) for block in section(own, tracked()))
