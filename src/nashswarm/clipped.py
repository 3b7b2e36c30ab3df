"""Finite grids: the search for their steps, and rounding to them with feedback.

A grid of step s has the values (q + m) s, -h <= q < h, q whole. s is 2^(e / 8) with a whole e; m is 1/2 where e is
even, else 0: of two neighbouring steps one has a grid that is symmetric, and the other one with zero in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from nashswarm import jit
from nashswarm.patches import PATCH, Patch

STEPS_PER_OCTAVE = 8
LEAST = 2.0**-100  # weights below are taken for it
LANES = 64  # groups of weights that are searched at the same time


def step(eighths: np.ndarray) -> np.ndarray:
    """2^(eighths / 8), float32."""
    return np.exp2(eighths / STEPS_PER_OCTAVE).astype(np.float32)


def middle(eighths: np.ndarray) -> np.ndarray:
    """Of the value of code 0, in steps, float32: 1/2 or 0."""
    return np.where(eighths % 2, np.float32(0), np.float32(0.5))


def search(
    groups: np.ndarray, power: np.ndarray, halves: np.ndarray, tries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best steps of groups, float32 [C, groups], a column each: e, int64 [groups], and errors as by `error`.

    Arguments: `power`, float32 [C], what a squared error counts; `halves`, h of each group's grids, float32 [groups];
    `tries`, how many steps to try, from the one that clips nothing downwards, int64 [groups].
    """
    peak = np.abs(groups).max(0, initial=LEAST)
    first = np.ceil(STEPS_PER_OCTAVE * np.log2(peak / halves)).astype(np.int64) + 1
    return _searched(groups, power, halves, first - np.minimum(np.arange(tries.max())[:, None], tries - 1))


def error(groups: np.ndarray, power: np.ndarray, eighths: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """Weighted squared rounding errors, float32 [groups], on grids of these e, int64 [groups], and h, float32."""
    return _searched(groups, power, halves, eighths[None])[1]


def _searched(
    groups: np.ndarray, power: np.ndarray, halves: np.ndarray, eighths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Arguments: `eighths`, those that are tried, int64 [tries, groups]."""
    best, least = np.empty(len(halves), np.int64), np.empty(len(halves), np.float32)
    _kernels()[0](groups, power, halves, eighths, step(eighths), middle(eighths), best, least)
    return best, least


def round_patch(patch: Patch, steps: np.ndarray, halves: np.ndarray, middles: np.ndarray) -> np.ndarray:
    """Round a patch in place, as `Patch` says; its codes q, int16 [C, R].

    Arguments: s, h and m of every row, float32 [R]. Where the step is zero, so is the value, and q is -h.
    """
    codes = np.empty(patch.values.shape, np.int16)
    given = patch.weights, patch.values, patch.handed, patch.between, patch.spread
    _kernels()[1](*given, steps, halves, middles, codes)
    return codes


def expected(patch: Patch) -> np.ndarray:
    """What comes to a patch's elements if rounding the columns before leaves nothing: targets, float32 [C, R].

    The rounded then are the targets, and what the weights differ by from these is handed on to later columns. What the
    patch's rows will hand each other is left out: with it, KL of the reference model at 2.5 and at 3.25 bits was 0.198
    and 0.0614, without 0.195 and 0.0607.
    """
    found: np.ndarray = patch.values + patch.handed
    _kernels()[2](patch.weights, patch.between, found)
    return found


@cache
def _kernels() -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    vector, matrix = "float32[::1]", "float32[:, ::1]"
    search = f"void({matrix}, {vector}, {vector}, int64[:, ::1], {matrix}, {matrix}, int64[::1], {vector})"
    part = "float32[:, :]"
    patch = f"void({part}, {part}, {part}, {matrix}, {part}, {vector}, {vector}, {vector}, int16[:, ::1])"
    expect = f"void({part}, {matrix}, {matrix})"
    return jit.compiled(_search, search), jit.compiled(_round, patch), jit.compiled(_expect, expect)


def _search(
    groups: np.ndarray,
    power: np.ndarray,
    halves: np.ndarray,
    eighths: np.ndarray,
    steps: np.ndarray,
    middles: np.ndarray,
    best: np.ndarray,
    least: np.ndarray,
) -> None:
    """Plain Python until numba compiles it, as what follows. Loops over lanes are of a constant length, for vectors."""
    columns, count = groups.shape
    block, errors = np.zeros((columns, LANES), np.float32), np.empty(LANES, np.float32)
    s, h, m = np.ones(LANES, np.float32), np.ones(LANES, np.float32), np.zeros(LANES, np.float32)
    for start in range(0, count, LANES):
        lanes = min(LANES, count - start)
        block[:, :lanes] = groups[:, start : start + lanes]
        h[:lanes] = halves[start : start + lanes]
        least[start : start + lanes] = np.float32(np.inf)
        best[start : start + lanes] = eighths[0, start : start + lanes]
        for i in range(len(steps)):
            s[:lanes], m[:lanes] = steps[i, start : start + lanes], middles[i, start : start + lanes]
            errors[:] = np.float32(0)
            for column in range(columns):
                weight = power[column]
                for lane in range(LANES):
                    code = np.floor(block[column, lane] / s[lane] + (np.float32(0.5) - m[lane]))
                    code = min(max(code, -h[lane]), h[lane] - np.float32(1))
                    miss = (code + m[lane]) * s[lane] - block[column, lane]
                    errors[lane] += weight * miss * miss
            for lane in range(lanes):
                if errors[lane] < least[start + lane]:
                    least[start + lane], best[start + lane] = errors[lane], eighths[i, start + lane]


def _round(
    weights: np.ndarray,
    values: np.ndarray,
    handed: np.ndarray,
    between: np.ndarray,
    spread: np.ndarray,
    steps: np.ndarray,
    halves: np.ndarray,
    middles: np.ndarray,
    codes: np.ndarray,
) -> None:
    """PATCH rows at a time, so that what all columns need of them stays near; then what they hand to those behind."""
    (total, count), half = values.shape, np.float32(0.5)
    taken, padded = np.empty(PATCH, np.float32), np.zeros((PATCH, PATCH), np.float32)
    for first in range(0, count, PATCH):
        own = min(PATCH, count - first)
        for row in range(own if len(spread) else 0):
            padded[row, :own] = spread[first + row, first : first + own]
        left, value = np.empty((total, own), np.float32), np.empty((total, own), np.float32)
        left[:], value[:] = weights[:, first : first + own], values[:, first : first + own]
        for column in range(total):
            taken[:own] = handed[column, first : first + own]
            for place in range(own):
                row = first + place
                target = value[column, place] + taken[place]
                code, rounded = -halves[row], np.float32(0)
                if steps[row] > 0:
                    code = np.floor(target / steps[row] + (half - middles[row]))
                    code = min(max(code, -halves[row]), halves[row] - np.float32(1))
                    rounded = (code + middles[row]) * steps[row]
                codes[column, row] = np.int16(code)
                value[column, place] -= rounded
                left[column, place] -= rounded
                if len(spread):
                    for later in range(PATCH):  # those of rows before are not read again
                        taken[later] += value[column, place] * padded[place, later]
            for other in range(column + 1, len(between)):
                for place in range(own):
                    value[other, place] += between[column, other] * left[column, place]
        weights[:, first : first + own], values[:, first : first + own] = left, value
        for column in range(total if len(spread) else 0):
            for place in range(own):
                for later in range(first + own, count):
                    handed[column, later] += value[column, place] * spread[first + place, later]


def _expect(weights: np.ndarray, between: np.ndarray, found: np.ndarray) -> None:
    for column in range(len(between)):
        for other in range(column + 1, len(between)):
            for row in range(found.shape[1]):
                found[other, row] += between[column, other] * (weights[column, row] - found[column, row])
