"""What an interrupted packing had finished, so that the next one need not round it again.

What a packing makes of a matrix follows from those before it. So finished ones are kept in a journal one by one, under
the fingerprint of all that decides them (`quantize.open_journal`): the codes, the bias that went with them, and the
round of packing that they are of. The run that goes on puts them into the model in the same order, without aiming or
rounding, and carries both streams of the propagation past them; from the first matrix that is missing it does what the
undisturbed run does. Of a round that missed the budget only the sizes are kept, by which the next one steers; its
matrices are overwritten by the next round's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nashswarm.artifacts import Journal
from nashswarm.types import TensorSpec

BIAS, ROUND, MISSES, TOTALS = "bias", "round", "misses", "totals"


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


@dataclass(frozen=True, slots=True)
class Miss:
    """A round of packing that was to be done again."""

    bytes: int  # of the packed files
    codes: float  # of all codes, before they were written
    taken: Mapping[str, float]  # bytes of each matrix' codes, had its steps been those that were bought


def misses(journal: Journal | None) -> list[Miss]:
    """The rounds that were to be done again."""
    kept = journal.read(MISSES) if journal else None
    if kept is None:
        return []
    taken = [{n: float(sizes[i]) for n, sizes in kept.items() if n != TOTALS} for i in range(len(kept[TOTALS]))]
    return [Miss(int(size), codes, own) for (size, codes), own in zip(kept[TOTALS].tolist(), taken, strict=True)]


def keep_misses(journal: Journal | None, found: list[Miss]) -> None:
    """Note the rounds that are to be done again."""
    if journal:
        taken = {name: np.array([m.taken[name] for m in found]) for name in found[0].taken}
        journal.keep(MISSES, {TOTALS: np.array([[m.bytes, m.codes] for m in found]), **taken})


def _step(tensor: TensorSpec) -> str:
    return f"matrix-{tensor.name}"
