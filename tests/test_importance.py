"""Every file in importance/ against the room's contract, and the paper's two formulas by hand."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import PROJECT

from nashswarm.config import load_room
from nashswarm.importance import magnitude, swarm

NAMES = sorted(p.stem for p in (PROJECT / "src/nashswarm/importance").glob("*.py") if p.stem != "__init__")
SHAPES = [(1, 1), (1, 7), (7, 1), (2, 2), (5, 9)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.1, 1e30])
def test_importance_is_finite_comparable_and_leaves_weights_alone(
    name: str, shape: tuple[int, int], scale: float
) -> None:
    room = load_room("importance", name)
    assert room.__doc__
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    before = weight.clone()
    found = room.importance(weight)
    assert torch.equal(weight, before)
    assert found.shape == weight.shape
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all())
    assert bool((found >= 0).all())
    assert torch.equal(found, room.importance(weight))
    if found.numel():
        found.add_(1)  # a copy: what is done to the result does not reach the weights
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", NAMES)
def test_importance_takes_views_as_they_are(name: str) -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    room = load_room("importance", name)
    assert torch.equal(room.importance(weight.T), room.importance(weight.T.contiguous()))


def test_magnitude_is_the_absolute_value() -> None:
    assert magnitude.importance(torch.tensor([[-2.0, 0.5], [0.0, 3.0]])).tolist() == [[2.0, 0.5], [0.0, 3.0]]


def test_swarm_multiplies_by_the_four_neighbours() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [4.0, -5.0, 6.0], [0.0, 8.0, -9.0]])
    expected = [
        [1 * 3 * 5, 2 * 2 * 4 * 6, 3 * 3 * 7],
        [4 * 2 * 6 * 1, 5 * 3 * 5 * 7 * 9, 6 * 4 * 6 * 10],
        [0, 8 * 1 * 6 * 10, 9 * 9 * 7],
    ]
    assert swarm.importance(weight).tolist() == expected


def test_swarm_matches_a_loop_over_neighbours() -> None:
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = swarm.importance(weight.float())
    for i in range(5):
        for j in range(6):
            near = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
            inside = [abs(float(weight[k, m])) for k, m in near if 0 <= k < 5 and 0 <= m < 6]
            expected = abs(float(weight[i, j])) * math.prod(1 + w for w in inside)
            # Six float32 roundings of the weights and of products: 6 * 6e-8, relative.
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-6)
