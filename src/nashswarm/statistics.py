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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import zip_longest
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
from nashswarm.devices import wide
from nashswarm.engine import LOCAL, Engine
from nashswarm.types import ModelIndex, NashSwarmError, Progress, Statistics, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    of the calibration split; `journal`, whose finished steps are not done again.
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

        def step(layer: int, moments: Callable[[], dict[str, _Moments]]) -> dict[str, Statistics]:
            if layer >= done:
                return _read_statistics(journal, layer)
            found = {name: m.statistics(name) for name, m in moments().items()}
            _keep_statistics(journal, layer, found)
            journal.keep("state", {"layer": np.array(layer), "gradients": gradients.numpy()})
            return found

        head = step(index.layers, lambda: run.head(inputs[-1], gradients))
        yield from run.named(head, lambda t: t.layer is None and t.part not in ("embedding", "other"))
        for layer in progress(range(index.layers - 1, -1, -1), "layers"):
            found = step(layer, lambda at=layer: run.block(at, inputs[at], gradients))  # type: ignore[misc]
            yield from run.named(found, lambda t, at=layer: t.layer == at)  # type: ignore[misc]
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


def _keep_statistics(journal: Journal, layer: int, found: Mapping[str, Statistics]) -> None:
    arrays = {f"{name}:{f.name}": getattr(s, f.name) for name, s in found.items() for f in fields(s)}
    journal.keep(f"layer-{layer}", {key: value for key, value in arrays.items() if value is not None})


def _read_statistics(journal: Journal, layer: int) -> dict[str, Statistics]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in (journal.read(f"layer-{layer}") or {}).items():
        name, _, field = key.rpartition(":")
        found.setdefault(name, {})[field] = value
    return {name: Statistics(**arrays) for name, arrays in found.items()}


@dataclass
class _Moments:
    """Sums over tokens for one projection: float32 within a batch of some thousand tokens, float64 across batches."""

    second: Tensor | None = None  # float64 [in, in]
    fisher: Tensor | None = None  # float64 [out]
    gradient: Tensor | None = None  # float64 [out, out]
    tokens: int = 0

    def add(self, found: _Found) -> None:
        """What a batch gave."""
        for key, value in found.sums:
            before, wider = getattr(self, key), value.to(wide(value.device)).double()
            setattr(self, key, wider if before is None else before.add_(wider))
        self.tokens += found.tokens

    def statistics(self, name: str) -> Statistics:
        fisher = self.fisher if self.gradient is None else self.gradient.diagonal()
        if self.second is None or fisher is None or not bool(self.second.diagonal().any()):
            raise NashSwarmError(
                f"{name}: no statistics were gathered; the model never ran this matrix, or only on zeros"
            )
        gradient = None if self.gradient is None else _float32(self.gradient / self.tokens)
        return Statistics(_float32(self.second / self.tokens), _float32(fisher / self.tokens), gradient)


@dataclass
class _Found:
    """Sums over the tokens of one batch for one projection, in the order in which they came, on the model's device."""

    sums: list[tuple[str, Tensor]] = field(default_factory=list)  # field of _Moments, value
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


def _head(blocks: Blocks, number: int, hidden: Tensor, stream: torch.Generator) -> tuple[Tensor, dict[str, _Found]]:
    """d loss / d hidden, and sums for the head. Arguments: `stream`, of labels; it moves on."""
    head = blocks.model.get_output_embeddings()
    name, hidden = blocks.name_of(head), _leaf(blocks, hidden)
    found = {name: _Found()}
    with replaced_blocks(blocks.model, blocks.blocks, hidden), _hooked({name: head}, found, False):
        windows = blocks.windows[blocks.batches()[number]]
        logits = blocks.model(windows, use_cache=False).logits.float().flatten(0, 1)
    p = logits.detach().softmax(-1)
    labels = _labels(p.cpu(), stream).to(p.device)
    found[name].sums.append(("fisher", _label_variance(p)))
    p[torch.arange(len(p)), labels] -= 1  # d loss / d logits; there is memory for few arrays of this size
    logits.backward(p)
    assert hidden.grad is not None
    return hidden.grad.float().cpu(), _on_processor(found)


def _labels(p: Tensor, stream: torch.Generator) -> Tensor:
    """int64 [tokens], of probabilities [tokens, rows]: takes a number for each token and row."""
    return torch.multinomial(p, 1, generator=stream).squeeze(1)


def _label_variance(p: Tensor) -> Tensor:
    """Of probabilities [tokens, rows], float64 [rows], summed over tokens.

    E over labels of (p - onehot)^2 is p (1 - p): exact, where drawn labels would be noise over a vocabulary.
    """
    parts = (p[i : i + 256] for i in range(0, len(p), 256))
    return torch.stack([(own * (1 - own)).to(wide(p.device)).sum(0, dtype=torch.float64) for own in parts]).sum(0)


def _on_processor(found: dict[str, _Found]) -> dict[str, _Found]:
    """The same on the processor: GPUs' memory is not sent."""
    return {name: replace(own, sums=[(key, value.cpu()) for key, value in own.sums]) for name, own in found.items()}


def _leaf(blocks: Blocks, hidden: Tensor) -> Tensor:
    return hidden.to(blocks.model.device, blocks.model.dtype, copy=True).requires_grad_()


def _block(
    blocks: Blocks, layer: int, number: int, hidden: Tensor, gradient: Tensor, sent: bool
) -> tuple[Tensor, dict[str, _Found]]:
    """d loss / d input of a block, from that of its output, and sums for its projections; `sent`: to be sent away."""
    modules = blocks.projections(layer)
    found = {name: _Found() for name in modules}
    blocks.enter(layer)  # held for the pass back, too
    hidden = _leaf(blocks, hidden)
    with _hooked(modules, found, True):
        output = blocks.run(layer, number, hidden)
        output.backward(gradient.to(output))  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    return hidden.grad.float().cpu(), _on_processor(found) if sent else found


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

    def head(self, outputs: Tensor, gradients: Tensor) -> dict[str, _Moments]:
        """Statistics of what follows the blocks; fills `gradients` with d loss / d output of the last block."""
        items = ((n, outputs[b].clone(), stream) for n, (b, stream) in enumerate(self._streams()))
        return self._summed(self.engine.map(_head, self.shared, items), gradients, "head")

    def block(self, layer: int, inputs: Tensor, gradients: Tensor) -> dict[str, _Moments]:
        """Statistics of one block; turns `gradients` from those of its output into those of its input."""
        sent = self.engine.apart
        items = ((layer, n, inputs[b].clone(), gradients[b].clone(), sent) for n, b in enumerate(self.batches))
        return self._summed(self.engine.map(_block, self.shared, items), gradients)

    def _streams(self) -> Iterator[tuple[slice, torch.Generator]]:
        """Batches, each with the stream of labels as the batch before left it, which is seen in this process alone."""
        stream = torch.Generator().manual_seed(self.scoring.seed)
        for batch, following in zip_longest(self.batches, self.batches[1:]):
            yield batch, stream.clone_state() if self.engine.apart else stream
            if self.engine.apart and following:
                tokens = (min(batch.stop, self.shape[0]) - batch.start) * self.shape[1]
                _labels(torch.ones(tokens, self.index.vocabulary), stream)

    def _summed(
        self, found: Iterator[tuple[Tensor, dict[str, _Found]]], gradients: Tensor, what: str | None = None
    ) -> dict[str, _Moments]:
        moments: dict[str, _Moments] = {}
        batches = self.progress(self.batches, what) if what else self.batches
        for batch, (gradient, own) in zip(batches, found, strict=True):
            gradients[batch] = gradient
            for name, sums in own.items():
                moments.setdefault(name, _Moments()).add(sums)
        return moments

    def named(
        self, found: Mapping[str, Statistics], wanted: Callable[[TensorSpec], bool]
    ) -> Iterator[tuple[TensorSpec, Statistics]]:
        for tensor in filter(wanted, self.index.tensors):
            yield tensor, found.get(tensor.name) or _Moments().statistics(tensor.name)

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
