"""Range asymmetric numeral systems (rANS) over blocks of integers: two kernels, each in numba and in numpy.

Duda 2013 (arXiv:1311.2540), with the interleaved lanes of Giesen 2014 (arXiv:1402.3392). All arithmetic is on
integers, so both backends write and read the same bits on every machine. The state x of a lane lives in
[2^16, 2^32); a symbol whose frequency is f and whose first slot is b, out of 2^12 slots, maps

    encode: x -> (x // f) * 2^12 + x % f + b        (after shifting out a 16-bit word while x >= f * 2^20)
    decode: x -> f * (x >> 12) + (x & 4095) - b     (then shifting in a 16-bit word if x < 2^16)

Symbol i of a block belongs to lane i % lanes, and the lanes share one stream of words. The encoder runs
backwards from the state START, so a decoder that is right ends with every lane at START and no word left
over.

The class of a symbol may depend on those before it: a finite-state machine for each column of the matrix reads
the parity of the column's symbols (an escape is odd), and a bit of its state picks the first or the second half
of the classes. Encoders get final classes; decoders run the machine. They remember 2 * state + bit, 0 in a block's
first row, for every symbol: `after` maps (2 * state + bit) * 2 + parity to that of the symbol a row further on. (A
memory by column is smaller, but finding the column costs more: 2.9 ns a code against 2.6.)
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nashswarm import jit

PRECISION = 12  # bits of a frequency; at 12 the rounding costs < 0.001 bit per symbol (measured on GPT-2 codes)
TOTAL = 1 << PRECISION
START = 1 << 16  # the lowest state; every lane starts its encoding there
MAX_LANES = 8  # a power of two, as are all numbers of lanes; 32 cost 0.013 bit per code in states
RADIUS = 60  # codes -60..60 are symbols 0..120
ESCAPE = 2 * RADIUS + 1  # the symbol of every other code; the value travels apart
SYMBOLS = ESCAPE + 1
ESCAPED = ESCAPE - RADIUS  # what the decoder leaves (61) where the value of an escape belongs
UNCODABLE = ESCAPED + 1  # what it leaves (62) where the class of a symbol has no table

WITHIN, OVERRUN, LEFTOVER, ASTRAY = range(4)
FAULTS = (
    "",
    "needs more words than its directory entry declares",
    "leaves words unread",
    "ends with lane states other than the start constant",
)


class EntropyError(ValueError):
    """A coded stream, table or scale vector is malformed, or does not fit what it is read with."""


def decode_table(frequencies: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """Slot -> symbol << 24 | (slot - first slot) << 12 | (frequency - 1), by class: one load per decoded code.

    Args: frequencies, uint16[classes, SYMBOLS], rows summing to 4096 or, for a class without a table, 0.
    Returns: uint32[classes * 4096]. A class without a table keeps the state and yields UNCODABLE.
    """
    slots = np.arange(TOTAL, dtype=np.uint32)
    blank = np.uint32(UNCODABLE + RADIUS) << np.uint32(24) | slots << np.uint32(12) | np.uint32(TOTAL - 1)
    table = np.tile(blank, (len(frequencies), 1))
    for entries, row in zip(table, frequencies.astype(np.uint32), strict=True):
        if row.any():
            symbols = np.repeat(np.arange(SYMBOLS, dtype=np.uint32), row)
            first = np.cumsum(row, dtype=np.uint32) - row
            entries[:] = symbols << 24 | (slots - first[symbols]) << 12 | (row[symbols] - 1)
    return table.ravel()


def encode_table(frequencies: NDArray[np.uint16]) -> NDArray[np.int32]:
    """Symbol -> (frequency, first slot): int32[classes * SYMBOLS, 2]; what cannot be coded has frequency 0."""
    wide = frequencies.astype(np.int32)
    return np.stack([wide, np.cumsum(wide, axis=1, dtype=np.int32) - wide], axis=-1).reshape(-1, 2)


# --- numba: one block a call --------------------------------------------------------------------------------
# Plain Python until `kernels` compiles them. Everything is int64 inside: numba takes uint64 with int64 to
# float64. Only as an index uint64 spares the question whether it counts from the end: 1.5 ns a code against 1.9.


def _decode_block(
    words: NDArray[np.uint16],
    begin: int,
    end: int,
    states: NDArray[np.uint32],
    classes: NDArray[np.uint8],
    table: NDArray[np.uint32],
    codes: NDArray[np.int32],
    columns: int,
    after: NDArray[np.uint8] | None,
) -> int:
    """Decode words[begin:end] into `codes`; returns an index into FAULTS. `words` runs MAX_LANES past `end`.

    `after` is None where no machine runs: that is compiled by itself, without what serves the machine.
    """
    mask = states.shape[0] - 1
    x = states.copy()
    position = begin
    half = table.shape[0] >> 1
    if after is not None:
        memory = np.zeros(codes.shape[0] + columns, np.uint8)
    for i in range(0, codes.shape[0], MAX_LANES):
        if position > end:  # once a round: the spare words behind the last block cover one round
            return OVERRUN
        left = codes.shape[0] - i
        for j in range(MAX_LANES):  # constant, so that it is unrolled: 1.9 ns a code against 2.7
            if j < left:
                here = np.uint64(i + j)
                state = np.int64(x[j & mask])
                slot = (np.int64(classes[here]) << PRECISION) | (state & (TOTAL - 1))
                if after is not None:
                    before = np.int64(memory[here])
                    slot += half & -(before & 1)
                entry = np.int64(table[slot])
                codes[here] = (entry >> 24) - RADIUS
                if after is not None:
                    memory[np.uint64(i + j + columns)] = after[before << 1 | ((entry >> 24) & 1)]
                state = ((entry & (TOTAL - 1)) + 1) * (state >> PRECISION) + ((entry >> PRECISION) & (TOTAL - 1))
                refill = state < START  # a select, not a branch, which would often be mispredicted
                word = np.int64(words[np.uint64(position)])
                x[j & mask] = ((state << 16) | word) if refill else state
                position += int(refill)
    if position != end:
        return OVERRUN if position > end else LEFTOVER
    for lane in range(mask + 1):
        if x[lane] != START:
            return ASTRAY
    return WITHIN


def _encode_block(
    codes: NDArray[np.int32],
    classes: NDArray[np.uint8],
    table: NDArray[np.int32],
    states: NDArray[np.uint32],
    words: NDArray[np.uint16],
) -> int:
    """Encode `codes`, last first, filling `words` (one per code) from its end and `states`.

    Returns the index of the first word written, or -1 - i where code i has frequency 0 in its class.
    """
    lanes = states.shape[0]
    x = np.full(lanes, START, np.int64)
    position: int = words.shape[0]
    for i in range(codes.shape[0] - 1, -1, -1):
        code = np.int64(codes[i])
        symbol = code + RADIUS if -RADIUS <= code <= RADIUS else ESCAPE
        row = np.int64(classes[i]) * SYMBOLS + symbol
        frequency = np.int64(table[row, 0])
        if frequency == 0:
            return -1 - i
        state = x[i % lanes]
        if state >= frequency << 20:
            position -= 1
            words[position] = state & 0xFFFF
            state >>= 16
        quotient = state // frequency
        x[i % lanes] = (quotient << PRECISION) + (state - quotient * frequency) + np.int64(table[row, 1])
    for lane in range(lanes):
        states[lane] = x[lane]
    return position


def _run_machine(
    codes: NDArray[np.int32],
    columns: int,
    after: NDArray[np.uint8],
    half: int,
    classes: NDArray[np.uint8],
) -> None:
    """Run the columns' machines over a block's codes, adding `half` to the classes where their bit is set."""
    memory = np.zeros(codes.shape[0] + columns, np.uint8)
    for i in range(codes.shape[0]):
        code, before = np.int64(codes[i]), np.int64(memory[i])
        parity = (code & 1) if -RADIUS <= code <= RADIUS else 1
        classes[i] += half * (before & 1)
        memory[i + columns] = after[before << 1 | parity]


def _count(
    codes: NDArray[np.int32],
    edges: NDArray[np.int64],
    rows: NDArray[np.int8],
    columns: NDArray[np.int8],
    after: NDArray[np.uint8],
    counts: NDArray[np.int64],
) -> None:
    """Add the symbols of blocks of rows, codes [rows, columns], to their counts by class, [2 * classes, SYMBOLS].

    The columns' machines run over each block; they stay as they are, and classes below half, where `after` has zeros.
    """
    half = counts.shape[0] // 2
    memory = np.empty(codes.shape[1], np.uint8)
    for block in range(len(edges) - 1):
        memory[:] = 0
        for row in range(edges[block], edges[block + 1]):
            for column in range(codes.shape[1]):
                code, before = np.int64(codes[row, column]), np.int64(memory[column])
                inside = -RADIUS <= code <= RADIUS
                level = min(max(np.int64(rows[row]) + np.int64(columns[column]), 0), half - 1) + half * (before & 1)
                counts[level, code + RADIUS if inside else ESCAPE] += 1
                memory[column] = after[before << 1 | ((code & 1) if inside else 1)]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled kernels; the signatures are those of the functions above."""

    decode_block: Callable[..., int]
    encode_block: Callable[..., int]
    run_machine: Callable[..., None]
    count: Callable[..., None]


@functools.cache
def kernels() -> Kernels | None:
    """Compile (or load from numba's cache) the kernels; None where numba is not installed.

    One block a call without the GIL, not `prange`: threads then also share the checksums, which cost a
    quarter of the decoding, no threading layer is started, and `parallel=True` would compile several times
    longer.
    """
    decoded = "int64(uint16[::1],int64,int64,uint32[::1],uint8[::1],uint32[::1],int32[::1],int64,{})"
    encoded = "int64(int32[::1],uint8[::1],int32[:,::1],uint32[::1],uint16[::1])"
    try:
        return Kernels(
            jit.compiled(_decode_block, [decoded.format(after) for after in ("none", "uint8[::1]")]),
            jit.compiled(_encode_block, encoded),
            jit.compiled(_run_machine, "void(int32[::1],int64,uint8[::1],int64,uint8[::1])"),
            jit.compiled(_count, "void(int32[:,::1],int64[::1],int8[::1],int8[::1],uint8[::1],int64[:,::1])"),
        )
    except ImportError:
        return None


# --- numpy: a step of all lanes of all blocks at once -------------------------------------------------------


def _by_step(values: NDArray[np.uint8], bounds: NDArray[np.int64], lanes: int) -> NDArray[np.uint8]:
    """Flat values [n], cut at `bounds` [blocks + 1] -> [steps, blocks, lanes], zeros behind a block's end."""
    steps = -(-int(np.diff(bounds).max()) // lanes)
    table = np.zeros((len(bounds) - 1, steps * lanes), np.uint8)
    for row, begin, end in zip(table, bounds[:-1], bounds[1:], strict=True):
        row[: end - begin] = values[begin:end]
    return np.ascontiguousarray(table.reshape(-1, steps, lanes).swapaxes(0, 1))


def _live(step: int, lengths: NDArray[np.int64], lanes: int) -> NDArray[np.bool_]:
    """Which lanes of which blocks still hold a symbol at this step: bool[blocks, lanes]."""
    return step * lanes + np.arange(lanes) < lengths[:, None]


def decode_blocks(
    words: NDArray[np.uint16],
    edges: NDArray[np.int64],
    states: NDArray[np.uint32],
    classes: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    table: NDArray[np.uint32],
    codes: NDArray[np.int32],
    columns: int,
    after: NDArray[np.uint8] | None,
) -> NDArray[np.int64]:
    """What `_decode_block` does, for all blocks: returns one index into FAULTS per block, int64[blocks].

    Args: words, uint16[total + spare]; edges, int64[blocks + 1], where each block's words begin; states,
    uint32[blocks, lanes]; classes, uint8[n]; bounds, int64[blocks + 1], where each block's codes begin;
    codes, int32[n], written; columns, at least as many as lanes if a machine runs: no symbol of a step then decides
    another's class. Beside these it holds 4 bytes per code, 5 with a machine.
    """
    lanes, lengths = states.shape[1], np.diff(bounds)
    class_steps = _by_step(classes, bounds, lanes)
    symbols = np.empty_like(class_steps)
    memory = np.zeros((len(lengths), symbols[:, 0].size + columns if after is not None else 0), np.uint8)
    x, position = states.astype(np.uint32), edges[:-1].copy()
    for step, step_classes in enumerate(class_steps):
        live = _live(step, lengths, lanes) if (step + 1) * lanes > lengths.min() else None
        slot = step_classes.astype(np.int64) << PRECISION | (x & (TOTAL - 1))
        if after is not None:
            before = memory[:, step * lanes : (step + 1) * lanes].astype(np.int64)
            slot += (table.size >> 1) * (before & 1)
        entry = table.take(slot)
        symbols[step] = entry >> 24
        if after is not None:
            begin = step * lanes + columns
            memory[:, begin : begin + lanes] = after[before << 1 | (entry >> 24 & 1)]
        turned = ((entry & (TOTAL - 1)) + 1) * (x >> PRECISION) + ((entry >> PRECISION) & (TOTAL - 1))
        turned = turned if live is None else np.where(live, turned, x)
        refill = turned < START  # never of an idle lane, whose state is in range already
        rank = refill.cumsum(axis=1)
        fetched = words.take(position[:, None] + rank - refill, mode="clip")  # clipped: a block astray reads no further
        x = np.where(refill, turned << 16 | fetched, turned)
        position += rank[:, -1]
    rows = symbols.swapaxes(0, 1).reshape(len(lengths), -1)
    for row, begin, end in zip(rows, bounds[:-1], bounds[1:], strict=True):
        codes[begin:end] = row[: end - begin]
    codes -= RADIUS
    faults = np.where((x != START).any(axis=1), ASTRAY, WITHIN)
    return np.select([position > edges[1:], position < edges[1:]], [OVERRUN, LEFTOVER], faults)


def encode_blocks(
    codes: NDArray[np.int32],
    classes: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    table: NDArray[np.int32],
    lanes: int,
) -> tuple[NDArray[np.uint32], list[NDArray[np.uint16]]]:
    """What `_encode_block` does, for all blocks: (uint32[blocks, lanes], the words of each block).

    The caller has seen to it that no frequency is 0. Holds about 8 bytes per code.
    """
    lengths = np.diff(bounds)
    symbols = symbols_of(codes)
    symbol_steps, class_steps = _by_step(symbols, bounds, lanes), _by_step(classes, bounds, lanes)
    words = np.zeros((len(lengths), int(lengths.max())), np.uint16)
    x = np.full((len(lengths), lanes), START, np.int64)
    position = np.full(len(lengths), words.shape[1])
    for step in range(len(symbol_steps) - 1, -1, -1):
        live = _live(step, lengths, lanes)
        entry = table[class_steps[step].astype(np.int64) * SYMBOLS + symbol_steps[step]]
        frequency = np.where(live, entry[..., 0], TOTAL).astype(np.int64)  # an idle lane: the identity
        first = np.where(live, entry[..., 1], 0)
        spill = x >= frequency << 20
        rank = spill.cumsum(axis=1)
        position -= rank[:, -1]
        block, lane = np.nonzero(spill)
        words[block, (position[:, None] + rank - 1)[block, lane]] = x[block, lane] & 0xFFFF
        x = np.where(spill, x >> 16, x)
        x = (x // frequency << PRECISION) + x % frequency + first
    return x.astype(np.uint32), [row[begin:] for row, begin in zip(words, position, strict=True)]


def symbols_of(codes: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Codes -> symbols, uint8: code + 60, or ESCAPE outside -60..60."""
    inside = (codes >= -RADIUS) & (codes <= RADIUS)
    return np.where(inside, codes + np.int32(RADIUS), np.int32(ESCAPE)).astype(np.uint8)
