"""HQQ (half-quadratic quantization, no calibration): https://github.com/mobiusml/hqq, package `hqq`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nashswarm.types import PeerJob, PeerWeights

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (1, 2, 3, 4, 8)
PARTS = {".W_q": "codes", ".scale": "scales", ".zero": "zeros"}


@dataclass(frozen=True, slots=True)
class Settings:
    """`group` weights of a row (axis 1) or a column (axis 0) share a grid with a float16 scale and zero."""

    bits: int
    group: int = 64
    axis: int = 1

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits: {self.bits}; HQQ has {', '.join(map(str, WIDTHS))}")
        if self.group < 8 or self.group % 8:
            raise ValueError(f"group: {self.group}; HQQ wants a multiple of 8")
        if self.axis not in (0, 1):
            raise ValueError(f"axis: {self.axis}; 0 or 1")


def quantize(job: PeerJob, settings: Settings) -> PeerWeights:
    """The blocks' matrices by `HQQLinear` at float16, counted as its own state dictionary is saved."""
    import hqq
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    from nashswarm import tooling

    model = tooling.load_original(job, torch.float16)
    tooling.conv1d_to_linear(model)
    config = BaseQuantizeConfig(nbits=settings.bits, group_size=settings.group, axis=settings.axis)
    matrices: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for tensor in job.inside:
        name = tensor.name.removesuffix(".weight")
        layer = HQQLinear(model.get_submodule(name), config, compute_dtype=torch.float16, device="cpu")
        matrices[tensor.name] = layer.dequantize().float()
        state |= {f"{name}.{k}": v for k, v in layer.state_dict().items() if k != "bias"}
    notes = [tooling.AS_LINEAR]
    if settings.bits == 3:
        notes.append("3-bit codes are packed ten to 32 bits: 3.2 bits each")
    return PeerWeights(matrices, tooling.stored_parts(state, PARTS), hqq.__version__, tuple(notes))
