"""A market for bits: one price per byte, and every piece of the model buys what is worth it.

A player (a matrix, or a tile of one) pays the price for each stored byte and suffers its own distortion. Its best
response minimises distortion + price * bytes; where all play theirs and the bytes equal the budget, nobody gains by
deviating: a Nash equilibrium, and, distortions being separable and convex in bytes, the Lagrangian optimum (Shoham and
Gersho, 1988, "Efficient bit allocation for an arbitrary set of quantizers"). The price is found by bisection. With
discrete options a few bytes stay over at the equilibrium price; they go to the best marginal gains that still fit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nashswarm.types import Allocation, Candidates, Choice, Offer

BUYS = "candidates"
NEEDS_IMPORTANCE = False
FINE = 32  # options put between two neighbours where options are continuous: steps of 0.5 % at 1/4 octave
PRICES = 1e-30, 1e6  # nats per byte; bisection runs between them
ROUNDS = 200  # of bisection: the two prices meet to the last bit


@dataclass(frozen=True, slots=True)
class Settings:
    """The budget: true bits per weight over all parameters and all stored bytes, or bytes, or a rise in loss."""

    budget: float | None = None  # bits per weight
    budget_bytes: int | None = None
    target_rise: float | None = None  # nats per token, as predicted by the quadratic model

    def __post_init__(self) -> None:
        given = [k for k in ("budget", "budget_bytes", "target_rise") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"budget: give exactly one of budget, budget_bytes, target_rise, not {given or 'none'}")
        if getattr(self, given[0]) <= 0:
            raise ValueError(f"{given[0]}: {getattr(self, given[0])} is not positive")


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the whole packed model amounts to beside the players' bytes."""

    parameters: int  # of the model
    overhead: float  # bytes beside those that the candidates count


@dataclass(frozen=True, slots=True)
class Table:
    """All players' options, side by side; a player with fewer options repeats its last one."""

    size: np.ndarray  # float64 [players, options]
    distortion: np.ndarray  # float64 [players, options]


def widths(settings: Settings) -> tuple[int, ...]:
    """No width is fixed beforehand."""
    return ()


def asked_bytes(settings: Settings, parameters: int) -> int | None:
    """The budget in bytes for the whole packed model; None where a rise in loss is asked for."""
    if settings.budget is not None:
        return math.floor(settings.budget * parameters / 8)
    return settings.budget_bytes


def allocate(offers: Iterable[Offer], settings: Settings, ledger: Ledger | None = None) -> Allocation:
    """The equilibrium at the budget. Raises ValueError where even the coarsest options do not fit."""
    offers = list(offers)
    grids = [_fine(offer.candidates) for offer in offers if offer.candidates is not None]
    owners = _owners(offers, grids)
    table = _summed(_table(grids), owners)
    ledger = ledger or Ledger(sum(o.tensor.weights for o in offers), 0.0)
    asked = asked_bytes(settings, ledger.parameters)
    if asked is None:
        assert settings.target_rise is not None
        price = price_for_rise(table, settings.target_rise)
        picked = respond(table, price)
        spendable = _total(table.size, picked)
    else:
        spendable = asked - ledger.overhead
        price = price_for(table, spendable)
        picked = spend(table, respond(table, price), price, spendable)
    return _allocation(offers, grids, table, picked, owners, price, spendable, asked)


# --- the game ------------------------------------------------------------------------------------------------------


def respond(table: Table, price: float) -> np.ndarray:
    """Every player's best response, int64 [players]; of equally good options the one with fewer bytes."""
    return np.asarray(np.argmin(table.distortion + price * table.size, axis=1))


def price_for(table: Table, budget: float) -> float:
    """The lowest price, nats per byte, at which the best responses cost no more than `budget` bytes."""
    least = float(table.size[:, 0].sum())
    if least > budget:
        raise ValueError(
            f"budget: the coarsest options take {least:.0f} bytes, {budget:.0f} are left for them; raise the budget"
        )
    return _prices_around(lambda price: _total(table.size, respond(table, price)) <= budget)[1]


def price_for_rise(table: Table, rise: float) -> float:
    """The highest price, nats per byte, at which the best responses are predicted to cost no more than `rise` nats."""
    least = float(table.distortion[:, -1].sum())
    if least > rise:
        raise ValueError(f"target_rise: the finest options are predicted to cost {least:.3g} nats already; raise it")
    return _prices_around(lambda price: _total(table.distortion, respond(table, price)) > rise)[0]


def spend(table: Table, picked: np.ndarray, price: float, budget: float) -> np.ndarray:
    """Best responses leave a remainder: spend it where a byte saves most, while anything fits."""
    picked = picked.copy()
    left = budget - _total(table.size, picked)
    rows = np.arange(len(picked))
    cost = table.size - table.size[rows, picked][:, None]
    gain = table.distortion[rows, picked][:, None] - table.distortion
    fits = (cost > 0) & (cost <= left) & (gain > 0)
    rate = np.where(fits, gain / np.where(cost > 0, cost, 1), -np.inf)
    best = rate.argmax(axis=1)
    # One move for each player at most: moves beyond the first are worth less than the price by more than rounding.
    for player in np.argsort(-rate[rows, best], kind="stable"):
        if not np.isfinite(rate[player, best[player]]):
            break
        if cost[player, best[player]] <= left:
            left -= cost[player, best[player]]
            picked[player] = best[player]
    return picked


def largest_deviation_gain(table: Table, picked: np.ndarray, price: float) -> float:
    """What the unhappiest player could win by deviating, nats; 0 at an equilibrium."""
    cost = table.distortion + price * table.size
    return float((_pick(cost, picked) - cost.min(axis=1)).max())


def duality_gap(table: Table, picked: np.ndarray, price: float, budget: float) -> float:
    """Distortion bought, minus the Lagrangian lower bound on what any purchase within the budget can reach, nats."""
    bound = float((table.distortion + price * table.size).min(axis=1).sum()) - price * budget
    return _total(table.distortion, picked) - bound


def _prices_around(dear: Callable[[float], bool]) -> tuple[float, float]:
    """The two neighbouring prices between which `dear`, false for low prices and true for high ones, changes."""
    low, high = PRICES
    for _ in range(ROUNDS):
        middle = math.sqrt(low * high)
        if middle in (low, high):
            break
        if dear(middle):
            high = middle
        else:
            low = middle
    return low, high


def _total(values: np.ndarray, picked: np.ndarray) -> float:
    return float(_pick(values, picked).sum())


def _pick(values: np.ndarray, picked: np.ndarray) -> np.ndarray:
    return np.asarray(np.take_along_axis(values, picked[:, None], axis=1)[:, 0])


# --- options -------------------------------------------------------------------------------------------------------


def _fine(candidates: Candidates) -> Candidates:
    """Continuous options, densely: bytes linear in the option, distortion geometric, as theory has both."""
    if not candidates.continuous:
        return candidates
    count = len(candidates.options)
    places = np.linspace(0, count - 1, (count - 1) * FINE + 1)
    below = np.minimum(places.astype(int), count - 2)
    share = places - below

    def between(values: np.ndarray) -> np.ndarray:
        return np.asarray(values[..., below] * (1 - share) + values[..., below + 1] * share)

    floor = np.maximum(candidates.distortion, 1e-300)
    return replace(
        candidates,
        options=between(candidates.options),
        size=between(candidates.size),
        distortion=np.exp(between(np.log(floor))),
    )


def _table(grids: Sequence[Candidates]) -> Table:
    columns = max(len(g.options) for g in grids)

    def padded(values: np.ndarray) -> np.ndarray:
        return np.pad(values, ((0, 0), (0, columns - values.shape[1])), mode="edge")

    return Table(np.concatenate([padded(g.size) for g in grids]), np.concatenate([padded(g.distortion) for g in grids]))


def _owners(offers: Sequence[Offer], grids: Sequence[Candidates]) -> np.ndarray:
    """Who buys for each piece, int64 [pieces]: itself, or the team that its matrix belongs to."""
    known: dict[object, int] = {}
    pieces = ((o, g, i) for o, g in zip(offers, grids, strict=True) for i in range(len(g.size)))
    return np.array([known.setdefault(g.team or (o.tensor.name, i), len(known)) for o, g, i in pieces])


def _summed(table: Table, owners: np.ndarray) -> Table:
    """The owners' tables: what their pieces cost together."""

    def added(values: np.ndarray) -> np.ndarray:
        total = np.zeros((owners.max() + 1, values.shape[1]))
        np.add.at(total, owners, values)
        return total

    return Table(added(table.size), added(table.distortion))


def _allocation(
    offers: Sequence[Offer],
    grids: Sequence[Candidates],
    table: Table,
    picked: np.ndarray,
    owners: np.ndarray,
    price: float,
    spendable: float,
    asked: int | None,
) -> Allocation:
    bought = picked[owners]
    choices: dict[str, Choice] = {}
    histogram: Counter[int] = Counter()
    start = 0
    for offer, grid in zip(offers, grids, strict=True):
        own = np.minimum(bought[start : start + len(grid.size)], len(grid.options) - 1)
        start += len(own)
        choices[offer.tensor.name] = _choice(offer, grid, own)
        histogram.update(_bits(offer, grid, own))
    return Allocation(
        choices,
        dict(histogram),
        price=price,
        largest_deviation_gain=largest_deviation_gain(table, picked, price),
        duality_gap=duality_gap(table, picked, price, spendable),
        predicted_rise=_total(table.distortion, picked),
        asked_bytes=asked,
    )


def _choice(offer: Offer, grid: Candidates, own: np.ndarray) -> Choice:
    if grid.continuous:
        at = int(own[0])
        around = [max(at - FINE, 0), min(at + FINE, len(grid.options) - 1)]
        slope = float(np.diff(grid.size[0, around])[0] / np.diff(grid.options[around])[0])
        return Choice(step=-float(grid.options[at]), size=float(grid.size[0, at]), slope=slope)
    if grid.whole:
        return Choice(bits=int(grid.options[own[0]]))
    digits = "".join(str(int(b)) for b in grid.options[own])
    strips = len(digits) // grid.per_strip
    return Choice(tiles=tuple(digits[i * grid.per_strip : (i + 1) * grid.per_strip] for i in range(strips)))


def _bits(offer: Offer, grid: Candidates, own: np.ndarray) -> Counter[int]:
    """Bits -> weights. A coded tensor counts under its average width, rounded; a tile under its own."""
    if grid.continuous:
        return Counter({round(8 * float(grid.size[0, own[0]]) / offer.tensor.weights): offer.tensor.weights})
    counts: Counter[int] = Counter()
    for bits, weights in zip(grid.options[own], grid.weights, strict=True):
        counts[int(bits)] += int(weights)
    return counts
