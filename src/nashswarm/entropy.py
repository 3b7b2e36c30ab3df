"""Entropy coding of quantized weight codes: contexts by scale and quantizer, tables for a model, rANS.

    scales -> histogram (summed over the matrices) -> tables -> encode, decode

The class of the code at (r, c) is 44 * quantizer + clip(row_scale[r] + column_scale[c], 0, 43): a log-scale in
quarter octaves, so that one set of tables serves every matrix (tables per matrix, adaptive mixing and neighbours
gained < 0.003 bit on GPT-2). Classes, tables and coder are integers: a float model one ulp off decodes into
garbage.

The quantizer, 0 or 1, is that of trellis-coded rounding (see `trellis`): the machine reads the parities of a
column's codes, row after row, and starts anew where a block begins (`first_rows`). Its two grids cut a weight's
distribution differently, so each has tables of its own. Without a machine all codes are of quantizer 0.

Stream of a matrix, little-endian; blocks and lanes follow from the shape, and from whether a machine runs:

    format      1 byte      1 + log2 of the machine's number of states; 1 without a machine
    directory   varints     for each block: words, bytes of escapes
    checksums   4 x blocks  CRC-32 of (rows, cols, block) as uint64 and the block's codes as int32
    states      4 x blocks x lanes
    words       2 x words   of all blocks
    escapes     varints     of all blocks, in the order of the codes: zigzag of the distance beyond +-60

Nothing may follow, and every block is checked: states end at their start, words and escapes are used up,
checksums match.
"""

import functools
import itertools
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nashswarm import rans, trellis
from nashswarm.rans import ESCAPE, MAX_LANES, RADIUS, SYMBOLS, TOTAL, EntropyError

R = TypeVar("R")
T = TypeVar("T")
CLASSES = 44  # of scale
TABLES = 2 * CLASSES  # by quantizer and class of scale
CLASSES_PER_OCTAVE = 4
UNIT_CLASS = 22  # the class whose mean |code| is 1, so 0..43 reach from 0.022 (0.15 bit) to 38 (6.7 bits)
BLOCK = 1 << 16  # codes: 40 bytes of block overhead are then 0.005 bit per code
CODES_PER_LANE = 4096  # at least, so that states (about 3 bytes a lane) stay below 0.006 bit per code
FORMAT = 1  # without a machine
VARINT_BYTES = 5  # the longest varint: 35 bits
PARTS = 32  # of a matrix' blocks, where several threads count
Backend = Literal["auto", "numba", "numpy"]
Shape = tuple[int, int]


class Run(Protocol):
    """Work on items, in turn or beside each other, as a `threads.Team`."""

    def __call__(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """work(item) of every item."""


def _in_turn(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    return [work(item) for item in items]


# --- contexts -----------------------------------------------------------------------------------------------


def _classes(row_scale: NDArray[np.int8], column_scale: NDArray[np.int8]) -> NDArray[np.uint8]:
    """clip(row_scale[r] + column_scale[c], 0, 43): uint8[rows, cols]."""
    total = row_scale.astype(np.int16)[:, None] + column_scale.astype(np.int16)
    return np.clip(total, 0, CLASSES - 1).astype(np.uint8)


def _checked_scales(
    row_scale: ArrayLike, column_scale: ArrayLike, shape: Shape
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    rows, cols = shape
    if rows < 1 or cols < 1:
        raise EntropyError(f"a matrix of shape {rows} x {cols} holds no codes")
    scales = []
    for name, scale, length in (("row", row_scale, rows), ("column", column_scale, cols)):
        array = np.asarray(scale)
        if array.dtype != np.int8 or array.shape != (length,):
            raise EntropyError(f"{name}_scale is {array.dtype}{list(array.shape)}, expected int8[{length}]")
        scales.append(np.ascontiguousarray(array))
    return scales[0], scales[1]


def _checked_codes(codes: ArrayLike) -> NDArray[np.int32]:
    array = np.asarray(codes)
    if array.dtype != np.int32 or array.ndim != 2:
        raise EntropyError(f"codes are {array.dtype}{list(array.shape)}, expected int32[rows, cols]")
    return np.ascontiguousarray(array)


def first_rows(shape: Shape) -> NDArray[np.int64]:
    """Where each block begins, and the end: int64[blocks + 1]. Whole rows, as even as may be, about BLOCK codes.

    There a machine starts anew, so that blocks are decoded apart: `trellis.rounding` needs these edges, too.
    """
    rows, cols = shape
    blocks = max(1, min(rows, (rows * cols + BLOCK // 2) // BLOCK))
    return np.arange(blocks + 1, dtype=np.int64) * rows // blocks


def _lanes(shape: Shape, blocks: int, machine: trellis.Machine | None) -> int:
    """1, 2, 4 or 8, with at least CODES_PER_LANE codes a lane: small matrices pay for few states.

    With a machine no more than columns: the symbols of a step then depend on none of the same step.
    """
    lanes, most = 1, MAX_LANES if machine is None else min(MAX_LANES, shape[1])
    while 2 * lanes <= most and 2 * lanes * CODES_PER_LANE * blocks <= shape[0] * shape[1]:
        lanes *= 2
    return lanes


def _transitions(machine: trellis.Machine | None) -> NDArray[np.uint8] | None:
    """The machine as the kernels of `rans` take it: (2 * state + quantizer) * 2 + parity -> 2 * state + quantizer.

    They begin a block with 0: `trellis.START` is state 0, and of quantizer 0.
    """
    if machine is None:
        return None
    return np.repeat(2 * machine.after + machine.quantizer[machine.after], 2, axis=0).astype(np.uint8).ravel()


def _contexts(
    codes: NDArray[np.int32],
    row_scale: NDArray[np.int8],
    column_scale: NDArray[np.int8],
    machine: trellis.Machine | None,
    kernels: rans.Kernels | None,
) -> NDArray[np.uint8]:
    """The classes of one block's codes, uint8[rows, cols]."""
    classes = _classes(row_scale, column_scale)
    if machine is None:
        return classes
    if kernels is None:
        return classes + np.uint8(CLASSES) * trellis.quantizers(codes, np.array([0, len(codes)]), machine)
    kernels.run_machine(codes.ravel(), codes.shape[1], _transitions(machine), CLASSES, classes.reshape(-1))
    return classes


def histogram(
    codes: NDArray[np.int32],
    row_scale: NDArray[np.int8],
    column_scale: NDArray[np.int8],
    *,
    machine: trellis.Machine | None = None,
    run: Run = _in_turn,
) -> NDArray[np.int64]:
    """Symbols counted by class: codes int32[rows, cols] -> int64[TABLES, SYMBOLS]. Sum it over the matrices."""
    codes = _checked_codes(codes)
    rows, columns = _checked_scales(row_scale, column_scale, codes.shape)
    edges, kernels, after = first_rows(codes.shape), rans.kernels(), _transitions(machine)

    def count(own: NDArray[np.int64]) -> NDArray[np.int64]:
        counts = np.zeros((TABLES, SYMBOLS), np.int64)
        if kernels:
            kernels.count(codes, own, rows, columns, np.zeros(2, np.uint8) if after is None else after, counts)
            return counts
        for begin, end in itertools.pairwise(own):  # block by block: the temporaries stay in cache
            piece = codes[begin:end]
            index = _contexts(piece, rows[begin:end], columns, machine, kernels).astype(np.int64) * SYMBOLS
            counts += np.bincount((index + rans.symbols_of(piece)).ravel(), minlength=counts.size).reshape(counts.shape)
        return counts

    total: NDArray[np.int64] = np.sum(run(count, _parts(edges)), 0)
    return total


def _parts(edges: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Of blocks for so many threads, each in one go: edges of its blocks."""
    places = np.arange(min(PARTS, len(edges) - 1) + 1) * (len(edges) - 1) // min(PARTS, len(edges) - 1)
    return [edges[first : last + 1] for first, last in itertools.pairwise(places)]


# --- tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Frequencies by class, uint16[TABLES, SYMBOLS]; a row sums to 4096, or to 0 where the class is unused."""

    frequencies: NDArray[np.uint16]

    def __post_init__(self) -> None:
        frequencies = np.array(self.frequencies)  # a copy of our own, made read-only: the decode tables are cached
        if frequencies.dtype != np.uint16 or frequencies.shape != (TABLES, SYMBOLS):
            raise EntropyError(
                f"frequencies are {frequencies.dtype}{list(frequencies.shape)}, expected uint16[{TABLES}, {SYMBOLS}]"
            )
        sums = frequencies.sum(axis=1, dtype=np.int64)
        wrong = np.flatnonzero((sums != 0) & (sums != TOTAL))
        if wrong.size:
            raise EntropyError(f"frequencies of class {wrong[0]} sum to {sums[wrong[0]]}, expected {TOTAL} or 0")
        frequencies.flags.writeable = False
        object.__setattr__(self, "frequencies", frequencies)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tables) and np.array_equal(self.frequencies, other.frequencies)

    def __hash__(self) -> int:
        return hash(self.frequencies.tobytes())


@functools.lru_cache(maxsize=4)
def _decode_table(tables: Tables) -> NDArray[np.uint32]:
    return rans.decode_table(tables.frequencies)  # 2 ms: as long as decoding a small matrix, hence the cache


def _fit_row(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The frequencies f >= 1, sum 4096, that minimise -sum counts * log2 f (for the symbols seen; others 0).

    A separable convex cost: from any feasible point, moving the unit that gains most until no move gains ends
    at the optimum.
    """
    seen = counts.astype(np.float64)
    f = np.where(counts > 0, np.maximum(1, np.floor(seen * (TOTAL / seen.sum()))), 0.0)
    while True:
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(counts > 0, seen * np.log2((f + 1) / f), -np.inf)
            loss = np.where(f > 1, seen * np.log2(f / (f - 1)), np.inf)
        taker, giver = int(gain.argmax()), int(loss.argmin())
        surplus = f.sum() - TOTAL
        if surplus == 0 and not gain[taker] > loss[giver] * (1 + 1e-12):  # the margin: ulps must not trade for ever
            return f.astype(np.int64)
        f[taker] += surplus <= 0
        f[giver] -= surplus >= 0


def fit_tables(histogram: NDArray[np.int64]) -> Tables:
    """The 12-bit tables of least code length (exactly) for these counts, int64[TABLES, SYMBOLS] >= 0.

    What was never seen gets frequency 0 and cannot be coded: escapes included; a class without counts gets no
    table.
    """
    counts = np.asarray(histogram)
    if counts.dtype != np.int64 or counts.shape != (TABLES, SYMBOLS) or counts.min() < 0:
        raise EntropyError(
            f"histogram is {counts.dtype}{list(counts.shape)}, expected int64[{TABLES}, {SYMBOLS}] of counts >= 0"
        )
    frequencies = np.zeros((TABLES, SYMBOLS), np.uint16)
    for row, seen in zip(frequencies, counts, strict=True):
        if seen.any():
            row[:] = _fit_row(seen)
    return Tables(frequencies)


def estimate_bytes(histogram: NDArray[np.int64], tables: Tables) -> float:
    """Code length of these counts in bytes: sum of counts * log2(4096 / f) / 8, and a byte per escape.

    A lower bound: beside it come `overhead_bytes` per matrix, and `long_escape_bytes`. Infinite where a symbol was
    seen that the tables do not know.
    """
    counts = histogram.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(counts > 0, counts * (rans.PRECISION - np.log2(tables.frequencies)), 0.0)
    return float(bits.sum() / 8 + counts[:, ESCAPE].sum())


def long_escape_bytes(codes: NDArray[np.int32]) -> int:
    """What escapes take beyond the byte each that `estimate_bytes` counts: one for |code| > 124, one for > 8252, ..."""
    wide = np.count_nonzero((codes > RADIUS) | (codes < -RADIUS))
    return len(_escape_bytes(codes)) - int(wide)


def overhead_bytes(shape: Shape, *, machine: trellis.Machine | None = None) -> float:
    """What blocks add to `estimate_bytes`, expected: format, directory, checksums, 24 of 32 bits of each state.

    Of a final state, 16 bits hold the start constant, and 8 more are lost on average: its logarithm is
    uniform over 16 bits.
    """
    blocks = len(first_rows(shape)) - 1
    return 1 + blocks * (4 + 3 + 1 + 3.0 * _lanes(shape, blocks, machine))


# --- varints ------------------------------------------------------------------------------------------------


def _varints(values: NDArray[np.int64]) -> bytes:
    """LEB128: seven bits a byte, low bits first, the top bit set but on a value's last; 0 <= values < 2^35."""
    shifts = 7 * np.arange(VARINT_BYTES)
    groups = (values[:, None] >> shifts) & 127
    used = np.maximum(1, (values[:, None] >> shifts > 0).sum(axis=1, keepdims=True))
    index = np.arange(VARINT_BYTES)
    return bytes((groups | np.where(index + 1 < used, 128, 0))[index < used].astype(np.uint8))


def _from_varints(data: NDArray[np.uint8], what: str) -> NDArray[np.int64]:
    """All varints of `data`, int64; refuses a cut one, more than five bytes, and a needless last byte."""
    last = np.flatnonzero(data < 128)
    if data.size and (not last.size or last[-1] != data.size - 1):
        raise EntropyError(f"{what} end within a number")
    sizes = np.diff(last, prepend=-1)
    if (sizes > VARINT_BYTES).any() or ((sizes > 1) & (data[last] == 0)).any():
        raise EntropyError(f"{what} hold a number that is not in its shortest form of at most {VARINT_BYTES} bytes")
    begin = last + 1 - sizes
    place = np.arange(data.size) - np.repeat(begin, sizes)
    groups = (data & 127).astype(np.int64) << 7 * place
    return np.add.reduceat(groups, begin) if data.size else groups


def _escape_bytes(codes: NDArray[np.int32]) -> bytes:
    """The codes outside -60..60 as varints: 61, -61, 62, -62 ... -> 0, 1, 2, 3 ... (one byte up to |124|)."""
    wide = codes[(codes > RADIUS) | (codes < -RADIUS)].astype(np.int64)
    return _varints(np.where(wide > 0, 2 * (wide - RADIUS - 1), -2 * (wide + RADIUS) - 1))


def _escapes(data: NDArray[np.uint8]) -> NDArray[np.int32]:
    numbers = _from_varints(data, "escapes")
    beyond = (numbers >> 1) + RADIUS + 1
    values = np.where(numbers & 1, -beyond, beyond)
    if values.size and (values.max() > 2**31 - 1 or values.min() < -(2**31)):
        raise EntropyError("escapes hold a number beyond int32")
    return values.astype(np.int32)


# Most frequent first: 0, 1, -1, 2, -2 ... and the escape, so that what ends a row is zeros.
_TABLE_ORDER = np.array([RADIUS, *(RADIUS + s * k for k in range(1, RADIUS + 1) for s in (1, -1)), ESCAPE])
# Raw LZMA2 with a fixed filter: 1090 bytes for the tables of a GPT-2-like model, where deflate took 1211,
# packed uint16 1200, and a prediction of each frequency from its neighbours 1035, for twice the code. The
# dictionary bounds the memory.
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 16, "lc": 3, "lp": 0, "pb": 0}]
_TABLE_BYTES = TABLES * (1 + 2 * SYMBOLS)  # the longest that the varints of tables can be


def tables_to_bytes(tables: Tables) -> bytes:
    """CRC-32 of varints, little-endian, and the varints in LZMA2; about 1 KB for a model, 2 KB with a machine.

    For each class: the length of its row without the zeros that end it, and the row in the order 0, 1, -1, 2, -2
    ... 60, -60, escape. The classes of quantizer 1 are left out where all are unused.

    Rows of one scale side by side saved 2 % of tables with a machine; differences from the other quantizer's row took
    3 to 5 % more, from the class before 9 %.
    """
    rows = [np.trim_zeros(row, "b") for row in tables.frequencies[:, _TABLE_ORDER].astype(np.int64)]
    if not any(row.size for row in rows[CLASSES:]):
        rows = rows[:CLASSES]
    plain = _varints(np.concatenate([part for row in rows for part in (np.array([row.size]), row)]))
    return struct.pack("<I", zlib.crc32(plain)) + lzma.compress(plain, format=lzma.FORMAT_RAW, filters=_LZMA)


def tables_from_bytes(data: bytes) -> Tables:
    """Undo `tables_to_bytes`; holds at most some 100 KB. Raises EntropyError for anything else than its output."""
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
    try:
        plain = decompressor.decompress(data[4:], _TABLE_BYTES + 1)
    except lzma.LZMAError as error:
        raise EntropyError(f"tables of {len(data)} bytes: {error}") from error
    _refuse_unfinished("tables", data, plain, _TABLE_BYTES, decompressor.eof and not decompressor.unused_data)
    numbers = _from_varints(np.frombuffer(plain, np.uint8), "tables")
    frequencies, at = np.zeros((TABLES, SYMBOLS), np.uint16), 0
    for kind in range(TABLES):
        if kind == CLASSES and at == numbers.size:
            break  # without a machine
        size = int(numbers[at]) if at < numbers.size else SYMBOLS + 1
        row = numbers[at + 1 : at + 1 + size]
        if size > SYMBOLS or row.size != size or (size and (row[-1] == 0 or row.max() > TOTAL)):
            raise EntropyError(f"tables: the row of class {kind} is cut, too long or out of range")
        frequencies[kind, _TABLE_ORDER[:size]] = row
        at += 1 + size
    if at != numbers.size:
        raise EntropyError(f"tables: {numbers.size - at} numbers too many")
    return Tables(frequencies)


def _refuse_unfinished(what: str, data: bytes, plain: bytes, most: int, finished: bool) -> None:
    """Raise unless `data`, 4 bytes of CRC-32 and a compressed rest, came to an end as `plain`, at most `most` bytes."""
    if len(plain) > most or not finished:
        raise EntropyError(f"{what} of {len(data)} bytes do not end where they should: cut, lengthened or damaged")
    if zlib.crc32(plain) != int.from_bytes(data[:4], "little"):
        raise EntropyError(f"{what} of {len(data)} bytes: checksum differs")


# --- streams ------------------------------------------------------------------------------------------------


def _checksum(shape: Shape, block: int, codes: NDArray[np.int32]) -> int:
    """CRC-32 of a block's codes, after its place: neither a reshaped matrix nor exchanged blocks pass."""
    return zlib.crc32(np.ascontiguousarray(codes, "<i4").data, zlib.crc32(struct.pack("<3Q", *shape, block)))


def _kernels(backend: Backend) -> rans.Kernels | None:
    """The compiled kernels, or None for numpy."""
    if backend not in ("auto", "numba", "numpy"):
        raise EntropyError(f"backend is {backend!r}, expected 'auto', 'numba' or 'numpy'")
    kernels = None if backend == "numpy" else rans.kernels()
    if backend == "numba" and kernels is None:
        raise ModuleNotFoundError("backend 'numba' was asked for, but numba is not installed: use 'auto' or 'numpy'")
    return kernels


def _each(function: Callable[[int], None], blocks: int, threads: int | None) -> None:
    """function(block) for every block, on `threads` threads (None: one per CPU that this process may use)."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(blocks, available if threads is None else threads)
    if threads <= 1:
        for block in range(blocks):
            function(block)
        return
    with ThreadPoolExecutor(threads) as pool:  # no pool is kept: a forked child would inherit it without its threads
        for _ in pool.map(function, range(blocks)):
            pass


def _refuse_uncodable(codes: NDArray[np.int32], classes: NDArray[np.uint8], tables: Tables) -> None:
    """Raise on the first code whose symbol the tables do not know; both flat."""
    symbols = rans.symbols_of(codes)
    missing = np.flatnonzero(tables.frequencies[classes, symbols] == 0)
    if missing.size:
        i = missing[0]
        known = "does not know it" if tables.frequencies[classes[i]].any() else "is empty"
        raise EntropyError(
            f"code {codes[i]} is of class {classes[i]}, whose table {known}: fit the tables on a histogram of all codes"
        )


def encode(
    codes: NDArray[np.int32],
    row_scale: NDArray[np.int8],
    column_scale: NDArray[np.int8],
    tables: Tables,
    *,
    machine: trellis.Machine | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
) -> bytes:
    """Codes int32[rows, cols], any values, to a stream; the same bytes from every backend and thread count.

    Args: row_scale, int8[rows], column_scale, int8[cols], and machine, that of `trellis.rounding`, choose the tables.
    Raises: EntropyError, where the arrays do not fit or a code has no frequency in its class.
    """
    codes = _checked_codes(codes)
    shape: Shape = codes.shape
    row_scale, column_scale = _checked_scales(row_scale, column_scale, shape)
    edges, kernels = first_rows(shape), _kernels(backend)
    blocks, table = len(edges) - 1, rans.encode_table(tables.frequencies)
    lanes = _lanes(shape, blocks, machine)

    def contexts(block: int) -> NDArray[np.uint8]:
        begin, end = edges[block], edges[block + 1]
        return _contexts(codes[begin:end], row_scale[begin:end], column_scale, machine, kernels).ravel()

    if kernels is None:
        classes, flat = np.concatenate([contexts(block) for block in range(blocks)]), codes.ravel()
        _refuse_uncodable(flat, classes, tables)
        states, words = rans.encode_blocks(flat, classes, edges * shape[1], table, lanes)
    else:
        states, words = np.empty((blocks, lanes), np.uint32), [np.empty(0, np.uint16)] * blocks

        def encode_block(block: int) -> None:
            classes, flat = contexts(block), codes[edges[block] : edges[block + 1]].ravel()
            buffer = np.empty(flat.size, np.uint16)
            first = kernels.encode_block(flat, classes, table, states[block], buffer)
            if first < 0:
                _refuse_uncodable(flat, classes, tables)
            words[block] = buffer[first:].copy()

        _each(encode_block, blocks, threads)
    return _assemble(_format(machine), codes, edges, states, words)


def _format(machine: trellis.Machine | None) -> int:
    return FORMAT if machine is None else FORMAT + len(machine.quantizer).bit_length() - 1


def _assemble(
    form: int,
    codes: NDArray[np.int32],
    edges: NDArray[np.int64],
    states: NDArray[np.uint32],
    words: list[NDArray[np.uint16]],
) -> bytes:
    """The sections of a stream, in the order that the module gives."""
    shape: Shape = codes.shape
    pieces = [codes[begin:end] for begin, end in itertools.pairwise(edges)]
    escapes = [_escape_bytes(piece) for piece in pieces]
    directory = np.array([[len(w), len(e)] for w, e in zip(words, escapes, strict=True)], np.int64)
    checksums = np.array([_checksum(shape, block, piece) for block, piece in enumerate(pieces)], "<u4")
    head = [bytes([form]), _varints(directory.ravel()), checksums.tobytes(), states.astype("<u4").tobytes()]
    return b"".join([*head, *(w.astype("<u2").tobytes() for w in words), *escapes])


@dataclass(frozen=True, slots=True)
class _Stream:
    """The sections of a stream, bounds checked against its size."""

    checksums: NDArray[np.uint32]  # [blocks]
    states: NDArray[np.uint32]  # [blocks, lanes]
    words: NDArray[np.uint16]  # of all blocks, and MAX_LANES spare
    word_edges: NDArray[np.int64]  # [blocks + 1]
    escapes: NDArray[np.uint8]
    escape_edges: NDArray[np.int64]  # [blocks + 1]


def _parse(data: bytes | memoryview, shape: Shape, blocks: int, machine: trellis.Machine | None) -> _Stream:
    """Cut a stream into its sections. Allocates no more than the stream's size and 16 bytes a block."""
    lanes, form = _lanes(shape, blocks, machine), _format(machine)
    least = 1 + blocks * (2 + 4 + 4 * lanes)
    if len(data) < least:
        raise EntropyError(f"stream of {len(data)} bytes, expected at least {least} for {blocks} blocks of {shape}")
    if data[0] != form:
        raise EntropyError(f"stream of format {data[0]}, expected {form}")
    raw = np.frombuffer(data, np.uint8)
    window = raw[1 : 1 + 2 * blocks * VARINT_BYTES]
    last = np.flatnonzero(window < 128)
    if last.size < 2 * blocks:
        raise EntropyError(f"directory ends after {last.size} of {2 * blocks} numbers")
    size = int(last[2 * blocks - 1]) + 1
    directory = _from_varints(window[:size], "directory").reshape(blocks, 2)
    words, escapes = (np.concatenate([[0], np.cumsum(column)]) for column in directory.T)
    ends = np.cumsum([1 + size, 4 * blocks, 4 * blocks * lanes, 2 * words[-1], escapes[-1]]).tolist()
    if len(data) != ends[-1]:
        raise EntropyError(f"stream of {len(data)} bytes, but its directory adds up to {ends[-1]}")
    cut = [raw[begin:end] for begin, end in itertools.pairwise(ends)]
    states = cut[1].copy().view("<u4").astype(np.uint32).reshape(blocks, lanes)
    if (states < rans.START).any():
        block = int(np.argmax((states < rans.START).any(axis=1)))
        raise EntropyError(f"block {block}: state {states[block].min()}, expected at least {rans.START}")
    padded = np.zeros(int(words[-1]) + MAX_LANES, np.uint16)  # the spare words that the kernels may touch
    padded[:-MAX_LANES] = cut[2].copy().view("<u2")
    return _Stream(cut[0].copy().view("<u4"), states, padded, words, cut[3], escapes)


def decode(
    data: bytes | memoryview,
    shape: Shape,
    row_scale: NDArray[np.int8],
    column_scale: NDArray[np.int8],
    tables: Tables,
    *,
    machine: trellis.Machine | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
) -> NDArray[np.int32]:
    """The codes, int32[rows, cols], of a stream that `encode` wrote with the same scales, tables and machine.

    Holds, beside the stream and the codes, 1 byte (numba) or 5 bytes (numpy) a code at most, and with a machine
    1 byte more. Raises: EntropyError, naming the block, for a stream that is malformed or is not of this shape,
    these scales, tables and machine.
    """
    shape = (int(shape[0]), int(shape[1]))
    row_scale, column_scale = _checked_scales(row_scale, column_scale, shape)
    edges, kernels = first_rows(shape), _kernels(backend)
    blocks, after = len(edges) - 1, _transitions(machine)
    stream = _parse(data, shape, blocks, machine)
    table, codes = _decode_table(tables), np.empty(shape, np.int32)
    if kernels is None:
        classes, bounds, flat = _classes(row_scale, column_scale).ravel(), edges * shape[1], codes.reshape(-1)
        coded = stream.words, stream.word_edges, stream.states
        faults = rans.decode_blocks(*coded, classes, bounds, table, flat, shape[1], after)
        for block, fault in enumerate(faults):
            _finish(codes[edges[block] : edges[block + 1]], shape, block, int(fault), stream)
        return codes

    def decode_block(block: int) -> None:
        begin, end = edges[block], edges[block + 1]
        classes, piece = _classes(row_scale[begin:end], column_scale).ravel(), codes[begin:end]
        coded = stream.words, *stream.word_edges[block : block + 2].tolist(), stream.states[block]
        fault = kernels.decode_block(*coded, classes, table, piece.reshape(-1), shape[1], after)
        _finish(piece, shape, block, fault, stream)

    _each(decode_block, blocks, threads)
    return codes


def _finish(codes: NDArray[np.int32], shape: Shape, block: int, fault: int, stream: _Stream) -> None:
    """Refuse a block that went astray, put its escapes in their places, and compare its checksum. Writes to `codes`."""
    if fault:
        raise EntropyError(f"block {block}: {rans.FAULTS[fault]}")
    begin, end = stream.escape_edges[block], stream.escape_edges[block + 1]
    top = codes.max()
    if top == rans.UNCODABLE:
        raise EntropyError(f"block {block}: a code is of a class that has no table")
    if top == rans.ESCAPED or end > begin:
        values, places = _escapes(stream.escapes[begin:end]), codes == rans.ESCAPED
        if values.size != np.count_nonzero(places):
            raise EntropyError(f"block {block}: {values.size} escapes stored, {np.count_nonzero(places)} expected")
        codes[places] = values
    if _checksum(shape, block, codes) != stream.checksums[block]:
        raise EntropyError(f"block {block}: checksum differs: the codes, scales, tables or shape are not those encoded")


# --- scales -------------------------------------------------------------------------------------------------


def _geometric_costs() -> NDArray[np.float64]:
    """[2, CLASSES]: bits that a unit of |code|, and a code, cost, |code| being geometric with the class's mean.

    -log2 P(x) = x * log2(1 + 1/m) + log2(1 + m), m = 2^((class - 22) / 4); signs cost the same everywhere.
    """
    mean = 2.0 ** ((np.arange(CLASSES) - UNIT_CLASS) / CLASSES_PER_OCTAVE)
    return np.stack([np.log2(1 + 1 / mean), np.log2(1 + mean)])


def _best_scale(
    magnitudes: NDArray[np.float32], other: NDArray[np.int64], own: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """The scale of each row of `magnitudes` [rows, cols] that costs fewest bits, given the columns', `other`.

    The cost of a row at scale k is that of its codes in the classes k + other, plus that of k itself by the
    frequencies of k in `own`, the rows' present scales (None: free).
    """
    levels, level = np.unique(other, return_inverse=True)
    per_level = np.zeros((other.size, levels.size), np.float32)
    per_level[np.arange(other.size), level] = 1
    candidates = np.arange(-levels[-1], CLASSES - levels[0])  # beyond these, nothing changes any more
    per_unit, per_code = _geometric_costs()[:, np.clip(levels[:, None] + candidates, 0, CLASSES - 1)]
    bits = np.bincount(level) @ per_code
    if own is not None:
        share = (own[:, None] == candidates).sum(axis=0) + 0.5
        bits = bits - np.log2(share / share.sum())
    best: NDArray[np.intp] = ((magnitudes @ per_level) @ per_unit + bits).argmin(axis=1)
    return candidates[best]


def fit_scales(
    codes: NDArray[np.int32], *, rounds: int = 1, run: Run = _in_turn
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Row and column scales, int8[rows], int8[cols], of least description length for codes int32[rows, cols].

    The model is E|code| = 2^((row + column - 22) / 4), |code| geometric (the rounded Laplacian), |code| > 61 taken
    as 61, which costs an escape alike. Columns start at the logarithm of their mean over the grand mean; then rows
    and columns in turn take the scale of least description length: the bits of their codes, plus (from the second
    turn on) the bits of the scale. More rounds than one gained nothing. Columns are centred on 0 and rows carry the
    22; class 0 is (nearly) all zeros.
    """
    codes = _checked_codes(codes)
    if not codes.size:
        raise EntropyError(f"a matrix of shape {codes.shape} has no scales")
    magnitudes = np.empty(codes.shape, np.float32)

    def clip(edges: NDArray[np.int64]) -> NDArray[np.float64]:
        own = slice(edges[0], edges[-1])
        magnitudes[own] = np.abs(np.clip(codes[own], -RADIUS - 1, RADIUS + 1))
        total: NDArray[np.float64] = magnitudes[own].sum(axis=0, dtype=np.float64)
        return total

    mean = np.sum(run(clip, _parts(first_rows(codes.shape))), 0) / len(codes)
    ratio = np.log2(np.maximum(mean, 1e-3) / max(mean.mean(), 1e-3))
    column = np.clip(np.rint(CLASSES_PER_OCTAVE * ratio), 1 - CLASSES, CLASSES - 1).astype(np.int64)
    row = _best_scale(magnitudes, column, None)
    for _ in range(rounds):
        column = _best_scale(magnitudes.T, row, column)
        row = _best_scale(magnitudes, column, row)
    return row.astype(np.int8), column.astype(np.int8)


def scales_to_bytes(scales: NDArray[np.int8]) -> bytes:
    """CRC-32, a byte of method (0 values, 1 differences along the index), the shorter of their deflated bytes.

    Deflate with Huffman codes alone comes to 3.3 bits per scale of 3.1 bits entropy at 1024 scales; rANS with
    a table of its own took 4 % more there. Concatenate the scales of several matrices to pay for headers
    once.
    """
    scales = np.asarray(scales)
    if scales.dtype != np.int8 or scales.ndim != 1:
        raise EntropyError(f"scales are {scales.dtype}{list(scales.shape)}, expected int8[n]")
    plain = scales.tobytes()
    steps = np.diff(scales.view(np.uint8), prepend=np.uint8(0)).tobytes()  # modulo 256
    candidates = []
    for method, content in enumerate((plain, steps)):
        for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
            compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
            candidates.append(bytes([method]) + compressor.compress(content) + compressor.flush())
    return struct.pack("<I", zlib.crc32(plain)) + min(candidates, key=len)


def scales_from_bytes(data: bytes, count: int) -> NDArray[np.int8]:
    """Undo `scales_to_bytes` for `count` scales: int8[count]. Raises EntropyError for anything but its output."""
    if len(data) < 5 or data[4] > 1:
        raise EntropyError(f"scales of {len(data)} bytes begin with {data[:5].hex()}, which names no method")
    decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = np.frombuffer(decompressor.decompress(data[5:], count + 1), np.uint8)
    except zlib.error as error:
        raise EntropyError(f"scales of {len(data)} bytes: {error}") from error
    values = np.cumsum(content, dtype=np.uint8) if data[4] else content
    _refuse_unfinished("scales", data, values.tobytes(), count, decompressor.eof and not decompressor.unused_data)
    if values.size != count:
        raise EntropyError(f"{values.size} scales stored, {count} expected")
    return values.view(np.int8).copy()
