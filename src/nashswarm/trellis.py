"""Trellis-coded quantization: two interleaved grids, and a state that says which of them a weight may use.

With one grid of step s, rounding leaves s^2 / 12; the cells are intervals, and no better cell exists in one dimension.
Here the codes of a column, row after row, drive a finite-state machine, whose state picks the grid of the next code:

    quantizer 0: the multiples of s              value = code * s
    quantizer 1: those half a step beside, and 0  value = (code - sign(code) / 2) * s

Both cost the same entropy, but together they are twice as dense, and the Viterbi algorithm finds the path of least
error: at equal entropy 1.0 dB (8 states) below one grid's, of the 1.53 dB that all of high-dimensional geometry can
give (Ungerboeck, 1982; Marcellin and Fischer, 1990; with entropy coding Fischer and Wang, 1992). The machine reads a
code's parity; zeros in both grids keep low rates good, as in JPEG 2000 and VVC. Codes beyond the coder's symbols count
as odd, because their values travel apart and the decoder meets them late.

Where rows interact (see `feedback`), a code's target depends on the errors before it on the same path: each state
carries its survivor's targets along, through a patch of rows, after which the best path is decided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nashswarm import jit
from nashswarm.patches import PATCH, Patch
from nashswarm.rans import RADIUS

# Parity-check polynomials h0, h1 of Ungerboeck's codes for one-dimensional constellations (1982, table I), octal.
POLYNOMIALS = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24)}
START = 0  # the state before the first row of a block
LARGEST = 1 << 24  # codes from here on float32 does not count one by one
OUT_OF_BOUNDS = -(1 << 31)  # in their place


@dataclass(frozen=True, eq=False)
class Machine:
    """Which quantizer each state uses, uint8 [states]; the state after a code of either parity, uint8 [states, 2]."""

    quantizer: NDArray[np.uint8]
    after: NDArray[np.uint8]

    @cached_property
    def ways(self) -> NDArray[np.int64]:
        """The two ways into each state, int64 [2, states]: parity * states + the state before, which rises."""
        states = len(self.quantizer)
        into = [np.argwhere(self.after == state) for state in range(states)]
        return np.array([[parity * states + before for before, parity in two] for two in into]).T.copy()


@cache
def machine(states: int) -> Machine:
    """The systematic feedback encoder of Ungerboeck's code with this many states, a power of two from 4 to 64."""
    h0, h1 = POLYNOMIALS[states]
    registers = states.bit_length() - 1
    quantizer, after = np.zeros(states, np.uint8), np.zeros((states, 2), np.uint8)
    for state in range(states):
        quantizer[state] = bit = state >> (registers - 1)
        for parity in (0, 1):
            for register in range(registers):
                shifted = state >> (register - 1) & 1 if register else 0
                place = registers - register
                after[state, parity] |= (shifted ^ (h0 >> place & bit) ^ (h1 >> place & parity)) << register
    return Machine(quantizer, after)


def quantizers(codes: NDArray[np.int32], edges: NDArray[np.int64], found: Machine) -> NDArray[np.uint8]:
    """Which quantizer each code was made with, uint8 [rows, columns].

    Arguments: `edges`, int64 [blocks + 1], the first row of each block: the machine starts anew there.
    """
    parity = (np.minimum(np.abs(codes).view(np.uint32), RADIUS + 1) & 1).astype(np.uint8)
    used, after = np.empty(codes.shape, np.uint8), found.after.reshape(-1)
    starts, state = set(np.asarray(edges).tolist()), np.zeros(codes.shape[1], np.uint8)
    for row in range(len(codes)):
        if row in starts:
            state = np.full(codes.shape[1], START, np.uint8)
        found.quantizer.take(state, out=used[row])
        state = after.take(2 * state + parity[row])
    return used


def values(codes: NDArray[np.int32], used: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Codes and their quantizers -> values in steps, float32."""
    return codes.astype(np.float32) - np.float32(0.5) * (np.sign(codes) * used).astype(np.float32)


def decisions(edges: NDArray[np.int64], interacting: bool) -> list[int]:
    """Rows at which paths are decided: `edges` of blocks, and every PATCH rows of a block where rows interact."""
    if not interacting:
        return [int(edge) for edge in edges]
    return [*(row for a, b in pairwise(map(int, edges)) for row in range(a, b, PATCH)), int(edges[-1])]


def round_patch(
    patch: Patch,
    rows: NDArray[np.float32],
    columns: NDArray[np.float32],
    states: NDArray[np.uint8],
    found: Machine,
    fresh: NDArray[np.bool_] | None = None,
) -> NDArray[np.int32]:
    """Round a patch in place, as `Patch` says, and return its codes, int32 [columns, rows].

    Arguments: `rows`, float32 [rows], and `columns`, float32 [columns]: a step is their product; `states`, uint8
    [columns], in which the machine comes to the first row of every column, START where a block begins, and in which
    it leaves the last; `fresh`, bool [pieces], where the machine starts anew, nowhere if there is none. Paths are
    decided at the end of each piece, which has no more than PATCH rows, if they interact. Codes from LARGEST on, and
    those of what is not finite, become OUT_OF_BOUNDS.
    """
    codes = np.empty(patch.values.shape, np.int32)
    fresh = np.zeros(len(patch.edges) - 1, np.bool_) if fresh is None else fresh
    halves, kernel = found.quantizer * np.float32(0.5), _kernel(len(found.quantizer))
    given = patch.weights, patch.values, patch.handed, patch.between, patch.spread, rows, columns, halves, found.ways
    kernel(*given, states, codes, patch.edges, fresh)
    return codes


@cache
def _kernel(states: int) -> Callable[..., None]:
    """`_round` for so many states. They are a constant there, so that loops over them become vector instructions."""
    from numba.extending import register_jitable

    within: list[Any] = [_round, _extend, _choose, _hand_on, _trace]
    for part in within:
        register_jitable(inline="always")(part)  # each stays plain Python, too
    beside: list[Any] = [_cut, _paste, _hand_over, _hand_down]
    for part in beside:
        register_jitable(part)

    def kernel(weights, values, handed, between, spread, rows, columns, halves, ways, start, codes, edges, fresh):  # type: ignore[no-untyped-def]
        _round(
            states, weights, values, handed, between, spread, rows, columns, halves, ways, start, codes, edges, fresh
        )

    vector, part = "float32[::1]", "float32[:, :]"
    patch = f"{part}, {part}, {part}, float32[:, ::1], {part}, {vector}, {vector}"
    return jit.compiled(
        kernel, f"void({patch}, {vector}, int64[:, ::1], uint8[::1], int32[:, ::1], int64[::1], b1[::1])"
    )


def _round(
    states: int,
    all_weights: NDArray[np.float32],
    all_values: NDArray[np.float32],
    all_handed: NDArray[np.float32],
    between: NDArray[np.float32],
    spread: NDArray[np.float32],
    all_rows: NDArray[np.float32],
    columns: NDArray[np.float32],
    halves: NDArray[np.float32],
    ways: NDArray[np.int64],
    start: NDArray[np.uint8],
    all_codes: NDArray[np.int32],
    edges: NDArray[np.int64],
    fresh: NDArray[np.bool_],
) -> None:
    """Plain Python until numba compiles it, as all that follows.

    What is known of the best path into each state lies in one array, so that the compiler sees that nothing in it
    overlaps. In units of `states`: 0 targets, 1 what the paths cost, 2 halves; then, of codes of even parity and of
    odd, 3 and 4 codes, 5 and 6 costs, 7 and 8 what is left of the value.
    """
    work, error, interact = np.empty(9 * states, np.float32), np.empty(states, np.float32), len(spread) > 0
    own, later = np.zeros((states, PATCH), np.float32), np.zeros((states, PATCH), np.float32)
    for piece in range(len(fresh)):
        first, last = edges[piece], edges[piece + 1]
        weights, values = _cut(all_weights, first, last), _cut(all_values, first, last)
        rows, codes, count = all_rows[first:last], np.empty(values.shape, np.int32), last - first
        padded = np.zeros((count, PATCH), np.float32)
        way, code = np.empty((count, states), np.uint8), np.empty((count, states), np.float32)
        if interact:
            padded[:, :count] = spread[first:last, first:last]
        if fresh[piece]:
            start[:] = START
        for column in range(len(columns)):
            for state in range(states):
                work[states + state], work[2 * states + state] = np.float32(np.inf), halves[state]
                if interact:
                    for row in range(count):
                        own[state, row] = values[column, row] + all_handed[column, first + row]
            work[states + start[column]], steps = np.float32(0), rows * columns[column]
            for row in range(count):
                for state in range(states):
                    work[state] = own[state, row] if interact else values[column, row]
                _extend(states, work, steps[row], values[column, row])
                _choose(states, work, ways, way[row], error, code[row])
                if interact:
                    _hand_on(states, way[row], error, padded[row], own, later)
                    own, later = later, own
            best = 0
            for state in range(1, states):
                if work[states + state] < work[states + best]:
                    best = state
            start[column] = best
            _trace(states, best, way, code, halves, steps, codes[column], values[column], weights[column])
            _hand_over(values, weights[column], column, between)
        for whole, part in ((all_values, values), (all_weights, weights)):
            _paste(whole, first, part)
        _paste(all_codes, first, codes)
        _hand_down(all_handed, values, first, last, spread)


def _cut(whole: NDArray[np.float32], first: int, last: int) -> NDArray[np.float32]:
    """A copy of some rows, which lie along the second axis."""
    found = np.empty((len(whole), last - first), np.float32)
    for column in range(len(whole)):
        for row in range(last - first):
            found[column, row] = whole[column, first + row]
    return found


def _paste(whole: NDArray[Any], first: int, part: NDArray[Any]) -> None:
    """Put them back."""
    for column in range(len(whole)):
        for row in range(part.shape[1]):
            whole[column, first + row] = part[column, row]


def _hand_over(
    values: NDArray[np.float32], left: NDArray[np.float32], column: int, between: NDArray[np.float32]
) -> None:
    """What is left of a column's weights to all columns behind it."""
    for later in range(column + 1, len(between)):
        for row in range(values.shape[1]):
            values[later, row] += between[column, later] * left[row]


def _hand_down(
    handed: NDArray[np.float32], left: NDArray[np.float32], first: int, last: int, spread: NDArray[np.float32]
) -> None:
    """What is left of a piece's values to all rows behind it, where rows interact."""
    for column in range(len(handed) if len(spread) else 0):
        for row in range(first, last):
            error = left[column, row - first]
            for later in range(last, len(spread)):
                handed[column, later] += error * spread[row, later]


def _extend(states: int, work: NDArray[np.float32], step: np.float32, value: np.float32) -> None:
    """The nearest code of either parity from every state, and what is left of the value; in float32, no branch."""
    zero, half, one, two = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
    beyond, inverse = np.float32(RADIUS + 1), one / step
    for s in range(states):
        target, cost, shift = work[s], work[states + s], work[2 * states + s]
        scaled = abs(target * inverse)
        near = np.rint(scaled + shift)
        other = near + one if scaled + shift > near else near - one
        # On the shifted grid 1 stands for half a step. From below 0.75 the second nearest is 0, not 2, at 1.5 steps.
        other = zero if (shift > zero) & (near == one) & (scaled < np.float32(0.75)) else other
        near_size = near - shift if near > zero else near
        other_size = other - shift if other > zero else other
        near_cost = cost + (scaled - near_size) * (scaled - near_size)
        other_cost = cost + (scaled - other_size) * (scaled - other_size)
        symbol = near if near < beyond else beyond
        odd = symbol - two * np.floor(symbol * half) > zero
        neither = (near >= beyond) & (other >= beyond)  # is even
        swap = (not odd) | (neither & (other_cost < near_cost))
        sign = one if target >= zero else -one
        work[3 * states + s] = sign * (other if odd else near)
        work[4 * states + s] = sign * (other if swap else near)
        work[5 * states + s] = np.float32(np.inf) if neither else (other_cost if odd else near_cost)
        work[6 * states + s] = other_cost if swap else near_cost
        work[7 * states + s] = value - sign * ((other_size if odd else near_size) * step)
        work[8 * states + s] = value - sign * ((other_size if swap else near_size) * step)


def _choose(
    states: int,
    work: NDArray[np.float32],
    ways: NDArray[np.int64],
    way: NDArray[np.uint8],
    error: NDArray[np.float32],
    code: NDArray[np.float32],
) -> None:
    """The better way into every state."""
    for s in range(states):
        one, other = ways[0, s], ways[1, s]
        better = other if work[5 * states + other] < work[5 * states + one] else one
        way[s], error[s], code[s] = better, work[7 * states + better], work[3 * states + better]
        work[s] = work[5 * states + better]
    for s in range(states):
        work[states + s] = work[s]


def _hand_on(
    states: int,
    way: NDArray[np.uint8],
    error: NDArray[np.float32],
    spread: NDArray[np.float32],
    own: NDArray[np.float32],
    later: NDArray[np.float32],
) -> None:
    """The targets of a piece's rows on each path, with what this one left; those of rows before are not read again."""
    for s in range(states):
        before, mine = way[s] & (states - 1), error[s]
        for row in range(PATCH):
            later[s, row] = own[before, row] + mine * spread[row]


def _trace(
    states: int,
    best: int,
    way: NDArray[np.uint8],
    code: NDArray[np.float32],
    halves: NDArray[np.float32],
    steps: NDArray[np.float32],
    codes: NDArray[np.int32],
    values: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> None:
    """Along the path that ends in state `best`: its codes, and what they leave of values and weights."""
    for row in range(len(codes) - 1, -1, -1):
        found = code[row, best]
        best = way[row, best] & (states - 1)
        codes[row] = np.int32(found) if abs(found) < np.float32(LARGEST) else OUT_OF_BOUNDS
        shift = halves[best] if found > 0 else -halves[best] if found < 0 else np.float32(0)
        rounded = (found - shift) * steps[row]
        values[row] -= rounded
        weights[row] -= rounded
