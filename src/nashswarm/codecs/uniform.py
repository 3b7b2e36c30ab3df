"""One asymmetric min-max grid for the whole tensor: the paper's uniform quantization.

code = round((w - min) / scale), scale = (max - min) / (2**bits - 1), w' = min + code * scale. Two float32 are all the
side information.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nashswarm.bitpack import pack, unpack
from nashswarm.types import InputError, Job, PackedTensor

SELLS = ("widths",)
WIDTHS = (2, 3, 4, 8)
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Settings:
    """No settings: the width is the allocator's."""


def min_max_grid(values: Tensor, bits: int) -> tuple[Tensor, np.ndarray]:
    """Quantize float32 [n] on its own min-max grid.

    Returns codes, uint8 [n], and the grid, float32 [2]: minimum and scale. Values all equal have scale 0 and code 0;
    no values have grid (0, 0).
    """
    if not values.numel():
        return torch.empty(0, dtype=torch.uint8), np.zeros(2, np.float32)
    low, high = values.min().double(), values.max().double()  # double: high - low of huge values overflows float32
    scale = ((high - low) / (2**bits - 1)).float()
    if not scale.isfinite():
        raise InputError(f"weights span [{low:.3g}, {high:.3g}], more than a float32 scale can carry")
    if scale == 0:
        return torch.zeros(values.numel(), dtype=torch.uint8), np.array([low, 0], np.float32)
    codes = ((values - low.float()) / scale).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), np.array([low, scale], np.float32)


def on_grid(codes: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """min + code * scale, float32 [n]. Raises InputError for a grid that is not finite."""
    if not np.isfinite(grid).all():
        raise InputError(f"a grid from {grid[0]} in steps of {grid[1]} is not finite")
    reach = np.float64(grid[1]) * codes + np.float64(grid[0])  # double: near float32's end the sum may round beyond it
    return np.clip(reach, -FLOAT32_MAX, FLOAT32_MAX).astype(np.float32)


def encode(job: Job, settings: Settings) -> PackedTensor:
    """Codes of `choice.bits` bits and one grid."""
    assert job.choice.bits is not None
    codes, grid = min_max_grid(job.weight.reshape(-1), job.choice.bits)
    arrays = {"codes": pack(codes.numpy(), job.choice.bits), "scales": grid}
    return PackedTensor("uniform", job.tensor.shape, arrays, {"bits": job.choice.bits})


def decode(packed: PackedTensor) -> Tensor:
    """float32 [out, in]. Raises InputError, or ValueError from `bitpack`, for what `encode` did not write."""
    packed.expect({"bits"}, codes=("uint8", (None,)), scales=("float32", (2,)))
    count = packed.shape[0] * packed.shape[1]
    codes = unpack(packed.arrays["codes"], packed.scalars["bits"], count)
    return torch.from_numpy(on_grid(codes, packed.arrays["scales"])).view(packed.shape)
