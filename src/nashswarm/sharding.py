"""A propagation (see `propagation`) whose calibration windows are spread over the workers of a cluster.

Each worker holds the streams of its batches. Products come back batch by batch and are added up here in the order of
all batches, so every digit is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nashswarm.blocks import batches_of, calibration_windows
from nashswarm.engine import Member, Ray
from nashswarm.propagation import Aim, Correction, Products, Propagation, Sums
from nashswarm.types import ModelIndex, NashSwarmError, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Shard:
    """The batches of one worker; what `Propagation` does, in calls that can be sent."""

    walk: Propagation

    def order(self) -> list[TensorSpec]:
        """Of all matrices."""
        return self.walk.order()

    def about(self, tensor: TensorSpec) -> tuple[bool, str | None, bool]:
        """Whether it has an aim of its own, with whom it shares its sums, whether a bias can follow."""
        if not self.walk.reaches(tensor):
            return False, None, False
        return True, self.walk.source(tensor), self.walk.has_bias(tensor)

    def compare(self, tensor: TensorSpec) -> list[tuple[int, Products] | None]:
        """See `Propagation.compare`."""
        found = self.walk.compare(tensor)
        return [part and (part[0], {key: value.cpu() for key, value in part[1].items()}) for part in found]

    def put(
        self, tensor: TensorSpec, weight: Tensor, moved: Tensor | None, bias: np.ndarray | None
    ) -> np.ndarray | None:
        """See `Propagation.put`."""
        return self.walk.put(tensor, weight, moved, bias)

    def vector(self, name: str) -> np.ndarray:
        """See `Propagation.vector`."""
        return self.walk.vector(name)


def _open(
    load: Callable[[], PreTrainedModel], index: ModelIndex, ids: np.ndarray, tokens: int, batch: int, own: slice
) -> Shard:
    walk = Propagation.prepare(load(), index, ids, tokens, batch)
    batches = walk.batches()[own]
    windows = walk.windows[batches[0].start : batches[-1].stop]
    walk = replace(walk, windows=windows, first=own.start, probe=walk.windows[:1])
    walk.start()
    return Shard(walk)


class ShardedPropagation:
    """`quantize.Walk` over the members of a cluster."""

    def __init__(
        self,
        engine: Ray,
        load: Callable[[], PreTrainedModel],
        index: ModelIndex,
        ids: np.ndarray,
        tokens: int,
        batch_tokens: int,
    ) -> None:
        """Arguments as those of `Propagation.prepare`; `load` makes the model, on each worker."""
        windows, batch = calibration_windows(index, ids, tokens, batch_tokens)
        count = len(batches_of(len(windows), batch))
        size = -(-count // min(engine.slots, count))
        make = partial(_open, load, index, ids, tokens, batch_tokens)
        self.members = [engine.member(partial(make, own)) for own in batches_of(count, size)]
        self._sums: tuple[str, Sums] | None = None
        self._corrections: dict[str, Correction] = {}  # of matrices that were not settled since

    def order(self) -> list[TensorSpec]:
        """As `Propagation.order`."""
        found: list[TensorSpec] = self._first("order")
        return found

    def aim(self, tensor: TensorSpec, weight: Tensor) -> Aim:
        """As `Propagation.aim`."""
        reaches, source, centered = self._all("about", tensor)[0]
        if not reaches:
            return Aim(weight)
        if self._sums and self._sums[0] == source:
            sums = self._sums[1]
        else:
            parts = self._all("compare", tensor)
            if any(found is None for part in parts for found in part):
                return Aim(weight)
            if len({"target" in found for part in parts for _, found in part}) > 1:
                raise NashSwarmError(
                    f"{tensor.name}: its block is the sum of its parts for some windows and not for others; "
                    "set compute.engine: local"
                )
            sums = Sums()
            sums.add([found for part in parts for found in part])
            self._sums = source or tensor.name, sums
        correction = self._corrections[tensor.name] = sums.correction(weight, centered)
        return correction.aim

    def settle(self, tensor: TensorSpec, weight: Tensor, bias: np.ndarray | None = None) -> np.ndarray | None:
        """As `Propagation.settle`."""
        correction = self._corrections.pop(tensor.name, None)
        moved = None if correction is None else correction.moved(weight)
        found: np.ndarray | None = self._all("put", tensor, weight, moved, bias, lasting=True)[0]
        return found

    def vector(self, name: str) -> np.ndarray:
        """As `Propagation.vector`."""
        found: np.ndarray = self._first("vector", name)
        return found

    def close(self) -> None:
        """Let the workers go."""
        for member in self.members:
            member.close()

    def _first(self, method: str, *arguments: Any) -> Any:
        member: Member = self.members[0]
        return member.result(member.submit(method, *arguments))

    def _all(self, method: str, *arguments: Any, lasting: bool = False) -> list[Any]:
        submitted = [member.submit(method, *arguments) for member in self.members]
        return [m.result(call, lasting) for m, call in zip(self.members, submitted, strict=True)]
