"""Paired differences: which baselines matter, what a figure marks as not resolved, and that nothing is cut off."""

from __future__ import annotations

from typing import Any

import pytest
from test_report import LOSS, Found, drawn, fake, with_blocks

from nashswarm import figures, forest
from nashswarm.rendering import Picture, Table


def pairs(metrics: Found) -> list[forest.Pair]:
    return forest.pairs({method: d for (_, method), d in metrics.items()}, "sampled", 500, 0)


def baselines(metrics: Found, method: str) -> list[str]:
    return [p.baseline for p in pairs(metrics) if p.method == method]


def swinging(rise: float, phase: int) -> dict[str, Any]:
    """Blocks whose rises differ from method to method by more than their mean does."""
    rises = [1989 * (rise + 0.02 * ((i + phase) % 5 - 2)) for i in range(30)]
    return {"delta_loss": rise, "loss": LOSS + rise, "window_blocks": {"rises": rises, "targets": [1989] * 30}}


def test_no_baseline_is_smaller_but_in_the_papers_own_comparisons() -> None:
    metrics = with_blocks(fake())
    found = pairs(metrics)
    smaller = [(p.method, p.baseline) for p in found if p.baseline_bits < p.bits]
    assert set(smaller) == {("paper-nash", "paper-uniform4"), ("nash", "uniform4")}
    assert {p.method for p in found} >= {"market-coded-2_0", "market-coded-3_0", "market-tiles-3_25", "nash"}
    assert "fp32" not in {name for p in found for name in (p.method, p.baseline)}


def test_the_nearest_and_the_best_of_each_family_matter() -> None:
    metrics = with_blocks(fake())
    document = metrics["reference", "rtn4-g64"]
    for name, bits, rise in (("rtn3-g64", 3.5, 0.2), ("rtn5-g64", 5.5, 0.3), ("rtn6-g64", 6.5, 0.001)):
        size = document["size"] | {"file_bytes": int(bits * 1e6), "bits_per_weight": bits}
        metrics["reference", name] = document | {"size": size, "quality": {"sampled": swinging(rise, 0)}}
    assert baselines(metrics, "market-coded-3_0") == ["rtn3-g64", "uniform4", "gptq4-g128", "rtn6-g64"]
    assert baselines(metrics, "rtn3-g64") == ["uniform4", "gptq4-g128"]  # none of its own kind


def test_difference_is_the_methods_rise_minus_the_baselines() -> None:
    (pair,) = [p for p in pairs(with_blocks(fake())) if (p.method, p.baseline) == ("market-coded-3_0", "gptq4-g128")]
    assert pair.interval.difference == pytest.approx(0.0071 - 0.0076)
    assert pair.interval.low < pair.interval.difference < pair.interval.high
    assert (pair.verdict, pair.bits, pair.baseline_bits) == (forest.BETTER, 2.999, 4.27)
    (other,) = [p for p in pairs(with_blocks(fake())) if (p.method, p.baseline) == ("market-coded-2_0", "gptq4-g128")]
    assert other.verdict == forest.WORSE


def test_an_interval_that_holds_zero_is_not_resolved_in_table_caption_and_figure() -> None:
    metrics = with_blocks(fake(methods=["gptq4-g128", "market-coded-3_0"]))
    for phase, name in enumerate(("gptq4-g128", "market-coded-3_0")):
        metrics["reference", name]["quality"]["sampled"] |= swinging(0.0071 + 0.0005 * phase, 2 * phase)
    (pair,) = pairs(metrics)
    assert pair.interval.low < 0 < pair.interval.high
    documents = {method: d for (_, method), d in metrics.items()}
    blocks = forest.section({"reference": documents}, ["sampled"], 500, 0, 40)
    (table,) = [b for b in blocks if isinstance(b, Table)]
    (picture,) = [b for b in blocks if isinstance(b, Picture)]
    assert [row[-1] for row in table.rows] == ["not resolved"]
    assert "that holds 0: 1 of 1" in picture.caption
    row = figures.Row("a", "b", pair.interval.difference, (pair.interval.low, pair.interval.high), resolved=False)
    (axes,) = drawn(figures.forest, [row], 100).axes
    assert "not resolved" in [text.get_text() for text in axes.texts]
    (mark,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert mark.get_markerfacecolor() == "white"


def test_metrics_without_blocks_give_no_section() -> None:
    documents = {method: d for (_, method), d in fake().items()}
    assert forest.section({"reference": documents}, ["sampled"], 500, 0, 40) == []


def test_every_word_of_the_figure_lies_inside_and_covers_no_other() -> None:
    values = [-1.7, -0.3, -0.02, -0.003, 0.004, 0.05, 0.6]
    rows = [
        figures.Row(
            f"market-coded-{i // 3}_25  (3.25 bits)", f"gptq{i}-g128  (4.24)", v, (v - 0.005, v + 0.005), abs(v) > 0.005
        )
        for i, v in enumerate(values)
    ]
    figure = drawn(figures.forest, rows, 100)
    figure.canvas.draw()
    (axes,) = figure.axes
    words = [t for t in (*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels(), *figure.texts) if t.get_text()]
    boxes = [t.get_window_extent() for t in words]
    whole = figure.bbox
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= whole.x1 and b.y1 <= whole.y1 for b in boxes)
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-0.5).overlaps(b.padded(-0.5))]
