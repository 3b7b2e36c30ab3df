"""The steps between a checkpoint and a packed directory, tensor by tensor: importance, allocation, encoding."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from nashswarm import artifacts, packed
from nashswarm.config import Method, load_room
from nashswarm.models import Checkpoint
from nashswarm.packed import Provenance, write_packed
from nashswarm.recipes import KEPT, method_document
from nashswarm.types import (
    Allocation,
    Choice,
    Job,
    ModelIndex,
    NashSwarmError,
    Offer,
    PackedTensor,
    Progress,
    Statistics,
    TensorSpec,
)

BUYING_ROUNDS = 8
CLOSE = 0.0005  # share of the budget that may stay unspent

logger = logging.getLogger(__name__)


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
    allocator, codec = load_room("allocators", method.allocator), load_room("codecs", method.codec)
    tensors = progress(model.index.scope(method.scope), "allocate")
    if allocator.BUYS == "candidates":
        offers = [
            Offer(t, candidates=codec.offer(_job(model, t, method, Choice()), method.codec_settings)) for t in tensors
        ]
        return _buy(model, method, offers)
    with_importance = (_offer(model, tensor, method, allocator.NEEDS_IMPORTANCE) for tensor in tensors)
    return allocator.allocate(with_importance, method.allocator_settings)  # type: ignore[no-any-return]


def _buy(model: Model, method: Method, offers: list[Offer]) -> Allocation:
    """Allocate, write the packed files, compare their bytes with the budget, correct the estimate by the difference.

    Candidates count bytes before feedback and without what the model as a whole adds; both are nearly constant, so a
    few rounds meet the budget. Raises NashSwarmError where none does.
    """
    allocator, parameters = load_room("allocators", method.allocator), model.index.parameters
    asked = allocator.asked_bytes(method.allocator_settings, parameters)
    overhead = 2.0 * sum(int(np.prod(v.shape)) for v in model.index.vectors)
    best, most = None, -1
    for _ in range(BUYING_ROUNDS):
        ledger = allocator.Ledger(parameters, overhead)
        allocation: Allocation = allocator.allocate(offers, method.allocator_settings, ledger)
        bought = _packed_bytes(model, method, allocation)
        allocation = dataclasses.replace(allocation, bought_bytes=bought)
        logger.info("price %.4g nats per byte: %d bytes bought, %s asked", allocation.price, bought, asked)
        if asked is None or 0 <= asked - bought <= CLOSE * asked:
            return allocation
        if most < bought <= asked:
            best, most = allocation, bought
        overhead += bought - asked + CLOSE / 2 * asked
    if best is None:
        raise NashSwarmError(f"methods.{method.name}.budget: {asked} bytes could not be met; the closest was {bought}")
    return best


def _packed_bytes(model: Model, method: Method, allocation: Allocation) -> int:
    """Size of the packed model as `pack` would write it, by writing it."""
    with tempfile.TemporaryDirectory(prefix="nashswarm-") as scratch:
        pack(
            model,
            method,
            dataclasses.replace(allocation, bought_bytes=0),
            Path(scratch) / "packed",
            lambda items, _: items,
        )
        return packed.file_bytes(Path(scratch) / "packed")


def encode(
    model: Model, method: Method, allocation: Allocation, progress: Progress
) -> Iterator[tuple[str, PackedTensor]]:
    """Every matrix of the model, packed: those in scope by the method's codec, the others kept as they are."""
    codec, kept = load_room("codecs", method.codec), load_room("codecs", KEPT)
    tensors = progress(model.index.tensors, "pack")
    if hasattr(codec, "encode_all"):
        jobs = (_job(model, t, method, allocation.choices[t.name]) for t in tensors if t.name in allocation.choices)
        yield from codec.encode_all(jobs, method.codec_settings)
        tensors = [t for t in model.index.tensors if t.name not in allocation.choices]
    for tensor in tensors:
        choice = allocation.choices.get(tensor.name)
        job = _job(model, tensor, method, choice or Choice())
        yield tensor.name, codec.encode(job, method.codec_settings) if choice else kept.encode(job, kept.Settings())


def pack(model: Model, method: Method, allocation: Allocation, directory: Path, progress: Progress) -> None:
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
    stored = () if method.codec == "source" else model.index.vectors
    vectors = ((v, model.checkpoint.vector(v).numpy()) for v in stored)
    write_packed(
        directory, provenance, encode(model, method, allocation, progress), vectors, model.checkpoint.directory
    )


def _offer(model: Model, tensor: TensorSpec, method: Method, needs_importance: bool) -> Offer:
    if not needs_importance:
        return Offer(tensor)
    importance = load_room("importance", method.importance).importance(model.checkpoint.tensor(tensor))
    return Offer(tensor, importance.reshape(-1).numpy())


def _job(model: Model, tensor: TensorSpec, method: Method, choice: Choice) -> Job:
    weight = model.checkpoint.tensor(tensor)
    importance = load_room("importance", method.importance).importance(weight) if choice.classes else None
    return Job(tensor, weight, choice, importance, model.statistics(tensor.name))
