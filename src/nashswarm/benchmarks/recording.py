"""What each task of score, allocate, pack and evaluate takes, on models of true widths with random weights.

The stages' own code runs with an engine that has one worker, which is this process with one thread, and writes down
of every call its seconds, what it was sent and what it returned, and what the driver did meanwhile. Windows of the
quantized prefix are sharded as on a cluster, a batch to a member. Seconds are of the processor, so that what else runs
on the machine does not count for much; files are in the page cache, so that reading them is copying.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nashswarm import artifacts, evaluation, loading, models, quantize, statistics
from nashswarm.benchmarks.apart import alone, peak_bytes
from nashswarm.benchmarks.quantization import Shape, open_model, random_text, write_model
from nashswarm.benchmarks.workload import BATCH, INSIDE, TABLES, At, Model, takes_time, tokens_of
from nashswarm.config import Evaluation, Method, PaperProtocol, Scoring, parse_method
from nashswarm.console import quiet
from nashswarm.engine import Member, Ray
from nashswarm.folding import Folding, Here, Parts, Total
from nashswarm.regression import Sums
from nashswarm.types import Allocation, ModelIndex, Progress, TensorSpec, TokenizedSplit

METHODS: Mapping[str, Mapping[str, Any]] = {
    "rtn4-g64": {"allocator": "uniform", "codec": "grouped", "bits": 4, "group": 64},
    "gptq4-g128": {
        "allocator": "uniform", "codec": "gptq", "bits": 4, "group": 128, "embedding_bits": 4, "embedding_group": 64,
    },
    "market-tiles-3_25": {"allocator": "market", "codec": "tiles", "columns": 64, "budget": 3.25},
    "market-coded-3_0": {"allocator": "market", "codec": "coded", "prefix_tokens": 32768, "budget": 3.0},
}  # fmt: skip
SCORED, EVALUATED = 2 * BATCH, 2 * BATCH  # tokens
PASSED = 2  # batches of a prefix, which has two folds
READING = Evaluation(batch_tokens=BATCH, paper=PaperProtocol(texts=(1,)))
TINY = Shape(1, 128, 2, 300)  # what is run before anything is recorded: libraries, compiled code


# --- an engine that writes down ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a task or a member, or the end of a stage, which has only a gap."""

    label: str  # of the function or method
    about: str  # name of a matrix, number of a layer, or nothing
    gap: float = 0.0  # seconds of the driver before the first call of a group
    before: float = 0.0  # of the driver, to make the arguments
    seconds: float = 0.0  # of the worker
    after: float = 0.0  # of the driver, with the result
    sent: int = 0  # bytes of arrays
    returned: int = 0
    kept: int = 0  # bytes of parts that stay on workers, to be added up


class Recorder(Ray):
    """One worker, which is this process. A Ray to the pipeline, which shards the quantized prefix for no other."""

    def __init__(self, slots: int = 1, clock: Callable[[], float] = time.process_time) -> None:
        """Arguments: `slots`, as many as the pipeline is told that there are."""
        self.threads, self.device, self.slots = torch.get_num_threads(), "cpu", slots
        self.calls: list[Call] = []
        self.clock = clock
        self.last = clock()

    def share(self, make: Callable[[], Any], *_: Any) -> Any:  # type: ignore[override, unused-ignore]
        """Made at once, and written down."""
        return self.note("start", "", make)

    def map(  # type: ignore[override, unused-ignore]
        self, function: Callable[..., Any], shared: Any, items: Iterable[tuple[Any, ...]], *_: Any, **__: Any
    ) -> Iterator[Any]:
        """One after the other."""
        name, rest = function.__name__, iter(items)
        while True:
            gap, began = self.gap(), self.clock()
            item = next(rest, None)
            before = self.clock() - began
            if item is None:
                return  # what that took is in the next gap
            self.last = self.clock()
            found = self.note(name, _about(item), partial(function, shared, *item), sent=nbytes(item), before=before)
            place = len(self.calls) - 1
            self.calls[place] = dataclasses.replace(self.calls[place], gap=gap)
            yield found
            after = self.gap()
            self.calls[place] = dataclasses.replace(self.calls[place], after=after)

    def fold(  # type: ignore[override, unused-ignore]
        self,
        function: Callable[..., Any],
        shared: Any,
        items: Iterable[tuple[Any, ...]],
        keys: Sequence[Hashable],
        total: Callable[[], Total],
    ) -> Folding:
        """As `map`. Adding and results are calls of their own: `NAME.add` of all parts of a task, `NAME.result`."""
        return _Noted(self, self.map(function, shared, items), keys, total)

    def member(self, make: Callable[[], Any]) -> Member:
        """One that lives here."""
        return _Here(self, make)

    def gap(self) -> float:
        """Seconds since the last call or gap ended."""
        now = self.clock()
        found, self.last = now - self.last, now
        return found

    def note(self, label: str, about: str, work: Callable[[], Any], sent: int = 0, before: float = 0.0) -> Any:
        """Do a call's work, and write it down."""
        gap, began = self.gap(), self.clock()
        found = work()
        seconds = self.clock() - began
        self.calls.append(Call(label, about, gap, before, seconds, 0.0, sent, nbytes(found)))
        self.last = self.clock()
        return found

    def end(self) -> list[Call]:
        """All calls, and what the driver did behind the last."""
        self.calls.append(Call("end", "", self.gap()))
        return self.calls


class _Noted(Here):
    def __init__(self, recorder: Recorder, *rest: Any) -> None:
        super().__init__(*rest)
        self.recorder = recorder

    def add(self, parts: Parts) -> None:
        calls, size = self.recorder.calls, nbytes(parts)
        calls[-1] = self.task = dataclasses.replace(calls[-1], returned=calls[-1].returned - size, kept=size)
        self.recorder.note(f"{self.task.label}.add", self.task.about, partial(super().add, parts), sent=size)

    def totals(self) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = self.recorder.note(f"{self.task.label}.result", self.task.about, super().totals)
        return found


class _Here(Member):
    def __init__(self, engine: Recorder, make: Callable[[], Any]) -> None:
        self.recorder, self.make = engine, make

    def open(self) -> None:
        self.made = self.recorder.note("open", "", self.make)

    def submit(self, method: str, *arguments: Any) -> Any:
        work = partial(getattr(self.made, method), *arguments)
        found = self.recorder.note(method, _about(arguments), work, sent=nbytes(arguments))
        if method == "compare" and None not in found:
            (only,) = found
            sums = Sums()
            sums.add(only)
            self.recorder.last = self.recorder.clock()
            self.recorder.note("add", _about(arguments), partial(sums.add, only))  # as of every batch but the first
        return found

    def result(self, submitted: Any, lasting: bool = False) -> Any:
        return submitted

    def close(self) -> None:
        pass


def _about(arguments: Sequence[Any]) -> str:
    first = arguments[0] if arguments else ""
    if isinstance(first, slice):
        return f"{first.start}:{first.stop}"
    return first.name if isinstance(first, TensorSpec) else str(first) if isinstance(first, int) else ""


def nbytes(value: Any) -> int:
    """Bytes of the arrays in a value."""
    if isinstance(value, Tensor | np.ndarray):
        return int(value.nbytes)
    if dataclasses.is_dataclass(value):
        return sum(nbytes(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, Mapping):
        return sum(map(nbytes, value.values()))
    return sum(map(nbytes, value)) if isinstance(value, tuple | list) else 0


# --- stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """One stage of one model."""

    stage: str
    method: str  # "all" of score
    model: Model
    peak_bytes: int  # of the process, which for `pack` and `evaluate` has run the stages before
    calls: list[Call] = field(default_factory=list)


def record(shape: Shape, methods: Iterable[str], scored: bool, progress: Progress) -> Iterator[Record]:
    """Score, then each method's three stages, each method in a process of its own.

    Arguments: `shape`, of two blocks, the second of which stands for all behind the first; `scored`, whether scoring is
    recorded, too.
    """
    with tempfile.TemporaryDirectory(prefix="nashswarm-") as scratch:
        root, tiny = Path(scratch) / "m", Path(scratch) / "tiny"
        for place, own in ((tiny, TINY), (root, shape)):
            alone(1, write_model, place / "model", own)
        alone(1, _score, tiny, tiny)
        found = alone(1, _score, root, tiny)
        if scored:
            yield found
        for name in progress(list(methods), f"{shape.layers} x {shape.width}"):
            yield from alone(1, _method, root, tiny, name)


def _score(root: Path, tiny: Path) -> Record:
    if root != tiny:
        _score(tiny, tiny)
    index = models.describe(root / "model")
    engine, load = Recorder(), partial(models.load_streamed, root / "model", index)
    ids, scoring = random_text(index, SCORED), Scoring(tokens=SCORED, batch_tokens=BATCH)
    for tensor, found in statistics.gather(load, index, ids, scoring, quiet, None, engine):
        artifacts.write_statistics(root, tensor.name, found)
    return record_of("score", "all", index, engine)


def _method(root: Path, tiny: Path, name: str) -> list[Record]:
    method = parse_method(name, METHODS[name])
    for place in (tiny, root):
        found = list(_stages(open_model(place), method, place / name))
    return found


def _stages(model: quantize.Model, method: Method, target: Path) -> Iterator[Record]:
    index, engine = model.index, Recorder()
    allocation = quantize.allocate(model, method, quiet, engine)
    yield record_of("allocate", method.name, index, engine)
    yield packed_once(model, method, allocation, target)
    directory, ids = model.checkpoint.directory, random_text(index, EVALUATED)
    width = next(t.shape[1] for t in index.tensors if t.name == index.head)
    said = evaluation.Baseline(np.zeros((len(ids), width), np.float32), np.zeros(1))
    original = partial(evaluation.open_original, directory, index, lambda: said)
    engine = Recorder(slots=len(ids))  # a batch to a task; the last one is a text of 64 tokens
    load = partial(loading.open_for_evaluation, target, directory, index)
    evaluation.measure(load, original, split_of(ids), READING, index.context, quiet, engine)
    yield record_of("evaluate", method.name, index, engine)


def packed_once(
    model: quantize.Model,
    method: Method,
    allocation: Allocation,
    target: Path,
    clock: Callable[[], float] = time.process_time,
) -> Record:
    """What an engine writes down of one round of packing, whatever it takes."""
    once, engine = dataclasses.replace(allocation, asked_bytes=None), Recorder(PASSED, clock)
    ids = random_text(model.index, PASSED * tokens_of("pack", method.name))
    quantize.pack(model, method, once, ids, target, quiet, None, engine)
    return record_of("pack", method.name, model.index, engine)


def split_of(ids: np.ndarray) -> TokenizedSplit:
    """A test split of random ids, int32 [tokens], with one text of 64."""
    return TokenizedSplit(ids, ids[:64], np.array([64]), np.array([100]))


def record_of(stage: str, method: str, index: ModelIndex, engine: Recorder) -> Record:
    """What an engine wrote down of a stage."""
    rows, width = next(t.shape for t in index.tensors if t.name == index.head)
    return Record(stage, method, Model(index.layers, width, rows), peak_bytes(), engine.end())


# --- in short ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unit:
    """What one kind of call took, or the driver beside it, as `workload.COUNTS` and `workload.ROUND` name them."""

    stage: str
    method: str
    label: str
    part: str  # gap, before, seconds or after
    at: At
    seconds: float

    def key(self) -> str:
        """As the metrics name it."""
        model, place = self.at.model, f"{self.at.role or '-'}{' first' * self.at.first}"
        return f"{self.stage} {self.method} {self.label} {self.part} {place} {model.width}x{model.vocabulary}"


def units(found: Record) -> list[Unit]:
    """The least seconds of calls that are alike, the most of what the driver does for the first of a group."""
    model, stage = found.model, found.stage
    made = partial(Unit, stage, found.method)
    if stage == "evaluate":
        *batches, text = [c.seconds for c in found.calls if c.label == "_compared"]
        start = sum(c.seconds for c in found.calls if c.label == "start")
        parts = {"start": start, "decode": text, "batch": min(batches) - text}
        return [made(label, "seconds", At(model), seconds) for label, seconds in parts.items()]
    result = []
    if stage == "allocate":
        if not rounds(found):
            return []
        result.append(made("round", "gap", At(model), sum(c.gap for c in found.calls) / rounds(found)))
    if stage == "pack":
        closing = sum(c.gap for c in found.calls if c.label in ("vector", "end"))
        result.append(made("end", "gap", At(model), closing / rounds(found)))
    groups: dict[tuple[str, str], list[Call]] = {}
    chained = any(call.label == "compare" for call in found.calls)
    for call in found.calls:
        groups.setdefault((call.label, call.about), []).append(call)
        if chained and call.label == "_encode":  # what comes before is the driver's correction
            groups.setdefault(("correct", call.about), []).append(call)
    for (label, about), calls in groups.items():
        at = _at(model, stage, found.method, label, about)
        for part in ("gap", "before", "seconds", "after"):
            if label != "end" and takes_time(stage, label, part, at):
                # A block is read for the first batch of a worker, and each worker has a first.
                least = min if part in ("seconds", "after") and label not in ("_forward", "_block") else max
                result.append(made(label, part, at, least(getattr(c, part) for c in calls)))
    return _once(result)


def rounds(found: Record) -> int:
    """How often a market bought, or a model was packed; 1 where nothing is repeated, 0 where there is nothing to do."""
    if found.stage not in ("allocate", "pack"):
        return 1
    return sum("wte" in c.about for c in found.calls if c.label == "_encode")


def _at(model: Model, stage: str, method: str, label: str, about: str) -> At:
    role = next((r for r in (*INSIDE, *TABLES) if f".{r}." in about), "")
    first = label == "about" and ".h.0." in about
    return At(model, role, tokens_of(stage, method), first)


def _once(found: Iterable[Unit]) -> list[Unit]:
    """Of batches and blocks that are alike the least.

    The most of what comes before a batch, as the first has nothing, and before a block, as the first follows the head.
    """
    best: dict[str, Unit] = {}
    for unit in found:
        pick = max if unit.part == "before" or (unit.label, unit.part) == ("_block", "gap") else min
        best[unit.key()] = pick(best.get(unit.key(), unit), unit, key=lambda u: u.seconds)
    return list(best.values())
