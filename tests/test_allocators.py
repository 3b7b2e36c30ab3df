"""Every file in allocators/ against the room's contract; the rules of `uniform` and `percentile` by hand."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import PROJECT
from hypothesis import given
from hypothesis import strategies as st

from nashswarm.allocators import percentile, uniform
from nashswarm.config import load_room, room_names
from nashswarm.types import Allocation, Candidates, Offer, Part, TensorSpec

# A newcomer adds a line: settings under which it must serve `offers()`. At 4 bits there is room for all.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "uniform": [{}, {"bits": 3, "embedding_bits": 8}],
    "percentile": [
        {},
        {"sample": 50, "seed": 3},
        {"bits": (2, 8), "shares": (0.5, 0.5)},
        {"bits": (4,), "shares": (1,)},
    ],
    "market": [{"budget": 4.0}, {"budget_bytes": 1500}, {"target_rise": 0.01}],
}
NAMES = sorted(p.stem for p in (PROJECT / "src/nashswarm/allocators").glob("*.py") if p.stem != "__init__")
CASES = [(name, settings) for name in NAMES for settings in SETTINGS.get(name, [])]
SHAPES: dict[str, tuple[tuple[int, int], Part]] = {
    "wte": ((40, 12), "embedding"),
    "attn": ((12, 36), "attention"),
    "mlp": ((48, 12), "mlp"),
    "row": ((1, 24), "mlp"),
    "head": ((40, 12), "head"),
}
WEIGHTS = sum(rows * columns for (rows, columns), _ in SHAPES.values())


def spec(name: str) -> TensorSpec:
    shape, part = SHAPES[name]
    return TensorSpec(name, shape, "linear", part, None)


def candidates(tensor: TensorSpec, sensitivity: float, continuous: bool) -> Candidates:
    """Theory's options, distortion ~ 2^(-2 bits): a whole matrix, or strips of three tiles of different worth."""
    bits = np.array([2.0, 3, 4, 8])
    players = 1 if continuous else 3
    weights = np.full(players, tensor.weights // players)
    worth = sensitivity * np.arange(1, players + 1)[:, None]
    return Candidates(
        options=bits,
        size=weights[:, None] * bits / 8,
        distortion=worth * weights[:, None] * np.exp2(-2 * bits) / 1000,
        continuous=continuous,
        weights=weights,
        per_strip=players,
    )


def offers(continuous: bool = False, seed: int = 0) -> list[Offer]:
    """All matrices, with everything that any allocator looks at."""
    rng = np.random.default_rng(seed)
    return [
        Offer(
            spec(name),
            importance=np.abs(rng.normal(size=spec(name).weights)).astype(np.float32),
            candidates=candidates(spec(name), float(rng.lognormal()), continuous),
        )
        for name in SHAPES
    ]


def allocate(name: str, settings: dict[str, Any], given_offers: list[Offer]) -> Allocation:
    room = load_room("allocators", name)
    found: Allocation = room.allocate(iter(given_offers), room.Settings(**settings))
    return found


def test_every_allocator_has_a_line_in_the_table() -> None:
    assert set(NAMES) <= set(SETTINGS), "a new allocator needs a line in SETTINGS, or the contract is not tested for it"


@pytest.mark.parametrize("name", NAMES)
def test_the_room_declares_what_config_reads(name: str) -> None:
    room = load_room("allocators", name)
    assert room.__doc__
    assert dataclasses.is_dataclass(room.Settings)
    assert room.Settings.__dataclass_params__.frozen
    assert isinstance(room.NEEDS_IMPORTANCE, bool)
    codecs = [load_room("codecs", codec) for codec in room_names("codecs")]
    assert room.BUYS in ("widths", "classes", "candidates")
    assert any(room.BUYS in codec.SELLS for codec in codecs), "no codec can encode what it chooses"
    for settings in SETTINGS[name]:
        widths = room.widths(room.Settings(**settings))
        assert isinstance(widths, tuple)
        assert all(type(bits) is int and bits > 0 for bits in widths)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_every_tensor_gets_a_choice_and_every_weight_is_counted(
    name: str, settings: dict[str, Any], continuous: bool
) -> None:
    given_offers = offers(continuous)
    before = [(o.importance.copy(), o.candidates.size.copy()) for o in given_offers]  # type: ignore[union-attr]
    found = allocate(name, settings, given_offers)
    assert list(found.choices) == list(SHAPES)
    assert sum(found.histogram.values()) == WEIGHTS
    assert all(type(bits) is int and type(count) is int for bits, count in found.histogram.items())
    room = load_room("allocators", name)
    widths = room.widths(room.Settings(**settings))
    assert not widths or set(found.histogram) <= set(widths)
    for offer, (importance, size) in zip(given_offers, before, strict=True):
        assert np.array_equal(offer.importance, importance)  # type: ignore[arg-type]
        assert np.array_equal(offer.candidates.size, size)  # type: ignore[union-attr]


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_allocation_is_deterministic(name: str, settings: dict[str, Any], continuous: bool) -> None:
    assert allocate(name, settings, offers(continuous)) == allocate(name, settings, offers(continuous))


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_choices_are_of_one_kind_and_well_formed(name: str, settings: dict[str, Any], continuous: bool) -> None:
    for tensor, choice in allocate(name, settings, offers(continuous)).choices.items():
        kinds = [choice.bits is not None, bool(choice.classes), choice.step is not None, bool(choice.tiles)]
        assert sum(kinds) == 1, tensor
        if choice.classes:
            assert len(choice.thresholds) == len(choice.classes) - 1
            assert sorted(choice.thresholds) == list(choice.thresholds)


@pytest.mark.parametrize("name", [n for n in NAMES if load_room("allocators", n).NEEDS_IMPORTANCE])
def test_importance_maps_are_let_go_one_by_one(name: str) -> None:
    """The room's promise: a map is as large as its matrix, so no two may be alive at once (beside the one in hand)."""
    alive: list[weakref.ref[np.ndarray]] = []

    def stream() -> Iterator[Offer]:
        for offer in offers():
            importance = np.array(offer.importance)
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1
            alive.append(weakref.ref(importance))
            made = dataclasses.replace(offer, importance=importance)
            del importance
            yield made
            del made

    room = load_room("allocators", name)
    assert len(room.allocate(stream(), room.Settings()).choices) == len(SHAPES)


def test_allocators_do_without_torch() -> None:
    script = (
        "import sys\n"
        + "".join(f"import nashswarm.allocators.{n}\n" for n in NAMES)
        + "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": str(PROJECT / "src")}, timeout=60)


# --- uniform -------------------------------------------------------------------------------------------------------


def test_uniform_gives_embeddings_and_heads_their_own_width() -> None:
    found = uniform.allocate(offers(), uniform.Settings(bits=3, embedding_bits=4))
    assert {n: c.bits for n, c in found.choices.items()} == {"wte": 4, "attn": 3, "mlp": 3, "row": 3, "head": 4}
    assert found.histogram == {4: 960, 3: 12 * 36 + 48 * 12 + 24}
    assert uniform.widths(uniform.Settings(bits=3, embedding_bits=4)) == (3, 4)
    assert uniform.widths(uniform.Settings(bits=3)) == (3,)
    assert found.price is None


# --- percentile ----------------------------------------------------------------------------------------------------


def one_offer(importance: np.ndarray) -> list[Offer]:
    return [Offer(TensorSpec("w", (1, importance.size), "linear", "mlp", 0), importance.astype(np.float32))]


def test_percentile_cuts_at_the_quantiles() -> None:
    """With every weight drawn: 0..100 has quantile q at 100 q, and a weight at a threshold is in the upper class."""
    importance = np.random.default_rng(0).permutation(101)
    found = percentile.allocate(one_offer(importance), percentile.Settings())
    assert found.choices["w"].classes == (2, 4, 8)
    assert found.choices["w"].thresholds == (70.0, np.float32(90.0))
    assert found.histogram == {2: 70, 4: 20, 8: 11}


@given(st.integers(1, 300), st.integers(0, 5), st.sampled_from([1, 7, 10_000]))
def test_percentile_counts_what_the_thresholds_split(count: int, seed: int, sample: int) -> None:
    importance = np.random.default_rng(seed).integers(0, 20, count).astype(np.float32)
    found = percentile.allocate(one_offer(importance), percentile.Settings(sample=sample, seed=seed))
    low, high = found.choices["w"].thresholds
    assert found.histogram[8] == np.count_nonzero(importance >= np.float32(high))
    assert found.histogram[2] == np.count_nonzero(importance < np.float32(low))
    assert sum(found.histogram.values()) == count


def test_percentile_draws_by_its_seed() -> None:
    importance = np.abs(np.random.default_rng(0).normal(size=5000))
    thresholds = [
        percentile.allocate(one_offer(importance), percentile.Settings(sample=500, seed=seed)).choices["w"].thresholds
        for seed in (0, 0, 1)
    ]
    assert thresholds[0] == thresholds[1] != thresholds[2]


def test_percentile_puts_constant_importance_into_the_highest_class() -> None:
    assert percentile.allocate(one_offer(np.ones(10)), percentile.Settings()).histogram == {2: 0, 4: 0, 8: 10}


def test_the_papers_mix_has_about_3_bits_at_gpt2s_shape() -> None:
    """50257 x 768 normal weights. The draw's own spread is 0.018 bits, so 0.05 are 2.7 standard deviations."""
    weights = np.random.default_rng(0).standard_normal(50257 * 768, dtype=np.float32)
    importance = np.abs(weights, out=weights)
    importance.sort()  # places are drawn at random, so order does not matter to the draw; sorted is searched faster
    offer = Offer(TensorSpec("wte", (50257, 768), "embedding", "embedding", None, linear=True), importance)
    for seed in range(5):
        found = percentile.allocate([offer], percentile.Settings(seed=seed))
        bits = sum(b * n for b, n in found.histogram.items()) / weights.size
        assert 2.95 <= bits <= 3.05, seed
