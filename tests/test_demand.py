"""The demand curves: points by price, one curve for each codec and each kind of matrix, none without a market."""

from __future__ import annotations

import pytest
from test_report import Found, drawn, fake, with_tensors

from nashswarm import demand, figures

BUDGETS = {"market-coded-2_0": 3e-7, "market-coded-3_0": 6e-8, "market-tiles-3_25": 8e-8}


def bought() -> demand.Documents:
    metrics: Found = with_tensors(fake(methods=list(BUDGETS)))
    for (_, method), document in metrics.items():
        document["allocation"]["price"] = BUDGETS[method]
    return {method: document for (_, method), document in metrics.items()}


def test_budgets_of_a_codec_are_points_of_one_curve() -> None:
    found = demand.curves(bought())
    assert found == {"market-coded": [(6e-8, 2.999), (3e-7, 1.999)], "market-tiles": [(8e-8, 3.249)]}


def test_kinds_are_means_over_layers() -> None:
    found = demand.of_kinds({m: d for m, d in bought().items() if m.startswith("market-coded")})
    assert list(found) == ["wte", "wpe", "q, k, v", "attn out", "MLP up", "MLP down"]
    assert found["q, k, v"] == [(6e-8, pytest.approx(2.999 + 0.25)), (3e-7, pytest.approx(1.999 + 0.25))]
    assert found["wte"] == [(6e-8, pytest.approx(3.999)), (3e-7, pytest.approx(2.999))]


def test_figure_has_a_line_for_each_curve() -> None:
    documents = bought()
    kinds = demand.of_kinds(documents)
    whole, below = drawn(figures.demand, demand.curves(documents), kinds, "market-coded", 40).axes
    assert [line.get_label() for line in whole.lines] == ["market, coded", "market, tiles"]
    assert [line.get_label() for line in below.lines] == list(kinds)
    assert len(demand.pictures("reference", documents, 40)) == 1


def test_rows_of_matrices_may_be_missing() -> None:
    documents = {m: d | {"allocation": {"price": 1e-8}} for m, d in bought().items()}
    assert demand.of_kinds(documents) == {}
    assert len(drawn(figures.demand, demand.curves(documents), {}, "market-coded", 40).axes) == 1


def test_without_a_market_there_is_no_picture() -> None:
    assert demand.pictures("reference", {}, 40) == []
