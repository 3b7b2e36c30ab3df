"""optimum-quanto, weights only, no calibration: https://github.com/huggingface/optimum-quanto."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nashswarm.types import PeerJob, PeerWeights

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (2, 4, 8)
OPTIMIZERS = ("hqq", "max")
PARTS = {"weight._data._data": "codes", "weight._data": "codes", "._scale": "scales", "._shift": "zeros"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Groups are quanto's own: 128 weights of a row. `optimizer` chooses ranges: HQQ's way, or by extremes."""

    bits: int
    optimizer: str = "hqq"

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits: {self.bits}; quanto has {', '.join(map(str, WIDTHS))}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: '{self.optimizer}'; one of {', '.join(OPTIMIZERS)}")


def quantize(job: PeerJob, settings: Settings) -> PeerWeights:
    """The blocks' matrices by `quantize` and `freeze` at float16, counted as their state dictionary is saved."""
    import torch
    from optimum import quanto

    from nashswarm import tooling

    model = tooling.load_original(job, torch.float16)
    tooling.conv1d_to_linear(model)
    names = [t.name.removesuffix(".weight") for t in job.inside]
    kinds = {2: quanto.qint2, 4: quanto.qint4, 8: quanto.qint8}
    chosen = None
    if settings.bits < 8:
        chosen = quanto.HqqOptimizer() if settings.optimizer == "hqq" else quanto.MaxOptimizer()
    quanto.quantize(model, weights=kinds[settings.bits], optimizer=chosen, include=names)
    quanto.freeze(model)
    matrices: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        matrices[f"{name}.weight"] = module.weight.dequantize().float()
        own = {k: v for k, v in module.state_dict().items() if k != "bias"}
        state |= {f"{name}.{k}": v for k, v in own.items()}
    return PeerWeights(matrices, tooling.stored_parts(state, PARTS), quanto.__version__, (tooling.AS_LINEAR,))
