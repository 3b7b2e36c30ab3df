"""One packed matrix of the codec `tiles` on a GPU: products with up to 16 rows of activations from its packed bits.

Loading re-orders bytes and adds none to them: tiles of one width stand together, by strip, so that a program runs over
one width without a branch, and a plane's bytes lie row by row, [rows][P] instead of [P / 4][rows][4], so that 16 bytes
of a row, which a lane loads at once, are neighbours. What is added is an index: for every tile its group and its byte
of steps (4 bytes, in place of 1), for every item of work 20 bytes, for every column its place (4 bytes).

An item is a run of tiles of one width in one strip; one warp does it. The last one of a strip to be done adds up the
others' sums in their order, so results are the same from run to run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nashswarm.kernels import triton_tiles as kernels
from nashswarm.kernels.matrix import WIDTHS, checked_arrays
from nashswarm.types import InputError, PackedTensor

MOST_ROWS = 16  # of activations that are multiplied by packed bits; from there on decoding once is faster
TALLEST, WIDEST = 64, 256  # tiles that programs are made for
WORK = 48  # of an item: a tile of b bits is 2 + b
STAGES = 3
CHUNK = 8
PREPARING, DECODING = 4, 4  # warps


class GpuMatrix:
    def __init__(self, packed: PackedTensor, device: torch.device | str = "cuda", work: int = WORK) -> None:
        if packed.codec != "tiles":
            raise InputError(f"a matrix of codec {packed.codec}: kernels are for tiles alone")
        if kernels.triton is None:
            raise InputError("products on a GPU need triton: pip install 'nash-swarm[gpu]'")
        self.shape, self.device = packed.shape, torch.device(device)
        self.rows, self.columns, self.base = (int(packed.scalars[key]) for key in ("rows", "columns", "base"))
        arrays = checked_arrays(packed)
        if self.rows % 8 or self.rows > TALLEST or self.columns > WIDEST:
            raise InputError(
                f"tiles of {self.rows} x {self.columns}: kernels for GPUs need rows in 8, 16, .. {TALLEST} and at most "
                f"{WIDEST} columns"
            )
        self._arrays = {k: torch.from_numpy(v).to(self.device) for k, v in device_layout(packed, arrays, work).items()}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    def matmul(self, x: Tensor, **options: Any) -> Tensor:
        rows = x.detach().reshape(-1, self.shape[1])
        if len(rows) > MOST_ROWS:
            y = rows.index_select(1, self._arrays["order"]) @ self._dense(x.dtype).T
        else:
            y = self._few(rows.contiguous(), **options)
        return y.view(*x.shape[:-1], self.shape[0])

    def _few(self, x: Tensor, warps: int = 1, stages: int = STAGES, pdl: bool = True, chunk: int = CHUNK) -> Tensor:
        batch, (out, columns_in), own = len(x), self.shape, self._arrays
        digits = 2 if x.dtype == torch.float32 else 1
        padded = max(8, 1 << (batch * digits - 1).bit_length())
        groups, strips, items = -(-columns_in // self.columns), len(own["firsts"]) - 1, len(own["items"])
        tall, wide = max(16, 1 << (self.rows - 1).bit_length()), 1 << (self.columns - 1).bit_length()
        asm = self.device.type == "cuda"
        pdl = pdl and asm
        made = torch.empty(groups, padded, self.columns, dtype=torch.float16, device=self.device)
        sums = torch.empty(groups, 2, padded, device=self.device)
        partial = torch.empty(items, tall, padded, device=self.device)
        arrived = torch.empty(strips, dtype=torch.int32, device=self.device)
        y = torch.empty(batch, out, dtype=x.dtype, device=self.device)
        kernels.prepare[(groups,)](
            x, own["order"], made, sums, arrived, columns_in, batch, strips,
            digits, self.columns, wide, padded, pdl, num_warps=PREPARING,
        )
        more = {"launch_pdl": True} if pdl else {}
        kernels.multiply[(items,)](
            own["codes"], own["nibbles"], own["labels"], made, sums, own["items"], own["firsts"], partial, arrived, y,
            self.base, out, batch,
            digits, self.rows, tall, self.columns, wide, padded, asm, stages, pdl, 0, chunk, num_warps=warps, **more,
        )
        return y

    def _dense(self, dtype: torch.dtype) -> Tensor:
        """Weights [out, in], columns in rounding order."""
        own = self._arrays
        tall, wide = max(16, 1 << (self.rows - 1).bit_length()), 1 << (self.columns - 1).bit_length()
        dense = torch.zeros(self.shape, dtype=dtype, device=self.device)
        kernels.decode[(len(own["items"]),)](
            own["codes"], own["nibbles"], own["labels"], own["items"], dense, self.base, *self.shape,
            self.rows, tall, self.columns, wide, num_warps=DECODING,
        )
        return dense

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._dense(dtype).index_select(1, torch.argsort(self._arrays["order"]))


def device_layout(packed: PackedTensor, arrays: dict[str, np.ndarray], work: int) -> dict[str, np.ndarray]:
    rows, columns = packed.scalars["rows"], packed.scalars["columns"]
    counts = arrays["counts"].astype(np.int64)
    strips = len(counts)
    index = np.tile(np.arange(len(WIDTHS)), strips).repeat(np.where(WIDTHS > 0, counts, 0).reshape(-1))
    order = np.argsort(index, kind="stable")  # of tiles, by width
    widths = WIDTHS[index]
    starts = np.cumsum(widths) - widths  # of tiles in the file, in units of a bit a weight
    unit = rows * columns // 8
    units = arrays["codes"].reshape(-1, unit)
    pieces = [np.empty(0, np.uint8)]
    for i, bits in enumerate(WIDTHS.tolist()):
        if bits:
            own = units[starts[order[index[order] == i]][:, None] + np.arange(bits)]  # [tiles, bits, unit]
            at = 0
            made = np.empty_like(own)
            for plane in (p for p in (8, 4, 2, 1) if bits & p):
                blocks = own[:, at : at + plane].reshape(len(own), columns * plane // 32, rows, 4).transpose(0, 2, 1, 3)
                made[:, at : at + plane] = blocks.reshape(len(own), plane, unit)
                at += plane
            pieces.append(made.reshape(-1))
    nibbles = np.ascontiguousarray(arrays["nibbles"].reshape(-1, rows // 2)[order]).view(np.int32)
    labels = arrays["groups"][order].astype(np.int32) | arrays["bytes"][order].astype(np.int32) << 16
    items, firsts = _items(counts, work)
    return {
        "codes": np.concatenate(pieces),
        "nibbles": nibbles.reshape(-1),
        "labels": np.append(labels, np.int32(0)),  # programs read one ahead
        "items": items,
        "firsts": firsts,
        "order": arrays["order"],
    }


def _items(counts: np.ndarray, work: int) -> tuple[np.ndarray, np.ndarray]:
    """Of width, strip, first tile, tiles, first unit, int32 [items, 5]; of each strip the first, int32 [strips + 1]."""
    counts = np.where(WIDTHS > 0, counts, 0)
    pieces = -(-counts * (WIDTHS + 2) // work)
    pieces[:, 0] = pieces.sum(1) == 0  # a strip of nothing still writes its zeros
    ends = np.cumsum(counts.T.reshape(-1)).reshape(counts.T.shape).T
    first = ends - counts
    unit_ends = np.cumsum((counts * WIDTHS).T.reshape(-1)).reshape(counts.T.shape).T
    unit = unit_ends - counts * WIDTHS
    run = np.arange(counts.size).repeat(pieces.reshape(-1))
    j = np.arange(len(run)) - (np.cumsum(pieces.reshape(-1)) - pieces.reshape(-1))[run]
    count, n = counts.reshape(-1)[run], pieces.reshape(-1)[run]
    begin, end = j * count // n, (j + 1) * count // n
    width = WIDTHS[run % len(WIDTHS)]
    items = [width, run // len(WIDTHS), first.reshape(-1)[run] + begin, end - begin, unit.reshape(-1)[run] + begin * width]
    firsts = np.concatenate([[0], np.cumsum(pieces.sum(1))])
    return np.stack(items, 1).astype(np.int32), firsts.astype(np.int32)
