"""A model that writes token by token: dense, and resident in packed form with products from packed bits.

Every contestant is a process of its own, all of them resident at once; in every round each writes once, greedily,
behind the same prompt. Weights are random, which times do not care for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nashswarm.benchmarks.apart import Worker, resident_bytes
from nashswarm.benchmarks.machine import COPIES, Readers, document, machine
from nashswarm.benchmarks.matrices import dense_model, packed_model
from nashswarm.benchmarks.timing import READING, Reader, Row, interleaved, rows
from nashswarm.config import Benchmark, DecodeBenchmark
from nashswarm.kernels.serving import accelerate
from nashswarm.types import InputError, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCE = "dense float32"
CONTESTANTS = (REFERENCE, "dense bfloat16", "packed, float32", "packed, int8")
# Of each, to see beforehand whether there is memory for all; at 24 x 1024 processes grew by 4.0, 2.0, 1.0 and 1.0.
WEIGHT_BYTES = (4.0, 2.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Held:
    """What a contestant takes."""

    counted: int  # bytes of all parameters and buffers
    resident: int  # by which the process grew until it had written once


@dataclass(frozen=True, slots=True)
class Written:
    """Times of one generation."""

    first: float  # seconds until the first token
    token: float  # seconds for each further one


def measure(settings: Benchmark, threads: int, progress: Progress) -> dict[str, Any]:
    """First token, further tokens, and memory. Raises InputError where there is no memory for all contestants."""
    import transformers  # noqa: F401  whose version is told

    check_memory(settings.decode)
    found = machine(threads, settings.cold_mib, settings.rounds)
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, threads, contestant, name, settings.decode))
            for name in progress(CONTESTANTS, "decode: start")
        }
        held: dict[str, Held] = {name: worker.said() for name, worker in workers.items()}
        written, reader = _rounds(workers, settings, progress)
    made = list(_rows(settings.decode, written, held, reader))
    memory = [{"contestant": name, **asdict(of)} for name, of in held.items()]
    return document(found, settings, made) | {"memory": memory}


def check_memory(settings: DecodeBenchmark) -> None:
    """Raises InputError where there is too little."""
    import psutil

    weights = 12 * settings.layers * settings.width**2 + settings.vocabulary * settings.width
    need, free = sum(WEIGHT_BYTES) * weights * 1.1, psutil.virtual_memory().available
    if need > free:
        raise InputError(
            f"benchmark.decode: all contestants together take {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free; "
            "give it fewer layers or a smaller width"
        )


def _rounds(
    workers: dict[str, Worker], settings: Benchmark, progress: Progress
) -> tuple[dict[str, list[Written]], Reader]:
    """What each wrote in every round, and how fast memory was read between them."""
    written: dict[str, list[Written]] = {name: [] for name in workers}
    readers, speeds = Readers.make((settings.cold_mib << 20) // COPIES, COPIES), []
    for _ in progress(range(settings.rounds), "decode"):
        for name, worker in workers.items():
            written[name].append(worker.ask())
        speeds.append(float(np.median(readers.best(interleaved(readers.turns, COPIES)).seconds)))
    return written, Reader(np.array(speeds), readers.bytes)


def _rows(
    settings: DecodeBenchmark, written: dict[str, list[Written]], held: dict[str, Held], reader: Reader
) -> Iterator[Row]:
    first = {name: np.array([w.first for w in of]) for name, of in written.items()}
    token = {name: np.array([w.token for w in of]) for name, of in written.items()}
    counted = {name: of.counted for name, of in held.items()}
    counted[READING] = counted[CONTESTANTS[-1]]
    token[READING] = reader.of(counted[READING])
    title = f"{settings.layers} x {settings.width}"
    yield from rows(f"{title}, a token", token, REFERENCE, counted, reader, 1)
    yield from rows(f"{title}, first token behind {settings.prompt}", first, REFERENCE, {}, None, settings.prompt)


# --- in a process of its own ---------------------------------------------------------------------------------------


def contestant(name: str, settings: DecodeBenchmark) -> tuple[Callable[[], Written], Held]:
    """A model, and what it takes once it has written."""
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401  its code is no weight

    small = replace(settings, layers=1, width=settings.heads * 32, vocabulary=256)
    _write(_model(name, small), small)  # nor are the libraries that the first products load
    before = resident_bytes()
    model = _model(name, settings)
    write = partial(_write, model, settings)
    write()
    return write, Held(_counted(model), resident_bytes() - before)


def _model(name: str, settings: DecodeBenchmark) -> PreTrainedModel:
    kind, precision = name.replace(",", "").split()
    if kind == "dense":
        return dense_model(settings, getattr(torch, precision))
    model = packed_model(settings)
    accelerate(model, "int8" if precision == "int8" else "float32")
    return model


def _counted(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers, each once."""
    found = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in found.values())


def _write(model: PreTrainedModel, settings: DecodeBenchmark) -> Written:
    """One greedy generation."""
    prompt = torch.arange(settings.prompt)[None] * 7 % settings.vocabulary
    generate: Any = model.generate
    clock, count = Clock(), settings.tokens + 1
    started = time.perf_counter()
    with torch.no_grad():
        generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    _, first, *_, last = clock.times
    return Written(first - started, (last - first) / settings.tokens)


class Clock:
    """Notes when tokens come: transformers hands a streamer the prompt, then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """Called by generate."""
        del tokens
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by generate."""
