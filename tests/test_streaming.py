"""Models whose blocks are in memory one at a time: the same statistics and aims, bit for bit, and no second block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import FAMILIES, VOCABULARY, Models, Packed, no_progress
from torch import Tensor
from transformers import PreTrainedModel

from nashswarm.blocks import Blocks, outputs_by_block
from nashswarm.config import Scoring
from nashswarm.loading import load, load_for_evaluation
from nashswarm.models import BlockWeights, fuse, load_original, load_streamed
from nashswarm.propagation import Propagation
from nashswarm.quantize import Model
from nashswarm.statistics import gather
from nashswarm.streams import Streams

PackedModels = Callable[[str, str], Packed]

IDS = np.random.default_rng(0).integers(0, VOCABULARY, 700).astype(np.int32)
SCORING = Scoring(tokens=512, batch_tokens=128)


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many blocks were in memory together at most."""
    resident: set[int] = set()
    counts = [0]
    hold, forget = BlockWeights.hold, BlockWeights._forget

    def watch_hold(self: BlockWeights) -> None:
        resident.add(id(self))
        counts.append(len(resident))
        hold(self)

    def watch_forget(self: BlockWeights) -> None:
        resident.discard(id(self))
        forget(self)

    monkeypatch.setattr(BlockWeights, "hold", watch_hold)
    monkeypatch.setattr(BlockWeights, "_forget", watch_forget)
    return lambda: max(counts)


def both(model: Model) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The original streamed, and as a whole."""
    place = model.checkpoint.directory, model.index
    return load_streamed(*place), fuse(load_original(*place))


def in_blocks(model: Model, loaded: torch.nn.Module) -> list[Tensor]:
    return [loaded.get_parameter(t.name) for t in model.index.tensors if t.layer is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_originals(family: str, quantizable: Models) -> None:
    model = quantizable(family)
    windows = torch.from_numpy(IDS[:64].astype(np.int64)).view(2, -1)
    streamed, original = both(model)
    with torch.inference_mode():
        assert torch.equal(streamed(windows).logits, original(windows).logits)
    assert all(bool(p.isnan().all()) for p in in_blocks(model, streamed))
    assert sum(p.untyped_storage().nbytes() for p in in_blocks(model, streamed)) == 4 * len(in_blocks(model, streamed))


@pytest.mark.parametrize("method", ["fp32", "rtn4-g64", "nash"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_holds_one_block(
    family: str, method: str, packed: PackedModels, quantizable: Models, most: Callable[[], int]
) -> None:
    made, model = packed(family, method), quantizable(family)
    streamed = load_for_evaluation(made.opened, model.checkpoint.directory, model.index)
    batches = [{"input_ids": torch.from_numpy(IDS[i : i + 64].astype(np.int64)).view(2, -1)} for i in (0, 64)]
    found = outputs_by_block(streamed, batches, no_progress)
    assert most() == 1
    stored = method != "fp32"
    whole = fuse(load(made.directory)) if stored else both(model)[1]
    with torch.inference_mode():
        for states, batch in zip(found, batches, strict=True):
            assert torch.equal(states, whole.base_model(**batch)[0])
    assert all(bool(p.isnan().all()) for p in in_blocks(model, streamed))


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_the_originals(family: str, quantizable: Models, most: Callable[[], int]) -> None:
    model = quantizable(family)
    streamed, original = both(model)
    found = {t.name: s for t, s in gather(lambda: streamed, model.index, IDS, SCORING, no_progress)}
    assert most() == 1
    for tensor, expected in gather(lambda: original, model.index, IDS, SCORING, no_progress):
        for field in expected.__dataclass_fields__:
            one, other = getattr(found[tensor.name], field), getattr(expected, field)
            assert (one is None and other is None) or np.array_equal(one, other), (tensor.name, field)


@pytest.mark.parametrize("family", FAMILIES)
def test_aims_are_the_originals(family: str, quantizable: Models, most: Callable[[], int]) -> None:
    model = quantizable(family)
    streams = [Streams.prepare(loaded, model.index, IDS, 512, 128) for loaded in both(model)]
    for own in streams:
        own.start()
    walks = [Propagation(own) for own in streams]
    for tensor in walks[0].order():
        weight = model.checkpoint.tensor(tensor)
        aims = [walk.aim(tensor, weight) for walk in walks]
        assert torch.equal(aims[0].weight, aims[1].weight), tensor.name
        rounded = (aims[0].weight * 4).round() / 4
        for walk in walks:
            walk.settle(tensor, rounded)
    for vector in model.index.vectors:
        assert np.array_equal(walks[0].vector(vector.name), walks[1].vector(vector.name)), vector.name
    assert most() == 1


def test_a_run_that_breaks_off_leaves_no_block_in_memory(quantizable: Models) -> None:
    model = quantizable("gpt2")
    loaded = load_streamed(model.checkpoint.directory, model.index)
    blocks = Blocks.prepare(loaded, model.index, IDS, 512, 128)

    def stop(*_: object) -> None:
        raise RuntimeError("stop")

    blocks.blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        loaded(blocks.windows)
    assert all(bool(p.isnan().all()) for p in in_blocks(model, loaded))
