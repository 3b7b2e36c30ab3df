"""All codes of a model rounded at once: the exact search down every column, at fixed steps and without feedback.

Matrices lie in one flat tensor, one behind the other, in units of their steps. Columns are independent, and so are the
blocks of rows at which the machine starts anew. On a GPU viterbi.cu does it, elsewhere `trellis`: the same codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from nashswarm import entropy, trellis
from nashswarm.kernels import nvrtc, viterbi
from nashswarm.patches import Patch
from nashswarm.threads import team

COLUMNS = 64  # that one task of the processor rounds: some milliseconds

Shape = tuple[int, int]


def search(shapes: Sequence[Shape], states: int, device: torch.device) -> Processor | Gpu:
    """The fastest that there is on a device. Arguments: `states`, of the trellis."""
    kernel = viterbi.kernel(states, device)
    return Processor(shapes, states) if kernel is None else Gpu(kernel, shapes, states, device)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a matrix that are rounded apart from its others."""

    begin: int  # of its first weight, in the flat tensor
    rows: int
    columns: int


def blocks(shapes: Sequence[Shape]) -> list[Block]:
    """Of all matrices, in their order."""
    found, begins = [], accumulate((rows * columns for rows, columns in shapes), initial=0)
    for (rows, columns), begin in zip(shapes, begins, strict=False):  # the last is the end
        edges = entropy.first_rows((rows, columns)).tolist()
        found += [Block(begin + first * columns, last - first, columns) for first, last in pairwise(edges)]
    return found


class Processor:
    """By `trellis`, some columns of a block after the other, on as many threads as the crew has."""

    def __init__(self, shapes: Sequence[Shape], states: int) -> None:
        self._machine = trellis.machine(states)
        parts = ((block, first) for block in blocks(shapes) for first in range(0, block.columns, COLUMNS))
        self._parts = sorted(parts, key=lambda part: -part[0].rows)  # the longest first: threads end together

    def values(self, latents: Tensor, out: Tensor) -> None:
        """Float32 [weights], in steps, of which only `out` is written: the values nearest to them that codes have."""
        found = torch.empty(latents.shape)
        self._round(latents, found.numpy(), None)
        out.copy_(found)

    def codes(self, latents: Tensor) -> np.ndarray:
        """Those values' codes, int32 [weights]; trellis.OUT_OF_BOUNDS in place of those that are too large."""
        found = np.empty(latents.shape, np.int32)
        self._round(latents, None, found)
        return found

    def _round(self, latents: Tensor, values: np.ndarray | None, codes: np.ndarray | None) -> None:
        targets = latents.detach().cpu().numpy()

        def work(part: tuple[Block, int]) -> None:
            block, first = part
            own = _own(targets, block, first)
            patch = Patch.alone(own.T.copy())
            ones, states = np.ones(max(own.shape), np.float32), np.full(own.shape[1], trellis.START, np.uint8)
            found = trellis.round_patch(patch, ones[: block.rows], ones[: own.shape[1]], states, self._machine)
            if codes is not None:
                _own(codes, block, first)[:] = found.T
            if values is not None:  # whole halves, to which the error leads back up to 2^21
                _own(values, block, first)[:] = np.rint(2 * (own - patch.values.T)) / 2

        with team(len(self._parts)) as run:
            run(work, self._parts)


def _own(flat: np.ndarray, block: Block, first: int) -> np.ndarray:
    """A view of some columns of a block, [rows, columns]."""
    whole = flat[block.begin : block.begin + block.rows * block.columns].reshape(block.rows, block.columns)
    return whole[:, first : first + COLUMNS]


class Gpu:
    """By viterbi.cu, all columns at once."""

    def __init__(self, kernel: nvrtc.Function, shapes: Sequence[Shape], states: int, device: torch.device) -> None:
        every, total = blocks(shapes), sum(rows * columns for rows, columns in shapes)
        begins = np.concatenate([block.begin + np.arange(block.columns) for block in every])
        widths = np.array([block.columns for block in every])
        strides = np.repeat(widths, widths).astype(np.int32)
        rows = np.repeat([block.rows for block in every], widths).astype(np.int32)
        self._columns = viterbi.Columns(kernel, states, begins, strides, rows, total, device)

    def values(self, latents: Tensor, out: Tensor) -> None:
        """As `Processor.values`."""
        self._columns.round(latents, out)

    def codes(self, latents: Tensor) -> np.ndarray:
        """As `Processor.codes`."""
        found = torch.empty(latents.shape, dtype=torch.int32, device=latents.device)
        self._columns.round(latents, torch.empty_like(latents), found)
        return found.cpu().numpy()
