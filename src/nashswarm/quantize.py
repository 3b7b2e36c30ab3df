"""The steps between a checkpoint and a packed directory, tensor by tensor: importance, allocation, encoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from nashswarm import artifacts
from nashswarm.config import Method, load_room
from nashswarm.models import Checkpoint
from nashswarm.recipes import KEPT, method_document
from nashswarm.packed import Provenance, write_packed
from nashswarm.types import Allocation, Choice, Job, ModelIndex, Offer, PackedTensor, Progress, Statistics, TensorSpec

NO_IMPORTANCE = np.empty(0, np.float32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model at rest: where its weights and its statistics are read from, one tensor at a time."""

    name: str
    index: ModelIndex
    record: artifacts.SourceRecord
    checkpoint: Checkpoint
    statistics: Callable[[str], Statistics | None]


def open_model(layout: artifacts.Layout, name: str) -> Model:
    """A downloaded and scored model. Raises InputError where its files changed since."""
    download = layout.download(name)
    record, index = artifacts.read_source(download), artifacts.read_index(download)
    checkpoint = Checkpoint.open(record.open(layout.root), index)
    return Model(name, index, record, checkpoint, lambda t: artifacts.read_statistics(layout.scores(name), t))


def allocate(model: Model, method: Method, progress: Progress) -> Allocation:
    """Ask the method's allocator for the bits of every tensor in the method's scope."""
    allocator = load_room("allocators", method.allocator)
    tensors = progress(model.index.scope(method.scope), "allocate")
    offers = (_offer(model, tensor, method, allocator.NEEDS_IMPORTANCE) for tensor in tensors)
    return allocator.allocate(offers, method.allocator_settings)  # type: ignore[no-any-return]


def encode(
    model: Model, method: Method, allocation: Allocation, progress: Progress
) -> Iterator[tuple[str, PackedTensor]]:
    """Every matrix of the model, packed: those in scope by the method's codec, the others kept as they are."""
    codec, kept = load_room("codecs", method.codec), load_room("codecs", KEPT)
    for tensor in progress(model.index.tensors, "pack"):
        choice = allocation.choices.get(tensor.name)
        job = _job(model, tensor, method, choice)
        yield tensor.name, kept.encode(job, kept.Settings()) if choice is None else codec.encode(job, method.codec_settings)



def pack(
    model: Model, method: Method, allocation: Allocation, directory: Path, progress: Progress
) -> None:
    """Encode every tensor and write the packed directory."""
    record = model.record
    provenance = Provenance(
        model=model.name,
        architecture=model.index.architecture,
        parameters=model.index.parameters,
        source=record.source,
        id=record.id,
        revision=record.revision,
        method={"name": method.name, **method_document(method)},
        certificate={k: v for k, v in artifacts.allocation_document(allocation).items() if k != "choices"},
    )
    vectors = ((v, model.checkpoint.vector(v).numpy()) for v in model.index.vectors)
    if method.codec == "source":
        vectors = iter(())
    write_packed(directory, provenance, encode(model, method, allocation, progress), vectors, model.checkpoint.directory)


def _offer(model: Model, tensor: TensorSpec, method: Method, needs_importance: bool) -> Offer:
    if not needs_importance:
        return Offer(tensor, NO_IMPORTANCE)
    return Offer(tensor, _importance(model, tensor, method).reshape(-1).numpy())


def _importance(model: Model, tensor: TensorSpec, method: Method) -> Tensor:
    room = load_room("importance", method.importance)
    return room.importance(model.checkpoint.tensor(tensor))  # type: ignore[no-any-return]


def _job(model: Model, tensor: TensorSpec, method: Method, choice: Choice | None) -> Job:
    weight = model.checkpoint.tensor(tensor)
    if choice is None:
        return Job(tensor, weight, Choice())
    importance = load_room("importance", method.importance).importance(weight) if choice.classes else None
    return Job(tensor, weight, choice, importance, model.statistics(tensor.name))
