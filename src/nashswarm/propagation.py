"""Where a matrix aims, once those before it are quantized: at what the original would have made of its own inputs.

Errors of quantized layers reach the layers behind them. So matrices are rounded in the order in which the model runs
them, and before one is rounded, its inputs x' behind everything quantized so far are compared, over the calibration
text, with the original's inputs x. Its weights become the ridge regression

    W' = W + E[t x'^T] (E[x' x'^T] + ridge I)^-1,    t = W (x - x') + (the residual stream's error),

the last term where it writes to the residual stream: what the stream lacks there, it adds. Its curvature is measured
anew on x'. Biases follow the means of t and of the rounding error. The ridge is chosen for each matrix by two-fold
cross-validation over the text, so that little text corrects little. The first term is GPTAQ's (Li et al., 2025,
arXiv:2504.02692), the second that of QEP (Arai and Ichikawa, 2025, arXiv:2504.09629) carried to the stream.

`streams` has both inputs, here or (`sharding`) on the workers of a cluster; `regression` has the sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nashswarm.regression import Aim, Compared, Correction, Sums
from nashswarm.streams import About
from nashswarm.types import TensorSpec


class BothStreams(Protocol):
    """`streams.Streams`, or `sharding.ShardedStreams` over a cluster."""

    @property
    def summed_on(self) -> torch.device:
        """Where sums are added up, in float64."""

    def order(self) -> list[TensorSpec]:
        """All matrices as they are to be quantized."""

    def about(self, tensor: TensorSpec) -> About:
        """What has to be known of a matrix before it is aimed."""

    def compare(self, tensor: TensorSpec) -> Iterable[Compared | None]:
        """Products of both streams' inputs, in the order of the text; None where they are not of the same tokens."""

    def put(
        self, tensor: TensorSpec, weight: Tensor, moved: Tensor | None = None, bias: np.ndarray | None = None
    ) -> np.ndarray | None:
        """A rounded matrix in the original's place."""

    def vector(self, name: str) -> np.ndarray:
        """A vector of the model as it is now."""


@dataclass
class Propagation:
    """Aims at what the original makes of its inputs, behind everything that was settled; a `quantize.Walk`."""

    streams: BothStreams
    _sums: tuple[str, Sums] | None = None  # of those matrices that share their inputs, and the first of them
    _corrections: dict[str, Correction] = field(default_factory=dict)  # of matrices that were not settled since

    def order(self) -> list[TensorSpec]:
        """All matrices as they are to be quantized: embeddings, blocks as they run, an untied head."""
        return self.streams.order()

    @torch.no_grad()
    def aim(self, tensor: TensorSpec, weight: Tensor) -> Aim:
        """Where to round a matrix to. Arguments: `weight`, the original's, float32 [out, in]."""
        about = self.streams.about(tensor)
        if not about.reaches:
            return Aim(weight)
        if not self._sums or self._sums[0] != about.source:
            sums = Sums()
            for found in self.streams.compare(tensor):
                if found is None:
                    return Aim(weight)
                sums.add(found)
            self._sums = about.source or tensor.name, sums
        correction = self._sums[1].correction(weight, about.has_bias, self.streams.summed_on)
        self._corrections[tensor.name] = correction
        return correction.aim

    @torch.no_grad()
    def settle(self, tensor: TensorSpec, weight: Tensor, bias: np.ndarray | None = None) -> np.ndarray | None:
        """Put the rounded matrix, float32 [out, in], in the model; its bias takes up the mean of the rounding error.

        Arguments: `bias`, float32 [out], what this returned in a run that was interrupted; such a matrix needs no aim.
        Returns: the bias as it is now, None where there is none.
        """
        correction = self._corrections.pop(tensor.name, None)
        return self.streams.put(tensor, weight, None if correction is None else correction.moved(weight), bias)

    def vector(self, name: str) -> np.ndarray:
        """A vector of the model as it is now, float32. Raises NashSwarmError where a correction left all bounds."""
        return self.streams.vector(name)
