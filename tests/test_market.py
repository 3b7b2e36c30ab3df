"""The market against brute force on small tables, and against the closed form for Gaussian sources."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nashswarm.allocators import market
from nashswarm.allocators.market import Ledger, Settings, Table
from nashswarm.types import Candidates, Offer, TensorSpec

BUDGETS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
WEIGHTS = np.array([4096, 1024, 16384, 2048])
SCALES = np.array([1.0, 8.0, 0.25, 2.0])  # standard deviations, as the loss sees them
STEP = 1 / market.FINE  # bits between two options; what is left at the price buys one source one more


def random_table(rng: np.random.Generator, players: int, options: int) -> Table:
    """Sizes rise and distortions fall along a row, convex or not; sizes are whole bytes."""
    size = np.cumsum(rng.integers(1, 20, (players, options)), axis=1).astype(float)
    distortion = np.flip(np.cumsum(rng.exponential(size=(players, options)), axis=1), axis=1).copy()
    return Table(size, distortion)


def totals(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and distortion of all combinations."""
    players, options = table.size.shape
    picks = np.array(list(itertools.product(range(options), repeat=players)))
    rows = np.arange(players)
    return table.size[rows, picks].sum(1), table.distortion[rows, picks].sum(1)


def total(values: np.ndarray, picked: np.ndarray) -> float:
    return float(values[np.arange(len(picked)), picked].sum())


# --- brute force ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 5), st.floats(0, 1))
def test_no_combination_is_better_by_more_than_the_gap(seed: int, players: int, options: int, share: float) -> None:
    table = random_table(np.random.default_rng(seed), players, options)
    sizes, distortions = totals(table)
    budget = float(sizes.min() + share * (sizes.max() - sizes.min()))
    price = market.price_for(table, budget)
    picked = market.spend(table, market.respond(table, price), price, budget)
    found, gap = total(table.distortion, picked), market.duality_gap(table, picked, price, budget)
    best = float(distortions[sizes <= budget].min())
    assert total(table.size, picked) <= budget
    assert best <= found + 1e-12
    assert found - best <= gap + 1e-9
    assert market.duality_gap(table, picked, price, budget) >= -1e-9


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 6), st.floats(-6, 3))
def test_nobody_gains_by_deviating_from_a_best_response(seed: int, players: int, options: int, power: float) -> None:
    table, price = random_table(np.random.default_rng(seed), players, options), 10.0**power
    picked = market.respond(table, price)
    assert market.largest_deviation_gain(table, picked, price) == 0
    rows = np.arange(players)
    cost = table.distortion + price * table.size
    for option in range(options):
        assert (cost[rows, picked] <= cost[:, option]).all()
    # Of equal bytes, or fewer, no combination is better at all: the equilibrium is the optimum for what it costs.
    sizes, distortions = totals(table)
    spent = total(table.size, picked)
    assert total(table.distortion, picked) <= distortions[sizes <= spent].min() + 1e-9


@given(st.integers(0, 10**6))
def test_the_largest_gain_is_the_unhappiest_players(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table, price = random_table(rng, 4, 5), float(rng.exponential())
    picked = rng.integers(0, 5, 4)
    cost = table.distortion + price * table.size
    gains = [cost[p, picked[p]] - min(cost[p]) for p in range(4)]
    assert market.largest_deviation_gain(table, picked, price) == pytest.approx(max(gains))


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_price_is_the_lowest_that_the_budget_bears(seed: int, share: float) -> None:
    table = random_table(np.random.default_rng(seed), 4, 5)
    sizes, _ = totals(table)
    budget = float(sizes.min() + share * (sizes.max() - sizes.min()))
    price = market.price_for(table, budget)
    assert total(table.size, market.respond(table, price)) <= budget
    if price > market.PRICES[0] * 1.01:
        assert total(table.size, market.respond(table, price * (1 - 1e-9))) > budget


def test_less_than_the_coarsest_options_cannot_be_bought() -> None:
    table = random_table(np.random.default_rng(0), 3, 3)
    least = float(table.size[:, 0].sum())
    assert (market.respond(table, market.price_for(table, least)) == 0).all()
    with pytest.raises(ValueError, match=r"^budget: the coarsest options take .* raise the budget"):
        market.price_for(table, least - 1)


# --- Gaussian sources ----------------------------------------------------------------------------------------------


def gaussian_offers(continuous: bool = True) -> list[Offer]:
    """At high rates: b bits a weight leave weights * c * scale^2 * 2^(-2 b), a grid's error in closed form."""
    bits = np.arange(0, 17.0) if continuous else np.arange(0, 17, 0.5)
    offers = []
    for i, (weights, scale) in enumerate(zip(WEIGHTS, SCALES, strict=True)):
        found = Candidates(
            options=bits,
            size=weights * bits[None] / 8,
            distortion=weights * scale**2 * np.exp2(-2 * bits)[None] * np.pi * np.e / 6,
            continuous=continuous,
            weights=np.array([weights]),
        )
        offers.append(Offer(TensorSpec(f"m{i}", (int(weights) // 32, 32), "linear", "mlp", 0), candidates=found))
    return offers


def water_filling(budget: float) -> np.ndarray:
    """Bits of each source: log2 of its scale above a common water level, none below it."""
    level = np.linspace(-20, 10, 3_000_001)
    octaves = np.log2(SCALES)
    spent = sum(w * np.maximum(o - level, 0) for w, o in zip(WEIGHTS, octaves, strict=True))
    return np.asarray(np.maximum(octaves - level[np.argmin(np.abs(spent - budget * WEIGHTS.sum()))], 0))


def bits_bought(budget: float, continuous: bool = True) -> np.ndarray:
    found = market.allocate(gaussian_offers(continuous), Settings(budget=budget))
    return np.array([8 * (c.size or 0) for c in found.choices.values()]) / WEIGHTS


@pytest.mark.parametrize("budget", BUDGETS)
def test_gaussian_sources_fill_to_one_water_level(budget: float) -> None:
    np.testing.assert_allclose(bits_bought(budget), water_filling(budget), atol=2 * STEP)


@pytest.mark.parametrize("budget", [3.0, 4.0, 8.0])
def test_bits_differ_by_log2_of_the_ratio_of_scales(budget: float) -> None:
    """Where all sources are above the water: one bit for each octave."""
    bits = bits_bought(budget)
    np.testing.assert_allclose(bits - bits[0], np.log2(SCALES / SCALES[0]), atol=2 * STEP)


@pytest.mark.parametrize("budget", BUDGETS)
def test_slopes_are_equal_and_are_the_price(budget: float) -> None:
    """-dD/d bytes of every source that buys anything; of one that buys nothing it is lower."""
    found = market.allocate(gaussian_offers(), Settings(budget=budget))
    bits = np.array([8 * (c.size or 0) for c in found.choices.values()]) / WEIGHTS
    slopes = 8 * 2 * np.log(2) * SCALES**2 * np.exp2(-2 * bits) * np.pi * np.e / 6
    assert found.price is not None
    buys = bits > 0
    np.testing.assert_allclose(slopes[buys], found.price, rtol=4 * np.log(2) * STEP)
    assert (slopes[~buys] <= found.price * (1 + 4 * np.log(2) * STEP)).all()
    assert found.largest_deviation_gain is not None
    assert found.duality_gap is not None
    assert found.predicted_rise is not None
    assert 0 <= found.largest_deviation_gain <= 1e-3 * found.predicted_rise
    assert -1e-9 <= found.duality_gap <= 2 * np.log(2) * STEP * found.predicted_rise  # at most what a step is worth


def test_more_budget_is_spent_at_a_lower_price_for_less_distortion() -> None:
    found = [market.allocate(gaussian_offers(), Settings(budget=budget)) for budget in BUDGETS]
    spent = [sum(c.size or 0 for c in a.choices.values()) for a in found]
    for budget, size in zip(BUDGETS, spent, strict=True):
        assert 0.99 * budget <= 8 * size / WEIGHTS.sum() <= budget
    for lesser, greater in itertools.pairwise(found):
        assert (greater.price or 0) < (lesser.price or 0)
        assert (greater.predicted_rise or 0) < (lesser.predicted_rise or 0)
        for name, choice in greater.choices.items():
            assert (choice.size or 0) >= (lesser.choices[name].size or 0)


@pytest.mark.parametrize("budget", [2.0, 5.0])
def test_bytes_beside_the_players_are_taken_off_the_budget(budget: float) -> None:
    overhead = 0.25 * WEIGHTS.sum() / 8
    ledger = Ledger(int(WEIGHTS.sum()), overhead)
    with_overhead = market.allocate(gaussian_offers(), Settings(budget=budget), ledger)
    without = market.allocate(gaussian_offers(), Settings(budget=budget - 0.25))
    assert with_overhead.choices == without.choices
    assert with_overhead.asked_bytes == budget * WEIGHTS.sum() // 8


@pytest.mark.parametrize("budget", [2.0, 4.0])
def test_a_rise_in_loss_asked_for_costs_what_that_budget_does(budget: float) -> None:
    by_bytes = market.allocate(gaussian_offers(), Settings(budget=budget))
    by_rise = market.allocate(gaussian_offers(), Settings(target_rise=by_bytes.predicted_rise))
    assert by_rise.predicted_rise == pytest.approx(by_bytes.predicted_rise, rel=2 * np.log(2) * STEP)
    sizes = [sum(c.size or 0 for c in a.choices.values()) for a in (by_bytes, by_rise)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert by_rise.asked_bytes is None


# --- teams ---------------------------------------------------------------------------------------------------------


def team_offers(rng: np.random.Generator, teams: list[str | None]) -> list[Offer]:
    """Matrices that buy a width out of three."""
    offers = []
    for number, team in enumerate(teams):
        table = random_table(rng, 1, 3)
        found = Candidates(
            options=np.array([2.0, 4, 8]), size=table.size, distortion=table.distortion, continuous=False,
            weights=np.array([64]), whole=True, team=team,
        )  # fmt: skip
        offers.append(Offer(TensorSpec(f"m{number}", (8, 8), "linear", "mlp", 0), candidates=found))
    return offers


@pytest.mark.parametrize("seed", range(5))
def test_a_team_buys_one_width_and_no_other_purchase_of_teams_is_better(seed: int) -> None:
    offers = team_offers(np.random.default_rng(seed), ["a", None, "a", "b", None, "b", "a"])
    teams = [[0, 2, 6], [1], [3, 5], [4]]
    sizes, distortions = (
        np.array([[sum(getattr(offers[i].candidates, key)[0, o] for i in team) for o in range(3)] for team in teams])
        for key in ("size", "distortion")
    )
    budget = int(sizes[:, 1].sum())
    found = market.allocate(offers, Settings(budget_bytes=budget))
    bits = [found.choices[o.tensor.name].bits for o in offers]
    assert all(len({bits[i] for i in team}) == 1 for team in teams)
    all_sizes, all_distortions = totals(Table(sizes, distortions))
    best = float(all_distortions[all_sizes <= budget].min())
    assert found.predicted_rise is not None
    assert found.duality_gap is not None
    assert best - 1e-9 <= found.predicted_rise <= best + found.duality_gap + 1e-9
    assert sum(found.histogram.values()) == 64 * len(offers)


def test_matrices_of_no_team_buy_for_themselves() -> None:
    free = team_offers(np.random.default_rng(0), [None] * 6)
    bound = team_offers(np.random.default_rng(0), ["a"] * 6)
    budget = int(sum(float(o.candidates.size[0, 1]) for o in free if o.candidates))
    found = [market.allocate(offers, Settings(budget_bytes=budget)) for offers in (free, bound)]
    assert len({c.bits for c in found[0].choices.values()}) > 1
    assert len({c.bits for c in found[1].choices.values()}) == 1
    assert (found[0].predicted_rise or 0) < (found[1].predicted_rise or 0)
