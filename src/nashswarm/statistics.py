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
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nashswarm.artifacts import reserved
from nashswarm.blocks import Blocks, called_with, replaced_blocks
from nashswarm.closure import closure, fingerprint
from nashswarm.config import Scoring
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
    model: PreTrainedModel,
    index: ModelIndex,
    ids: np.ndarray,
    scoring: Scoring,
    progress: Progress,
    journal: Journal | None = None,
) -> Iterator[tuple[TensorSpec, Statistics]]:
    """The statistics of every matrix, one at a time, head first, then blocks from last to first, then embeddings.

    Arguments: `model` in float32, not training; `ids`, int32 [tokens], of the calibration split; `journal`, whose
    finished steps are not done again.
    Raises InputError where `ids` do not fill a window, NashSwarmError where a matrix was never run.
    """
    run = _Run.prepare(model, index, ids, scoring.tokens, scoring.batch_tokens)
    with tempfile.TemporaryDirectory(prefix="nashswarm-") as scratch:
        journal = journal or _Forgetful(Path(scratch))
        inputs = run.file(journal)
        lookups = _resumed(journal, "lookups", lambda: run.forward(inputs, progress))
        if not run.calls:
            run.first_calls()
        gradients = torch.empty(inputs.shape[1:])
        state = journal.read("state")
        done = int(state["layer"]) if state else len(run.blocks) + 1
        if state:
            gradients.copy_(torch.from_numpy(np.array(state["gradients"])))

        def step(layer: int, moments: Callable[[], dict[str, _Moments]]) -> dict[str, Statistics]:
            if layer >= done:
                return _read_statistics(journal, layer)
            found = {name: m.statistics(name) for name, m in moments().items()}
            _keep_statistics(journal, layer, found)
            journal.keep("state", {"layer": np.array(layer), "gradients": gradients.numpy()})
            return found

        head = step(len(run.blocks), lambda: run.head(inputs[-1], gradients, scoring.seed, progress))
        yield from run.named(head, lambda t: t.layer is None and t.kind != "embedding")
        for layer in progress(range(len(run.blocks) - 1, -1, -1), "layers"):
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
    """Sums over tokens for one projection."""

    second: Tensor | None = None  # float64 [in, in]
    fisher: Tensor | None = None  # float64 [out]
    gradient: Tensor | None = None  # float64 [out, out]
    tokens: int = 0

    def add_input(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        product = (x.T @ x).double()  # float32 within a batch of some thousand tokens, float64 across batches
        self.second = product if self.second is None else self.second.add_(product)
        self.tokens += x.shape[0]

    def add_gradient(self, g: Tensor) -> None:
        g = g.reshape(-1, g.shape[-1])
        product = (g.T @ g).double()
        self.gradient = product if self.gradient is None else self.gradient.add_(product)

    def add_fisher(self, square: Tensor) -> None:
        self.fisher = square if self.fisher is None else self.fisher.add_(square)

    def statistics(self, name: str) -> Statistics:
        fisher = self.fisher if self.gradient is None else self.gradient.diagonal()
        if self.second is None or fisher is None or not bool(self.second.diagonal().any()):
            raise NashSwarmError(
                f"{name}: no statistics were gathered; the model never ran this matrix, or only on zeros"
            )
        gradient = None if self.gradient is None else _float32(self.gradient / self.tokens)
        return Statistics(_float32(self.second / self.tokens), _float32(fisher / self.tokens), gradient)


@dataclass
class _Run(Blocks):
    def file(self, journal: Journal) -> Tensor:
        """float32 [blocks + 1, windows, context, width] on disk: every block's inputs, and the last one's output."""
        shape = (len(self.blocks) + 1, *self.windows.shape, self.model.config.hidden_size)
        path = journal.scratch("inputs", 4 * math.prod(shape))
        return torch.from_numpy(np.memmap(path, np.float32, "r+", shape=shape))

    def first_calls(self) -> None:
        """Note how blocks are called, where their inputs are known already."""
        for batch in self.batches():
            call = called_with(self.blocks[0], partial(self.model.base_model, self.windows[batch], use_cache=False))
            assert call is not None
            self.calls.append((call[0][1:], call[1]))

    def forward(self, inputs: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Fill `inputs`, remember how blocks are called, and count lookups: name of a table -> float64 [rows]."""
        recorder = _LookupRecorder(self.names)
        for batch in progress(self.batches(), "inputs of layers"):
            recorder.tokens = self.windows[batch].numel()
            with torch.no_grad(), recorder, _recording(self.blocks, inputs[:, batch], self.calls):
                self.model.base_model(self.windows[batch], use_cache=False)
        return recorder.counts

    def head(self, outputs: Tensor, gradients: Tensor, seed: int, progress: Progress) -> dict[str, _Moments]:
        """Statistics of what follows the blocks; fills `gradients` with d loss / d output of the last block."""
        generator = torch.Generator().manual_seed(seed)
        head = self.model.get_output_embeddings()
        moments = {self.name_of(head): _Moments()}
        for batch in progress(self.batches(), "head"):
            hidden = outputs[batch].clone().requires_grad_()
            with (
                replaced_blocks(self.model, self.blocks, hidden),
                _hooked({self.name_of(head): head}, moments, False),
            ):
                logits = self.model(self.windows[batch], use_cache=False).logits.float().flatten(0, 1)
            p = logits.detach().softmax(-1)
            labels = torch.multinomial(p, 1, generator=generator).squeeze(1)
            # E over labels of (p - onehot)^2 is p (1 - p): exact, where drawn labels would be noise over a vocabulary.
            moments[self.name_of(head)].add_fisher((p * (1 - p)).sum(0, dtype=torch.float64))
            functional.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
            assert hidden.grad is not None
            gradients[batch] = hidden.grad
        return moments

    def block(self, layer: int, inputs: Tensor, gradients: Tensor) -> dict[str, _Moments]:
        """Statistics of one block; turns `gradients` from those of its output into those of its input."""
        modules = self.projections(layer)
        moments = {name: _Moments() for name in modules}
        self.hold(layer)  # for the pass back, too
        with _hooked(modules, moments, True):
            for number, batch in enumerate(self.batches()):
                hidden = inputs[batch].clone().requires_grad_()
                self.run(layer, number, hidden).backward(gradients[batch])  # type: ignore[no-untyped-call]
                assert hidden.grad is not None
                gradients[batch] = hidden.grad
        self.drop(layer)
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
        for batch in self.batches():
            g = gradients[batch].view(-1, width)
            moment += g.T @ g
        moment /= self.windows.numel()
        for tensor in self.index.tensors:
            if tensor.kind != "embedding":
                continue
            if tensor.name not in lookups:
                raise NashSwarmError(f"{tensor.name}: no row of this table was looked up during calibration")
            counts = lookups[tensor.name] + FREQUENCY_PRIOR
            per_token = counts / self.windows.numel()
            # A table narrower than the blocks (OPT-350M projects it) has no gradient of its own: the mean stands in.
            mean = moment.diagonal().mean()
            own = moment if tensor.shape[1] == width else mean * torch.eye(tensor.shape[1], dtype=torch.float64)
            use = head.get(tensor.name, Statistics())
            yield tensor, replace(use, frequency=_float32(per_token), lookup_moment=_float32(own))


def _float32(value: Tensor) -> np.ndarray:
    return value.float().contiguous().numpy()


class _LookupRecorder(TorchFunctionMode):
    """Counts the rows that nn.functional.embedding looks up; a module's own arguments may be offset from them (OPT)."""

    def __init__(self, tables: dict[int, str]) -> None:
        super().__init__()
        self.tables = tables
        self.tokens = 0  # of the batch under way
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
def _recording(blocks: nn.ModuleList, inputs: Tensor, calls: list[Any]) -> Iterator[None]:
    """Write the blocks' inputs, and the last one's output, to `inputs` [blocks + 1, ...]; keep the first one's call."""

    def before(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs[layer] = args[0]
            if layer == 0:
                calls.append((args[1:], keywords))

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        inputs[len(blocks)] = output[0] if isinstance(output, tuple) else output

    handles = [b.register_forward_pre_hook(before(i), with_kwargs=True) for i, b in enumerate(blocks)]
    handles.append(blocks[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _hooked(modules: dict[str, nn.Module], moments: dict[str, _Moments], gradients: bool) -> Iterator[None]:
    """Add every input (and output gradient) of `modules` to `moments`."""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            moments[name].add_input(args[0].detach())
            if gradients:
                output.register_hook(moments[name].add_gradient)  # type: ignore[no-untyped-call]

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
