"""Time and memory of score, allocate and pack against the model's size, on models with random weights.

Nothing but the shapes matters to either, so no checkpoint is needed. Seconds are as they are and over those of one
forward pass over the same calibration tokens; peaks are of resident memory of the process, which for `pack` has run
`allocate` before. Blocks are visited one at a time, so that memory hardly follows their number (a byte per weight does,
where `coded` keeps its codes), and time follows it in proportion.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nashswarm import artifacts, models, packed, quantize, statistics
from nashswarm.benchmarks.apart import alone, peak_bytes
from nashswarm.benchmarks.machine import document, machine
from nashswarm.benchmarks.timing import Row, Spread, interleaved, plain, significant
from nashswarm.config import HEAD, Benchmark, Method, Scoring, load_room, parse_method, sizes
from nashswarm.console import quiet
from nashswarm.engine import Local
from nashswarm.types import Choice, Job, ModelIndex, Progress, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 1024
WORDS = 65_536  # of random text at least: calibration takes what it wants of it


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of GPT-2's make."""

    layers: int
    width: int
    heads: int
    vocabulary: int = 50257


@dataclass(frozen=True, slots=True)
class Step:
    """One step of quantizing one model."""

    model: str
    weights: int  # parameters of the whole model
    method: str
    step: str
    seconds: float
    forward_passes: float  # seconds over those of one pass over the calibration tokens
    peak_bytes: int
    bits_per_weight: float | None = None  # true ones, of what `pack` wrote


def measure(settings: Benchmark, threads: int, progress: Progress) -> dict[str, Any]:
    """All models by all methods, then round to nearest on the last model's matrices."""
    own = settings.quantization
    found = machine(threads, settings.cold_mib, settings.rounds)
    methods = [parse_method(name, block) for name, block in _methods(own.budget).items()]
    made: list[Step] = []
    for text in progress(own.models, "quantization"):
        layers, width = sizes(text)
        shape = Shape(layers, width, width // HEAD, own.vocabulary)
        made += steps(text.replace("x", " x "), shape, methods, Scoring(tokens=own.tokens), threads)
    return document(found, settings, made) | {"nearest": _nearest(sizes(own.models[-1])[1], settings.rounds)}


def _methods(budget: float) -> Mapping[str, Mapping[str, Any]]:
    """Name -> what params.yaml would say."""
    return {
        "rtn4-g64": {"allocator": "uniform", "codec": "grouped", "bits": 4, "group": 64},
        "market-tiles": {"allocator": "market", "codec": "tiles", "budget": budget},
        "market-coded": {"allocator": "market", "codec": "coded", "budget": budget},
    }


def steps(model: str, shape: Shape, methods: Sequence[Method], scoring: Scoring, threads: int) -> Iterator[Step]:
    """Score once, then allocate and pack by each method, each of these in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="nashswarm-") as scratch:
        root = Path(scratch)
        alone(threads, write_model, root / "model", shape)
        unit, weights, seconds, peak = alone(threads, score, root, scoring)
        yield _step(model, weights, "all", "score", seconds, unit, peak)
        for method in methods:
            (first, second), peaks, bits = alone(threads, allocate_and_pack, root, method)
            yield _step(model, weights, method.name, "allocate", first, unit, peaks[0])
            yield _step(model, weights, method.name, "pack", second, unit, peaks[1], bits)


def _step(
    model: str, weights: int, method: str, step: str, seconds: float, unit: float, peak: int, bits: float | None = None
) -> Step:
    return Step(model, weights, method, step, significant(seconds), significant(seconds / unit), peak, bits)


# --- in processes of their own -------------------------------------------------------------------------------------


def write_model(directory: Path, shape: Shape) -> None:
    """A checkpoint with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        vocab_size=shape.vocabulary,
        n_positions=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(directory, max_shard_size="800MB")


def score(root: Path, scoring: Scoring) -> tuple[float, int, float, int]:
    """Seconds of one forward pass over the calibration tokens, parameters, seconds of scoring, peak in bytes."""
    index = models.describe(root / "model")
    original, ids = models.load_streamed(root / "model", index), random_text(index, max(WORDS, scoring.tokens))
    whole = scoring.tokens // index.context * index.context
    windows = torch.from_numpy(ids[:whole].astype(np.int64)).view(-1, index.context)
    unit = _seconds(lambda: _read(original, windows))
    seconds = _seconds(lambda: _score(root, statistics.gather(lambda: original, index, ids, scoring, quiet)))
    return unit, index.parameters, seconds, peak_bytes()


@torch.no_grad()
def _read(model: PreTrainedModel, windows: torch.Tensor) -> None:
    """Window after window; logits of all of them would be gigabytes."""
    for window in windows:
        model(window[None], use_cache=False)


def _score(root: Path, found: Iterable[tuple[TensorSpec, Any]]) -> None:
    for tensor, of_tensor in found:
        artifacts.write_statistics(root, tensor.name, of_tensor)


def allocate_and_pack(root: Path, method: Method) -> tuple[tuple[float, float], tuple[int, int], float]:
    """Seconds of both, peaks behind each in bytes, true bits per weight."""
    model, target = open_model(root), root / method.name
    started = time.perf_counter()
    allocation = quantize.allocate(model, method, quiet, Local(torch.get_num_threads()))
    first, between = peak_bytes(), time.perf_counter()
    quantize.pack(model, method, allocation, random_text(model.index, WORDS), target, quiet)
    ended = time.perf_counter()
    bits = significant(8 * packed.file_bytes(target) / model.index.parameters)
    return (between - started, ended - between), (first, peak_bytes()), bits


def open_model(root: Path) -> quantize.Model:
    """The model in `root`/model, its statistics in `root`."""
    directory = root / "model"
    index, record = models.describe(directory), artifacts.SourceRecord("embedded", str(directory), None, None, {})
    checkpoint = models.Checkpoint.open(directory, index)
    return quantize.Model("m", index, record, checkpoint, partial(artifacts.read_statistics, root))


def random_text(index: ModelIndex, tokens: int) -> np.ndarray:
    """int32 [tokens]."""
    return np.random.default_rng(0).integers(0, index.vocabulary, tokens).astype(np.int32)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- round to nearest ----------------------------------------------------------------------------------------------


def _nearest(width: int, rounds: int) -> list[dict[str, Any]]:
    """Encoding alone, without reading and writing: the four matrices of a block, 4 bits in groups of 64."""
    codec = load_room("codecs", "grouped")
    settings, shapes = codec.Settings(), ((3, 1), (1, 1), (4, 1), (1, 4))
    jobs = [_job((out * width, into * width)) for out, into in shapes]
    weights = sum(job.tensor.weights for job in jobs)
    name = "rtn4-g64"
    times = interleaved({name: lambda _: [codec.encode(job, settings) for job in jobs]}, rounds)[name]
    return [plain(Row(f"a block {width} wide", name, Spread.of(times), items=weights))]


def _job(shape: tuple[int, int]) -> Job:
    tensor = TensorSpec("m.weight", shape, "linear", "mlp", 0)
    return Job(tensor, torch.randn(shape), Choice(bits=4))
