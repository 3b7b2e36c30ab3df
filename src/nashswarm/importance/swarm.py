"""The paper's "swarm" importance: a weight matters more among large neighbours.

    importance(w_ij) = |w_ij| * prod over the adjacent w_kl of (1 + |w_kl|)

The paper does not say what is adjacent. We take the four neighbours in the matrix (left, right, above, below; fewer at
an edge), the smallest set that the word allows. A product over an edge's missing neighbour is a factor of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance(weight: Tensor) -> Tensor:
    """|w_ij| * prod(1 + |neighbour|): float32 [out, in] -> float32 [out, in], in canonical orientation."""
    magnitude = weight.abs()
    grown = 1 + magnitude
    result = magnitude.clone()
    result[1:] *= grown[:-1]
    result[:-1] *= grown[1:]
    result[:, 1:] *= grown[:, :-1]
    result[:, :-1] *= grown[:, 1:]
    # Four factors of up to 1 + |w| leave float32 only for |w| beyond 1e7; a finite weight must stay comparable.
    return torch.nan_to_num(result, posinf=torch.finfo(result.dtype).max)
