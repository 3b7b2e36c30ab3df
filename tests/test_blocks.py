"""A model cut at its blocks: windows, what a block is, and that running it alone is what the model does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from conftest import CONTEXT, FAMILIES, VOCABULARY, Models
from torch import Tensor

from nashswarm.blocks import Blocks, replaced_blocks
from nashswarm.models import load_original
from nashswarm.streams import Streams
from nashswarm.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nashswarm.quantize import Model

IDS = np.random.default_rng(0).integers(0, VOCABULARY, 10 * CONTEXT + 5).astype(np.int32)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, quantizable: Models) -> Model:
    return quantizable(request.param)


def original(model: Model) -> PreTrainedModel:
    return load_original(model.checkpoint.directory, model.index)


@pytest.mark.parametrize(
    ("given", "tokens", "windows"),
    [(10 * CONTEXT + 5, 10**6, 10), (10 * CONTEXT, 4 * CONTEXT + 1, 4), (CONTEXT, 10**6, 1), (CONTEXT + 9, 1, 1)],
)
def test_text_is_cut_into_whole_windows_at_least_one(
    given: int, tokens: int, windows: int, quantizable: Models
) -> None:
    model = quantizable("gpt2")
    blocks = Blocks.prepare(original(model), model.index, IDS[:given], tokens, 3 * CONTEXT)
    assert torch.equal(blocks.windows.flatten(), torch.from_numpy(IDS[: windows * CONTEXT]).long())
    assert blocks.windows.shape == (windows, CONTEXT)
    assert torch.equal(torch.cat([blocks.windows[b] for b in blocks.batches()]), blocks.windows)
    assert all(len(blocks.windows[b]) <= 3 for b in blocks.batches())


@pytest.mark.parametrize("tokens", [0, CONTEXT - 1])
def test_too_little_text_is_refused(tokens: int, quantizable: Models) -> None:
    model = quantizable("gpt2")
    with pytest.raises(InputError, match=f"{tokens} calibration tokens do not fill one window of {CONTEXT}"):
        Blocks.prepare(original(model), model.index, IDS[:tokens], 10**6, 64)


def test_a_pass_holds_at_least_one_window(quantizable: Models) -> None:
    model = quantizable("gpt2")
    assert Blocks.prepare(original(model), model.index, IDS, 10**6, 1).batch == 1


@torch.no_grad()
def test_blocks_run_alone_are_the_model(model: Model) -> None:
    """From the first block's input through all blocks, batch by batch, and through what follows them."""
    walk = Streams.prepare(original(model), model.index, IDS, 10**6, 4 * CONTEXT)
    expected = walk.model(walk.windows, use_cache=False).logits
    walk.start()
    for number, batch in enumerate(walk.batches()):
        hidden = walk.original[number]
        for layer in range(len(walk.blocks)):
            hidden = walk.run(layer, number, hidden)
        with replaced_blocks(walk.model, walk.blocks, hidden):
            found = walk.model(walk.windows[batch], use_cache=False).logits
        torch.testing.assert_close(found, expected[batch], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blocks_come_back_even_after_an_error(model: Model) -> None:
    blocks = Blocks.prepare(original(model), model.index, IDS, CONTEXT, CONTEXT)
    expected = blocks.model(blocks.windows).logits
    nothing = torch.zeros(1, CONTEXT, blocks.model.config.hidden_size)

    def fail() -> None:
        with replaced_blocks(blocks.model, blocks.blocks, nothing):
            assert not torch.equal(blocks.model(blocks.windows).logits, expected)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(blocks.model(blocks.windows).logits, expected)


def test_a_blocks_projections_are_its_matrices(model: Model) -> None:
    blocks = Blocks.prepare(original(model), model.index, IDS, CONTEXT, CONTEXT)
    for layer in range(model.index.layers):
        found = blocks.projections(layer)
        assert set(found) == {t.name for t in model.index.tensors if t.layer == layer}
        for name, module in found.items():
            weight: Tensor = module.weight  # type: ignore[assignment]
            assert weight is blocks.model.get_parameter(name)


def test_a_tied_head_goes_by_the_canonical_name(model: Model) -> None:
    blocks = Blocks.prepare(original(model), model.index, IDS, CONTEXT, CONTEXT)
    assert blocks.name_of(blocks.model.get_output_embeddings()) == model.index.head
