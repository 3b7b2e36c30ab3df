"""Predicted rises of single matrices: the formula, the map, and that they sum to what the market predicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_report import fake, with_tensors

from nashswarm import distortion
from nashswarm.allocators import market
from nashswarm.rendering import Picture
from nashswarm.types import Allocation, Candidates, Choice, Offer, TensorSpec


def exponential(name: str, scale: float) -> Offer:
    """A matrix whose distortion is scale 4^-octaves and whose bytes are an eighth of its weights for each octave."""
    tensor = TensorSpec(name, (64, 64), "linear", "mlp", 0)
    octaves = np.linspace(0.0, 12.0, 49)
    size, damage = 512.0 * octaves[None], scale * 4.0 ** -octaves[None]
    candidates = Candidates(octaves, size, damage, continuous=True, weights=np.array([4096]))
    return Offer(tensor, candidates=candidates)


def test_where_errors_go_with_the_step_it_is_the_distortion_itself() -> None:
    allocation = market.allocate([exponential("a", 1.0), exponential("b", 9.0)], market.Settings(budget_bytes=4096))
    found = distortion.predicted(allocation)
    for name, scale in (("a", 1.0), ("b", 9.0)):
        step = allocation.choices[name].step
        assert step is not None
        assert found[name] == pytest.approx(scale * 4.0**step, rel=0.02)  # a step of the market's grid is 0.8 %
    assert sum(found.values()) == pytest.approx(allocation.predicted_rise, rel=0.02)


def test_what_bought_no_steps_has_none() -> None:
    assert distortion.predicted(Allocation({"a": Choice(bits=4)}, {4: 1})) == {}
    assert distortion.predicted(Allocation({"a": Choice(tiles=("22",))}, {2: 1}, price=1e-8)) == {}


def test_the_map_sums_what_its_caption_says() -> None:
    documents = {m: d for (_, m), d in with_tensors(fake(methods=["nash", "market-coded-3_0"])).items()}
    names = [row[0] for row in documents["nash"]["allocation"]["tensors"]]
    slopes = {name: Choice(step=-9.0, size=100.0, slope=2 * math.log(2) * (i + 1)) for i, name in enumerate(names)}
    total = 1e-3 * sum(range(1, len(names) + 1))
    of = {
        ("reference", "nash"): Allocation({name: Choice(bits=4) for name in names}, {4: 1}),
        ("reference", "market-coded-3_0"): Allocation(slopes, {3: 1}, price=1e-3, predicted_rise=0.125),
    }
    (picture,) = distortion.pictures("reference", documents, of, 40)
    assert isinstance(picture, Picture)
    assert picture.name == "distortion-reference-market-coded-3_0.png"
    assert f"sum to {total:.4f} nats per token; the market's own prediction is 0.1250" in picture.caption
    assert "most MLP down of layer 2" in picture.caption
    assert distortion.pictures("reference", documents, {}, 40) == []
