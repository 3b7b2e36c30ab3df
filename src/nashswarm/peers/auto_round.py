"""AutoRound (rounding learned by signed gradients): https://github.com/intel/auto-round, package `auto-round`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nashswarm.types import InputError, PeerJob, PeerWeights

WIDTHS = (2, 3, 4, 8)
OFFSETS = {"auto_round": 0, "auto_round:auto_gptq": 1}  # packing format -> what it takes off a zero before storing it


@dataclass(frozen=True, slots=True)
class Settings:
    """`group` weights of a row share a grid; `iters` steps of gradient descent for each block (200 is its default)."""

    bits: int
    group: int = 128
    symmetric: bool = True
    iters: int = 200
    batch: int = 8  # windows per step
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits: {self.bits}; one of {', '.join(map(str, WIDTHS))}")
        for key in ("group", "iters", "batch"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} is too small; at least 1")


def quantize(job: PeerJob, settings: Settings) -> PeerWeights:
    """The blocks' matrices, tuned in float32 on all of the calibration text, read back from its own format."""
    import auto_round
    import torch
    from transformers import AutoTokenizer

    from nashswarm import tooling

    windows = tooling.calibration_windows(job)
    with tempfile.TemporaryDirectory() as scratch:
        tuner = auto_round.AutoRound(
            tooling.load_original(job, torch.float32),
            AutoTokenizer.from_pretrained(job.directory, local_files_only=True),
            bits=settings.bits,
            group_size=settings.group,
            sym=settings.symmetric,
            iters=settings.iters,
            seqlen=job.context,
            nsamples=len(windows),
            batch_size=settings.batch,
            dataset=[window[None] for window in windows],
            seed=settings.seed,
            device_map="cpu",
            amp=False,  # bfloat16 on a CPU is slow and worse
            enable_torch_compile=False,
        )
        tuner.quantize_and_save(scratch, format="auto_round")
        (found,) = Path(scratch).rglob("quantization_config.json")
        packing = json.loads(found.read_bytes())["packing_format"]
        if packing not in OFFSETS:
            raise InputError(f"auto-round chose the format {packing}, which is not read here")
        names = [t.name for t in job.inside]
        matrices, parts = tooling.read_gptq(Path(scratch), names, settings.bits, OFFSETS[packing])
    notes = (f"{settings.iters} steps for each block, on {windows.numel()} tokens; Conv1D natively; amp off",)
    return PeerWeights(matrices, parts, auto_round.__version__, notes)
