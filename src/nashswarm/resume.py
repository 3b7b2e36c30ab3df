"""What an interrupted packing had finished, so that the next one need not round it again.

What a packing makes of a matrix follows from those before it. So finished ones are kept in a journal one by one, under
the fingerprint of all that decides them (`quantize.open_journal`): the codes, the bias that went with them, and the
round of packing that they are of. The run that goes on puts them into the model in the same order, without aiming or
rounding, and carries both streams of the propagation past them; from the first matrix that is missing it does what the
undisturbed run does. Of a round that missed the budget only its bytes are kept; its matrices are overwritten by the
next round's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nashswarm.artifacts import Journal
from nashswarm.types import TensorSpec

BIAS, ROUND, MISSES = "bias", "round", "misses"


@dataclass(frozen=True, slots=True)
class Finished:
    """The matrices of one round of packing; without a journal there are none, and none are kept."""

    journal: Journal | None = None
    round: int = 0

    def read(self, tensor: TensorSpec) -> Mapping[str, np.ndarray] | None:
        """What was kept of a matrix in this round."""
        kept = self.journal.read(_step(tensor)) if self.journal else None
        return kept if kept is not None and int(kept[ROUND]) == self.round else None

    def has(self, tensor: TensorSpec) -> bool:
        """Whether a matrix was kept in this round."""
        return self.read(tensor) is not None

    def keep(self, tensor: TensorSpec, arrays: Mapping[str, np.ndarray], bias: np.ndarray | None) -> None:
        """Note a matrix as finished, and the bias, float32 [out], that went with it."""
        if self.journal:
            with_bias = {} if bias is None else {BIAS: bias}
            self.journal.keep(_step(tensor), {**arrays, **with_bias, ROUND: np.array(self.round)})


def misses(journal: Journal | None) -> list[int]:
    """Bytes packed in each round that was to be done again."""
    kept = journal.read(MISSES) if journal else None
    return [] if kept is None else kept[MISSES].tolist()


def keep_misses(journal: Journal | None, found: list[int]) -> None:
    """Note how many bytes the rounds took that are to be done again."""
    if journal:
        journal.keep(MISSES, {MISSES: np.array(found, np.int64)})


def _step(tensor: TensorSpec) -> str:
    return f"matrix-{tensor.name}"
