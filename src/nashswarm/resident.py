"""Models that stay packed in memory: a matrix is decoded when its layer asks for it, and forgotten behind it.

Resident memory is that of the payload, the vectors, the largest matrix in its two dtypes, and the activations; each
forward pass pays for decoding. Modules keep their classes' code: what changes is where `weight` comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from nashswarm.types import PackedTensor


class PackedWeight(nn.Module):
    """One packed matrix as bytes, which no change of dtype can touch; they follow the model from device to device."""

    def __init__(self, packed: PackedTensor, decode: Callable[[PackedTensor], Tensor], transposed: bool) -> None:
        super().__init__()
        self.packed = dataclasses.replace(packed, arrays={})  # whose arrays are the buffers, and no second copy
        self.kinds = {part: (array.dtype, array.shape) for part, array in packed.arrays.items()}
        self.decode, self.transposed = decode, transposed
        self.register_buffer("like", torch.empty(0), persistent=False)  # of the dtype and on the device asked for
        for part, array in packed.arrays.items():
            self.register_buffer(f"bytes_{part}", torch.from_numpy(np.array(array).reshape(-1).view(np.uint8)))

    def forward(self) -> Tensor:
        """The matrix as its module expects it: (out, in), or (in, out) in a Conv1D."""
        like = self.get_buffer("like")
        weight = self.decode(self.whole()).to(like.device, like.dtype)
        return weight.T if self.transposed else weight

    def whole(self) -> PackedTensor:
        """The packed matrix over the buffers' memory, or over a copy where they are not on the processor."""
        stored = {p: self.get_buffer(f"bytes_{p}").cpu().numpy().view(k).reshape(s) for p, (k, s) in self.kinds.items()}
        return dataclasses.replace(self.packed, arrays=stored)


def keep_packed(module: nn.Module, weight: PackedWeight) -> None:
    """Let a module decode its `weight` whenever it is used. Several modules may share one (a tied head)."""
    del module._parameters["weight"]
    module.packed_weight = weight
    module.__class__ = _decoding(type(module))


def _decoding(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Packed{kind.__name__}", (kind,), {"weight": property(lambda self: self.packed_weight())})
