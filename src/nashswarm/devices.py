"""Which device torch computes with, by the names that params know."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from nashswarm.types import NashSwarmError

if TYPE_CHECKING:
    import torch


def resolve(name: str) -> torch.device:
    """'auto' is a GPU where there is one. Raises NashSwarmError for one that is not there."""
    import torch

    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, here in found.items() if here)
    if not found[name]:
        there = ", ".join(n for n, here in found.items() if here)
        raise NashSwarmError(f"compute.device: no {name} on this machine, which has {there}; set one of these, or auto")
    return torch.device(name)


def wide(device: torch.device) -> torch.device:
    """Where float64 is computed: Apple's GPUs have none."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device


def repeatable(device: torch.device) -> AbstractContextManager[None]:
    """Within, gradients of attention come out the same each time: a GPU's fused kernels add them up in any order."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
