"""Two streams of hidden states through one model: the original's, and the one behind what was quantized.

One copy of the model is held: each block's original outputs are computed just before it is changed. All of it is
forward passes; no gradient is taken.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nashswarm.blocks import Blocks, called_with, is_projection, replaced_blocks
from nashswarm.devices import wide
from nashswarm.regression import Compared, products
from nashswarm.types import NashSwarmError, TensorSpec

FOLDED = 2048  # tokens of text next to each other that are of the same fold
PASS_TOKENS = 2048  # per forward pass, at most
PASSES = 16  # at least, where there are so many windows: as many workers share them
RESIDUAL_TOLERANCE = 1e-3  # relative; how well a block's output must be the sum of what is said to write to it

logger = logging.getLogger(__name__)


class About(NamedTuple):
    """What has to be known of a matrix before it is aimed."""

    reaches: bool  # whether it multiplies what matrices before it made
    source: str | None = None  # the first matrix that has its inputs, and hence its sums; None where none shares them
    has_bias: bool = False  # whether one can follow it


def pass_tokens(tokens: int) -> int:
    """Of a forward pass over so many tokens of calibration; it has a window at least."""
    return min(PASS_TOKENS, -(-tokens // PASSES))


def turn_of(windows: Tensor) -> int:
    """How many of these windows, [windows, context], next to each other are of one fold: half of them at most."""
    return max(1, min(FOLDED // windows.shape[1], len(windows) // 2))


@dataclass
class Streams(Blocks):
    """Two streams of hidden states through one model: the original's, and the one behind what was quantized."""

    first: int = 0  # number of the first batch, where these windows are a part of more
    turn: int = 0  # windows next to each other that are of the same fold; 0: as `turn_of` all of these
    probe: Tensor | None = None  # int64 [1, context], by which the order of matrices is seen; None: the first window
    original: list[Tensor] = field(default_factory=list)  # for each batch, float32 [windows, context, width]
    quantized: list[Tensor] = field(default_factory=list)
    sequence: list[str] = field(default_factory=list)  # the matrices that multiply, as the model runs them
    _layer: int | None = None
    _once: set[str] = field(default_factory=set)  # those of them that run once in a pass
    _inputs: dict[str, list[Tensor]] = field(default_factory=dict)  # the original's, of the present block
    _streams: dict[str, list[Tensor]] = field(default_factory=dict)  # the original's, to which a writer adds
    _outputs: list[Tensor] = field(default_factory=list)  # the original's, of the present block
    _settled: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # of this block: batch -> a matrix' outputs

    @torch.no_grad()
    def start(self) -> None:
        """Run the original up to its first block, and once through, to see in which order matrices are used."""
        self.original = self.embedded()
        self.turn = self.turn or turn_of(self.windows)
        with ExitStack() as hooks:
            for module in filter(is_projection, self.model.modules()):
                name = self.name_of(module)
                hooks.enter_context(_before(module, partial(lambda at, _: self.sequence.append(at), name)))
            self.model(self.windows[:1] if self.probe is None else self.probe, use_cache=False)
        self._once = {name for name, calls in Counter(self.sequence).items() if calls == 1}
        self.sequence = list(dict.fromkeys(self.sequence))

    @property
    def summed_on(self) -> torch.device:
        """Where products are added up, in float64."""
        return wide(self.model.device)

    def order(self) -> list[TensorSpec]:
        """All matrices as they are to be quantized: embeddings, blocks as they run, an untied head."""
        known = {t.name: t for t in self.index.tensors}
        inside = [known[n] for n in self.sequence if known[n].layer is not None]
        idle = [t for t in self.index.tensors if t.layer is not None and t not in inside]
        head = [t for t in self.index.tensors if self._is_own_head(t)]
        first = [t for t in self.index.tensors if t.layer is None and t not in head]
        return [*first, *sorted([*inside, *idle], key=lambda t: t.layer or 0), *head]

    @torch.no_grad()
    def about(self, tensor: TensorSpec) -> About:
        """What has to be known of a matrix before it is aimed."""
        if not self.reaches(tensor):
            return About(False)
        return About(True, self._source(tensor), self._bias(tensor.name) is not None)

    def reaches(self, tensor: TensorSpec) -> bool:
        """Whether a matrix multiplies what matrices before it made."""
        return tensor.name in self.sequence and (tensor.layer is not None or self._is_own_head(tensor))

    def _source(self, tensor: TensorSpec) -> str | None:
        """The first matrix that has its inputs, and hence its sums: queries, keys and values. None for a writer."""
        self._enter_at(tensor)
        own = self._inputs[tensor.name][:1]
        if tensor.name in self._streams or not own:
            return None
        return next(name for name, inputs in self._inputs.items() if inputs and inputs[0] is own[0])

    @torch.no_grad()
    def put(
        self, tensor: TensorSpec, weight: Tensor, moved: Tensor | None = None, bias: np.ndarray | None = None
    ) -> np.ndarray | None:
        """A rounded matrix, float32 [out, in], in the original's place.

        Arguments: `moved`, float32 [out], what is added to its bias, if it has one; `bias`, float32 [out], what this
        returned in a run that was interrupted, in its place.
        Returns: the bias as it is now, None where there is none.
        """
        if self.reaches(tensor):
            self._enter_at(tensor)  # what the original makes of the block is seen before anything in it changes
        elif tensor.layer is not None:
            self._enter(tensor.layer)
        parameter = self.model.get_parameter(tensor.name)
        parameter.copy_(_stored(tensor, weight))
        if tensor.layer is not None and tensor.name in self._once:
            self._settled[tensor.name] = {}
        own = self._bias(tensor.name)
        if own is not None and moved is not None:
            own += moved.to(own.device)
        if own is not None and bias is not None:
            own.copy_(torch.from_numpy(bias))
        return None if own is None else own.cpu().numpy().copy()

    def vector(self, name: str) -> np.ndarray:
        """A vector of the model as it is now, float32. Raises NashSwarmError where a correction left all bounds."""
        value: Tensor = self.model.get_parameter(name).detach()
        if not bool(value.isfinite().all()):
            raise NashSwarmError(
                f"{name}: its correction is not finite; set prefix_tokens: 0, or calibrate on more text"
            )
        return value.cpu().numpy()

    def _is_own_head(self, tensor: TensorSpec) -> bool:
        return tensor.name == self.index.head and tensor.kind != "embedding"

    # --- streams ---------------------------------------------------------------------------------------------------

    def _enter_at(self, tensor: TensorSpec) -> None:
        """Bring both streams to the block of a matrix that `reaches`, or behind all blocks."""
        self._enter(tensor.layer if tensor.layer is not None else len(self.blocks))

    def _enter(self, layer: int) -> None:
        """Bring both streams to a block's input, and keep what the original makes of it."""
        if layer == self._layer:
            return
        if self._layer is None:
            self.quantized, self._layer = self.embedded(), -1
        while self._layer < layer:
            if self._layer >= 0:
                if not self._outputs:
                    self._keep(self._layer)
                for number, hidden in enumerate(self.quantized):
                    with self._remembering(number):
                        self.quantized[number] = self.run(self._layer, number, hidden)
                self.original, self._outputs = self._outputs, []
                self._settled = {}
                self.drop(self._layer)
            self._layer += 1
            if self._layer < len(self.blocks):
                self.hold(self._layer)  # what is rounded is kept until the stream has passed
        self._keep(layer)

    def _keep(self, layer: int) -> None:
        """The original's inputs of every matrix of a block, streams and outputs."""
        self._inputs, self._streams, self._outputs = {}, {}, []
        if layer == len(self.blocks):
            head = self.model.get_output_embeddings()
            self._inputs[self.name_of(head)] = [self._head_input(head, hidden) for hidden in self.original]
            return
        modules = self.projections(layer)
        self._inputs = {name: [] for name in modules}
        writers = self._writers(layer)
        self._streams = {name: [] for name in writers}
        for number, hidden in enumerate(self.original):
            written: dict[str, Tensor] = {}  # in the writers' order, which is that in which the model runs them
            with ExitStack() as hooks:
                for name, module in modules.items():
                    see = partial(lambda kept, like, x: kept.append(_by_token(x, like)), self._inputs[name], hidden)
                    hooks.enter_context(_before(module, see))
                for name in writers:
                    hooks.enter_context(_after(modules[name], partial(written.__setitem__, name)))
                output = self.run(layer, number, hidden)
            self._outputs.append(output)
            stream = hidden
            for name, values in written.items():
                self._streams[name].append(stream)
                stream = stream + _by_token(values, hidden) if values.numel() == hidden.numel() else stream
            if number == 0 and writers and not _close(stream, output):
                logger.info("block %d is not the sum of its parts; its residual stream is not corrected", layer)
                writers, self._streams = [], {}

    def _writers(self, layer: int) -> list[str]:
        """Matrices that should add to the residual stream: in each part, the last one, if as wide as the stream."""
        known = {t.name: t for t in self.index.tensors}
        last = {known[n].part: n for n in self.sequence if known[n].layer == layer}
        width = self.original[0].shape[-1]
        return [n for n in self.sequence if n in last.values() and known[n].shape[0] == width]

    @torch.no_grad()
    def compare(self, tensor: TensorSpec) -> Iterable[Compared | None]:
        """Products of both streams' inputs of a matrix, batch by batch.

        None, and nothing more, where they are not the same tokens (routed experts).
        """
        self._enter_at(tensor)
        name, originals = tensor.name, self._inputs[tensor.name]
        weight = _stored(tensor, self.model.get_parameter(name)).float()  # the original's, until it is settled
        if len(originals) != len(self.quantized):
            yield None
            return
        for number, original in enumerate(originals):
            now, stream = self._reach(tensor, number)
            if now is None or now.shape != original.shape or original.shape[:2] != self.quantized[number].shape[:2]:
                yield None
                return
            lacking = self._streams[name][number] - stream if stream is not None else None
            for fold, own in self._folds(number):
                yield fold, products(now[own], original[own], None if lacking is None else lacking[own], weight)

    def _folds(self, number: int) -> Iterator[tuple[int, slice | Tensor]]:
        """The two folds' windows of a batch, where it has any: runs of `turn` windows, in turn."""
        place = torch.arange(len(self.original[number])) + (self.first + number) * self.batch
        for fold in (0, 1):
            own = (place // self.turn % 2 == fold).nonzero()[:, 0]
            if len(own):
                yield fold, slice(None) if len(own) == len(place) else own.to(self.model.device)

    def _reach(self, tensor: TensorSpec, number: int) -> tuple[Tensor | None, Tensor | None]:
        """The inputs that a matrix gets now, if it is run, and the stream that it adds to, if it does."""
        hidden = self.quantized[number]
        if tensor.layer is None:
            return self._head_input(self.model.get_output_embeddings(), hidden), None
        modules, streams = self.projections(tensor.layer), list[Tensor]()
        with ExitStack() as hooks:
            for name in self._streams:
                if name == tensor.name:
                    break
                hooks.enter_context(_after(modules[name], streams.append))
            hooks.enter_context(self._remembering(number))
            call = called_with(modules[tensor.name], partial(self.run, tensor.layer, number, hidden))
        if call is None:
            return None, None
        stream = sum((_by_token(s, hidden) for s in streams), hidden) if tensor.name in self._streams else None
        return _by_token(call[0][0], hidden), stream

    @contextmanager
    def _remembering(self, number: int) -> Iterator[None]:
        """Within, settled matrices of the block do not multiply batch `number` again: nothing before them changed."""
        modules = self.projections(self._layer) if self._layer is not None and self._settled else {}
        settled = [(modules[name], modules[name].forward, outputs) for name, outputs in self._settled.items()]
        for module, own, outputs in settled:
            module.forward = partial(_first_time, own, outputs, number)
        try:
            yield
        finally:
            for module, own, _ in settled:
                module.forward = own

    def _head_input(self, head: nn.Module, hidden: Tensor) -> Tensor:
        with replaced_blocks(self.model, self.blocks, hidden):
            call = called_with(head, partial(self.model, self.windows[: len(hidden)], use_cache=False))
        assert call is not None
        reached: Tensor = call[0][0]
        return reached

    def _bias(self, name: str) -> Tensor | None:
        owner = self.model.get_submodule(name.rpartition(".")[0])
        bias = getattr(owner, "bias", None)
        return bias.data if isinstance(bias, Tensor) else None


def _stored(tensor: TensorSpec, weight: Tensor) -> Tensor:
    """[out, in] as a layer stores it, and back."""
    return weight.T if tensor.kind == "conv1d" else weight


def _by_token(values: Tensor, hidden: Tensor) -> Tensor:
    """[windows, context, features], also where a model ran its windows as one (OPT); routed experts' are left alone."""
    tokens = hidden.shape[:-1]
    flat = values.dim() < hidden.dim() and len(values) == tokens.numel()
    return values.view(*tokens, -1) if flat else values


def _first_time(forward: Callable[..., Tensor], outputs: dict[int, Tensor], number: int, *arguments: Tensor) -> Tensor:
    if number not in outputs:
        outputs[number] = forward(*arguments)
    return outputs[number]


def _close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= RESIDUAL_TOLERANCE * float(other.abs().max())


@contextmanager
def _before(module: nn.Module, see: Callable[[Tensor], Any]) -> Iterator[None]:
    """Within, `see` gets the module's inputs."""
    handle = module.register_forward_pre_hook(lambda _, arguments: (see(arguments[0]), None)[1])
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: nn.Module, see: Callable[[Tensor], Any]) -> Iterator[None]:
    """Within, `see` gets the module's outputs."""
    handle = module.register_forward_hook(lambda _, arguments, output: (see(output), None)[1])
    try:
        yield
    finally:
        handle.remove()
