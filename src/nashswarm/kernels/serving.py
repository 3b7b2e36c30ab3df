"""A model that is resident in packed form, whose layers use the packed bits.

With up to 8 rows of activations (tokens times batch), as in writing token by token, a layer's time is that of reading
its matrix, and a packed one is a tenth of a float32 one. More rows go over the matrix 8 at a time, and are bound by
arithmetic; with thousands, decoding once and multiplying with torch is faster. On a GPU that begins above 16 rows, and
decoding is done there. Where one token is written, GPT-2's blocks do it in one call (`writing`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nashswarm import loading
from nashswarm.kernels.gpu import GpuMatrix
from nashswarm.kernels.matrix import Activations, Matrix, aligned
from nashswarm.kernels.writing import fuse
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

    They are those of codec `tiles` in a plain Linear, Conv1D or Embedding. The first two multiply what
    `Matrix.takes` and needs no gradient, and decode for all else; logits then differ from the decoded model's as
    `Matrix` says. An Embedding decodes the rows that it looks up. Where a packed weight lies on a GPU, any number of
    rows there, of any `activations`, takes a `GpuMatrix`; the file's bytes go back to the processor, so that the GPU
    holds a matrix once. Blocks whose layers all multiply on the processor write single tokens as `writing` says. May be
    called again, once the model was moved.
    """
    made: dict[PackedWeight, tuple[Matrix, Matrix | GpuMatrix]] = {}
    layers = [m for m in model.modules() if _takes_part(m)]
    for module in layers:
        weight: Any = module.packed_weight
        if weight not in made:
            device = weight.get_buffer("like").device  # where the model was moved
            packed = _resident(weight)
            own = Matrix(packed)
            made[weight] = own, own if device.type == "cpu" else GpuMatrix(packed, device)
        looks_up = isinstance(module, nn.Embedding)
        kind = _decoding(module)
        module.__class__ = _looking_up(kind) if looks_up else _multiplying(kind)
        module.kernel = made[weight][0 if looks_up else 1]  # type: ignore[assignment]
        module.options = (activations,) if isinstance(module.kernel, Matrix) else ()  # type: ignore[assignment]
    fuse(model, activations)
    return len(layers)


def _takes_part(module: nn.Module) -> bool:
    """Whether its forward is x W^T + bias or W[x], as far as can be told, and W is packed in tiles."""
    from transformers.pytorch_utils import Conv1D

    weight = getattr(module, "packed_weight", None)
    if not isinstance(weight, PackedWeight) or weight.packed.codec != "tiles":
        return False
    forward = _decoding(module).forward
    if isinstance(module, nn.Embedding):
        return forward is nn.Embedding.forward and module.max_norm is None
    return forward in (nn.Linear.forward, Conv1D.forward)


def _decoding(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or what it was before `accelerate`."""
    return getattr(module, "accelerated", type(module))


def _resident(weight: PackedWeight) -> PackedTensor:
    """The matrix over the module's own bytes, on the processor, the codes where vectors fit lines of the cache."""
    for part in weight.kinds:
        weight.register_buffer(f"bytes_{part}", weight.get_buffer(f"bytes_{part}").cpu())
    codes = weight.get_buffer("bytes_codes").numpy()
    weight.register_buffer("bytes_codes", torch.from_numpy(aligned(codes)))
    return weight.whole()


def _multiplying(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.kernel.takes(x) or (x.requires_grad and torch.is_grad_enabled()):
            decoded: Tensor = kind.forward(self, x)
            return decoded
        y: Tensor = self.kernel.matmul(x, *self.options)
        return y if self.bias is None else y + self.bias

    return type(f"Multiplying{kind.__name__}", (kind,), {"forward": forward, "accelerated": kind})


def _looking_up(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, numbers: Tensor) -> Tensor:
        if numbers.numel() * self.kernel.packed.scalars["rows"] > self.num_embeddings:
            decoded: Tensor = kind.forward(self, numbers)
            return decoded
        rows: Tensor = self.kernel.rows(numbers.cpu())
        return rows.to(self.packed_weight.like)

    return type(f"LookingUp{kind.__name__}", (kind,), {"forward": forward, "accelerated": kind})
