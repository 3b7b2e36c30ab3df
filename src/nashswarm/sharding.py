"""Streams (see `streams`) whose calibration windows are spread over the workers of a cluster.

Each worker holds the streams of its batches. Products come back batch by batch and are added up here in the order of
all batches, so every digit is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nashswarm.blocks import batches_of, calibration_windows
from nashswarm.engine import Member, Ray
from nashswarm.regression import CPU, Compared
from nashswarm.streams import About, Streams, turn_of
from nashswarm.types import ModelIndex, NashSwarmError, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Shard(Streams):
    """Those of one worker's batches."""

    def compare(self, tensor: TensorSpec) -> list[Compared | None]:
        """All at once, on the processor."""
        found = super().compare(tensor)
        return [part and (part[0], {key: value.cpu() for key, value in part[1].items()}) for part in found]


def _open(
    load: Callable[[], PreTrainedModel], index: ModelIndex, ids: np.ndarray, tokens: int, batch: int, own: slice
) -> Shard:
    shard = Shard.prepare(load(), index, ids, tokens, batch)
    batches = shard.batches()[own]
    windows = shard.windows[batches[0].start : batches[-1].stop]
    probe, turn = shard.windows[:1], turn_of(shard.windows)
    shard = replace(shard, windows=windows, first=own.start, probe=probe, turn=turn)
    shard.start()
    return shard


class ShardedStreams:
    """`propagation.BothStreams` over the members of a cluster."""

    summed_on = CPU

    def __init__(
        self,
        engine: Ray,
        load: Callable[[], PreTrainedModel],
        index: ModelIndex,
        ids: np.ndarray,
        tokens: int,
        batch_tokens: int,
    ) -> None:
        """Arguments as those of `Streams.prepare`; `load` makes the model, on each worker."""
        windows, batch = calibration_windows(index, ids, tokens, batch_tokens)
        count = len(batches_of(len(windows), batch))
        size = -(-count // min(engine.slots, count))
        make = partial(_open, load, index, ids, tokens, batch_tokens)
        self.members = [engine.member(partial(make, own)) for own in batches_of(count, size)]

    def start(self) -> None:
        """Begin with the original, as often as it takes."""
        for member in self.members:
            member.open()

    def order(self) -> list[TensorSpec]:
        """As `Streams.order`."""
        found: list[TensorSpec] = self._first("order")
        return found

    def about(self, tensor: TensorSpec) -> About:
        """As `Streams.about`."""
        found: About = self._all("about", tensor)[0]  # all of them enter its block
        return found

    def compare(self, tensor: TensorSpec) -> Iterator[Compared | None]:
        """As `Streams.compare`."""
        submitted = [member.submit("compare", tensor) for member in self.members]
        kinds = set()
        for member in self.members:
            for found in member.result(submitted.pop(0)):
                if found is not None:
                    kinds.add("target" in found[1])
                if len(kinds) > 1:
                    raise NashSwarmError(
                        f"{tensor.name}: its block is the sum of its parts for some windows and not for others; "
                        "set compute.engine: local"
                    )
                yield found

    def put(
        self, tensor: TensorSpec, weight: Tensor, moved: Tensor | None = None, bias: np.ndarray | None = None
    ) -> np.ndarray | None:
        """As `Streams.put`."""
        found: np.ndarray | None = self._all("put", tensor, weight, moved, bias, lasting=True)[0]
        return found

    def vector(self, name: str) -> np.ndarray:
        """As `Streams.vector`."""
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
