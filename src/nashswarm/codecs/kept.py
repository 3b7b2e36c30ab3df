"""Not quantized: the weights as the checkpoint holds them, bit for bit. For the matrices outside a method's scope."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nashswarm.types import InputError, Job, PackedTensor

SELLS: tuple[str, ...] = ()
WIDTHS = (16, 32)  # chosen by the values: 16 where float16 holds them all exactly


@dataclass(frozen=True, slots=True)
class Settings:
    """No settings."""


def encode(job: Job, settings: Settings) -> PackedTensor:
    """float16 where that is lossless, bfloat16 where that is, float32 otherwise."""
    weight = job.weight
    for index, dtype in enumerate((torch.float16, torch.bfloat16)):
        narrow = weight.to(dtype)
        if torch.equal(narrow.float(), weight):
            return PackedTensor(
                "kept", job.tensor.shape, {"codes": narrow.view(torch.uint16).numpy()}, {"bfloat": index}
            )
    return PackedTensor("kept", job.tensor.shape, {"codes": weight.contiguous().numpy()}, {"bfloat": 0})


def decode(packed: PackedTensor) -> Tensor:
    """float32 [out, in]. Raises InputError for what `encode` did not write."""
    dtype_name = "float32" if packed.arrays["codes"].dtype == np.float32 else "uint16"
    packed.expect({"bfloat"}, codes=(dtype_name, packed.shape))
    if packed.scalars["bfloat"] not in (0, 1):
        raise InputError(f"bfloat is {packed.scalars['bfloat']}, expected 0 or 1")
    codes = torch.from_numpy(np.array(packed.arrays["codes"]))
    if codes.dtype == torch.float32:
        return codes.view(packed.shape)
    dtype = torch.bfloat16 if packed.scalars["bfloat"] else torch.float16
    return codes.view(dtype).view(packed.shape).float()
