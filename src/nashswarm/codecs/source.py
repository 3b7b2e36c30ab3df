"""The original model as the baseline `fp32`: nothing is stored, the packed directory points at the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nashswarm.types import Job, NashSwarmError, PackedTensor

SELLS = ("widths",)
WIDTHS = (32,)


@dataclass(frozen=True, slots=True)
class Settings:
    """No settings."""


def encode(job: Job, settings: Settings) -> PackedTensor:
    """An empty record of the right shape."""
    return PackedTensor("source", job.tensor.shape, {})


def decode(packed: PackedTensor) -> Tensor:
    """Always raises: the weights are in the checkpoint, and `loading` takes them from there."""
    raise NashSwarmError("codec 'source' stores no weights; load the checkpoint that the manifest names")
