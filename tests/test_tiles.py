"""The tile layout byte by byte, what tiles promise of their damage, and what they refuse to read."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from test_codecs import NAME, damage, job_of, normal, statistics, tiled, with_outlier
from torch import Tensor

from nashswarm import clipped, feedback
from nashswarm.allocators import market
from nashswarm.bitpack import pack
from nashswarm.codecs import tiles
from nashswarm.types import Choice, Job, NashSwarmError, Offer, PackedTensor, Statistics

WIDTHS = tiles.TILE_WIDTHS
BASE = 0


def hand_packed(
    codes: np.ndarray, widths: list[list[int]], tile: int, row: int, order: list[int], shape: tuple[int, int]
) -> PackedTensor:
    """Bytes by the docstring's definition, one code at a time. codes [strip][k][row][column]."""
    data, live = bytearray(), 0
    for strip, own in enumerate(widths):
        for k in sorted(range(len(own)), key=lambda k: (own[k], k)):
            shift, live = 0, live + (own[k] > 0)
            for plane in (8, 4, 2, 1):
                if not own[k] & plane:
                    continue
                per_row = 128 * plane // 8
                block = np.zeros(16 * per_row, np.uint8)
                for r in range(16):
                    for c in range(128):
                        k0, e = c % per_row, c // per_row
                        bits = (int(codes[strip, k, r, c]) >> shift) % 2**plane
                        block[((k0 // 4) * 16 + r) * 4 + k0 % 4] |= bits << (plane * e)
                data += block.tobytes()
                shift += plane
    index = pack(np.array([WIDTHS.index(b) for own in widths for b in own]), 3)
    places = pack(np.array(order), max(1, (shape[1] - 1).bit_length()))
    arrays = {
        "codes": np.frombuffer(bytes(data), np.uint8),
        "scales": np.array([row | row << 4] * (8 * live) + [tile] * live, np.uint8),
        "map": np.concatenate([index, places]),
    }
    return PackedTensor("tiles", shape, arrays, {"rows": 16, "columns": 128, "base": BASE})


# --- layout --------------------------------------------------------------------------------------------------------


def test_one_tile_of_3_bits_by_hand() -> None:
    """Two planes: byte k0 of one holds 2 bits of columns k0 + 32 e, of the other the third bit of k0 + 16 e."""
    codes = np.zeros((1, 16, 128), np.uint8)
    codes[0, 1, [5, 37, 69, 101]] = 1, 2, 7, 4
    data = tiles._pack_tiles(codes, 3)[0]
    expected = np.zeros(16 * 48, np.uint8)
    expected[(5 // 4 * 16 + 1) * 4 + 1] = 1 | 2 << 2 | 3 << 4 | 0 << 6
    expected[512 + (5 // 4 * 16 + 1) * 4 + 1] = 1 << 4 | 1 << 6  # columns 69 = 5 + 16 * 4 and 101 = 5 + 16 * 6
    assert data.tolist() == expected.tolist()


def test_a_matrix_written_out_by_hand_decodes_as_defined() -> None:
    rng = np.random.default_rng(0)
    widths = [[3, 0, 2], [1, 8, 1], [5, 4, 6]]
    tops = 2 ** np.array(widths)
    codes = rng.integers(0, tops[:, :, None, None], (3, 3, 16, 128))
    shape = (45, 300)
    order = rng.permutation(300)
    for tile, row in ((3, 4), (3, 3), (3, 0)):
        found = tiles.decode(hand_packed(codes, widths, tile, row, order.tolist(), shape))
        step = 2.0 ** ((BASE + tile + row - 1) / 8) if row else 0.0
        middle = (tops - 1) / 2 if (tile + row) % 2 == 0 else tops / 2
        values = step * (codes - middle[:, :, None, None]) * (np.array(widths) > 0)[:, :, None, None]
        expected = np.empty(shape)
        expected[:, order] = values.transpose(0, 2, 1, 3).reshape(48, 384)[:45, :300]
        assert found.numpy() == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("rows", [1, 3, 16, 64])
@pytest.mark.parametrize("bits", WIDTHS[1:])
def test_codes_of_every_width_come_back(bits: int, rows: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, rows, 96)).astype(np.uint8)
    data = tiles._pack_tiles(codes, bits)
    assert data.shape == (5, rows * 96 * bits // 8)
    assert np.array_equal(tiles._unpack_tiles(data, bits, rows), codes)


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_nibbles_come_back(rows: int) -> None:
    values = np.random.default_rng(0).integers(0, 16, (4, rows)).astype(np.uint8)
    assert np.array_equal(tiles._unpack_nibbles(tiles._pack_nibbles(values), rows), values)


@pytest.mark.parametrize("shape", [(16, 128), (17, 129), (1, 1), (50, 300), (3, 1000)])
def test_stored_bytes_are_those_on_offer(shape: tuple[int, int]) -> None:
    found = tiles.offer(job_of(normal(*shape), Choice()), tiles.Settings())
    job = job_of(normal(*shape), tiled(4, 0, 8, 1, 3, 2, 6, 5))
    picked = [list(found.options).index(int(digit)) for strip in job.choice.tiles for digit in strip]
    stored = sum(array.nbytes for array in tiles.encode(job, tiles.Settings()).arrays.values())
    assert stored == pytest.approx(found.size[np.arange(len(picked)), picked].sum())


def test_tiles_of_other_shapes() -> None:
    settings = tiles.Settings(rows=5, columns=32)
    job = job_of(normal(9, 70), Choice(tiles=("840", "123")))
    packed = tiles.encode(job, settings)
    found = tiles.decode(packed)
    assert packed.scalars["rows"] == 5
    order = feedback.factor(feedback.curvature(job.statistics, NAME).inputs, NAME).order  # type: ignore[arg-type]
    assert not found[:5, order[64:]].any()
    near = order[:32]
    assert float((found - job.weight)[:5, near].abs().max()) < 0.02 * float(job.weight.abs().max())


def test_grids_are_fitted_to_what_comes_to_each_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier tiles leave of values, by U^-1: columns of a tile move by what those before them in it hand on; and
    what rows before this patch hand to it."""
    job, real, fitted = job_of(normal(90, 70), Choice(tiles=("333",) * 18)), clipped._fit, list[np.ndarray]()
    job = dataclasses.replace(job, statistics=with_gradients((90, 70)))

    def spy(values: np.ndarray, *others: Any) -> tuple[np.ndarray, np.ndarray]:
        fitted.append(values.copy())
        return real(values, *others)

    monkeypatch.setattr(clipped, "_fit", spy)
    monkeypatch.setattr(clipped, "_kernels", lambda: (clipped._search, clipped._round_tiles))  # plain Python
    rounded = tiles.decode(tiles.encode(job, tiles.Settings(rows=5, columns=32)))
    model, (weight, exponent) = tiles._loss_model(job, 5)[0], tiles._normalized(job)
    assert model.spread is not None
    rows, columns = model.spread.order, model.columns.order
    plain, found = (values[rows][:, columns].double() for values in (weight, rounded * 2.0**-exponent))
    unit, down = (factor.spread().triu().double() for factor in (model.columns, model.spread))
    error = plain - found
    left, patches = error @ unit, iter(fitted)
    for first in (0, 32, 64):
        for own in (slice(0, 65), slice(65, 90)):
            here = slice(first, min(first + 32, 70))
            moved = error[own, :first] @ unit[:first, here] + down[: own.start, own].T @ left[: own.start, here]
            expected = plain[own, here] + moved @ unit[here, here].inverse()
            torch.testing.assert_close(torch.from_numpy(next(patches)).T.double(), expected, rtol=0, atol=1e-5)


def test_rows_of_a_tile_stay_together_in_rounding() -> None:
    """Strips come by falling power; the last one, of fewer rows, where its own says."""
    found = feedback.factor(torch.diag(torch.tensor([1.0, 3, 2, 2, 9])), NAME, together=2).order
    assert found.tolist() == [4, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": 0}, "rows: 0"),
        ({"columns": 48}, "columns: 48"),
        ({"widths": (2, 7)}, "widths"),
        ({"widths": (3, 2)}, "widths"),
        ({"widths": ()}, "widths"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiles.Settings(**given)  # type: ignore[arg-type]


# --- what tiles promise --------------------------------------------------------------------------------------------


def with_gradients(shape: tuple[int, int]) -> Statistics:
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(4 * shape[0], shape[0])) * rng.lognormal(size=shape[0])
    moment = (outputs.T @ outputs / len(outputs)).astype(np.float32)
    return dataclasses.replace(statistics(shape), gradient_moment=moment, fisher=np.diagonal(moment).copy())


@pytest.mark.parametrize("interacting", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_damage_is_what_was_predicted(bits: int, interacting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feedback's identity, by the loss model without damping; refitted grids and clipping leave a few per cent."""
    monkeypatch.setattr(tiles, "BEYOND", 0.0)
    monkeypatch.setattr(tiles, "OUTPUT_DAMPING", feedback.DAMPING)
    shape = (64, 256)
    found = with_gradients(shape) if interacting else statistics(shape)
    job = dataclasses.replace(job_of(normal(*shape), tiled(bits)), statistics=found)
    candidates = tiles.offer(job, tiles.Settings())
    predicted = float(candidates.distortion[:, list(candidates.options).index(bits)].sum())
    measured = damage(job, tiles.decode(tiles.encode(job, tiles.Settings())) - job.weight)
    assert measured == pytest.approx(predicted, rel=0.15)


def test_rows_that_interact_do_less_damage_than_rows_alone() -> None:
    shape = (256, 128)
    weight, found = normal(*shape), with_gradients(shape)
    alone = dataclasses.replace(found, gradient_moment=None)
    results = []
    for seen in (found, alone):
        job = dataclasses.replace(job_of(weight, tiled(3)), statistics=seen)
        error = tiles.decode(tiles.encode(job, tiles.Settings())) - weight
        results.append(damage(dataclasses.replace(job, statistics=found), error))
    assert results[0] < 0.95 * results[1]


@pytest.mark.parametrize("make", [lambda: torch.zeros(40, 200), lambda: normal(40, 200)])
def test_width_0_and_zero_weights_are_exact_zeros(make: object) -> None:
    weight: Tensor = make()  # type: ignore[operator]
    widths = tiled(0) if bool(weight.any()) else tiled(4, 1, 8)
    assert not tiles.decode(tiles.encode(job_of(weight, widths), tiles.Settings())).any()


def test_rows_of_zeros_stay_zeros_beside_others() -> None:
    weight = normal(16, 128)
    weight[::3] = 0
    found = tiles.decode(tiles.encode(job_of(weight, tiled(1)), tiles.Settings()))
    assert not found[::3].any()
    assert bool((found[1::3] != 0).all())


def test_an_outlier_does_not_raise_its_neighbours() -> None:
    """A grid with zero in it is at hand: 100 beside weights of 0.05 comes back, the others are nothing beside it."""
    weight = with_outlier(normal(16, 128))
    found = tiles.decode(tiles.encode(job_of(weight, tiled(4)), tiles.Settings()))
    assert float((found - weight).abs().max()) < 10


@pytest.mark.parametrize("value", [1e31, 3e38, float("nan"), float("inf")])
def test_weights_beyond_reason_are_refused(value: float) -> None:
    weight = normal(4, 8)
    weight[1, 1] = value
    for use in (tiles.encode, tiles.offer):
        with pytest.raises(NashSwarmError, match=re.escape(NAME)):
            use(job_of(weight, Choice(tiles=("4",))), tiles.Settings())


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_a_scale_of_the_weights_changes_nothing_else(scale: float) -> None:
    exact = 2.0 ** round(np.log2(scale))
    one, other = (tiles.encode(job_of(normal(20, 130) * f, tiled(3, 2)), tiles.Settings()) for f in (1.0, exact))
    assert all(np.array_equal(one.arrays[part], other.arrays[part]) for part in one.arrays)
    assert torch.equal(tiles.decode(one) * exact, tiles.decode(other))


def test_an_allocation_of_another_shape_is_refused() -> None:
    for wrong in ((), ("4", "4"), ("44",), ("7",)):
        with pytest.raises(NashSwarmError, match=re.escape(NAME)):
            tiles.encode(job_of(normal(4, 8), Choice(tiles=wrong)), tiles.Settings())


def test_the_market_buys_what_it_can_encode() -> None:
    job = job_of(normal(64, 256), Choice())
    candidates = tiles.offer(job, tiles.Settings())
    bought = market.allocate([Offer(job.tensor, candidates=candidates)], market.Settings(budget=3.0))
    packed = tiles.encode(dataclasses.replace(job, choice=bought.choices[NAME]), tiles.Settings())
    bits = 8 * sum(array.nbytes for array in packed.arrays.values()) / job.weight.numel()
    assert 2.9 < bits <= 3.0
    assert len({*"".join(bought.choices[NAME].tiles)}) > 1


# --- what they refuse ----------------------------------------------------------------------------------------------


def packed_example() -> PackedTensor:
    return tiles.encode(job_of(normal(20, 200), tiled(3, 0, 8, 2)), tiles.Settings())


@pytest.mark.parametrize("part", ["codes", "scales", "map"])
@pytest.mark.parametrize("change", ["cut", "longer", "missing", "dtype", "shape"])
def test_malformed_arrays_are_refused(part: str, change: str) -> None:
    packed = packed_example()
    array = packed.arrays[part]
    others = {k: v for k, v in packed.arrays.items() if k != part}
    changed = {
        "cut": array[:-1],
        "longer": np.append(array, np.uint8(0)),
        "dtype": array.astype(np.uint16),
        "shape": array[None],
    }
    arrays = others if change == "missing" else {**others, part: changed[change]}
    with pytest.raises((NashSwarmError, ValueError, KeyError)):
        tiles.decode(dataclasses.replace(packed, arrays=arrays))


def test_an_order_that_names_a_column_twice_is_refused() -> None:
    packed = packed_example()
    order = packed.arrays["map"].copy()
    order[2:] = 0  # 4 widths of 3 bits take the first two bytes
    with pytest.raises(NashSwarmError, match="order of columns"):
        tiles.decode(dataclasses.replace(packed, arrays={**packed.arrays, "map": order}))


@pytest.mark.parametrize(
    "change",
    [{"rows": 0}, {"rows": 15}, {"rows": 2**40}, {"columns": 100}, {"columns": 64}, {"base": 2**40}, {"base": 0.5}],
)
def test_wrong_scalars_are_refused(change: dict[str, int]) -> None:
    packed = packed_example()
    with pytest.raises((NashSwarmError, ValueError)):
        tiles.decode(dataclasses.replace(packed, scalars={**packed.scalars, **change}))


def test_damaged_map_never_decodes_in_silence() -> None:
    packed, refused = packed_example(), 0
    for place in range(len(packed.arrays["map"])):
        data = packed.arrays["map"].copy()
        data[place] ^= 1
        try:
            found = tiles.decode(dataclasses.replace(packed, arrays={**packed.arrays, "map": data}))
        except (NashSwarmError, ValueError):
            refused += 1
        else:
            assert bool(found.isfinite().all())
    assert refused >= len(packed.arrays["map"]) - 2


def test_a_job_without_use_is_refused() -> None:
    found = dataclasses.replace(statistics((4, 8)), fisher=np.zeros(4, np.float32))
    job: Job = dataclasses.replace(job_of(normal(4, 8), Choice(tiles=("4",))), statistics=found)
    with pytest.raises(NashSwarmError, match="Fisher information is zero"):
        tiles.encode(job, tiles.Settings())
