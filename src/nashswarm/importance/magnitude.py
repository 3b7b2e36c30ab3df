"""Importance of a weight is its absolute value (the paper's first importance)."""

from __future__ import annotations

from torch import Tensor


def importance(weight: Tensor) -> Tensor:
    """|w|, elementwise: float32 [out, in] -> float32 [out, in]."""
    return weight.abs()
