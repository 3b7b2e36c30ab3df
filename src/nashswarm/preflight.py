"""What a run will need, estimated from shapes before it starts: memory, disk and time, and which setting to lower.

The formulas count the arrays that are alive together at the worst moment of each step; what they leave out (the
interpreter, libraries, temporaries) is in BASE. They were held against measured peaks (docs/decisions.md). Times are
in forward passes over the calibration text, as `make benchmark` measures them; the speed of one is taken from a
product of matrices on this machine.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from nashswarm.config import Method, Scoring
from nashswarm.tuning import DRAWING_BYTES, PASS_LOGITS
from nashswarm.types import ModelIndex, NashSwarmError, TensorSpec

GIB = 2**30
BASE = int(0.8 * GIB)
SCORE_PASSES, ALLOCATE_PASSES, PREFIX_PASSES = 6.0, 3.0, 15.0  # forward passes over the same number of tokens
ROUNDING_RATE = 1.1e6  # weights a second and thread that the trellis rounds
# Forward passes over a token of a tuning step: it is drawn, read by the original, and read and learnt by the model.
TUNING_PASSES = 5.0
# Floats for each parameter: the original, the model and its gradients; latents with theirs and two moments; what they
# are rounded to, a copy of it, and codes.
TUNING_FLOATS = 10
LOGITS = 6  # as large as a pass' logits: of both models, their logarithms, and gradients
SPEED_SIZE = 1024


@dataclass(frozen=True, slots=True)
class Need:
    """What one step takes, and which setting it follows."""

    step: str
    memory: int  # bytes resident at its peak
    disk: int  # bytes that it writes, scratch files included
    seconds: float
    lower: str  # what to change where it does not fit, if anything

    def __str__(self) -> str:
        memory, disk = self.memory / GIB, self.disk / GIB
        return f"{self.step}: about {memory:.1f} GiB of memory, {disk:.1f} GiB of disk, {self.seconds / 60:.0f} minutes"


def needs(index: ModelIndex, method: Method, scoring: Scoring, seconds: float) -> list[Need]:
    """Of scoring and packing. Arguments: `seconds` of a forward pass over one token, as `token_seconds` gives it."""
    return [scoring_need(index, scoring, seconds), packing_need(index, method, scoring.tokens, seconds)]


def token_seconds(index: ModelIndex) -> float:
    """Seconds of a forward pass over one token on this machine, from the speed of a product of matrices."""
    matrix = torch.randn(SPEED_SIZE, SPEED_SIZE)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    products = sum(t.weights for t in index.tensors if t.kind != "embedding" or t.name == index.head)
    return 2.0 * products * best / (2 * SPEED_SIZE**3) * 2  # attention and activations take about as long again


def check(wanted: Iterable[Need], directory: Path) -> None:
    """Raise NashSwarmError for the first step that does not fit, and say what to change."""
    memory, place = psutil.virtual_memory().available, directory
    while not place.exists():
        place = place.absolute().parent
    disk = shutil.disk_usage(place).free
    for need in wanted:
        if need.memory > memory:
            advice = f"lower {need.lower}, or close" if need.lower else "close"
            raise NashSwarmError(
                f"{need.step} needs about {need.memory / GIB:.1f} GiB of memory and {memory / GIB:.1f} are free; "
                f"{advice} other programs"
            )
        if need.disk > disk:
            raise NashSwarmError(
                f"{need.step} writes about {need.disk / GIB:.1f} GiB to {place} and {disk / GIB:.1f} are free; "
                "make room"
            )


def scoring_need(index: ModelIndex, scoring: Scoring, seconds: float = 0.0) -> Need:
    """Of the statistics. Arguments as those of `needs`."""
    width = _width(index)
    inputs, outputs = ([shape[i] for shape in (t.shape for t in _worst_layer(index))] for i in (1, 0))
    batch, context = scoring.batch_tokens, index.calibration_window
    batch = max(batch, context)
    head = 3 * 4 * batch * index.vocabulary  # logits, probabilities, and numbers drawn for labels
    sums = 8 * sum(i * i + o * o for i, o in zip(inputs, outputs, strict=True)) + 12 * max(map(_square, inputs))
    block = sums + 8 * batch * sum(map(sum, zip(inputs, outputs, strict=True)))
    hidden = 4 * scoring.tokens * width
    inside = sum(_square(t.shape[0]) + _square(t.shape[1]) for t in index.tensors if t.layer is not None)
    statistics = 4 * (inside + sum(2 * _square(t.shape[1]) for t in index.tensors if t.layer is None))
    return Need(
        "score",
        BASE + _resident(index) + 2 * hidden + max(head, block),
        statistics + (index.layers + 1) * hidden,
        SCORE_PASSES * scoring.tokens * seconds,
        "scoring.batch_tokens (then scoring.tokens) in params.yaml, or --tokens",
    )


def packing_need(index: ModelIndex, method: Method, tokens: int = 0, seconds: float = 0.0) -> Need:
    """Of allocating and packing. Arguments: `tokens` of scoring, by whose passes allocating is timed; see `needs`."""
    prefix, market = getattr(method.codec_settings, "prefix_tokens", 0), method.allocator == "market"
    worst = _worst_layer(index)
    inputs = [t.shape[1] for t in worst]
    wide = sum(t.shape[0] + t.shape[1] for t in worst) + 5 * _width(index)
    streams = 4 * prefix * wide + 48 * max(map(_square, inputs), default=0) * bool(prefix)
    sides = [side for t in worst for side in t.shape]
    factors = 32 * max(map(_square, sides), default=0) * market  # of both moments, float64, where rows interact
    codes = index.parameters if method.codec == "coded" else 0
    largest = max((t.weights for t in index.tensors), default=0)
    if method.codec == "source":  # nothing is written but where the original lies
        return Need("pack", BASE + 8 * largest, 0, 0.0, "")
    bits = 8 * 4 if method.codec == "kept" else 8
    rounding = index.parameters / ROUNDING_RATE if market else 0.0
    steps, tuned, read = _tuning(index, method)
    rounded = factors + 24 * largest
    lower = f"methods.{method.name}.prefix_tokens" if prefix else "compute.threads"
    return Need(
        "pack",
        BASE + _resident(index) + streams + codes + max(rounded, tuned),
        3 * index.parameters * bits // 8,  # spool, payload, and what an interrupted run would go on from
        (ALLOCATE_PASSES * tokens * market + PREFIX_PASSES * prefix + TUNING_PASSES * read) * seconds
        + rounding * (1 + steps),
        f"methods.{method.name}.tuning_steps to 0 (off)" if tuned > rounded else lower,
    )


def _tuning(index: ModelIndex, method: Method) -> tuple[int, int, int]:
    """Steps in which all codes are trained together, bytes that this takes beside the rest, and tokens read in all."""
    steps, tokens = (getattr(method.codec_settings, key, 0) for key in ("tuning_steps", "tuning_tokens"))
    if not steps:
        return 0, 0, 0
    context = index.calibration_window
    tokens = max(tokens, context)
    passed = min(tokens, max(context, PASS_LOGITS // index.vocabulary))  # in one forward and backward pass
    kept = 2 * index.layers * sum(map(sum, (t.shape for t in _worst_layer(index))))  # of a token, for the gradient
    training = 4 * (TUNING_FLOATS * index.parameters + passed * (LOGITS * index.vocabulary + kept))
    return steps, max(training, 8 * index.parameters + DRAWING_BYTES), steps * tokens


def _resident(index: ModelIndex) -> int:
    """Bytes of what stands outside of the blocks, and of one block, float32."""
    outside = sum(t.weights for t in index.tensors if t.layer is None)
    return 4 * (outside + sum(t.weights for t in _worst_layer(index)))


def _worst_layer(index: ModelIndex) -> list[TensorSpec]:
    layers: dict[int, list[TensorSpec]] = {}
    for tensor in index.tensors:
        if tensor.layer is not None:
            layers.setdefault(tensor.layer, []).append(tensor)
    return max(layers.values(), key=lambda group: sum(t.weights for t in group), default=[])


def _width(index: ModelIndex) -> int:
    """Of the hidden states."""
    return next(t.shape[1] for t in index.tensors if t.name == index.head)


def _square(value: int) -> int:
    return value * value
