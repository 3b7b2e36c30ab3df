"""All codes of a packed model, its norms and biases are trained at once towards the original.

Rounding decides about one matrix after another, by a local model of the loss. Here latents z, in steps, begin at the
packed values. In each step the model's weights are what the codec rounds them to, and the gradient of

    KL(original || quantized), mean over the tokens of a batch

goes straight through to the latents: dz = dw * step. The steps of the grids stay, so a file grows by what the codes'
distribution widens. Adam's second moment makes one rate fit all matrices, as latents of all are in units of steps.

Text is drawn from the original itself, each window once: on calibration text of the same size codes learn its words
(docs/decisions.md, "Training all codes"). A part of it is held out and decides whether what came of it is kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nashswarm.blocks import batches_of
from nashswarm.devices import resolve
from nashswarm.models import fuse, is_transposed
from nashswarm.types import InputError, ModelIndex, Progress, Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BETAS, EPSILON = (0.9, 0.99), 1e-12
WARMING, WARMING_STEPS = 0.1, 100  # a rising rate: share of the steps, and at most so many
VECTOR_RATE, LEAST_MEAN = 1e-3, 1e-3  # of norms and biases, in their mean magnitude, which counts as at least so much
# The latents' rate where none is given, over the root of the number of steps, since noise adds up like it. On the
# reference at 3.0 bits 1,000 steps at 0.007 and 300 at 0.02 gave KL 0.0283 and 0.0304, where 3,000 at 0.004 and at 0.01
# gave 0.0297 and 0.0399: too much loses more than too little.
RATE = 0.19
HELD_WINDOWS, HELD_TOKENS = 16, 8192  # that decide, at least
PASS_LOGITS = 1 << 25  # of a forward and backward pass: 128 MiB, of which about six are alive
DRAWING_BYTES = 1 << 28  # of keys, values and logits while text is drawn; and of a GPU's memory, which likes many:
GPU_DRAWING_BYTES = 1 << 32

logger = logging.getLogger(__name__)


class Item(Protocol):
    """A rounded matrix whose codes can be trained."""

    @property
    def name(self) -> str:
        """Its parameter's."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    def latents(self) -> Tensor:
        """Values in steps, float32 [out, in]."""

    def step(self) -> tuple[Tensor, Tensor]:
        """Of rows, float32 [out], and of columns, float32 [in]; a weight's is their product."""

    def weight(self) -> Tensor:
        """The rounded values, float32 [out, in]."""

    def recoded(self, codes: np.ndarray) -> Self:
        """The same matrix with other codes, int32 [out, in]. Raises InputError for codes beyond all bounds."""


class Search(Protocol):
    """Rounds all matrices of a model at once, which lie in one flat tensor, one behind the other."""

    def values(self, latents: Tensor, out: Tensor) -> None:
        """Float32 [weights], in steps, of which only `out` is written: the values nearest to them that codes have."""

    def codes(self, latents: Tensor) -> np.ndarray:
        """Those values' codes, int32 [weights]."""


T = TypeVar("T", bound=Item)


@dataclass(frozen=True, slots=True)
class Tuned(Generic[T]):
    """What came of it. KL in nats, on the windows that were held out, as the files would have it."""

    items: list[T]  # in the order in which they came
    vectors: dict[str, np.ndarray]  # name -> float32
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether it was for the better; if not, items and vectors are those that came."""
        return self.after < self.before


def rate_of(settings: Tuning) -> float:
    """The latents' largest rate, in steps: the given one, or RATE / sqrt(steps)."""
    return RATE / math.sqrt(settings.steps) if settings.rate is None else settings.rate


def tune(
    load: Callable[[], PreTrainedModel],
    index: ModelIndex,
    search: Callable[[Sequence[T], torch.device], Search],
    items: Sequence[T],
    vectors: Mapping[str, np.ndarray],
    ids: np.ndarray,
    settings: Tuning,
    progress: Progress,
    device: str = "cpu",
    seed: int = 0,
) -> Tuned[T]:
    """Train codes, norms and biases together; a matrix that is not among `items` stays the original's.

    Arguments: `load` makes the original, float32, all weights in memory; `search`, what rounds these items on a device;
    `vectors`, name -> float32, as they were to be stored; `ids`, int32 [tokens], the calibration text, from which
    windows take their first token; `device`, as params name it; `seed`, of all that is drawn. On the processor the
    result depends on nothing else but the number of torch's threads, as all sums do.
    Raises InputError where codes leave all bounds, and for no text.
    """
    if not ids.size:
        raise InputError("tuning draws the first token of each window from calibration text, and there is none")
    place = resolve(device)
    original, model = (fuse(load()).to(place) for _ in range(2))
    generator, context = torch.Generator(place).manual_seed(seed), index.calibration_window
    batch, held = max(1, settings.tokens // context), max(HELD_WINDOWS, -(-HELD_TOKENS // context))
    windows = draw(original, index, ids, held + settings.steps * batch, generator, progress)
    judge = Judge(original, model, index, windows[:held], batch)
    before = judge.kl(items, vectors)
    student = _Student.of(model, search(items, place), items, vectors)
    with torch.enable_grad():
        _train(student, original, torch.split(windows[held:], batch), index, settings, progress)
    found, moved = student.finish(items)
    tuned = Tuned(found, moved, before, judge.kl(found, moved))
    logger.info("tuning: KL %.5f -> %.5f on %d windows held out", before, tuned.after, held)
    if tuned.kept:
        return tuned
    logger.warning("tuning did not lower KL on text held out (%.5f -> %.5f): it is not used", before, tuned.after)
    return Tuned(list(items), dict(vectors), before, tuned.after)


# --- text ----------------------------------------------------------------------------------------------------------


def draw(
    model: PreTrainedModel,
    index: ModelIndex,
    ids: np.ndarray,
    count: int,
    generator: torch.Generator,
    progress: Progress,
) -> Tensor:
    """Windows drawn from a model at temperature 1, int32 [count, context]; the ends of texts end none of them.

    `generate` of transformers takes no generator. Arguments: `ids`, int32 [tokens], of which first tokens are drawn.
    """
    context, place = index.calibration_window, model.device
    firsts = torch.from_numpy(ids.astype(np.int64)).to(place)
    chosen = firsts[torch.randint(len(firsts), (count,), generator=generator, device=place)]
    windows = torch.empty(count, context, dtype=torch.int32, device=place)
    for own in progress(batches_of(count, _drawn_at_once(index, place)), "draw text"):
        windows[own] = _continued(model, chosen[own], context, generator)
    return windows


@torch.no_grad()
def _continued(model: PreTrainedModel, firsts: Tensor, context: int, generator: torch.Generator) -> Tensor:
    """First tokens, int64 [windows] -> int64 [windows, context]."""
    ids, past = firsts.new_empty(len(firsts), context), None
    ids[:, 0] = firsts
    for place in range(1, context):
        said = model(input_ids=ids[:, place - 1 : place], past_key_values=past, use_cache=True)
        past, chances = said.past_key_values, said.logits[:, -1].float().softmax(-1)
        ids[:, place] = (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax(-1)
    return ids


def _drawn_at_once(index: ModelIndex, place: torch.device) -> int:
    """Windows whose keys, values and logits take no more than is meant for them."""
    width = next(t.shape[1] for t in index.tensors if t.name == index.head)
    window = 4 * (2 * index.layers * width * index.calibration_window + 4 * index.vocabulary)
    return max(1, (GPU_DRAWING_BYTES if place.type == "cuda" else DRAWING_BYTES) // window)


# --- loss ----------------------------------------------------------------------------------------------------------


def divergences(
    original: PreTrainedModel, model: PreTrainedModel, windows: Tensor, index: ModelIndex
) -> Iterator[Tensor]:
    """Of some windows after the other, as many as memory is meant for: KL(original || model), a sum over tokens."""
    at_once = max(1, PASS_LOGITS // (index.vocabulary * windows.shape[1]))
    for ids in torch.split(windows.long(), at_once):
        with torch.no_grad():
            target = original(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        found = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        yield functional.kl_div(found, target, reduction="sum", log_target=True)


@dataclass(frozen=True, slots=True)
class Judge:
    """Measures what would be stored, on windows that training does not see."""

    original: PreTrainedModel
    model: PreTrainedModel  # whose weights are overwritten
    index: ModelIndex
    windows: Tensor  # int32 [windows, context]
    batch: int  # windows at a time

    @torch.no_grad()
    def kl(self, items: Sequence[Item], vectors: Mapping[str, np.ndarray]) -> float:
        """Mean over tokens, nats; vectors as float16 holds them."""
        for item in items:
            write(self.model, item.name, item.weight())
        for name, vector in vectors.items():
            self.model.get_parameter(name).copy_(torch.from_numpy(vector).half())
        batches = torch.split(self.windows, self.batch)
        sums = (kl for own in batches for kl in divergences(self.original, self.model, own, self.index))
        return sum(map(float, sums)) / self.windows.numel()


def write(model: PreTrainedModel, name: str, weight: Tensor) -> None:
    """Give a model a matrix, canonical."""
    model.get_parameter(name).data.copy_(weight.T if is_transposed(model, name) else weight)


# --- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix of the model in training, and views of what all matrices have in flat tensors, canonical [out, in]."""

    parameter: nn.Parameter  # of the model, which may store it transposed
    transposed: bool
    latent: nn.Parameter  # in steps
    rounded: Tensor  # in steps
    rows: Tensor  # steps, [out, 1]
    columns: Tensor  # [in]

    def write(self) -> None:
        """Rounded values to the model."""
        weight = self.rounded * self.rows * self.columns
        self.parameter.data.copy_(weight.T if self.transposed else weight)

    def pull(self) -> None:
        """The model's gradient to the latents."""
        if self.parameter.grad is not None:
            grad = self.parameter.grad.T if self.transposed else self.parameter.grad
            self.latent.grad, self.parameter.grad = grad * self.rows * self.columns, None


@dataclass(frozen=True, slots=True)
class _Student:
    """The model in training."""

    model: PreTrainedModel
    search: Search
    latents: Tensor  # of all matrices, one behind the other
    rounded: Tensor
    matrices: list[_Matrix]
    vectors: dict[str, nn.Parameter]

    @classmethod
    def of(
        cls, model: PreTrainedModel, search: Search, items: Sequence[Item], vectors: Mapping[str, np.ndarray]
    ) -> Self:
        """Before its first step."""
        place = model.device
        latents = torch.cat([item.latents().reshape(-1) for item in items]).to(place)
        rounded, sizes, matrices = torch.empty_like(latents), [math.prod(item.shape) for item in items], []
        for item, own, found in zip(items, *(torch.split(flat, sizes) for flat in (latents, rounded)), strict=True):
            rows, columns = (side.to(place) for side in item.step())
            parameter, transposed = model.get_parameter(item.name).requires_grad_(), is_transposed(model, item.name)
            latent = nn.Parameter(own.view(item.shape))
            matrices.append(_Matrix(parameter, transposed, latent, found.view(item.shape), rows[:, None], columns))
        trained = {name: model.get_parameter(name).requires_grad_() for name in vectors}
        for name, vector in vectors.items():
            trained[name].data.copy_(torch.from_numpy(vector))
        return cls(model, search, latents, rounded, matrices, trained)

    def round(self) -> None:
        """What the latents stand for becomes the model's weights."""
        self.search.values(self.latents, self.rounded)
        for matrix in self.matrices:
            matrix.write()

    def finish(self, items: Sequence[T]) -> tuple[list[T], dict[str, np.ndarray]]:
        """The matrices with the latents' codes; and the vectors. Raises InputError for codes out of bounds."""
        found, begin = [], 0
        codes = self.search.codes(self.latents)
        for item in items:
            own = codes[begin : begin + math.prod(item.shape)]
            found.append(item.recoded(own.reshape(item.shape)))
            begin += own.size
        return found, {name: p.detach().cpu().numpy().copy() for name, p in self.vectors.items()}


def _train(
    student: _Student,
    original: PreTrainedModel,
    batches: Sequence[Tensor],
    index: ModelIndex,
    settings: Tuning,
    progress: Progress,
) -> None:
    """A step for each batch, int32 [windows, context]."""
    latents, vectors = [m.latent for m in student.matrices], list(student.vectors.values())
    rates = [VECTOR_RATE * max(float(vector.detach().abs().mean()), LEAST_MEAN) for vector in vectors]
    groups: list[dict[str, Any]] = [{"params": [v], "lr": rate} for v, rate in zip(vectors, rates, strict=True)]
    adam = torch.optim.Adam([{"params": latents, "lr": rate_of(settings)}, *groups], betas=BETAS, eps=EPSILON)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, partial(share_of_rate, steps=len(batches)))
    for windows in progress(batches, "tune"):
        student.round()
        for divergence in divergences(original, student.model, windows, index):
            (divergence / windows.numel()).backward()
        for matrix in student.matrices:
            matrix.pull()
        adam.step()
        adam.zero_grad()
        schedule.step()


def share_of_rate(step: int, steps: int) -> float:
    """Of the largest rate, at a step counted from 0: it rises evenly, then falls along a cosine to 0."""
    warming = max(1, min(int(WARMING * steps), WARMING_STEPS))
    if step < warming:
        return (step + 1) / warming
    return 0.5 * (1 + math.cos(math.pi * (step - warming) / max(1, steps - warming)))
