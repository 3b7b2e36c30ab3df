"""GPTQ by GPTQModel: https://github.com/ModelCloud/GPTQModel, package `gptqmodel`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from nashswarm.types import PeerJob, PeerWeights

WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Settings:
    """`group` weights of a row share a grid; `act_order` rounds inputs in falling order of their power.

    Asymmetric grids, though symmetric ones are its default: docs/decisions.md has both.
    """

    bits: int
    group: int = 128
    act_order: bool = True
    symmetric: bool = False
    damping: float = 0.01  # of the mean diagonal of the inputs' second moment

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits: {self.bits}; one of {', '.join(map(str, WIDTHS))}")
        if self.group < 1:
            raise ValueError(f"group: {self.group} is too small; at least 1")
        if not 0 < self.damping < 1:
            raise ValueError(f"damping: {self.damping}; between 0 and 1")


def quantize(job: PeerJob, settings: Settings) -> PeerWeights:
    """The blocks' matrices, calibrated on all of the text, read back from its own format (version 2: whole zeros)."""
    import os

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default is 1 on two cores, and its loader asks for 2

    import gptqmodel
    import torch

    from nashswarm import tooling

    windows = tooling.calibration_windows(job)
    config = gptqmodel.QuantizeConfig(
        bits=settings.bits,
        group_size=settings.group,
        desc_act=settings.act_order,
        sym=settings.symmetric,
        damp_percent=settings.damping,
        format="gptq_v2",
        device="cpu",
        offload_to_disk=False,
    )
    rows = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None])} for w in windows]
    with tempfile.TemporaryDirectory() as scratch:
        model = gptqmodel.GPTQModel.load(str(job.directory), config, dtype=torch.float32)
        model.quantize(rows, batch_size=8)
        model.save(scratch)
        names = [t.name for t in job.inside]
        matrices, parts = tooling.read_gptq(Path(scratch), names, settings.bits, zero_offset=0)
    order = "in falling order of input power, " if settings.act_order else ""
    return PeerWeights(matrices, parts, gptqmodel.__version__, (f"{order}on {windows.numel()} tokens",))
