"""Finite grids: the search for steps against all tried, and patches of a matrix against one element after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
from test_feedback import COLUMNS, ROWS, job

from nashswarm import clipped, feedback, jit
from nashswarm.patches import PATCH, Patch


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@cache
def rounding() -> Callable[..., None]:
    part, vector = "float32[:, :]", "float32[::1]"
    given = f"{part}, {part}, {part}, float32[:, ::1], {part}, {vector}, {vector}, {vector}"
    return jit.compiled(clipped._round, f"void({given}, int16[:, ::1])")


@cache
def comparing() -> Callable[..., None]:
    matrix, vector = "float32[:, ::1]", "float32[::1]"
    given = f"{matrix}, {vector}, {vector}, int64[:, ::1], {vector}, {vector}"
    return jit.compiled(clipped._compare, f"void({given}, int64[::1], {vector})")


def round_patch(patch: Patch, *grids: np.ndarray) -> np.ndarray:
    """To grids of these s, h and m, float32 [R]; codes q, int16 [C, R]."""
    codes = np.empty(patch.values.shape, np.int16)
    rounding()(patch.weights, patch.values, patch.handed, patch.between, patch.spread, *grids, codes)
    return codes


def defined(groups: np.ndarray, power: np.ndarray, eighths: np.ndarray, half: float) -> np.ndarray:
    """Errors by the module's definition, float64 [groups]."""
    step, middle = 2.0 ** (eighths / 8), np.where(eighths % 2, 0.0, 0.5)
    codes = np.clip(np.floor(groups / step + 0.5 - middle), -half, half - 1)
    return np.asarray(power @ np.square((codes + middle) * step - groups))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 64, 130])
def test_the_best_step_of_those_tried_is_found(bits: int, count: int) -> None:
    groups, power, half, tries = normal(40, count), np.abs(normal(40, seed=1)), 2.0 ** (bits - 1), 12
    halves, allowed = np.full(count, half, np.float32), np.full(count, tries)
    allowed[count // 2] = 1
    best, least = clipped.search(groups, power, halves, allowed)
    first = np.ceil(8 * np.log2(np.abs(groups).max(0) / half)) + 1
    errors = np.array([defined(groups, power, first - np.minimum(i, allowed - 1), half) for i in range(tries)])
    assert least == pytest.approx(errors.min(0), rel=1e-4)
    found = (first - best).astype(int)
    assert errors[found, np.arange(count)] == pytest.approx(errors.min(0), rel=1e-4)
    chosen, again = np.empty_like(best), np.empty_like(least)
    comparing()(groups, power, halves, best[None], *clipped._table(), chosen, again)
    assert np.array_equal(again, least)
    assert np.array_equal(chosen, best)
    assert np.abs(groups).max(0) == pytest.approx(np.clip(np.abs(groups).max(0), None, half * 2.0 ** (first / 8)))


def test_zeros_have_the_least_step() -> None:
    grids = np.ones(3, np.float32), np.full(3, 14)
    best, least = clipped.search(np.zeros((8, 3), np.float32), np.ones(8, np.float32), *grids)
    assert (best <= -790).all()
    assert (least < 1e-30).all()


@pytest.mark.parametrize("interact", [False, True])
@pytest.mark.parametrize("size", [COLUMNS, 24])
@pytest.mark.parametrize("edges", [[0, ROWS], [0, 7, 20, ROWS]])
def test_patches_are_one_element_after_the_other(
    interact: bool, size: int, edges: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, as `Patch` says: what is handed on by any cut into patches is the same to rounding."""
    monkeypatch.setattr(feedback, "GROUP", 1)
    task = job(interact)
    model = feedback.loss_model(task, "test", 0.01, 0.5, together=1)
    steps, halves, middles = np.full(ROWS, 0.2, np.float32), np.full(ROWS, 4.0, np.float32), np.zeros(ROWS, np.float32)
    steps[5] = 0
    found = np.empty((ROWS, COLUMNS), np.int64)

    def visit(patch: Patch) -> None:
        own = (values[patch.rows] for values in (steps, halves, middles))
        found[patch.rows[:, None], patch.columns] = round_patch(patch, *own).T

    feedback.sweep(task.weight, model.columns, model.spread, size, edges, visit)
    weights, between = task.weight.double().numpy(), model.columns.spread().double().numpy()
    order = np.arange(ROWS) if model.spread is None else model.spread.order.numpy()
    spread = np.eye(ROWS) if model.spread is None else model.spread.spread().double().numpy()
    values = weights.copy()
    expected = np.empty_like(found)
    for i, column in enumerate(model.columns.order.tolist()):
        handed, rounded = np.zeros(ROWS), np.zeros(ROWS)
        for r, row in enumerate(order):
            target = values[row, column] + handed[r]
            code = np.clip(np.floor(target / steps[row] + 0.5), -4, 3) if steps[row] else -4
            rounded[row], expected[row, column] = code * steps[row], code
            handed[r + 1 :] += (values[row, column] - rounded[row]) * spread[r, r + 1 :]
        later = model.columns.order[i + 1 :].numpy()
        values[:, later] += np.outer(weights[:, column] - rounded, between[i, i + 1 :])
    assert (found != expected).mean() < 0.003  # of float32 beside float64: a code at an edge
    assert len(np.unique(found)) == 8


@pytest.mark.parametrize("count", [PATCH, PATCH + 1, 3 * PATCH - 20])
def test_rows_of_a_patch_interact_however_many_they_are(count: int) -> None:
    weights, handed = normal(6, count), normal(6, count, seed=1)
    between = np.triu(normal(6, 6, seed=2) / 8, 1)
    spread = np.triu(normal(count, count, seed=3) / count**0.5, 1)
    rows, columns, steps = np.arange(count), np.arange(6), np.full(count, 0.25, np.float32)
    own = (weights.copy(), weights.copy(), handed.copy(), between, spread)
    patch = Patch(columns, rows, (0, 0), np.array([0, count]), *own)
    codes = round_patch(patch, steps, 16 * steps * 4, np.zeros(count, np.float32))
    values, found = weights.astype(np.float64), np.empty((6, count))
    for column in range(6):
        left = np.zeros(count)
        for row in range(count):
            target = values[column, row] + handed[column, row] + left @ spread[:, row]
            found[column, row] = np.clip(np.floor(target / 0.25 + 0.5), -16, 15)
            left[row] = values[column, row] - 0.25 * found[column, row]
        values[column + 1 :] += between[column, column + 1 :, None] * (weights[column] - 0.25 * found[column])
    assert (codes != found).mean() < 0.003  # of float32 beside float64: a code at an edge


def grids_of(shape: tuple[int, int]) -> clipped.Tiles:
    """Of tiles of 5 x 32 weights, of 3 bits but for one of none and one of 1."""
    strips, tiles = -(-shape[0] // 5), -(-shape[1] // 32)
    widths, tries = np.full((strips, tiles), 3, np.uint8), np.array([1, 14, 14, 11, 8, 6, 5, 5, 4])
    widths[0, 0], widths[1, -1] = 0, 1
    fitted = np.zeros(widths.shape, np.uint8), np.zeros((*widths.shape, 5), np.uint8)
    return clipped.Tiles(5, 32, 15, -223, tries, widths, *fitted, np.zeros((tiles * 32, strips * 5), np.uint8))


def test_kernels_are_plain_python_too(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, power = normal(6, 70), np.abs(normal(6, seed=1))
    between, spread = np.triu(normal(70, 70, seed=2) / 32, 1), np.triu(normal(18, 18, seed=3) / 8, 1)

    def results() -> list[np.ndarray]:
        found, weights, handed = grids_of((18, 70)), normal(70, 18), normal(70, 18, seed=4) / 8
        rows, edges = np.array([*range(10, 18), *range(10)]), np.array([0, 5, 8, 13, 18])
        patch = Patch(np.arange(70), rows, (0, 0), edges, weights, weights.copy(), handed, between, spread)
        found.round_patch(patch, np.ones(70, np.float32))
        searched = clipped.search(groups, power, np.full(70, 2.0, np.float32), np.full(70, 5))
        return [*searched, found.codes, found.tile, found.row, patch.values, patch.weights]

    compiled = results()
    assert len(np.unique(compiled[2])) == 8
    monkeypatch.setattr(clipped, "_kernels", lambda: (clipped._search, clipped._round_tiles))
    for one, other in zip(compiled, results(), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("interact", [False, True])
def test_tiles_of_a_patch_are_as_patches_of_their_own(interact: bool) -> None:
    task, found = job(interact), []
    model = feedback.loss_model(task, "test", 0.01, 0.5, together=5)
    strips = feedback.row_order(task.weight, model.spread).numpy() // 5
    edges = [0, *np.flatnonzero(np.diff(strips)) + 1, len(strips)]
    for size in (32, 96):
        grids = grids_of((ROWS, COLUMNS))
        visit = partial(grids.round_patch, power=np.ones(size, np.float32))
        feedback.sweep(task.weight, model.columns, model.spread, size, edges, lambda patch, visit=visit: visit(patch))
        found.append(grids)
    one, other = found
    assert (one.codes != other.codes).mean() < 0.01
    assert (one.row != other.row).mean() < 0.01
    assert len(np.unique(one.codes)) == 8


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_breaks_nothing_but_its_row(value: float) -> None:
    values, grids = normal(32, 10), grids_of((10, 32))
    grids.widths[:] = 3
    values[3, 2] = value
    grids.round_patch(replace(Patch.alone(values), edges=np.array([0, 5, 10])), np.ones(32, np.float32))
    assert len(np.unique(grids.codes[:, 5:])) == 8
