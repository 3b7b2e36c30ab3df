"""Fixed widths mixed tile by tile, laid out so that a kernel runs over them without a branch per weight.

The columns of a matrix are put into rounding order (act-order, see `feedback`) and cut, with its rows, into tiles of
`rows` x `columns` (16 x 128); the last ones are padded. A tile's width b is one of 0, 1, 2, 3, 4, 5, 6, 8 bits, each of
its rows has a step s, and a code c in [0, 2^b) stands for

    w = s * (c - m),    s = 2^((base + tile + row - 1) / 8), or 0 where row = 0
                        m = (2^b - 1) / 2 where tile + row is even, 2^b / 2 where it is odd

Steps cost a nibble (`row`, 0..15) and a byte for a tile (`tile`): 0.035 bits a weight, where float16 took 0.125; `base`
is the matrix's, in the manifest. No zeros are stored, since a row's weights have a mean of 0.01 to 0.06 of their
spread; but of two neighbouring steps one has a grid that is symmetric, which is best for normal weights at few bits,
and the other one with zero in it, which saves the others where one weight stands out. For activations x in the order of
columns, y_r = sum over tiles of s (sum c x - m sum x); a tile of width 0 adds nothing, nor does a row of step 0.

Arrays, all uint8. R rows and C columns in a tile, S = ceil(out / R) strips of rows, T = ceil(in / C) tiles in a strip.
In a strip, tiles stand by rising width, those of equal width by rising k; strips follow in row order.

    map     S T indices of widths, row-major, 3 bits each (0..7 for 0, 1, 2, 3, 4, 5, 6, 8), padded to a byte; then for
            every place in the order of columns the column of the matrix, ceil(log2(in)) bits each (see `bitpack`)
    codes   R C b / 8 bytes for each tile: its planes, whose widths are the powers of two in b, widest first; the first
            holds the lowest bits of the codes, the next those above (5 = 4 + 1: c & 15, then c >> 4)
    scales  ceil(R / 2) bytes for each tile that is not of width 0: nibbles of rows 2i (low) and 2i + 1 (high); then
            one byte for each of these tiles: `tile`

A plane of p bits has P = C p / 8 bytes for every row; byte k0 holds the bits of columns k0 + P e, shifted by p e. They
lie as [P / 4][R][4]: byte k0 of row r is at ((k0 // 4) R + r) 4 + k0 % 4. So 64 bytes are 16 rows x 4 k for a vector
unit, and an int32 is four codes of one row at a time.

The market sees a tile's damage as 1/2 sum_rc rows_r (e_rc D_c)^2, e the rounding error on grids of its own that are
searched with these weights, and a surcharge where a row loses much of itself (`_beyond_local`). Strips are rounded by
falling power, and a tile's grids fitted once more when its turn comes: see `clipped.Tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nashswarm import clipped, feedback
from nashswarm.bitpack import pack, packed_size, unpack
from nashswarm.clipped import STEPS_PER_OCTAVE, TOP
from nashswarm.patches import Patch
from nashswarm.types import Candidates, InputError, Job, PackedTensor

SELLS = ("candidates",)
WIDTHS: tuple[int, ...] = ()
TILE_WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8)  # bits, by index in the map
INDEX_BITS = 3
PLANES = (8, 4, 2, 1)
LEVELS = 15  # of a row's step within its tile: 1.75 octaves
HEADROOM = 4 * STEPS_PER_OCTAVE  # above the largest weight: feedback moves weights
OFFSET = TOP - HEADROOM  # tiles' bytes span 32 octaves
LIMIT = 100  # log2 of the largest weights that are taken; float32 ends at 128
LARGEST_SIDE = 4096  # of a tile
# Steps of 1/8 octave that are tried, from the one that clips nothing downwards. Of 128 normal weights the best lies 6
# below at 1 bit, 4 at 2 bits, 1 at 3 bits.
TRIES = np.array([1, 14, 14, 11, 8, 6, 5, 5, 4])  # by bits
# Of the outputs' mean Fisher information, as in `coded`. On the reference model at 2.5 bits, rise in loss by damping,
# width 0 left out: 0.5: 0.261, 1: 0.272, 2: 0.303.
OUTPUT_DAMPING = 0.5
# How much more a row's damage counts that loses all of its weights. Without it the market empties tiles that the
# quadratic model holds for dead. On the reference model, rise in loss by BEYOND at 2.5 and at 3.25 bits: 0: 0.375 and
# 0.100, 4: 0.259 and 0.077, 8: 0.262 and 0.078.
BEYOND = 4.0
CHUNK = 1 << 21  # weights per round; bounds temporaries to about 50 MiB


@dataclass(frozen=True, slots=True)
class Settings:
    """Shape of a tile, the widths that are for sale, and what `coded` has, too."""

    rows: int = 16
    columns: int = 128
    widths: tuple[int, ...] = TILE_WIDTHS
    prefix_tokens: int = 16384  # of calibration, to fit each matrix to what is quantized before it; 0 for none

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= LARGEST_SIDE:
            raise ValueError(f"rows: {self.rows} is not in 1..{LARGEST_SIDE}")
        if self.columns % 32 or not 32 <= self.columns <= LARGEST_SIDE:
            raise ValueError(f"columns: {self.columns} is no multiple of 32 in 32..{LARGEST_SIDE}")
        if not self.widths or not {*self.widths} <= {*TILE_WIDTHS} or list(self.widths) != sorted({*self.widths}):
            raise ValueError(f"widths: {list(self.widths)} are not rising widths out of {list(TILE_WIDTHS)}")
        if self.prefix_tokens < 0:
            raise ValueError(f"prefix_tokens: {self.prefix_tokens} is negative; 0 turns the fitting off")


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a matrix is cut into tiles, and what the pieces take."""

    shape: tuple[int, int]
    rows: int
    columns: int

    @property
    def strips(self) -> int:
        return -(-self.shape[0] // self.rows)

    @property
    def tiles(self) -> int:
        """In a strip."""
        return -(-self.shape[1] // self.columns)

    @property
    def order_bits(self) -> int:
        return max(1, (self.shape[1] - 1).bit_length())

    @property
    def map_bytes(self) -> tuple[int, int]:
        """Of the widths, of the order of columns."""
        return packed_size(self.strips * self.tiles, INDEX_BITS), packed_size(self.shape[1], self.order_bits)

    @property
    def nibble_bytes(self) -> int:
        return (self.rows + 1) // 2

    def code_bytes(self, bits: int) -> int:
        return self.rows * self.columns * bits // 8

    def bytes_of(self, bits: int) -> int:
        """Of one tile, its share of the map aside."""
        return self.code_bytes(bits) + self.nibble_bytes + 1 if bits else 0


# --- the loss model ------------------------------------------------------------------------------------------------


def _loss_model(job: Job, rows: int) -> tuple[feedback.LossModel, np.ndarray]:
    """And the columns' weights D_c^2 in rounding order, mean 1, float32 [in]. Arguments: `rows` of a tile."""
    model = feedback.loss_model(job, "tiles", feedback.DAMPING, OUTPUT_DAMPING, together=rows)
    power = model.columns.pivot.square()
    return model, (power / power.mean()).float().numpy()


def _normalized(job: Job) -> tuple[Tensor, int]:
    """The weights over a power of two that brings them to at most 1, and its exponent."""
    peak = float(job.weight.abs().max())
    if not peak < 2.0**LIMIT:
        raise InputError(f"{job.tensor.name}: weights reach {peak:.3g}, beyond 2^{LIMIT}, which tiles cannot carry")
    exponent = math.ceil(math.log2(max(peak, 2.0**-LIMIT)))
    return job.weight * 2.0**-exponent, exponent


# --- grids ---------------------------------------------------------------------------------------------------------


def _fit(values: np.ndarray, power: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best steps and errors of rows, values float32 [columns, rows], as by `clipped.search`."""
    return clipped.search(values, power, _half(widths), TRIES[widths])


def _half(widths: np.ndarray) -> np.ndarray:
    return np.exp2(widths.astype(np.float32) - 1)


def _middles(tile: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Those of bytes [...] and nibbles [..., rows]: float32 [..., rows]; see `clipped.middle`."""
    return clipped.middle(tile[..., None] + row)


def _steps(tile: np.ndarray, row: np.ndarray, base: int) -> np.ndarray:
    """The steps that bytes [...] and nibbles [..., rows] stand for, float32 [..., rows]."""
    eighths = tile[..., None].astype(np.int64) + row.astype(np.int64) - 1 + base
    return np.where(row > 0, clipped.step(eighths), np.float32(0))


# --- what the market sees ------------------------------------------------------------------------------------------


def offer(job: Job, settings: Settings) -> Candidates:
    """Bytes and damage of every tile at every width that is for sale, on the weights as they are before feedback."""
    weight, exponent = _normalized(job)
    model, power = _loss_model(job, settings.rows)
    rows = 0.5 * (_priced_rows(model) * 4.0**exponent).numpy()
    cut = _Cut(job.tensor.shape, settings.rows, settings.columns)
    distortion, strips = np.empty((cut.strips, cut.tiles, len(settings.widths))), np.arange(0, len(rows), cut.rows)
    for k in range(cut.tiles):
        here = slice(k * cut.columns, (k + 1) * cut.columns)
        values, own = weight.T[model.columns.order[here]].contiguous().numpy(), power[here]
        nothing = own @ np.square(values)
        for i, bits in enumerate(settings.widths):
            error = _fit(values, own, np.full(len(rows), bits))[1] if bits else nothing
            distortion[:, k, i] = np.add.reduceat(rows * _beyond_local(error, nothing), strips)
    sizes = np.array([cut.bytes_of(bits) for bits in settings.widths], np.float64)
    sizes += sum(cut.map_bytes) / (cut.strips * cut.tiles)
    players = distortion.reshape(-1, len(settings.widths))
    return Candidates(
        options=np.array(settings.widths, np.float64),
        size=np.tile(sizes, (len(players), 1)),
        distortion=np.minimum.accumulate(players, 1),
        continuous=False,
        weights=np.outer(_lengths(cut.shape[0], cut.rows), _lengths(cut.shape[1], cut.columns)).reshape(-1),
        per_strip=cut.tiles,
    )


def _priced_rows(model: feedback.LossModel) -> Tensor:
    """What an error costs in each row, float64 [out].

    Damped, so that rows of next to no curvature do not sell all their bits; and scaled to what all rows together cost
    without damping, so that matrices compare. On the reference model, KL at 2.5 and at 3.25 bits: damped alone 0.204
    and 0.0665, scaled 0.198 and 0.0629, without damping 0.328 and 0.0804.
    """
    rows, columns = model.damage()
    return model.rows * float(rows.sum() / model.rows.sum() * columns.mean())


def _beyond_local(error: np.ndarray, nothing: np.ndarray) -> np.ndarray:
    """error (1 + BEYOND error / nothing), float64 [rows]: what loses much of itself leaves the quadratic model's range.

    `nothing` is the error of zeros in a row's place.
    """
    share = np.divide(error, nothing, out=np.zeros_like(error), where=nothing > 0).clip(max=1)
    return np.asarray(error.astype(np.float64) * (1 + BEYOND * share))


def _lengths(length: int, size: int) -> np.ndarray:
    """Of the pieces into which `length` is cut."""
    return np.minimum(size, length - np.arange(0, length, size))


# --- encoding ------------------------------------------------------------------------------------------------------


def encode(job: Job, settings: Settings) -> PackedTensor:
    """Round with feedback, fitting each tile's grids when it comes up. Raises InputError."""
    weight, exponent = _normalized(job)
    model, power = _loss_model(job, settings.rows)
    cut = _Cut(job.tensor.shape, settings.rows, settings.columns)
    widths = _widths(job, cut)
    codes = np.zeros((cut.tiles * cut.columns, cut.strips * cut.rows), np.uint8)
    tile, row = np.zeros(widths.shape, np.uint8), np.zeros((*widths.shape, cut.rows), np.uint8)
    grids = clipped.Tiles(cut.rows, cut.columns, LEVELS, -OFFSET, TRIES, widths, tile, row, codes)

    def visit(patch: Patch) -> None:
        grids.round_patch(patch, power[patch.place[0] :][: len(patch.columns)])

    strips = feedback.row_order(weight, model.spread).numpy() // cut.rows
    edges = [0, *np.flatnonzero(np.diff(strips)) + 1, len(strips)]
    size = cut.columns * max(1, cut.shape[1] // feedback.STEPS // cut.columns)
    feedback.sweep(weight, model.columns, model.spread, size, edges, visit)
    stored = _file_order(widths)
    index = np.searchsorted(TILE_WIDTHS, widths)
    arrays = {
        "codes": _pack_codes(codes, widths, cut),
        "scales": np.concatenate([_pack_nibbles(row[stored]), tile[stored]]),
        "map": np.concatenate([pack(index, INDEX_BITS), pack(model.columns.order.numpy(), cut.order_bits)]),
    }
    scalars = {"rows": cut.rows, "columns": cut.columns, "base": STEPS_PER_OCTAVE * exponent - OFFSET}
    return PackedTensor("tiles", cut.shape, arrays, scalars)


def _widths(job: Job, cut: _Cut) -> np.ndarray:
    """uint8 [strips, tiles]."""
    found = [[int(digit) for digit in strip] for strip in job.choice.tiles]
    if len(found) != cut.strips or any(len(strip) != cut.tiles or not {*strip} <= {*TILE_WIDTHS} for strip in found):
        raise InputError(
            f"{job.tensor.name}: the allocation is not of {cut.strips} strips of {cut.tiles} tiles; run allocate again"
        )
    return np.array(found, np.uint8)


# --- layout --------------------------------------------------------------------------------------------------------


def _file_order(widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(strip, k) of every tile that is not of width 0, as they follow each other in the file."""
    order = np.argsort(widths, 1, kind="stable")
    strips = np.arange(len(widths)).repeat(widths.shape[1])
    live = widths[strips, order.reshape(-1)] > 0
    return strips[live], order.reshape(-1)[live]


def _starts(widths: np.ndarray, cut: _Cut) -> tuple[np.ndarray, int]:
    """Byte at which each tile's codes start, int64 [strips, tiles], and the bytes of all."""
    places = _file_order(widths)
    sizes = widths[places].astype(np.int64) * cut.code_bytes(1)
    starts = np.zeros(widths.shape, np.int64)
    starts[places] = np.cumsum(sizes) - sizes
    return starts, int(sizes.sum())


def _of_width(widths: np.ndarray, starts: np.ndarray, bits: int, cut: _Cut) -> Iterator[tuple[np.ndarray, ...]]:
    """Strips, ks and bytes' places [n, bytes] of the tiles of one width, a chunk at a time."""
    strips, ks = np.nonzero(widths == bits)
    count = max(1, CHUNK // (cut.rows * cut.columns))
    for i in range(0, len(strips), count):
        place = strips[i : i + count], ks[i : i + count]
        yield *place, starts[place][:, None] + np.arange(cut.code_bytes(bits))


def _pack_codes(codes: np.ndarray, widths: np.ndarray, cut: _Cut) -> np.ndarray:
    """codes uint8 [in, out], both padded -> uint8."""
    starts, total = _starts(widths, cut)
    data = np.empty(total, np.uint8)
    tiles = codes.reshape(cut.tiles, cut.columns, cut.strips, cut.rows)
    for bits in TILE_WIDTHS[1:]:
        for strips, ks, places in _of_width(widths, starts, bits, cut):
            data[places] = _pack_tiles(tiles[ks, :, strips].transpose(0, 2, 1), bits)
    return data


def _pack_tiles(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, rows, columns] -> [n, bytes]."""
    count, rows, columns = codes.shape
    pieces = []
    for plane in (p for p in PLANES if bits & p):
        fields = (codes & np.uint8(2**plane - 1)).reshape(count, rows, 8 // plane, -1)
        packed = np.zeros((count, rows, columns * plane // 8), np.uint8)
        for e in range(8 // plane):
            packed |= fields[:, :, e] << np.uint8(plane * e)
        pieces.append(packed.reshape(count, rows, -1, 4).transpose(0, 2, 1, 3).reshape(count, -1))
        codes = codes >> np.uint8(min(plane, 7))  # nothing comes above a plane of 8
    return np.concatenate(pieces, 1)


def _unpack_tiles(data: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Inverse of `_pack_tiles`."""
    count, size = len(data), data.shape[1] // bits
    codes, at, shift = np.zeros((count, rows, size * 8 // rows), np.uint8), 0, 0
    for plane in (p for p in PLANES if bits & p):
        blocks = data[:, at : at + plane * size].reshape(count, -1, rows, 4)
        packed, mask = blocks.transpose(0, 2, 1, 3).reshape(count, rows, -1), np.uint8(2**plane - 1)
        fields = [packed >> np.uint8(plane * e) & mask for e in range(8 // plane)]
        codes |= np.concatenate(fields, 2) << np.uint8(shift)
        at, shift = at + plane * size, shift + plane
    return codes


def _pack_nibbles(values: np.ndarray) -> np.ndarray:
    """uint8 [tiles, rows] -> flat, two a byte, the even row low."""
    even = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    return np.asarray(even[:, ::2] | even[:, 1::2] << np.uint8(4)).reshape(-1)


def _unpack_nibbles(data: np.ndarray, rows: int) -> np.ndarray:
    pairs = data.reshape(-1, (rows + 1) // 2)
    return np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], 2).reshape(len(pairs), 2 * pairs.shape[1])[:, :rows]


# --- decoding ------------------------------------------------------------------------------------------------------


def decode(packed: PackedTensor) -> Tensor:
    """float32 [out, in]. Raises InputError, or ValueError from `bitpack`, for arrays that `encode` did not write."""
    flat = ("uint8", (None,))
    packed.expect({"rows", "columns", "base"}, codes=flat, scales=flat, map=flat)
    cut = _Cut(packed.shape, *_side_lengths(packed))
    widths, order = _read_map(packed, cut)
    starts, total = _starts(widths, cut)
    places = _file_order(widths)
    nibbles = len(places[0]) * cut.nibble_bytes
    codes, scales = _bytes(packed, "codes", total), _bytes(packed, "scales", nibbles + len(places[0]))
    tile, row = scales[nibbles:], _unpack_nibbles(scales[:nibbles], cut.rows)
    steps, middles = (np.zeros((*widths.shape, cut.rows), np.float32) for _ in range(2))
    steps[places], middles[places] = _steps(tile, row, packed.scalars["base"]), _middles(tile, row)
    weight = np.zeros((cut.strips, cut.rows, cut.tiles, cut.columns), np.float32)
    for bits in TILE_WIDTHS[1:]:
        for strips, ks, at in _of_width(widths, starts, bits, cut):
            found = _unpack_tiles(codes[at], bits, cut.rows).astype(np.float32)
            found += middles[strips, ks][..., None] - np.float32(2 ** (bits - 1))
            weight[strips, :, ks] = found * steps[strips, ks][..., None]
    result = np.empty(cut.shape, np.float32)
    result[:, order] = weight.reshape(cut.strips * cut.rows, -1)[: cut.shape[0], : cut.shape[1]]
    return torch.from_numpy(result)


def _side_lengths(packed: PackedTensor) -> tuple[int, int]:
    """Rows and columns of a tile; `base` is checked along with them."""
    rows, columns, base = (packed.scalars[key] for key in ("rows", "columns", "base"))
    try:
        Settings(rows, columns)
    except ValueError as error:
        raise InputError(f"the shape of a tile cannot be read: {error}") from error
    least, most = (STEPS_PER_OCTAVE * exponent - OFFSET for exponent in (-LIMIT, LIMIT))
    if not least <= base <= most:
        raise InputError(f"base is {base}, expected {least}..{most}")
    return rows, columns


def _read_map(packed: PackedTensor, cut: _Cut) -> tuple[np.ndarray, np.ndarray]:
    """Widths uint8 [strips, tiles], columns in rounding order int64 [in]."""
    data = _bytes(packed, "map", sum(cut.map_bytes))
    index = unpack(data[: cut.map_bytes[0]], INDEX_BITS, cut.strips * cut.tiles)
    order = unpack(data[cut.map_bytes[0] :], cut.order_bits, cut.shape[1]).astype(np.int64)
    if not np.array_equal(np.sort(order), np.arange(cut.shape[1])):
        raise InputError("map: the order of columns does not name each column once")
    return np.array(TILE_WIDTHS, np.uint8)[index].reshape(cut.strips, cut.tiles), order


def _bytes(packed: PackedTensor, part: str, size: int) -> np.ndarray:
    array = packed.arrays[part]
    if array.size != size:
        raise InputError(f"{part} are {array.size} bytes, expected {size}")
    return array
