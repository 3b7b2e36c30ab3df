"""The market's demand: how much is bought at which price, by the whole model and by each kind of matrix in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nashswarm.bitmap import kinds_of
from nashswarm.comparison import CODECS
from nashswarm.rendering import Block, Picture

Document = Mapping[str, Any]
Documents = Mapping[str, Document]  # method -> its metrics
Points = list[tuple[float, float]]  # (price, nats per byte; true bits per weight), by rising price


def curves(documents: Documents) -> dict[str, Points]:
    """Codec -> its points, one for each budget: the price at which the market met it, and the bits of the file.

    Arguments: `documents`, methods that bought at a price. Several budgets of one model are several points of one
    demand curve: the offers, and so the players' best responses to a price, do not depend on the budget.
    """
    found: dict[str, Points] = {}
    for method, document in documents.items():
        codec = next((c for c in CODECS if method.startswith(c)), method)
        point = float(document["allocation"]["price"]), float(document["size"]["bits_per_weight"])
        found.setdefault(codec, []).append(point)
    return {codec: sorted(points) for codec, points in found.items()}


def of_kinds(documents: Documents) -> dict[str, Points]:
    """Kind of matrix -> its points: the price, and the true bits per weight over all matrices of that kind."""
    found: dict[str, Points] = {}
    for document in documents.values():
        for kind, bits in kinds_of(document["allocation"].get("tensors") or []).items():
            found.setdefault(kind, []).append((float(document["allocation"]["price"]), bits))
    return {kind: sorted(points) for kind, points in found.items()}


def pictures(model: str, bought: Documents, dpi: int) -> list[Block]:
    """The demand curves of one model; those of kinds of matrix are of the codec with the most budgets.

    Arguments: `bought`, the methods that bought at a price; `dpi`, of the figure.
    """
    from nashswarm import figures  # with matplotlib, which the console table can do without

    whole = curves(bought)
    if not whole:
        return []
    codec = max(whole, key=lambda c: len(whole[c]))
    kinds = of_kinds({m: d for m, d in bought.items() if m.startswith(codec)})
    lower = f" Below, what each kind of matrix bought of {codec}: the same price for all." if kinds else ""
    caption = (
        f"Demand for bits, {model}: true bits per weight against the price at which the market cleared, one point for "
        f"each budget.{lower} Where an error falls by four with every bit, a price four times lower buys one bit more."
    )
    return [Picture(f"demand-{model}.png", caption, figures.demand(whole, kinds, codec, dpi))]
