"""From packed files to a model: every weight bit for bit what the quantizer meant, ties kept, baselines exact."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from conftest import CONTEXT, FAMILIES, PROJECT, VOCABULARY, Models, Packed

from nashswarm.loading import dequantized, load, load_for_evaluation
from nashswarm.models import BlockWeights, load_original
from nashswarm.types import InputError, NashSwarmError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = list(yaml.safe_load((PROJECT / "params.yaml").read_text())["methods"])
IDS = torch.arange(2 * CONTEXT).view(2, CONTEXT) * 5 % VOCABULARY

PackedModels = Callable[[str, str], Packed]


def held(model: PreTrainedModel) -> PreTrainedModel:
    """With every block's weights in memory."""
    for module in model.modules():
        if isinstance(weights := getattr(module, "streamed", None), BlockWeights):
            weights.hold()
    return model


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_weights_are_the_quantizers_bit_for_bit(
    family: str, method: str, packed: PackedModels, quantizable: Models
) -> None:
    made, model = packed(family, method), quantizable(family)
    loaded = held(load_for_evaluation(made.opened, model.checkpoint.directory, model.index))
    stores = made.method.codec != "source"
    for spec in model.index.tensors:
        expected = made.meant[spec.name] if stores else model.checkpoint.tensor(spec)
        own = loaded.get_parameter(spec.name)
        assert torch.equal(own.T if spec.kind == "conv1d" else own, expected), spec.name
        for other in spec.tied:
            assert loaded.get_parameter(other) is own
    for vector in model.index.vectors:
        exact = model.checkpoint.vector(vector)
        meant = torch.from_numpy(made.vectors[vector.name]).half().float() if stores else exact
        assert torch.equal(loaded.get_parameter(vector.name), meant), vector.name
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert not loaded.training


@pytest.mark.parametrize("method", ["rtn4-g64", "paper-nash"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_directory_is_all_that_load_needs(
    family: str, method: str, packed: PackedModels, quantizable: Models
) -> None:
    made, model = packed(family, method), quantizable(family)
    alone = load(made.directory)
    beside = load_for_evaluation(made.opened, model.checkpoint.directory, model.index)
    with torch.inference_mode():
        assert torch.equal(alone(IDS).logits, beside(IDS).logits)
    assert alone.num_parameters() == model.index.parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_stays_tied(family: str, packed: PackedModels) -> None:
    loaded = load(packed(family, "rtn4-g64").directory)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (family != "llama")


def test_the_baseline_is_the_checkpoint_itself(packed: PackedModels, quantizable: Models) -> None:
    model = quantizable("gpt2")
    loaded = load_for_evaluation(packed("gpt2", "fp32").opened, model.checkpoint.directory, model.index)
    with torch.inference_mode():
        assert torch.equal(loaded(IDS).logits, load_original(model.checkpoint.directory, model.index)(IDS).logits)


@pytest.mark.parametrize("kind", ["tensors", "vectors"])
def test_weights_of_another_model_are_not_measured_as_this_ones(
    kind: str, packed: PackedModels, quantizable: Models
) -> None:
    made, model = packed("gpt2", "rtn4-g64").opened, quantizable("gpt2")
    name = next(iter(getattr(made, kind)))
    less = dataclasses.replace(made, **{kind: {n: v for n, v in getattr(made, kind).items() if n != name}})
    with pytest.raises(InputError, match=rf"{re.escape(name)} has shape None, but .* says \("):
        load_for_evaluation(less, model.checkpoint.directory, model.index)


def test_a_baseline_cannot_be_loaded_alone(packed: PackedModels) -> None:
    with pytest.raises(NashSwarmError, match="stores no weights; load the checkpoint"):
        load(packed("gpt2", "fp32").directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_decoded_once(family: str, packed: PackedModels, quantizable: Models) -> None:
    names = [name for name, _ in dequantized(packed(family, "nash").opened)]
    index = quantizable(family).index
    assert sorted(names) == sorted([t.name for t in index.tensors] + [v.name for v in index.vectors])
