"""The steps between a checkpoint and a packed directory, tensor by tensor: importance, allocation, encoding."""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nashswarm import artifacts, packed
from nashswarm.closure import closure, fingerprint
from nashswarm.config import Method, load_room
from nashswarm.console import quiet
from nashswarm.engine import FARTHER, LOCAL, Engine, Ray
from nashswarm.models import Checkpoint, load_original, load_streamed
from nashswarm.packed import Provenance, write_packed
from nashswarm.propagation import Propagation
from nashswarm.recipes import KEPT, method_document, method_files
from nashswarm.regression import Aim
from nashswarm.resume import BIAS, Finished, Miss, keep_misses, misses
from nashswarm.sharding import ShardedStreams
from nashswarm.streams import Streams, pass_tokens
from nashswarm.threads import crew, team
from nashswarm.tuning import Tuned, tune
from nashswarm.types import (
    Allocation,
    Candidates,
    Choice,
    Job,
    ModelIndex,
    NashSwarmError,
    Offer,
    PackedTensor,
    Progress,
    Statistics,
    TensorSpec,
    Tuning,
)

BUYING_ROUNDS = 8
PACKING_ROUNDS = 6
CLOSE = 0.0005  # share of the budget that may stay unspent when bytes are bought
SLACK = 0.001  # and when they are packed
CAUTION = 4  # factor by which packing aims lower and takes more slack, from its third round on: small models jump
NEAR = 0.03  # share of the budget within which sizes that were measured can be carried to other steps
STEERING = 0.25  # octaves by which a packing may correct steps, beyond what the round before says of all of them
# Share of the budget that the first round leaves to tuning, which widens codes: files grew by 0.08 to 0.13 % at 3.0
# bits (by 0.23 % at 2.5, where a second round was needed). The middle of what SLACK allows is the aim.
GROWTH = 0.0012 + CLOSE

logger = logging.getLogger(__name__)


class Reader(Protocol):
    """Where a model's statistics come from."""

    def __call__(self, tensor: str, second_moment: np.ndarray | None = None, /) -> Statistics | None:
        """A tensor's; see `artifacts.read_statistics`."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model at rest: where its weights and its statistics are read from, one tensor at a time."""

    name: str
    index: ModelIndex
    record: artifacts.SourceRecord
    checkpoint: Checkpoint
    statistics: Reader


def open_model(layout: artifacts.Layout, name: str) -> Model:
    """A downloaded and scored model. Raises InputError where its files changed since."""
    download = layout.download(name)
    record, index = artifacts.read_source(download), artifacts.read_index(download)
    checkpoint = Checkpoint.open(record.open(layout.root), index)
    return Model(name, index, record, checkpoint, partial(artifacts.read_statistics, layout.scores(name)))


def allocate(model: Model, method: Method, progress: Progress, engine: Engine = LOCAL) -> Allocation:
    """Ask the method's allocator for the bits of every tensor in the method's scope."""
    allocator = load_room("allocators", method.allocator)
    scope = model.index.scope(method.scope)
    tensors = progress(scope, "allocate")
    if allocator.BUYS == "candidates":
        shared, items = engine.share(partial(_same, model)), ((tensor, method) for tensor in scope)
        found = engine.map(_candidates, shared, items, True, FARTHER)
        offers = [Offer(tensor, candidates=own) for tensor, own in zip(tensors, found, strict=True)]
        return _buy(model, method, offers, engine)
    with_importance = (_offer(model, tensor, method, allocator.NEEDS_IMPORTANCE) for tensor in tensors)
    return allocator.allocate(with_importance, method.allocator_settings)  # type: ignore[no-any-return]


def _same(model: Model) -> Model:
    return model


def _candidates(model: Model, tensor: TensorSpec, method: Method) -> Candidates:
    found: Candidates = load_room("codecs", method.codec).offer(
        _job(model, tensor, method, Choice()), method.codec_settings
    )
    return found


def _buy(model: Model, method: Method, offers: list[Offer], engine: Engine) -> Allocation:
    """Allocate, write the packed files, compare their bytes with the budget, correct the estimate by the difference.

    Candidates count bytes before feedback and without what the model as a whole adds; both are nearly constant. Where
    options are continuous it is enough to come near, because `pack` steers by the sizes that are noted in the choices.
    Raises NashSwarmError where no round meets the budget.
    """
    allocator, parameters = load_room("allocators", method.allocator), model.index.parameters
    asked = allocator.asked_bytes(method.allocator_settings, parameters)
    overhead = 2.0 * sum(int(np.prod(v.shape)) for v in model.index.vectors)

    def buy(overhead: float) -> Allocation:
        try:
            ledger = allocator.Ledger(parameters, overhead)
            return allocator.allocate(offers, method.allocator_settings, ledger)  # type: ignore[no-any-return]
        except ValueError as error:
            raise NashSwarmError(f"methods.{method.name}.{error}") from error

    best, most, above = None, -1, 0
    for _ in range(BUYING_ROUNDS):
        allocation = buy(overhead)
        bought, sizes = _trial(model, method, allocation, engine)
        logger.info("price %.4g nats per byte: %d bytes bought, %s asked", allocation.price, bought, asked)
        if asked is None or 0 <= asked - bought <= CLOSE * asked:
            return _sized(dataclasses.replace(allocation, bought_bytes=bought), sizes)
        if bought < (1 - SLACK) * asked and allocation.choices == buy(-float(asked) * parameters).choices:
            logger.warning("the finest options take %d of %d bytes asked: that is all there is to buy", bought, asked)
            return _sized(dataclasses.replace(allocation, bought_bytes=bought), sizes)
        if most < bought <= asked:
            best, most = allocation, bought
        above += bought > asked
        # Twice the margin each time it was too much: in a tiny model the next coarser tile may be far.
        overhead += bought - asked + CLOSE / 2 * asked * 2 ** max(above - 1, 0)
        if sizes and abs(bought - asked) <= NEAR * asked:
            better = buy(overhead)
            moved = {n: (better.choices[n].size or 0) - (allocation.choices[n].size or 0) for n in sizes}
            grown = {n: sizes[n] + moved[n] for n in sizes}
            return _sized(better, grown)
    if best is None:
        raise NashSwarmError(f"methods.{method.name}.budget: {asked} bytes could not be met; the closest was {bought}")
    return dataclasses.replace(best, bought_bytes=most)


def _trial(model: Model, method: Method, allocation: Allocation, engine: Engine) -> tuple[int, dict[str, float]]:
    """Bytes of the packed model, by writing it; and of each matrix' codes, where its codec rounds before it codes.

    Nothing is fitted to a quantized prefix here: that moves sizes by some thousandths and takes the most time.
    """
    codec = load_room("codecs", method.codec)
    if hasattr(codec, "draft"):
        method = dataclasses.replace(method, codec_settings=codec.draft(method.codec_settings))
    course = Course(Plain(model), allocation, steer=False)
    with tempfile.TemporaryDirectory(prefix="nashswarm-") as scratch:
        directory = Path(scratch) / "packed"
        _write(model, method, allocation, directory, course, lambda items, _: items, Finished(), engine)
        return packed.file_bytes(directory), course.sizes


def _sized(allocation: Allocation, sizes: Mapping[str, float]) -> Allocation:
    choices = {n: dataclasses.replace(c, size=sizes.get(n)) for n, c in allocation.choices.items()}
    return dataclasses.replace(allocation, choices=choices)


# --- packing -------------------------------------------------------------------------------------------------------


def open_journal(
    parent: Path,
    purpose: str,
    method: Method,
    allocation: Allocation,
    ids: np.ndarray,
    files: Mapping[str, str],
    scores: Path,
    device: str = "cpu",
) -> artifacts.Journal:
    """Where `pack` keeps what it has finished, below `parent`; a run of which anything differs finds nothing there.

    Arguments: `files`, the checkpoint's, name -> SHA-256; `scores`, the directory of the statistics' files; `device`,
    where models run, as params name it.
    """
    paths = sorted(scores.iterdir())
    with team(len(paths)) as run:
        statistics = dict(zip([path.name for path in paths], run(artifacts.sha256_file, paths), strict=True))
    facts = (files, statistics, artifacts.digest(ids), method_document(method), code(method))
    versions = (torch.__version__, np.__version__, torch.get_num_threads(), device)
    return artifacts.Journal.of(parent, purpose, *facts, artifacts.allocation_document(allocation), *versions)


def code(method: Method) -> dict[str, str]:
    """The files that compute a packing, and their SHA-256."""
    source = Path(__file__).parents[1]
    return fingerprint(closure([Path(__file__), *method_files(source, method)], [source]), source)


def pack(
    model: Model,
    method: Method,
    allocation: Allocation,
    ids: np.ndarray,
    directory: Path,
    progress: Progress,
    journal: artifacts.Journal | None = None,
    engine: Engine = LOCAL,
) -> None:
    """Encode every tensor and write the packed directory, within the budget.

    Arguments: `ids`, int32 [tokens], the calibration text, for methods that fit matrices to the quantized prefix;
    `journal`, by `open_journal`: what is finished there is not done again. The caller closes it.
    Raises NashSwarmError where the files would exceed the budget.
    """
    missed, tuner = misses(journal), _tuner(model, method, ids, engine)
    tokens, asked = getattr(method.codec_settings, "prefix_tokens", 0), allocation.asked_bytes
    all_bought = asked is not None and 0 < (allocation.bought_bytes or 0) < (1 - SLACK) * asked  # no more was for sale
    expected = sum(c.size or 0.0 for c in allocation.choices.values())
    rounds = Rounds(asked or 0, expected, GROWTH * (asked or 0) if tuner else 0.0)
    for miss in missed:
        rounds.learn(miss)
    with _walks(model, ids, tokens, engine) as begin:
        while True:
            course = Course(begin(), allocation, reserve=rounds.reserve, taken=rounds.taken, tuner=tuner)
            _write(model, method, allocation, directory, course, progress, Finished(journal, rounds.number), engine)
            bought = packed.file_bytes(directory)
            if asked is None or not course.sizes or rounds.meets(bought, all_bought):
                return
            logger.info("%d bytes packed, %d asked%s", bought, asked, "" if rounds.last else ": once more")
            if rounds.last:
                break
            missed.append(Miss(bought, sum(course.sizes.values()), course.taken_at_bought_steps()))
            keep_misses(journal, missed)
            rounds.learn(missed[-1])
    if bought > asked:
        artifacts.remove_directory(directory)
        raise NashSwarmError(f"methods.{method.name}.budget: {bought} bytes were packed, beyond {asked}; raise it")


@dataclasses.dataclass
class Rounds:
    """What a round of packing aims at, by what those before it took."""

    asked: int  # bytes
    expected: float  # of all codes, as they were bought
    reserve: float  # of which to stay below
    number: int = 0  # of the round
    taken: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by the round before: see `Miss`
    _fitting: list[tuple[int, float, Mapping[str, float]]] = dataclasses.field(default_factory=list)

    @property
    def last(self) -> bool:
        """Whether no other will follow."""
        return self.number == PACKING_ROUNDS - 1

    def meets(self, bought: int, anything: bool) -> bool:
        """Whether this round's bytes will do. Arguments: `anything`, whether all do that fit."""
        return bought <= self.asked and (anything or self.asked - bought <= SLACK * self._ease * self.asked)

    def learn(self, miss: Miss) -> None:
        """Go on to the next round: matrices will take what they took, and files what theirs took beside codes."""
        if miss.bytes <= self.asked:
            self._fitting.append((miss.bytes, self.reserve, self.taken))
        aim = self.asked * (1 - SLACK / 2 * self._ease)  # the middle of what will do
        self.reserve, self.taken = self.expected - (aim - (miss.bytes - miss.codes)), miss.taken
        self.number += 1
        if self.last and self._fitting:
            _, self.reserve, self.taken = max(self._fitting, key=itemgetter(0))  # once more what is known to fit

    @property
    def _ease(self) -> int:
        return CAUTION ** ((self.number > 1) + self.last)  # type: ignore[no-any-return]


def encode(
    model: Model,
    method: Method,
    allocation: Allocation,
    course: Course,
    progress: Progress,
    finished: Finished = Finished(),  # noqa: B008 (frozen)
    engine: Engine = LOCAL,
) -> Iterator[tuple[str, PackedTensor]]:
    """Every matrix of the model, packed: those in scope by the method's codec, the others kept as they are.

    Codecs of two passes round every matrix before they code the first, and may tune all of them in between.
    """
    codec, kept = load_room("codecs", method.codec), load_room("codecs", KEPT)
    two_passes, order = hasattr(codec, "round_one"), course.walk.order()
    restore = codec.Rounded if two_passes else PackedTensor
    shared, rounded = engine.share(partial(_same, model)), list[Any]()
    wanted = ((t, allocation.choices[t.name]) for t in order if t.name in allocation.choices and not finished.has(t))
    items = ((tensor, method, choice) for tensor, choice in wanted)
    apart = engine.map(_encode, shared, items, not course.steer, FARTHER) if course.apart else None
    for tensor in progress(order, "pack"):
        choice = allocation.choices.get(tensor.name)
        if choice is None:
            job = Job(tensor, model.checkpoint.tensor(tensor), Choice())
            yield tensor.name, kept.encode(job, kept.Settings())
            continue
        before = finished.read(tensor)
        if before is not None:
            course.steered(tensor.name, choice)
            item: Any = restore.from_arrays(tensor, before)
        elif apart is not None:
            item = next(apart)
        else:
            aim = course.aim(tensor, model.checkpoint.tensor(tensor))
            work = tensor, method, course.steered(tensor.name, choice), aim
            (item,) = engine.map(_encode, shared, [work], alone=True)
        weight, size = (item.weight, item.size) if two_passes else (partial(codec.decode, item), None)
        bias = course.settle(tensor, weight, size, None if before is None else before.get(BIAS))
        if before is None:
            finished.keep(tensor, item.to_arrays(), bias)
        if two_passes:
            rounded.append(item)
        else:
            yield tensor.name, item
    if two_passes:
        yield from codec.assemble(course.tune(rounded, [v.name for v in model.index.vectors], progress))


def _encode(model: Model, tensor: TensorSpec, method: Method, choice: Choice, aim: Aim | None = None) -> Any:
    """One matrix, packed, or rounded where its codec has two passes."""
    codec, job = load_room("codecs", method.codec), _job(model, tensor, method, choice, aim)
    with team(crew()):  # one, for all that is done by one
        return (codec.round_one if hasattr(codec, "round_one") else codec.encode)(job, method.codec_settings)


def _write(
    model: Model,
    method: Method,
    allocation: Allocation,
    directory: Path,
    course: Course,
    progress: Progress,
    finished: Finished = Finished(),  # noqa: B008 (frozen)
    engine: Engine = LOCAL,
) -> None:
    record, unstored = model.record, ("choices", "bought_bytes")
    provenance = Provenance(
        model=model.name,
        architecture=model.index.architecture,
        parameters=model.index.parameters,
        source=record.source,
        id=record.id,
        revision=record.revision,
        method={"name": method.name, **method_document(method)},
        certificate={k: v for k, v in artifacts.allocation_document(allocation).items() if k not in unstored},
    )
    stored = () if method.codec == "source" else model.index.vectors
    vectors = ((v, course.vector(v.name)) for v in stored)  # after all matrices: their biases may have moved
    tensors = encode(model, method, allocation, course, progress, finished, engine)
    write_packed(directory, provenance, tensors, vectors, model.checkpoint.directory)


# --- tuning --------------------------------------------------------------------------------------------------------

Tuner = Callable[[list[Any], dict[str, np.ndarray], Progress], Tuned[Any]]  # rounded matrices, vectors by name


def _tuner(model: Model, method: Method, ids: np.ndarray, engine: Engine) -> Tuner | None:
    """What trains all codes once they are rounded, where the method asks for it; as a task, which has a device."""
    codec = load_room("codecs", method.codec)
    settings = codec.tuning(method.codec_settings) if hasattr(codec, "tuning") else None
    if settings is None:
        return None

    def run(rounded: list[Any], vectors: dict[str, np.ndarray], progress: Progress) -> Tuned[Any]:
        shown = quiet if engine.apart else progress
        work = method.codec, rounded, vectors, ids, settings, shown, engine.device
        (found,) = engine.map(_tune, engine.share(partial(_same, model), True), [work], alone=True)
        return found  # type: ignore[no-any-return]

    return run


def _tune(
    model: Model,
    codec: str,
    rounded: list[Any],
    vectors: dict[str, np.ndarray],
    ids: np.ndarray,
    settings: Tuning,
    progress: Progress,
    device: str,
) -> Tuned[Any]:
    load, search = partial(load_original, model.checkpoint.directory, model.index), load_room("codecs", codec).search
    return tune(load, model.index, search, rounded, vectors, ids, settings, progress, device)


# --- the order of things -------------------------------------------------------------------------------------------


class Walk(Protocol):
    """An order in which matrices are quantized, and what each of them aims at once those before it are."""

    def order(self) -> list[TensorSpec]:
        """All matrices of the model."""

    def aim(self, tensor: TensorSpec, weight: Tensor) -> Aim:
        """Where to round a matrix to; `weight` is the original's."""

    def settle(self, tensor: TensorSpec, weight: Tensor, bias: np.ndarray | None = None) -> np.ndarray | None:
        """What became of it. Returns its bias, which a run that goes on behind it hands back in place of aiming it."""

    def vector(self, name: str) -> np.ndarray:
        """A vector of the model as it is to be stored, float32."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """Every matrix aims at itself."""

    model: Model

    def order(self) -> list[TensorSpec]:
        """As the model lists them."""
        return list(self.model.index.tensors)

    def aim(self, tensor: TensorSpec, weight: Tensor) -> Aim:
        """At the original."""
        return Aim(weight)

    def settle(self, tensor: TensorSpec, weight: Tensor, bias: np.ndarray | None = None) -> None:
        """Nothing follows."""

    def vector(self, name: str) -> np.ndarray:
        """The original's."""
        return self.model.checkpoint.read(name).numpy()


@contextmanager
def _walks(model: Model, ids: np.ndarray, tokens: int, engine: Engine) -> Iterator[Callable[[], Walk]]:
    """What begins a walk, as often as needed: behind the quantized prefix, or without `tokens` of one, one by one."""
    load = partial(load_streamed, model.checkpoint.directory, model.index, device=engine.device)
    if not tokens:
        yield partial(Plain, model)
    elif isinstance(engine, Ray):
        sharded = ShardedStreams(engine, load, model.index, ids, tokens, pass_tokens(tokens))

        def all_begin() -> Walk:
            sharded.start()
            return Propagation(sharded)

        try:
            yield all_begin
        finally:
            sharded.close()
    else:

        def begin() -> Walk:
            streams = Streams.prepare(load(), model.index, ids, tokens, pass_tokens(tokens))
            streams.start()
            return Propagation(streams)

        yield begin


@dataclasses.dataclass
class Course:
    """Holds a packing to the bytes that were bought, by steps a little coarser or finer as it goes."""

    walk: Walk
    allocation: Allocation
    reserve: float = 0.0  # bytes to stay below what was bought
    taken: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by the round before: see `resume.Miss`
    steer: bool = True
    sizes: dict[str, float] = dataclasses.field(default_factory=dict)  # bytes of codes so far
    corrections: dict[str, float] = dataclasses.field(default_factory=dict)  # octaves by which their steps are coarser
    tuner: Tuner | None = None
    tuned: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # vectors in place of the walk's

    @property
    def apart(self) -> bool:
        """Whether nothing that becomes of a matrix matters to those after it."""
        return isinstance(self.walk, Plain) and not (self.steer and self._expected)

    def aim(self, tensor: TensorSpec, weight: Tensor) -> Aim | None:
        """Of the walk; None where matrices aim at themselves."""
        return None if isinstance(self.walk, Plain) else self.walk.aim(tensor, weight)

    def steered(self, name: str, choice: Choice) -> Choice:
        """A matrix' choice with its step corrected by what those before it took."""
        if choice.step is None or not self.steer:
            return choice
        correction = self.corrections[name] = self._correction()
        return dataclasses.replace(choice, step=choice.step + correction)

    def settle(
        self,
        tensor: TensorSpec,
        weight: Callable[[], Tensor],
        size: float | None = None,
        bias: np.ndarray | None = None,
    ) -> np.ndarray | None:
        """Note what a matrix took, and hand its values on; `bias` and what is returned are the walk's."""
        if size is not None:
            self.sizes[tensor.name] = size
        return None if isinstance(self.walk, Plain) else self.walk.settle(tensor, weight(), bias)

    def tune(self, rounded: list[Any], vectors: Sequence[str], progress: Progress) -> list[Any]:
        """All matrices, trained together with these vectors where the method asks for it."""
        if self.tuner is None:
            return rounded
        found = self.tuner(rounded, {name: self.walk.vector(name) for name in vectors}, progress)
        self.tuned.update(found.vectors)
        return found.items

    def vector(self, name: str) -> np.ndarray:
        """A vector of the model as it is to be stored, float32."""
        return self.tuned[name] if name in self.tuned else self.walk.vector(name)

    @cached_property
    def _expected(self) -> dict[str, float]:
        return {n: c.size for n, c in self.allocation.choices.items() if c.size is not None}

    @cached_property
    def _slopes(self) -> dict[str, float]:
        """Bytes per octave."""
        return {n: self.allocation.choices[n].slope or size for n, size in self._expected.items()}

    def _correction(self) -> float:
        """log2 of the factor on the steps of the matrices to come that leads to the bytes that were bought."""
        expected, slopes = {**self._expected, **self.taken}, self._slopes
        rest = [n for n in expected if n not in self.sizes]
        if not rest:
            return 0.0
        # Steps follow the inputs' moments, which are measured anew: what that did to sizes, it will do to their like.
        seen = self.taken_at_bought_steps()
        coming = sum(expected[n] * _growth(n, seen, expected) for n in rest)
        octaves = (coming - self._aim + sum(self.sizes.values())) / max(sum(slopes[n] for n in rest), 1e-9)
        return min(max(octaves, self._middle - STEERING), self._middle + STEERING)

    def taken_at_bought_steps(self) -> dict[str, float]:
        """Bytes of the matrices so far, had their steps been those that were bought."""
        own = self._slopes
        return {n: size + self.corrections.get(n, 0.0) * own[n] for n, size in self.sizes.items() if n in own}

    @property
    def _aim(self) -> float:
        return sum(self._expected.values()) - self.reserve

    @cached_property
    def _middle(self) -> float:
        """Octaves by which all steps alike should be corrected, as far as the round before says."""
        return (sum(self.taken.values()) - self._aim) / max(sum(self._slopes.values()), 1e-9) if self.taken else 0.0


def _growth(name: str, seen: Mapping[str, float], expected: Mapping[str, float]) -> float:
    """By which factor matrices like this one took more than expected: its namesakes in other layers, if any."""
    kind = re.sub(r"\d+", "", name)
    like = [n for n in seen if re.sub(r"\d+", "", n) == kind]
    return sum(seen[n] for n in like) / max(sum(expected[n] for n in like), 1e-9) if like else 1.0


def _offer(model: Model, tensor: TensorSpec, method: Method, needs_importance: bool) -> Offer:
    if not needs_importance:
        return Offer(tensor)
    importance = load_room("importance", method.importance).importance(model.checkpoint.tensor(tensor))
    return Offer(tensor, importance.reshape(-1).numpy())


def _job(model: Model, tensor: TensorSpec, method: Method, choice: Choice, aim: Aim | None = None) -> Job:
    """With an aim, neither the original's weights nor its inputs' moment are read, but for importance."""
    weight = aim.weight if aim else model.checkpoint.tensor(tensor)
    importance = None
    if choice.classes:
        importance = load_room("importance", method.importance).importance(model.checkpoint.tensor(tensor))
    measured = aim.second_moment if aim else None
    return Job(tensor, weight, choice, importance, model.statistics(tensor.name, measured))
