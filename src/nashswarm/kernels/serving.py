"""A model that is resident in packed form, whose layers use the packed bits while it writes token by token.

With up to 8 rows of activations (tokens times batch) a layer's time is that of reading its matrix, and a packed one is
a tenth of a float32 one. With more, decoding once and multiplying with torch is faster.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nashswarm import loading
from nashswarm.kernels.matrix import MOST_ROWS, Activations, Matrix, aligned
from nashswarm.resident import PackedWeight
from nashswarm.types import PackedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    directory: Path | str,
    dtype: torch.dtype = torch.float32,
    resident: Literal["dequantized", "packed"] = "dequantized",
    activations: Activations = "float32",
) -> PreTrainedModel:
    """As `loading.load`; what stays packed as `tiles` is multiplied as it is (`accelerate`)."""
    model = loading.load(directory, dtype, resident)
    if resident == "packed":
        accelerate(model, activations)
    return model


def accelerate(model: nn.Module, activations: Activations = "float32") -> int:
    """Let the layers of a model from `load(..., resident="packed")` use `Matrix`; returns how many do.

    They are those of codec `tiles` in a plain Linear, Conv1D or Embedding. The first two use their matrix for up to 8
    rows on the processor that need no gradient, and decode it for all else; logits then differ from the decoded model's
    as `Matrix` says. An Embedding decodes the rows that it looks up.
    """
    made: dict[PackedWeight, Matrix] = {}
    layers = [m for m in model.modules() if _takes_part(m)]
    for module in layers:
        weight: Any = module.packed_weight
        if weight not in made:
            made[weight] = Matrix(_resident(weight))
        kind = type(module)
        module.__class__ = _looking_up(kind) if isinstance(module, nn.Embedding) else _multiplying(kind)
        module.kernel, module.activations = made[weight], activations  # type: ignore[assignment]
    return len(layers)


def _takes_part(module: nn.Module) -> bool:
    """Whether its forward is x W^T + bias or W[x], as far as can be told, and W is packed in tiles."""
    from transformers.pytorch_utils import Conv1D

    weight = getattr(module, "packed_weight", None)
    if not isinstance(weight, PackedWeight) or weight.packed.codec != "tiles":
        return False
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward and module.max_norm is None
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _resident(weight: PackedWeight) -> PackedTensor:
    """The matrix over the module's own bytes, of which the codes are moved to where vectors fit lines of the cache."""
    codes = weight.get_buffer("bytes_codes").numpy()
    weight.register_buffer("bytes_codes", torch.from_numpy(aligned(codes)))
    arrays = {part: weight.get_buffer(f"bytes_{part}").numpy() for part in weight.packed.arrays}
    return dataclasses.replace(weight.packed, arrays=arrays)


def _multiplying(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        few = x.numel() <= MOST_ROWS * x.shape[-1]
        if not (few and self.kernel.fast and x.device.type == "cpu") or (x.requires_grad and torch.is_grad_enabled()):
            decoded: Tensor = kind.forward(self, x)
            return decoded
        y: Tensor = self.kernel.matmul(x, self.activations)
        return y if self.bias is None else y + self.bias

    return type(f"Multiplying{kind.__name__}", (kind,), {"forward": forward})


def _looking_up(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, numbers: Tensor) -> Tensor:
        like = self.packed_weight.like
        if like.device.type != "cpu" or numbers.numel() * self.kernel.packed.scalars["rows"] > self.num_embeddings:
            decoded: Tensor = kind.forward(self, numbers)
            return decoded
        rows: Tensor = self.kernel.rows(numbers)
        return rows.to(like.dtype)

    return type(f"LookingUp{kind.__name__}", (kind,), {"forward": forward})
