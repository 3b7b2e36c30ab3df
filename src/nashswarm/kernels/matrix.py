"""One packed matrix of the codec `tiles`, ready for products with a few rows of activations.

The arrays are used as they lie in the file (codes are copied once where they do not begin at a multiple of 64 bytes).
What is added is an index: for every tile of a width above 0 its group of columns (2 bytes), for every strip of rows the
numbers of its tiles (16 bytes) and where they begin (16 bytes), for every column its place (4 bytes). Of a matrix of
4096 x 4096 at 3.22 bits that is 0.6 %.
"""

from __future__ import annotations

import ctypes
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nashswarm import clipped
from nashswarm.bitpack import pack, packed_size, unpack
from nashswarm.config import load_room
from nashswarm.kernels.build import library
from nashswarm.types import InputError, PackedTensor

Activations = Literal["float32", "int8"]
Set = Literal["portable", "avx2", "avx512"]
DIGITS: dict[str, int] = {"float32": 3, "int8": 1}  # of 8 bits, for each activation
SETS: tuple[Set, ...] = ("portable", "avx2", "avx512")
TILES = load_room("codecs", "tiles")  # whose format this reads
WIDTHS = np.array(TILES.TILE_WIDTHS)
MOST_ROWS = 8  # of activations in one pass over the matrix
# Rows above which decoding and torch's product are faster. At 4096 x 4096 decoding takes 567 ms, a row then 0.10 ms;
# without decoding a row takes 0.33 ms (float32) or 0.15 ms (int8), in passes of 8 (2 threads).
DECODED_ABOVE = 2048
MOST_GROUPS = 2**16 - 1  # of columns: 16 bits name them
MOST_EIGHTHS = 255 + 15  # steps that a tile's byte and a row's nibble can name
ALIGNMENT = 64  # bytes: a line of the cache, and a vector


class Layout(ctypes.Structure):
    """`Matrix` of tiles.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "nibbles", "bytes")),
        *((name, ctypes.c_void_p) for name in ("groups", "counts", "code_starts", "tile_starts", "order")),
        *((name, ctypes.c_int32) for name in ("out", "columns_in", "rows", "columns", "base")),
    )


class Matrix:
    """y = x W^T for x of [..., in], W as `tiles` packed it. Raises InputError for arrays that it did not write.

    With w^ the decoded weights, t a group of columns (those of a tile, in the format's order), T groups, u = 2^-24,
    and |x|_t the largest activation in a group,

        float32    |y - x w^^T| <= sum_t |x|_t sum_{c in t} |w^_c|  *  u (T + 8)
        int8       |y - x w^^T| <= sum_t |x|_t sum_{c in t} |w^_c|  *  (1 / 254 + u (T + 8))

    float32 is float32's precision of a group's largest activation; what a float32 product may be off by is of the same
    form, with the number of columns in T's place. Groups whose largest is below 2^-90 count as zeros; one that holds
    inf or nan makes its outputs nan. Every output is the same, bit for bit, with any number of threads, rows beside it
    and on any processor.
    """

    def __init__(self, packed: PackedTensor) -> None:
        if packed.codec != "tiles":
            raise InputError(f"a matrix of codec {packed.codec}: kernels are for tiles alone")
        self.packed, self.shape = packed, packed.shape
        self._library = library()
        self._arrays = checked_arrays(packed)
        bits = max(1, (packed.shape[1] - 1).bit_length())
        self._order = packed.arrays["map"][-packed_size(packed.shape[1], bits) :]  # of columns, as the file has it
        pointers = {name: array.ctypes.data for name, array in self._arrays.items()}
        out, columns_in = packed.shape
        sides = {name: packed.scalars[name] for name in ("rows", "columns", "base")}
        self.layout = Layout(**pointers, out=out, columns_in=columns_in, **sides)
        with np.errstate(over="ignore"):  # of steps that no tile has
            self._steps = clipped.step(packed.scalars["base"] + np.arange(MOST_EIGHTHS))

    @property
    def nbytes(self) -> int:
        """Of the packed arrays and the index."""
        return sum(array.nbytes for array in self._arrays.values()) + self.packed.arrays["map"].nbytes

    @property
    def fast(self) -> bool:
        """Whether there are kernels; without them every product decodes the matrix."""
        return self._library is not None

    def instructions(self, most: Set = "avx512") -> Set:
        """What products run on: the largest set, of those up to `most`, that processor and tiles allow."""
        if self._library is None:
            return "portable"
        found: int = self._library.nashswarm_set(SETS.index(most), self.packed.scalars["rows"])
        return SETS[found]

    def takes(self, x: Tensor) -> bool:
        """Whether `matmul` is faster than decoding and torch's product."""
        return self.fast and x.device.type == "cpu" and x.numel() <= DECODED_ABOVE * x.shape[-1]

    def matmul(
        self,
        x: Tensor,
        activations: Activations = "float32",
        threads: int | None = None,
        most: Set = "avx512",
    ) -> Tensor:
        """[..., in] -> [..., out], of x's dtype, without a gradient.

        Arguments: `x`, on the processor; more than 8 rows are taken 8 at a time. `activations`, their precision.
        `threads`, else torch's number. `most`, the largest instruction set to use, for tests and measurements.
        """
        if x.shape[-1:] != self.shape[1:] or x.device.type != "cpu":
            raise InputError(f"x is {list(x.shape)} on {x.device}, expected [..., {self.shape[1]}] on the processor")
        if activations not in DIGITS:
            raise InputError(f"activations: {activations!r}; choose {' or '.join(map(repr, DIGITS))}")
        # Few calls of torch: behind a product, which leaves the caches full of codes, each takes many times as long.
        rows = x if x.dtype == torch.float32 and x.is_contiguous() else x.detach().to(torch.float32).contiguous()
        if self._library is None:
            weight: Tensor = TILES.decode(self.packed)
            y = rows.detach() @ weight.T
        else:
            y = torch.empty(*x.shape[:-1], self.shape[0])
            self._multiply(rows, DIGITS[activations], threads or torch.get_num_threads(), most, y)
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def rows(self, numbers: Tensor) -> Tensor:
        """W[numbers]: int64 [...] -> float32 [..., in]; only the strips of tiles that hold these rows are decoded.

        Raises IndexError for numbers that are not in 0..out - 1.
        """
        if not numbers.numel():
            return torch.empty(*numbers.shape, self.shape[1])
        least, most = int(numbers.min()), int(numbers.max())
        if least < 0 or most >= self.shape[0]:
            raise IndexError(f"rows {least}..{most} of a matrix that has {self.shape[0]}")
        if self._library is not None:
            return self._decoded(numbers.to(torch.int64).contiguous())
        strips, places = torch.unique(numbers // self.layout.rows, return_inverse=True)
        weight: Tensor = TILES.decode(self._part(strips.numpy()))
        return weight[places * self.layout.rows + numbers % self.layout.rows]

    def _decoded(self, numbers: Tensor) -> Tensor:
        assert self._library is not None
        found = torch.empty(*numbers.shape, self.shape[1])
        self._library.nashswarm_rows(
            ctypes.byref(self.layout),
            ctypes.c_void_p(numbers.data_ptr()),
            ctypes.c_int64(numbers.numel()),
            ctypes.c_void_p(self._steps.ctypes.data),
            ctypes.c_void_p(found.data_ptr()),
        )
        return found

    def _part(self, strips: np.ndarray) -> PackedTensor:
        """Some strips, padded rows included, as a matrix of their own, of their own parts of the arrays."""
        rows, columns, arrays = self.layout.rows, self.layout.columns, self._arrays
        counts, pair = arrays["counts"][strips].astype(np.int64), (rows + 1) // 2
        starts, firsts = arrays["code_starts"][strips], arrays["tile_starts"][strips]
        ends, lasts = starts + counts @ (rows * columns * WIDTHS // 8), firsts + counts[:, 1:].sum(1)
        index = np.zeros((len(strips), -(-self.shape[1] // columns)), np.uint8)
        for i, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            index[i, arrays["groups"][first:last]] = np.repeat(np.arange(1, len(WIDTHS)), counts[i, 1:])
        codes = [arrays["codes"][a:b] for a, b in zip(starts, ends, strict=True)]
        nibbles = [arrays["nibbles"][a * pair : b * pair] for a, b in zip(firsts, lasts, strict=True)]
        tile_bytes = [arrays["bytes"][a:b] for a, b in zip(firsts, lasts, strict=True)]
        parts = {
            "codes": np.concatenate(codes),
            "scales": np.concatenate(nibbles + tile_bytes),
            "map": np.concatenate([pack(index, TILES.INDEX_BITS), self._order]),
        }
        return PackedTensor("tiles", (len(strips) * rows, self.shape[1]), parts, self.packed.scalars)

    def _multiply(self, x: Tensor, digits: int, threads: int, most: Set, y: Tensor) -> None:
        assert self._library is not None
        out, width = self.shape
        count, first, first_out, layout = x.numel() // width, x.data_ptr(), y.data_ptr(), ctypes.byref(self.layout)
        for i in range(0, count, MOST_ROWS):
            failed = self._library.nashswarm_multiply(
                layout,
                ctypes.c_void_p(first + 4 * i * width),
                min(MOST_ROWS, count - i),
                digits,
                threads,
                SETS.index(most),
                ctypes.c_void_p(first_out + 4 * i * out),
            )
            if failed:
                raise MemoryError(f"no memory for the activations of {count} rows of {width}")


def aligned(array: np.ndarray) -> np.ndarray:
    """The bytes, where a vector does not cross a line of the cache: the array itself, or a copy."""
    flat = array.reshape(-1).view(np.uint8)
    if flat.flags.c_contiguous and flat.ctypes.data % ALIGNMENT == 0:
        return flat
    room = np.empty(flat.size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    room[start : start + flat.size] = flat
    return room[start : start + flat.size]


# --- what the file says, checked: the kernels trust it ------------------------------------------------------------


def checked_arrays(packed: PackedTensor) -> dict[str, np.ndarray]:
    """By name in `Layout`. Raises InputError."""
    rows, columns = _sides(packed)
    strips, groups = -(-packed.shape[0] // rows), -(-packed.shape[1] // columns)
    index, order = _map(packed, strips, groups)
    places = np.argsort(index, 1, kind="stable")
    in_order = np.take_along_axis(index, places, 1)
    live = in_order > 0
    counts = np.stack([(index == i).sum(1) for i in range(len(WIDTHS))], 1)
    code_bytes = counts @ (rows * columns * WIDTHS // 8)
    tiles, nibbles = int(live.sum()), (rows + 1) // 2
    scales = _bytes(packed, "scales", tiles * (nibbles + 1))
    return {
        "codes": aligned(_bytes(packed, "codes", int(code_bytes.sum()))),
        "nibbles": scales[: tiles * nibbles],
        "bytes": scales[tiles * nibbles :],
        "groups": places[live].astype(np.uint16),
        "counts": np.ascontiguousarray(counts, np.uint16),
        "code_starts": (np.cumsum(code_bytes) - code_bytes).astype(np.int64),
        "tile_starts": (np.cumsum(live.sum(1)) - live.sum(1)).astype(np.int64),
        "order": order.astype(np.int32),
    }


def _sides(packed: PackedTensor) -> tuple[int, int]:
    rows, columns, base = (packed.scalars.get(key) for key in ("rows", "columns", "base"))
    if not all(type(value) is int for value in (rows, columns, base)):
        raise InputError(f"tiles of {rows!r} x {columns!r} and base {base!r}: expected integers")
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    assert isinstance(base, int)
    if (
        not 1 <= rows <= TILES.LARGEST_SIDE
        or columns % 32
        or not 32 <= columns <= TILES.LARGEST_SIDE
        or abs(base) > 2**10
    ):
        raise InputError(f"tiles of {rows} x {columns} and base {base} cannot be read")
    if not 0 < packed.shape[1] <= columns * MOST_GROUPS or not 0 < packed.shape[0] < 2**31 - TILES.LARGEST_SIDE:
        raise InputError(f"a matrix of {list(packed.shape)} in tiles of {rows} x {columns} is too large for kernels")
    return rows, columns


def _map(packed: PackedTensor, strips: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of widths [strips, groups], the columns in their order [in]."""
    bits = max(1, (packed.shape[1] - 1).bit_length())
    cut = packed_size(strips * groups, TILES.INDEX_BITS)
    data = _bytes(packed, "map", cut + packed_size(packed.shape[1], bits))
    index = unpack(data[:cut], TILES.INDEX_BITS, strips * groups).reshape(strips, groups)
    order = unpack(data[cut:], bits, packed.shape[1])
    if not np.array_equal(np.sort(order), np.arange(packed.shape[1])):
        raise InputError("map: the order of columns does not name each column once")
    return index, order


def _bytes(packed: PackedTensor, part: str, size: int) -> np.ndarray:
    array = packed.arrays.get(part)
    if array is None or array.dtype != np.uint8 or array.shape != (size,):
        found = "missing" if array is None else f"{array.dtype}{list(array.shape)}"
        raise InputError(f"{part} are {found}, expected uint8[{size}]")
    return np.ascontiguousarray(array)
