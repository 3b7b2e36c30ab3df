"""A model taken apart at its transformer blocks, so that each can be run alone on hidden states that were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from nashswarm.models import BlockWeights, block_path
from nashswarm.types import InputError, ModelIndex, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Blocks:
    """A float32 model, its blocks, and the calibration windows on which they run."""

    model: PreTrainedModel
    index: ModelIndex
    windows: Tensor  # int64 [windows, context]
    batch: int  # windows per pass
    blocks: nn.ModuleList
    _calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)  # beside hidden states
    _held: int | None = None  # the block that `enter` holds

    @classmethod
    def prepare(
        cls, model: PreTrainedModel, index: ModelIndex, ids: np.ndarray, tokens: int, batch_tokens: int
    ) -> Self:
        """Take the model apart; windows as `calibration_windows` cuts them."""
        windows, batch = calibration_windows(index, ids, tokens, batch_tokens)
        blocks = model.get_submodule(block_path(model))
        assert isinstance(blocks, nn.ModuleList)
        return cls(model, index, windows.to(model.device), batch, blocks)

    def batches(self) -> list[slice]:
        """Of windows."""
        return batches_of(len(self.windows), self.batch)

    def hold(self, layer: int) -> None:
        """Keep a block's weights in memory until `drop`, where the model is one whose blocks are streamed."""
        if weights := _streamed(self.blocks[layer]):
            weights.hold()

    def drop(self, layer: int) -> None:
        """The opposite of `hold`."""
        if weights := _streamed(self.blocks[layer]):
            weights.drop()

    def enter(self, layer: int | None) -> None:
        """Hold this block and no other."""
        if not self._calls:
            self.embedded()
        if layer != self._held:
            if self._held is not None:
                self.drop(self._held)
            if layer is not None:
                self.hold(layer)
            self._held = layer

    def run(self, layer: int, number: int, hidden: Tensor) -> Tensor:
        """The output of a block for batch `number`: [windows, context, width] -> the same."""
        arguments, keywords = self._calls[number]
        return _first(self.blocks[layer](hidden, *arguments, **keywords))

    @torch.no_grad()
    def embedded(self) -> list[Tensor]:
        """What the first block is given for each batch; what else blocks are called with is kept."""
        found, self._calls = [], []
        for number in range(len(self.batches())):
            hidden, others, keywords = self.called(number)
            self._calls.append((others, keywords))
            found.append(hidden)
        return found

    @torch.no_grad()
    def called(self, number: int) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """What the first block is called with for a batch: hidden states, a copy, and what goes with them."""
        windows = self.windows[self.batches()[number]]
        call = called_with(self.blocks[0], partial(self.model.base_model, windows, use_cache=False))
        assert call is not None
        (hidden, *others), keywords = call
        return hidden.clone(), tuple(others), keywords

    def name_of(self, module: nn.Module) -> str:
        """The canonical name of a module's weight."""
        return self.names[id(module.weight)]

    def projections(self, layer: int) -> dict[str, nn.Module]:
        """The matrices of a block that multiply vectors, by name."""
        return {self.name_of(m): m for m in self.blocks[layer].modules() if is_projection(m)}

    @cached_property
    def names(self) -> dict[int, str]:
        """Identity of each matrix -> its name."""
        return {id(self.model.get_parameter(t.name)): t.name for t in self.index.tensors}


def calibration_windows(index: ModelIndex, ids: np.ndarray, tokens: int, batch_tokens: int) -> tuple[Tensor, int]:
    """At most `tokens` of `ids`, int32, as whole windows, int64 [windows, context], at least one; windows per pass.

    Raises InputError for too few.
    """
    context = index.calibration_window
    count = min(ids.size, tokens) // context or min(1, ids.size // context)
    if not count:
        raise InputError(f"{ids.size} calibration tokens do not fill one window of {context}; give more text")
    windows = torch.from_numpy(ids[: count * context].astype(np.int64)).view(count, context)
    return windows, max(1, batch_tokens // context)


def batches_of(windows: int, batch: int) -> list[slice]:
    """Slices of `batch` windows, the last one of what is left."""
    return [slice(i, i + batch) for i in range(0, windows, batch)]


def outputs_by_block(
    model: PreTrainedModel, inputs: Sequence[Mapping[str, Tensor]], progress: Progress
) -> list[Tensor]:
    """What the model makes of each batch, before its head; a block at a time, so that a streamed one is read once.

    Arguments: `inputs`, of the model: ids and the like, int64 [windows, tokens]. Returns float32 [windows, tokens,
    width] of each, on the model's device, bit for bit what `model.base_model` gives.
    """
    blocks = model.get_submodule(block_path(model))
    assert isinstance(blocks, nn.ModuleList)
    placed = [{name: values.to(model.device) for name, values in batch.items()} for batch in inputs]
    states, calls = [], []
    with torch.inference_mode():
        with _held(blocks[0]):
            for batch in placed:
                call = called_with(blocks[0], partial(model.base_model, **batch, use_cache=False))
                assert call is not None
                (state, *arguments), keywords = call
                states.append(state)
                calls.append((arguments, keywords))
        for layer in progress(range(len(blocks)), "layers"):
            with _held(blocks[layer]):
                for number, (arguments, keywords) in enumerate(calls):
                    states[number] = _first(blocks[layer](states[number], *arguments, **keywords))
        for number, batch in enumerate(placed):
            with replaced_blocks(model, blocks, states[number]):
                states[number] = model.base_model(**batch, use_cache=False)[0]
    return states


def _streamed(block: nn.Module) -> BlockWeights | None:
    weights = getattr(block, "streamed", None)
    return weights if isinstance(weights, BlockWeights) else None


@contextmanager
def _held(block: nn.Module) -> Iterator[None]:
    weights = _streamed(block)
    if weights:
        weights.hold()
    try:
        yield
    finally:
        if weights:
            weights.drop()


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def is_projection(module: nn.Module) -> bool:
    """Whether the module is y = W x."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class _Stub(nn.Module):
    """Stands in for all blocks: returns what they returned."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **keywords: Any) -> Tensor:
        return self.output


@contextmanager
def replaced_blocks(model: nn.Module, blocks: nn.ModuleList, output: Tensor) -> Iterator[None]:
    """Within, the model's blocks do nothing but return `output`."""
    path, _, leaf = block_path(model).rpartition(".")
    owner = model.get_submodule(path)
    setattr(owner, leaf, nn.ModuleList([_Stub(output)]))
    try:
        yield
    finally:
        setattr(owner, leaf, blocks)


class _Reached(Exception):
    """Ends a forward pass where nothing behind is needed."""


def called_with(module: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What `run` calls a module with, if it gets there; nothing behind that is run."""
    found = []

    def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append((arguments, keywords))
        raise _Reached

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_Reached):
            run()
    finally:
        handle.remove()
    return found[0] if found else None
