"""A model that is resident in packed form, whose layers multiply by the packed bits while it writes token by token.

With up to 8 rows of activations (tokens times batch) a layer's time is that of reading its matrix, and a packed one is
a tenth of a float32 one. With more, decoding once and multiplying with torch is faster. On a GPU it is 16 rows, and
decoding is done there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nashswarm import loading
from nashswarm.kernels.gpu import GpuMatrix
from nashswarm.kernels.matrix import Activations, Matrix, aligned
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
    """Let the layers of a model from `load(..., resident="packed")` use `Matrix` or `GpuMatrix`; returns how many do.

    They are those of codec `tiles` in a plain Linear or Conv1D. A layer uses its matrix for up to 8 rows on the
    processor that need no gradient, and decodes it for all else. Logits then differ from the decoded model's as
    `Matrix` says. Where a packed weight lies on a GPU, any number of rows there, of any `activations`, takes a
    `GpuMatrix`; the file's bytes go back to the processor, so that the GPU holds a matrix once.
    """
    made: dict[PackedWeight, Matrix | GpuMatrix] = {}
    layers = [m for m in model.modules() if _takes_part(m)]
    for module in layers:
        weight: Any = module.packed_weight
        if weight not in made:
            device = weight.get_buffer("bytes_codes").device
            packed = _resident(weight)
            made[weight] = Matrix(packed) if device.type == "cpu" else GpuMatrix(packed, device)
        module.__class__ = _multiplying(type(module))
        module.kernel = made[weight]  # type: ignore[assignment]
        module.options = (activations,) if isinstance(module.kernel, Matrix) else ()  # type: ignore[assignment]
    return len(layers)


def _takes_part(module: nn.Module) -> bool:
    """Whether its forward is x W^T + bias, as far as can be told, and W is packed in tiles."""
    from transformers.pytorch_utils import Conv1D

    weight = getattr(module, "packed_weight", None)
    if not isinstance(weight, PackedWeight) or weight.packed.codec != "tiles":
        return False
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _resident(weight: PackedWeight) -> PackedTensor:
    """The matrix over the module's own bytes, on the processor, the codes where vectors fit lines of the cache."""
    for part in weight.packed.arrays:
        weight.register_buffer(f"bytes_{part}", weight.get_buffer(f"bytes_{part}").cpu())
    codes = weight.get_buffer("bytes_codes").numpy()
    weight.register_buffer("bytes_codes", torch.from_numpy(aligned(codes)))
    arrays = {part: weight.get_buffer(f"bytes_{part}").numpy() for part in weight.packed.arrays}
    return dataclasses.replace(weight.packed, arrays=arrays)


def _multiplying(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.kernel.takes(x) or (x.requires_grad and torch.is_grad_enabled()):
            decoded: Tensor = kind.forward(self, x)
            return decoded
        y: Tensor = self.kernel.matmul(x, *self.options)
        return y if self.bias is None else y + self.bias

    return type(f"Multiplying{kind.__name__}", (kind,), {"forward": forward})
