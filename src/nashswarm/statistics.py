"""What the original model says of its matrices: second moments of inputs, Fisher information of outputs.

Layer by layer: the inputs of every block are kept (on disk, as they are large), then blocks are visited from the last
to the first; each is run again with the gradient of its output at hand, so that only one block's statistics are in
memory at a time. This is activation checkpointing with the loop over layers outside.

Labels are drawn from the model, not taken from the text: their gradients' second moment is then the Fisher information,
which is the Hessian of KL(original || quantized) (Kunstner et al., 2019, arXiv:1905.12558).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nashswarm.artifacts import reserved
from nashswarm.blocks import Blocks, batches_of, calibration_windows, replaced_blocks
from nashswarm.closure import closure, fingerprint
from nashswarm.config import Scoring
from nashswarm.devices import repeatable, wide
from nashswarm.engine import LOCAL, Engine
from nashswarm.folding import Folding
from nashswarm.types import ModelIndex, NashSwarmError, Progress, Statistics, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STRIPE = 1 << 24  # bytes of float32 that are added up as one, by one worker
CUMULATED = 256  # tokens whose probabilities are added up together, in float64
FREQUENCY_PRIOR = 0.5  # lookups added to each row: a token that calibration missed is rare, not impossible


class Journal(Protocol):
    """Where finished steps are kept, so that a run that was interrupted goes on behind them."""

    def read(self, step: str) -> Mapping[str, np.ndarray] | None:
        """What was kept of a step, if it was finished."""

    def keep(self, step: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Note a step as finished."""

    def scratch(self, name: str, size: int) -> Path:
        """A file of `size` bytes of which nothing is known but what steps that were kept say."""


def gather(
    load: Callable[[], PreTrainedModel],
    index: ModelIndex,
    ids: np.ndarray,
    scoring: Scoring,
    progress: Progress,
    journal: Journal | None = None,
    engine: Engine = LOCAL,
) -> Iterator[tuple[TensorSpec, Statistics]]:
    """The statistics of every matrix, one at a time, head first, then blocks from last to first, then embeddings.

    Arguments: `load` makes the model, in float32, not training, in each process that computes; `ids`, int32 [tokens],
    of the calibration split; `journal`, whose finished steps are not done again; those of blocks' matrices are kept
    there under their names, as they are handed on.
    Raises InputError where `ids` do not fill a window, NashSwarmError where a matrix was never run.
    """
    run = _Run(engine, load, index, ids, scoring, progress)
    with tempfile.TemporaryDirectory(prefix="nashswarm-") as scratch:
        journal = journal or _Forgetful(Path(scratch))
        mapped = run.file(journal)
        inputs = torch.from_numpy(mapped)
        lookups = _resumed(journal, "lookups", lambda: run.forward(mapped))
        gradients = torch.empty(inputs.shape[1:])
        state = journal.read("state")
        done = int(state["layer"]) if state else index.layers + 1
        if state:
            gradients.copy_(torch.from_numpy(np.array(state["gradients"])))

        def begin(layer: int) -> Folding | None:
            return run.backward(layer, inputs[layer], gradients) if 0 <= layer < done else None

        def finish(layer: int, begun: Folding | None) -> dict[str, Statistics]:
            if begun is None:
                return run.kept(journal, layer)
            found = _joined(begun.totals())
            run.keep(journal, layer, found)
            journal.keep("state", {"layer": np.array(layer), "gradients": gradients.numpy()})
            return found

        begun, head = begin(index.layers), dict[str, Statistics]()
        for layer in progress(range(index.layers, -1, -1), "layers"):  # what follows the blocks is the first
            if begun:
                for batch, gradient in zip(run.batches, begun, strict=True):
                    gradients[batch] = gradient
            # The next block's batches begin on workers while this one's statistics are taken, kept and handed on.
            # Gradients stay as they are until these come back.
            following = begin(layer - 1)
            found = finish(layer, begun)
            if layer == index.layers:
                head = found
            yield from run.named(found, layer)
            begun = following
        yield from run.embeddings(lookups, head, gradients)


def code() -> dict[str, str]:
    """The files that compute this, and their SHA-256: an interrupted run and its successor must have them in common."""
    own = Path(__file__)
    return fingerprint(closure([own], [own.parents[1]]), own.parents[1])


class _Forgetful:
    """A journal that keeps nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, step: str) -> None:
        return None

    def keep(self, step: str, arrays: Mapping[str, np.ndarray]) -> None:
        pass

    def scratch(self, name: str, size: int) -> Path:
        return reserved(self.directory / name, size)


def _resumed(journal: Journal, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    kept = journal.read(name)
    if kept is not None:
        return {key: torch.from_numpy(np.array(value)) for key, value in kept.items()}
    found = make()
    journal.keep(name, {key: value.numpy() for key, value in found.items()})
    return found


# --- sums over batches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stripe:
    """Some rows of a moment of a matrix, which are added up by themselves."""

    tensor: str
    moment: str  # second [in, in], gradient [out, out], or fisher [out], the latter's diagonal, where that is too large
    rows: range


def stripes(index: ModelIndex, layer: int) -> list[Stripe]:
    """All of a block, or of the head, which is the layer behind the last block; STRIPE bytes each at most."""
    if layer == index.layers:
        found = [(t.name, "second", t.shape[1], t.shape[1]) for t in index.tensors if t.name == index.head]
        found += [(t.name, "fisher", t.shape[0], 1) for t in index.tensors if t.name == index.head]
    else:
        inside = [t for t in index.tensors if t.layer == layer]
        found = [(t.name, "second", t.shape[1], t.shape[1]) for t in inside]
        found += [(t.name, "gradient", t.shape[0], t.shape[0]) for t in inside]
    return [Stripe(name, moment, rows) for name, moment, size, columns in found for rows in cuts(size, columns)]


def cuts(rows: int, columns: int) -> list[range]:
    """Rows of a float32 matrix in parts of STRIPE bytes at most."""
    height = max(1, STRIPE // (4 * columns))
    return [range(first, min(first + height, rows)) for first in range(0, rows, height)]


@dataclass(frozen=True, slots=True)
class _Part:
    """What one batch gives to a stripe: sums over its tokens, float32 [rows, columns], fisher float64 [rows]."""

    values: list[Tensor] | list[np.ndarray]  # one for each time that the matrix was run
    tokens: int


@dataclass
class _Mean:
    """The mean of a stripe over tokens: float32 within a batch of some thousand tokens, float64 across batches."""

    sum: Tensor | None = None
    tokens: int = 0

    def add(self, part: _Part) -> None:
        """What a batch gave."""
        for value in map(torch.as_tensor, part.values):
            wider = value.to(wide(value.device))
            self.sum = wider.to(torch.float64, copy=True) if self.sum is None else self.sum.add_(wider)
        self.tokens += part.tokens

    def result(self) -> np.ndarray | None:
        """float32; nothing where the matrix was never run."""
        return None if self.sum is None else _float32(self.sum.div_(self.tokens))

    def __getstate__(self) -> tuple[np.ndarray | None, int]:
        return None if self.sum is None else self.sum.cpu().numpy(), self.tokens

    def __setstate__(self, state: tuple[np.ndarray | None, int]) -> None:
        found, self.tokens = state
        self.sum = None if found is None else torch.from_numpy(found.copy())  # what a worker is handed is read-only


def _joined(means: dict[Any, np.ndarray | None]) -> dict[str, Statistics]:
    """Name of a matrix -> its statistics, of all its stripes, in order."""
    rows: dict[str, dict[str, list[np.ndarray | None]]] = {}
    for stripe in list(means):
        rows.setdefault(stripe.tensor, {}).setdefault(stripe.moment, []).append(means.pop(stripe))
    return {name: _statistics(name, **{moment: _whole(own) for moment, own in of.items()}) for name, of in rows.items()}


def _whole(stripes: list[np.ndarray | None]) -> np.ndarray | None:
    found = [own for own in stripes if own is not None]
    return np.concatenate(found) if found else None


def _statistics(
    name: str,
    second: np.ndarray | None = None,
    gradient: np.ndarray | None = None,
    fisher: np.ndarray | None = None,
) -> Statistics:
    if gradient is not None:
        fisher = gradient.diagonal().copy()
    if second is None or fisher is None or not second.diagonal().any():
        raise NashSwarmError(f"{name}: no statistics were gathered; the model never ran this matrix, or only on zeros")
    return Statistics(second, fisher, gradient)


@dataclass
class _Found:
    """Sums over the tokens of one batch for one projection, in the order in which they came, on the model's device."""

    sums: list[tuple[str, Tensor]] = field(default_factory=list)  # moment, value
    tokens: int = 0

    def see_input(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        x = x.float()
        self.sums.append(("second", x.T @ x))
        self.tokens += x.shape[0]

    def see_gradient(self, g: Tensor) -> None:
        g = g.reshape(-1, g.shape[-1])
        g = g.float()
        self.sums.append(("gradient", g.T @ g))

    def part(self, stripe: Stripe, sent: bool) -> _Part:
        """Arguments: `sent`, whether to another process: as arrays, of which Ray sends these rows alone."""
        values = [v[stripe.rows.start : stripe.rows.stop] for moment, v in self.sums if moment == stripe.moment]
        return _Part([v.cpu().numpy() for v in values] if sent else values, self.tokens)


# --- one batch -----------------------------------------------------------------------------------------------------


def _prepare(load: Callable[[], PreTrainedModel], index: ModelIndex, ids: np.ndarray, scoring: Scoring) -> Blocks:
    return Blocks.prepare(load(), index, ids, scoring.tokens, scoring.batch_tokens)


def _width(blocks: Blocks) -> int:
    return int(blocks.model.config.hidden_size)


def _embedded(blocks: Blocks, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The first block's inputs, and lookups by table, float64 [rows]."""
    recorder = _LookupRecorder(blocks.names, blocks.windows[blocks.batches()[number]].numel())
    with recorder:
        hidden, _, _ = blocks.called(number)
    return hidden.float().cpu(), {name: count.cpu() for name, count in recorder.counts.items()}


def _forward(blocks: Blocks, layer: int, number: int, hidden: Tensor) -> Tensor:
    """The output of a block."""
    blocks.enter(layer)
    with torch.no_grad():
        return blocks.run(layer, number, hidden.to(blocks.model.device, blocks.model.dtype, copy=True)).float().cpu()


def _head(
    blocks: Blocks, number: int, hidden: Tensor, seed: int, wanted: Sequence[Stripe], sent: bool
) -> tuple[Tensor, dict[Stripe, _Part]]:
    """d loss / d hidden, and sums for the head. Arguments: `seed`, of all labels; else as those of `_block`."""
    head = blocks.model.get_output_embeddings()
    name, hidden = blocks.name_of(head), _leaf(blocks, hidden)
    found = {name: _Found()}
    with replaced_blocks(blocks.model, blocks.blocks, hidden), _hooked({name: head}, found, False):
        windows = blocks.windows[blocks.batches()[number]]
        logits = blocks.model(windows, use_cache=False).logits.float().flatten(0, 1)
    p = logits.detach().softmax(-1)
    labels = _labels(p.cpu(), seed, number).to(p.device)
    found[name].sums.append(("fisher", _label_variance(p)))
    p[torch.arange(len(p)), labels] -= 1  # d loss / d logits; there is memory for few arrays of this size
    logits.backward(p)
    assert hidden.grad is not None
    return hidden.grad.float().cpu(), _parts(found, wanted, sent)


def _labels(p: Tensor, seed: int, number: int) -> Tensor:
    """int64 [tokens], drawn with probabilities [tokens, rows], on the processor, for batch `number`.

    By numpy's generator, whose numbers are the same on every machine, of the batch's child of SeedSequence(seed), so
    that batches can be drawn in any order, in any process. A label is where the probabilities' sum passes its number.
    """
    drawn = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,))).random(len(p))
    labels = []
    for own, at in zip(*(torch.split(x, CUMULATED) for x in (p, torch.from_numpy(drawn))), strict=True):
        sums = own.cumsum(1, dtype=torch.float64)
        labels.append(torch.searchsorted(sums, at[:, None] * sums[:, -1:], right=True).squeeze(1))
    return torch.cat(labels).clamp_(max=p.shape[1] - 1)


def _label_variance(p: Tensor) -> Tensor:
    """Of probabilities [tokens, rows], float64 [rows], summed over tokens.

    E over labels of (p - onehot)^2 is p (1 - p): exact, where drawn labels would be noise over a vocabulary.
    """
    parts = torch.split(p, CUMULATED)
    return torch.stack([(own * (1 - own)).to(wide(p.device)).sum(0, dtype=torch.float64) for own in parts]).sum(0)


def _parts(found: dict[str, _Found], wanted: Sequence[Stripe], sent: bool) -> dict[Stripe, _Part]:
    """Of every stripe. Raises NashSwarmError for a matrix that was run and is none of them."""
    if others := found.keys() - {stripe.tensor for stripe in wanted}:
        raise NashSwarmError(f"{', '.join(sorted(others))}: run where the model's index has no such matrix")
    return {stripe: found.get(stripe.tensor, _Found()).part(stripe, sent) for stripe in wanted}


def _leaf(blocks: Blocks, hidden: Tensor) -> Tensor:
    return hidden.to(blocks.model.device, blocks.model.dtype, copy=True).requires_grad_()


def _block(
    blocks: Blocks, layer: int, number: int, hidden: Tensor, gradient: Tensor, wanted: Sequence[Stripe], sent: bool
) -> tuple[Tensor, dict[Stripe, _Part]]:
    """d loss / d input of a block, from that of its output, and sums for its projections.

    Arguments: `wanted`, all stripes of the layer; `sent`, whether sums leave this process.
    """
    modules = blocks.projections(layer)
    found = {name: _Found() for name in modules}
    blocks.enter(layer)  # held for the pass back, too
    hidden = _leaf(blocks, hidden)
    with _hooked(modules, found, True), repeatable(blocks.model.device):
        output = blocks.run(layer, number, hidden)
        output.backward(gradient.to(output))  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    return hidden.grad.float().cpu(), _parts(found, wanted, sent)


# --- all batches ---------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    engine: Engine
    load: Callable[[], PreTrainedModel]
    index: ModelIndex
    ids: np.ndarray
    scoring: Scoring
    progress: Progress

    def __post_init__(self) -> None:
        windows, batch = calibration_windows(self.index, self.ids, self.scoring.tokens, self.scoring.batch_tokens)
        self.shape, self.batches = windows.shape, batches_of(len(windows), batch)
        self.shared = self.engine.share(partial(_prepare, self.load, self.index, self.ids, self.scoring), True)

    def file(self, journal: Journal) -> np.memmap[Any, np.dtype[np.float32]]:
        """float32 [blocks + 1, windows, context, width]: every block's inputs, and the last one's output."""
        (width,) = self.engine.map(_width, self.shared, [()])
        shape = (self.index.layers + 1, *self.shape, width)
        path = journal.scratch("inputs", 4 * math.prod(shape))
        return np.memmap(path, np.float32, "r+", shape=shape)

    def forward(self, mapped: np.memmap[Any, np.dtype[np.float32]]) -> dict[str, Tensor]:
        """Fill the file, and count lookups: name of a table -> float64 [rows]."""
        counts, inputs = dict[str, Tensor](), torch.from_numpy(mapped)
        found = self.engine.map(_embedded, self.shared, ((number,) for number in range(len(self.batches))))
        for batch, (own, lookups) in zip(self.batches, found, strict=True):
            inputs[0, batch] = own
            for name, count in lookups.items():
                counts[name] = counts[name] + count if name in counts else count
        for layer in self.progress(range(self.index.layers), "inputs of layers"):
            items = ((layer, n, inputs[layer, b].clone()) for n, b in enumerate(self.batches))
            for batch, own in zip(self.batches, self.engine.map(_forward, self.shared, items), strict=True):
                inputs[layer + 1, batch] = own
        mapped.flush()
        return counts

    def backward(self, layer: int, inputs: Tensor, gradients: Tensor) -> Folding:
        """Batch by batch, d loss / d input of a block, from `gradients`, of its output; totals by `Stripe`.

        Arguments: `layer`, that behind the last block for what follows the blocks, which needs no gradients.
        """
        wanted, batches = stripes(self.index, layer), enumerate(self.batches)
        rest = wanted, self.engine.apart
        items: Iterator[tuple[Any, ...]]
        if layer == self.index.layers:
            function: Callable[..., Any] = _head
            items = ((n, inputs[b].clone(), self.scoring.seed, *rest) for n, b in batches)
        else:
            function = _block
            items = ((layer, n, inputs[b].clone(), gradients[b].clone(), *rest) for n, b in batches)
        return self.engine.fold(function, self.shared, items, wanted, _Mean)

    def keep(self, journal: Journal, layer: int, found: Mapping[str, Statistics]) -> None:
        """Those of a block, each under its matrix' name, or what its use as a head says of a matrix."""
        for name, own in found.items():
            journal.keep(self._step(layer, name), own.arrays())

    def kept(self, journal: Journal, layer: int) -> dict[str, Statistics]:
        """What `keep` kept, by the matrices' names."""
        names = dict.fromkeys(stripe.tensor for stripe in stripes(self.index, layer))
        found = {name: journal.read(self._step(layer, name)) for name in names}
        return {name: Statistics(**arrays) for name, arrays in found.items() if arrays is not None}

    def _step(self, layer: int, name: str) -> str:
        return name if layer < self.index.layers else "head"

    def named(self, found: Mapping[str, Statistics], layer: int) -> Iterator[tuple[TensorSpec, Statistics]]:
        """Of a block's matrices, or of a head that is no embedding."""
        for tensor in self.index.tensors:
            last = tensor.layer is None and tensor.part not in ("embedding", "other")
            if tensor.layer == layer or (last and layer == self.index.layers):
                yield tensor, found.get(tensor.name) or _statistics(tensor.name)

    def embeddings(
        self, lookups: dict[str, Tensor], head: Mapping[str, Statistics], gradients: Tensor
    ) -> Iterator[tuple[TensorSpec, Statistics]]:
        """Tables: how often each row is looked up, and the Fisher information of the first block's input."""
        width = gradients.shape[-1]
        moment = torch.zeros(width, width, dtype=torch.float64)
        for batch in self.batches:
            g = gradients[batch].view(-1, width)
            moment += g.T @ g
        moment /= math.prod(self.shape)
        for tensor in self.index.tensors:
            if tensor.kind != "embedding":
                continue
            if tensor.name not in lookups:
                raise NashSwarmError(f"{tensor.name}: no row of this table was looked up during calibration")
            counts = lookups[tensor.name] + FREQUENCY_PRIOR
            per_token = counts / math.prod(self.shape)
            # A table narrower than the blocks (OPT-350M projects it) has no gradient of its own: the mean stands in.
            mean = moment.diagonal().mean()
            own = moment if tensor.shape[1] == width else mean * torch.eye(tensor.shape[1], dtype=torch.float64)
            use = head.get(tensor.name, Statistics())
            yield tensor, replace(use, frequency=_float32(per_token), lookup_moment=_float32(own))


def _float32(value: Tensor) -> np.ndarray:
    return value.float().cpu().contiguous().numpy()


class _LookupRecorder(TorchFunctionMode):
    """Counts the rows that nn.functional.embedding looks up; a module's own arguments may be offset from them (OPT)."""

    def __init__(self, tables: dict[int, str], tokens: int) -> None:
        super().__init__()
        self.tables = tables
        self.tokens = tokens  # of the batch
        self.counts: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.embedding:
            rows, weight = args[0], args[1]
            name = self.tables.get(id(weight))
            if name:
                # Positions come as one row of indices that is broadcast over the batch: each stands for several tokens.
                repeats = self.tokens / rows.numel()
                count = torch.bincount(rows.flatten(), minlength=weight.shape[0]).double() * repeats
                self.counts[name] = self.counts[name] + count if name in self.counts else count
        return func(*args, **(kwargs or {}))


@contextmanager
def _hooked(modules: dict[str, nn.Module], found: dict[str, _Found], gradients: bool) -> Iterator[None]:
    """Show every input (and output gradient) of `modules` to what is found of it."""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[name].see_input(args[0].detach())
            if gradients:
                output.register_hook(found[name].see_gradient)  # type: ignore[no-untyped-call]

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
