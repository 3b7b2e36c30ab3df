"""Where the loss is predicted to come from: the share of every matrix, as the market that bought for it saw it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nashswarm import artifacts
from nashswarm.artifacts import Layout
from nashswarm.bitmap import BitMap, sum_map
from nashswarm.config import Active
from nashswarm.rendering import Block, Picture
from nashswarm.types import Allocation

MILLI = 1e-3  # nats: cells are read in thousandths
Allocations = Mapping[tuple[str, str], Allocation]  # of (model, method)


def gather(layout: Layout, active: Active) -> dict[tuple[str, str], Allocation]:
    """The allocations of active models and methods, of which `predicted` knows the steps' prices.

    Those that are at hand: a report can be made of tracked metrics alone (`make difference`).
    """
    return {
        (model, method): artifacts.read_allocation(layout.allocation(model, method))
        for model in active.models
        for method in active.methods
        if layout.allocation(model, method).exists()
    }


def predicted(allocation: Allocation) -> dict[str, float]:
    """Tensor -> predicted rise in loss, nats per token: p s / (2 ln 2). Empty where no steps were bought.

    At the equilibrium no matrix gains by another step, so that dD/do = -p s for its distortion D, octaves o of finer
    steps, price p (nats per byte) and slope s (bytes per octave), which the allocation holds. An error's power goes
    with the square of the step, D ~ 4^-o, hence dD/do = -2 ln 2 D. Coarse steps bend that law: the sum is 8 % below
    the curves that the market bought by at 3.0 bits on the reference model, 11 % at 2.5, 16 % at 2.0.
    """
    if allocation.price is None:
        return {}
    slopes = {name: choice.slope for name, choice in allocation.choices.items() if choice.slope is not None}
    return {name: allocation.price * slope / (2 * math.log(2)) for name, slope in slopes.items()}


def pictures(model: str, documents: Mapping[str, Mapping[str, Any]], of: Allocations, dpi: int) -> list[Block]:
    """A map of layers and kinds of matrix for every method of one model that bought steps.

    Arguments: `documents`, method -> metrics, whose rows of matrices say where each lies; `dpi`, of the figures.
    """
    blocks: list[Block] = []
    for method, document in documents.items():
        allocation, rows = of.get((model, method)), document.get("allocation", {}).get("tensors") or []
        rises = predicted(allocation) if allocation else {}
        found = sum_map([(name, part, layer, rises[name] / MILLI) for name, part, layer, *_ in rows if name in rises])
        if allocation and found:
            blocks.append(_picture(model, method, found, allocation, dpi))
    return blocks


def _picture(model: str, method: str, found: BitMap, allocation: Allocation, dpi: int) -> Picture:
    from nashswarm import figures  # with matplotlib, which the console table can do without

    limits = 0.0, max([*(found.cells or found.outside).values(), MILLI])
    title, label = (
        f"{method}: where the loss is predicted to come from",
        "predicted rise, thousandths of a nat per token",
    )
    total = sum(found.values()) * MILLI
    own = f"; the market's own prediction is {allocation.predicted_rise:.4f}" if allocation.predicted_rise else ""
    caption = (
        f"Predicted rise in loss by layer and kind of matrix, {method} on {model}, before anything is rounded: the "
        "market's price times the bytes that an octave of finer steps takes there, over 2 ln 2, which is the matrix' "
        "distortion where errors go with the step: at an equilibrium, large matrices have large shares. "
        f"The cells sum to {total:.4f} nats per token{own}.{_ends(found)}"
    )
    picture = figures.bit_map(found, title, limits, dpi, label, "OrRd")
    return Picture(f"distortion-{model}-{method}.png", caption, picture)


def _ends(found: BitMap) -> str:
    """What lies at the ends, in words; empty where there are no layers."""
    if not found.cells:
        return ""
    most = max(found.cells, key=lambda cell: found.cells[cell])
    inside, total = sum(found.cells.values()), sum(found.values())
    return (
        f" The layers have {100 * inside / total:.0f} % of it, most {most[1]} of layer {most[0]} "
        f"({100 * found.cells[most] / total:.1f} %)."
    )
