"""One packed matrix of the codec `tiles` on a GPU: products with up to 16 rows of activations from its packed bits.

Loading re-orders the codes and adds no bit to them: tiles of one width stand together, strip by strip, so that a
program runs over one width without a branch, and a plane's bytes lie as [rows][P] instead of [P / 4][rows][4], so that
the 16 bytes of a row that a lane loads at once are neighbours. What is added is an index: 4 bytes for a tile (its group
of columns, and the byte of its steps, which was there), 32 for an item, 4 for a column. Of 4096 x 11008 at 3.24 bits
that is 1.0 %.

An item is a run of tiles of one width in one strip, the work of one warp. The last item of a strip to end adds up what
all have left, in their order: results are the same, bit for bit, from run to run.

On an H100 or H200, matrices of tiles of 16 x 128 have the layout and the kernels of `hopper` in place of all this.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from nashswarm.kernels import hopper
from nashswarm.kernels import triton_tiles as kernels
from nashswarm.kernels.matrix import TILES, WIDTHS, checked_arrays
from nashswarm.types import InputError, PackedTensor

MOST_ROWS = 16  # of activations that are multiplied by packed bits; with more, decoding once is faster
TALLEST, WIDEST = 64, 256  # rows and columns of the tiles that kernels are made for
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Tiles of b bits an item has: WORK / (2 + b). On an H100, 4096 x 11008, batch 1, us by WORK at 4 bits and at 3.25: 32:
# 20.4 and 24.7, 48: 18.1 and 24.4, 64: 20.7 and 29.3; with 3 stages of loads in place of 2, 48: 19.7 and 23.9.
WORK, STAGES = 48, 2
AT_ONCE = 8  # items that are added up with their loads in flight together
WARPS = 4  # of programs that prepare activations or decode


class GpuMatrix:
    """y = x W^T for x of [..., in], W as `tiles` packed it. Raises InputError for what it or `Matrix` refuses.

    Up to 16 rows, with Triton's kernels: activations of float16 or bfloat16 become one float16 digit each, with a unit
    for each group of a tile's columns, those of float32 two; products are exact, sums float32. With |x|_t the largest
    activation in a group t, s_rt the step of row r in its tile, b its width, T groups, u = 2^-24, before y is rounded
    to x's dtype:

        |y_r - x w^_r| <= u sum_t s_rt 2^b ((T + 64) sum_{c in t} |x_c| + 8 columns |x|_t)

    where 8 columns |x|_t is what tensor cores may lose beside large products. Groups whose largest is below 2^-90 count
    as zeros; what is not finite in x makes outputs not finite wherever its tile's width is above 0. More rows: W is
    decoded to x's dtype and multiplied by torch. Both can be captured in a CUDA graph, after one product of the same
    dtype and number of rows has compiled the kernels.

    With the kernels of `hopper`, x of any of the three dtypes becomes fixed point of 24 bits in each group: an
    activation is off by up to 2^-23 of the power of two above the group's largest, products of these are exact, sums of
    groups float32. The bound is the same (8 columns |x|_t now is for what activations are off by, 2 columns |x|_t), as
    is all else here. Once a matrix is loaded, its products may run on any streams, several at once.

    Arguments: `work`, for Triton's kernels, see WORK. `fastest`: False for Triton's everywhere.
    """

    def __init__(
        self, packed: PackedTensor, device: torch.device | str = "cuda", work: int = WORK, fastest: bool = True
    ) -> None:
        if packed.codec != "tiles":
            raise InputError(f"a matrix of codec {packed.codec}: kernels are for tiles alone")
        if not kernels.AVAILABLE:
            raise InputError("products on a GPU need Triton: pip install 'nash-swarm[gpu]'")
        arrays = checked_arrays(packed)
        self.shape = packed.shape
        self._rows, self._columns, self._base = (int(packed.scalars[key]) for key in ("rows", "columns", "base"))
        if self._rows % 8 or self._rows > TALLEST or self._columns > WIDEST:
            raise InputError(
                f"tiles of {self._rows} x {self._columns}: the GPU's kernels are for a multiple of 8 rows "
                f"up to {TALLEST}, and up to {WIDEST} columns"
            )
        fits = fastest and (self._rows, self._columns) == (hopper.ROWS, hopper.COLUMNS)
        self._hopper = hopper.kernels(torch.device(device)) if fits else None
        if self._hopper:
            self._arrays = hopper.layout(arrays, self.shape, torch.device(device))
            torch.cuda.synchronize(device)  # products read codes before what runs ahead of them on a stream has ended
        else:
            layout = _layout(arrays, self._rows, self._columns, work)
            self._arrays = {name: torch.from_numpy(array).to(device) for name, array in layout.items()}
        self.device = self._arrays["codes"].device

    @property
    def nbytes(self) -> int:
        """Of everything that is on the device."""
        return sum(array.nbytes for array in self._arrays.values())

    def takes(self, x: Tensor) -> bool:
        """Whether `matmul` multiplies x, of any number of rows."""
        return x.device == self.device and x.dtype in DTYPES

    def matmul(self, x: Tensor, stages: int = STAGES) -> Tensor:
        """[..., in] -> [..., out], of x's dtype and on its device, without a gradient. `stages`: of Triton's loads."""
        if x.shape[-1:] != self.shape[1:] or not self.takes(x):
            raise InputError(
                f"x is {x.dtype}{list(x.shape)} on {x.device}, expected float16, bfloat16 or float32 "
                f"[..., {self.shape[1]}] on {self.device}"
            )
        rows = x.detach().reshape(-1, self.shape[1])
        if len(rows) > MOST_ROWS:
            y = rows.index_select(1, self._arrays["order"]) @ self._decode(x.dtype).T
        elif self._hopper:
            y = hopper.multiply(self._hopper, self._arrays, self.shape, self._base, rows.contiguous())
        else:
            y = torch.empty(len(rows), self.shape[0], dtype=x.dtype, device=self.device)
            with _current(self.device):
                self._multiply(rows.contiguous(), stages, y)
        return y.view(*x.shape[:-1], self.shape[0])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [out, in]."""
        return self._decode(dtype).index_select(1, torch.argsort(self._arrays["order"]))

    def _multiply(self, x: Tensor, stages: int, y: Tensor) -> None:
        batch, (out, columns_in), own = len(x), self.shape, self._arrays
        if not batch:
            return
        digits = 2 if x.dtype == torch.float32 else 1
        n = max(8, _power_of_two(batch * digits))
        groups, strips, items = -(-columns_in // self._columns), -(-out // self._rows), len(own["items"])
        tall, wide = self._sides
        made = torch.empty(groups, n, self._columns, dtype=torch.float16, device=self.device)
        sums = torch.empty(groups, 2, n, device=self.device)
        partial = torch.empty(items, tall, n, device=self.device)
        arrived = torch.empty(strips, dtype=torch.int32, device=self.device)
        gpu = self.device.type == "cuda"
        kernels.prepare[(groups,)](
            *(x, own["order"], made, sums, arrived, columns_in, batch, strips),
            *(digits, self._columns, wide, n, gpu),
            num_warps=WARPS,
        )
        early = {"launch_pdl": True} if gpu else {}
        kernels.multiply[(items,)](
            *(own["codes"], own["nibbles"], own["labels"], made, sums, own["items"], partial, arrived, y),
            *(self._base, out, batch, digits, self._rows, tall, self._columns, wide, n, gpu, stages, gpu, AT_ONCE),
            num_warps=1,
            **early,
        )

    def _decode(self, dtype: torch.dtype) -> Tensor:
        """W [out, in], its columns in rounding order."""
        if self._hopper:
            made = dtype if dtype in DTYPES else torch.float32
            return hopper.decode(self._hopper, self._arrays, self.shape, self._base, made).to(dtype)
        own = self._arrays
        dense = torch.zeros(self.shape, dtype=dtype, device=self.device)  # tiles of width 0 are in no item
        with _current(self.device):
            kernels.decode[(len(own["items"]),)](
                *(own["codes"], own["nibbles"], own["labels"], own["items"], dense, self._base, *self.shape),
                *(self._rows, self._sides[0], self._columns, self._sides[1]),
                num_warps=WARPS,
            )
        return dense

    @property
    def _sides(self) -> tuple[int, int]:
        """Of the blocks that hold a tile."""
        return max(16, _power_of_two(self._rows)), _power_of_two(self._columns)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Kernels start on the current device. (In Triton's interpreter all is on the processor.)"""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


# --- the device's layout -------------------------------------------------------------------------------------------


def _layout(arrays: dict[str, np.ndarray], rows: int, columns: int, work: int) -> dict[str, np.ndarray]:
    """From those of `checked_arrays`."""
    counts = np.where(WIDTHS > 0, arrays["counts"].astype(np.int64), 0)
    index = np.tile(np.arange(len(WIDTHS)), len(counts)).repeat(counts.reshape(-1))  # of widths, as tiles lie
    order = np.argsort(index, kind="stable")
    labels = arrays["groups"][order].astype(np.int32) | arrays["bytes"][order].astype(np.int32) << 16
    return {
        "codes": _codes(arrays["codes"], index, rows, columns),
        "nibbles": np.ascontiguousarray(arrays["nibbles"].reshape(-1, rows // 2)[order]).reshape(-1).view(np.int32),
        "labels": np.append(labels, np.int32(0)),  # programs read one ahead
        "items": _items(counts, work),
        "order": arrays["order"],
    }


def _codes(codes: np.ndarray, index: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """By width, in planes of [rows][P]. `index`, of the tiles' widths."""
    unit = rows * columns // 8  # bytes of a plane of one bit
    units, widths = codes.reshape(-1, unit), WIDTHS[index]
    starts, pieces = np.cumsum(widths) - widths, [np.empty(0, np.uint8)]
    for bits in TILES.TILE_WIDTHS[1:]:
        tiles, at = units[starts[widths == bits][:, None] + np.arange(bits)], 0
        made = np.empty_like(tiles)
        for plane in (p for p in TILES.PLANES if bits & p):
            blocks = tiles[:, at : at + plane].reshape(len(tiles), columns * plane // 32, rows, 4)
            made[:, at : at + plane] = blocks.transpose(0, 2, 1, 3).reshape(len(tiles), plane, unit)
            at += plane
        pieces.append(made.reshape(-1))
    return np.concatenate(pieces)


def _items(counts: np.ndarray, work: int) -> np.ndarray:
    """int32 [items, 8]: width, strip, first tile, tiles, first unit of codes; place of the strip, the next one's, own.

    counts int64 [strips, widths]. Sums of a strip's items have places side by side; a strip without tiles has one item,
    which writes zeros. Wide ones start first, and those of one width together: what runs at a time is one loop, which
    stays in the cache of instructions.
    """
    pieces = -(-counts * (2 + WIDTHS) // work)
    pieces[:, 0] = pieces.sum(1) == 0
    last = np.cumsum(pieces.sum(1))
    run = np.arange(counts.size).repeat(pieces.reshape(-1))
    j = np.arange(len(run)) - (np.cumsum(pieces.reshape(-1)) - pieces.reshape(-1))[run]
    strip, width, tiles = run // len(WIDTHS), WIDTHS[run % len(WIDTHS)], counts.reshape(-1)[run]
    begin, end = (k * tiles // pieces.reshape(-1)[run] for k in (j, j + 1))
    first, unit = (_starts(sizes).reshape(-1)[run] for sizes in (counts, counts * WIDTHS))
    columns = [width, strip, first + begin, end - begin, unit + begin * width]
    found = np.stack([*columns, (last - pieces.sum(1))[strip], last[strip], np.arange(len(run))], 1)
    return found[np.argsort(-width, kind="stable")].astype(np.int32)


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each run starts, with runs by width, then by strip; [strips, widths] both."""
    starts: np.ndarray = np.cumsum(sizes.T) - sizes.T.reshape(-1)
    return starts.reshape(sizes.T.shape).T
