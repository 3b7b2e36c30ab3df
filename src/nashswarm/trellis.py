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
carries its survivor's targets along, through blocks of rows, after which the best path is decided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nashswarm import jit
from nashswarm.rans import RADIUS

# Parity-check polynomials h0, h1 of Ungerboeck's codes for one-dimensional constellations (1982, table I), octal.
POLYNOMIALS = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24)}
START = 0  # the state before the first row of a block
BLOCK = 64  # interacting rows between two decisions


@dataclass(frozen=True, slots=True, eq=False)
class Machine:
    """Which quantizer each state uses, uint8 [states]; the state after a code of either parity, uint8 [states, 2]."""

    quantizer: NDArray[np.uint8]
    after: NDArray[np.uint8]


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


def rounding(
    edges: NDArray[np.int64], found: Machine, spread: NDArray[np.float32] | None
) -> Callable[[NDArray[np.float32], NDArray[np.float32]], tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """The rounding of one column: (targets, steps), float32 [rows] -> (codes int32 [rows], values float32 [rows]).

    Arguments: `spread`, float32 [rows, rows] above the diagonal, what a unit of a row's error takes from later rows'
    targets; None where rows do not interact.
    """
    kernel, edges = _kernel(), np.ascontiguousarray(edges, np.int64)
    alone = np.zeros((0, 0), np.float32)

    def snap(targets: NDArray[np.float32], steps: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        codes, rounded = np.empty(len(targets), np.int32), np.empty_like(targets)
        kernel(
            targets.copy(),
            steps,
            alone if spread is None else spread,
            edges,
            found.quantizer,
            found.after,
            codes,
            rounded,
        )
        return codes, rounded

    return snap


@cache
def _kernel() -> Callable[..., None]:
    from numba.extending import register_jitable

    register_jitable(_nearest)  # they stay plain Python, too
    register_jitable(_trace)
    register_jitable(inline="always")(_hand_on)  # 370 ns a row of 300 with 8 states, called 500
    numbers, bits = "float32[::1]", "uint8[::1], uint8[:, ::1]"
    signature = f"void({numbers}, {numbers}, float32[:, ::1], int64[::1], {bits}, int32[::1], {numbers})"
    return jit.compiled(_round_column, signature)


def _nearest(scaled: np.float32, half: np.float32) -> tuple[int, int]:
    """The codes of either parity nearest to `scaled` >= 0 steps; the quantizer shifts by `half`, 0 or half a step."""
    near = int(np.rint(scaled + half))
    other = near + 1 if scaled + half > near else near - 1
    if half > 0 and near == 1 and scaled < np.float32(0.75):
        other = 0  # which is not shifted: nearer than 2, at 1.5 steps
    return near, other


def _hand_on(
    row: int,
    origin: NDArray[np.uint8],
    error: NDArray[np.float32],
    spread: NDArray[np.float32],
    own: NDArray[np.float32],
    handed: NDArray[np.float32],
) -> None:
    """The targets of a block's rows after `row`, by state, from its errors and the targets of the states before."""
    for state in range(len(origin)):
        mine, before, e = handed[state], own[origin[state]], error[state]
        for later in range(row + 1, len(spread)):
            mine[later] = before[later] - e * spread[later]


def _trace(best: int, origin: NDArray[np.uint8], kept: NDArray[Any], path: NDArray[Any]) -> None:
    """What was kept, by row and state, along the path that ends in state `best`."""
    for i in range(len(path) - 1, -1, -1):
        path[i] = kept[i, best]
        best = origin[i, best]


def _round_column(
    targets: NDArray[np.float32],
    steps: NDArray[np.float32],
    spread: NDArray[np.float32],
    edges: NDArray[np.int64],
    quantizer: NDArray[np.uint8],
    after: NDArray[np.uint8],
    codes: NDArray[np.int32],
    rounded: NDArray[np.float32],
) -> None:
    """Plain Python until numba compiles it. Uses up `targets`; fills `codes` and `rounded`."""
    states, interact, impossible = len(quantizer), len(spread) > 0, np.float32(np.inf)
    for place in range(len(edges) - 1):
        first, state = edges[place], START
        while first < edges[place + 1]:
            last = min(first + BLOCK, edges[place + 1]) if interact else edges[place + 1]
            count = last - first
            width = count if interact else 1
            own, handed = np.empty((states, width), np.float32), np.empty((states, width), np.float32)
            if interact:
                own[state] = targets[first:last]
            cost = np.full(states, impossible, np.float32)
            cost[state] = 0
            # What follows is of the best path into each state.
            origin, code = np.zeros((count, states), np.uint8), np.zeros((count, states), np.int32)
            value, error = np.zeros((count, states), np.float32), np.zeros((count, states), np.float32)
            for i in range(count):
                row = first + i
                inverse = np.float32(1) / steps[row]
                reached = np.full(states, impossible, np.float32)
                for s in range(states):
                    if cost[s] == impossible:
                        continue
                    target = own[s, i] if interact else targets[row]
                    scaled = abs(target * inverse)
                    half = np.float32(0.5) * quantizer[s]
                    for k in _nearest(scaled, half):
                        size = np.float32(k) - half if k > 0 else np.float32(0) if k == 0 else np.float32(k) + half
                        miss = scaled - size
                        total = cost[s] + miss * miss
                        s2 = after[s, min(abs(k), RADIUS + 1) & 1]
                        if total < reached[s2]:
                            reached[s2] = total
                            origin[i, s2] = s
                            code[i, s2] = k if target >= 0 else -k
                            value[i, s2] = size * steps[row] if target >= 0 else -size * steps[row]
                            error[i, s2] = target - value[i, s2]
                if interact:
                    _hand_on(i, origin[i], error[i], spread[row, first:last], own, handed)
                    own, handed = handed, own
                cost = reached
            state = int(np.argmin(cost))
            _trace(state, origin, code, codes[first:last])
            _trace(state, origin, value, rounded[first:last])
            if interact:
                _trace(state, origin, error, targets[first:last])
                for i in range(first, last):
                    targets[last:] -= targets[i] * spread[i, last:]
            first = last
