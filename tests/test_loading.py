"""From packed files to a model: every weight bit for bit what the quantizer meant, ties kept, baselines exact."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from conftest import CONTEXT, FAMILIES, METHODS, VOCABULARY, Models, Packed, edit_json
from forging import rearrange, relist, reseal

from nashswarm.loading import dequantized, load, load_for_evaluation
from nashswarm.models import BlockWeights, fuse, load_streamed
from nashswarm.packed import MANIFEST, PackedError, open_packed
from nashswarm.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        assert torch.equal(fuse(alone)(IDS).logits, beside(IDS).logits)
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
        assert torch.equal(loaded(IDS).logits, load_streamed(model.checkpoint.directory, model.index)(IDS).logits)


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
    with pytest.raises(PackedError, match="stores no weights; load the checkpoint"):
        load(packed("gpt2", "fp32").directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_decoded_once(family: str, packed: PackedModels, quantizable: Models) -> None:
    names = [name for name, _ in dequantized(packed(family, "nash").opened)]
    index = quantizable(family).index
    assert sorted(names) == sorted([t.name for t in index.tensors] + [v.name for v in index.vectors])


# --- forged directories: whole by their hashes, and yet not what `quantize` writes ----------------------------------

MATRIX, TABLE, HEAD = "transformer.h.0.attn.c_attn.weight", "transformer.wte.weight", "lm_head.weight"
Resident = Literal["dequantized", "packed"]
Arrays = dict[str, np.ndarray]


def copied(packed: PackedModels, method: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed("gpt2", method).directory, tmp_path / "packed"))


def drop(directory: Path, name: str) -> None:
    """Take a matrix out, and out of the count of parameters."""

    def forget(manifest: dict[str, Any]) -> None:
        manifest["provenance"]["parameters"] -= int(np.prod(manifest["tensors"].pop(name)["shape"]))

    rearrange(directory, lambda arrays: [arrays.pop(key) for key in [*arrays] if key.startswith(name)])
    reseal(directory, forget)


def repeat(directory: Path, name: str, other: str) -> None:
    """The arrays of one matrix once more under another name."""

    def note(manifest: dict[str, Any]) -> None:
        manifest["tensors"][other] = manifest["tensors"][name]
        manifest["provenance"]["parameters"] += int(np.prod(manifest["tensors"][name]["shape"]))

    rearrange(directory, lambda a: a.update({k.replace(name, other): v for k, v in a.items() if k.startswith(name)}))
    reseal(directory, note)


@pytest.mark.parametrize("resident", ["dequantized", "packed"])
@pytest.mark.parametrize("name", [MATRIX, TABLE])
def test_a_parameter_without_weights_is_refused(
    name: str, resident: Resident, packed: PackedModels, tmp_path: Path
) -> None:
    directory = copied(packed, "rtn4-g64", tmp_path)
    drop(directory, name)
    open_packed(directory)  # it is only the model that knows
    with pytest.raises(InputError, match=f"no weights came for {name}"):
        load(directory, resident=resident)


@pytest.mark.parametrize(
    ("resident", "says"), [("dequantized", f"weights for {TABLE} came twice"), ("packed", f"no parameter {HEAD}")]
)
def test_a_tied_matrix_with_weights_for_both_names_is_refused(
    resident: Resident, says: str, packed: PackedModels, tmp_path: Path
) -> None:
    directory = copied(packed, "rtn4-g64", tmp_path)
    repeat(directory, TABLE, HEAD)
    with pytest.raises(InputError, match=says):
        load(directory, resident=resident)


@pytest.mark.parametrize("resident", ["dequantized", "packed"])
def test_a_matrix_of_another_model_is_refused(resident: Resident, packed: PackedModels, tmp_path: Path) -> None:
    directory = copied(packed, "rtn4-g64", tmp_path)
    repeat(directory, MATRIX, "transformer.h.7.attn.c_attn.weight")
    with pytest.raises(InputError, match=r"config\.json describes a model that has no parameter transformer\.h\.7"):
        load(directory, resident=resident)


@pytest.mark.parametrize("resident", ["dequantized", "packed"])
@pytest.mark.parametrize("changes", [{"vocab_size": VOCABULARY + 1}, {"n_inner": 100}])
def test_shapes_that_are_not_the_configs_are_refused(
    changes: dict[str, int], resident: Resident, packed: PackedModels, tmp_path: Path
) -> None:
    directory = copied(packed, "rtn4-g64", tmp_path)
    edit_json(directory / "config.json", **changes)
    relist(directory, "config.json")
    with pytest.raises(InputError, match=r"has shape \[.*, but config\.json says"):
        load(directory, resident=resident)(IDS)


# Method -> what stands for one matrix: its parts, and those that all matrices have in common.
PARTS = {
    "uniform4": ("codes", "scales"),
    "nash": ("codes", "scales", "map", "tables"),
    "rtn4-g64": ("codes", "scales", "zeros"),
    "gptq3-g128": ("codes", "scales", "zeros"),
    "market-tiles-2_5": ("codes", "scales", "map"),
    "market-coded-3_0": ("codes", "shared.tables", "shared.scales"),
    "paper-uniform4": ("codes",),  # kept
}
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cut": lambda a: a.reshape(-1)[:-1],
    "longer": lambda a: np.append(a.reshape(-1), a.reshape(-1)[:1]),
    "empty": lambda a: a.reshape(-1)[:0],
    "of one dimension more": lambda a: a[None],
    "of another dtype": lambda a: a.astype(np.int32),
}


def refused(directory: Path, says: str) -> None:
    opened = open_packed(directory)
    with pytest.raises(PackedError, match=rf"manifest\.json: .*{says}"):
        list(dequantized(opened))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("method", "part"), [(m, part) for m, parts in PARTS.items() for part in parts])
def test_arrays_that_the_codec_cannot_have_written_are_refused(
    method: str, part: str, form: str, packed: PackedModels, tmp_path: Path
) -> None:
    directory = copied(packed, method, tmp_path)
    key = part if part.startswith("shared.") else f"{MATRIX}.{part}"
    rearrange(directory, lambda arrays: arrays.update({key: FORMS[form](arrays[key])}))
    refused(directory, "")


@pytest.mark.parametrize(("method", "part"), [(m, part) for m, parts in PARTS.items() for part in parts])
def test_arrays_that_are_missing_are_refused(method: str, part: str, packed: PackedModels, tmp_path: Path) -> None:
    if part == "zeros":
        pytest.skip("a symmetric grid stores none")
    directory = copied(packed, method, tmp_path)
    key = part if part.startswith("shared.") else f"{MATRIX}.{part}"
    rearrange(directory, lambda arrays: arrays.pop(key))
    refused(directory, part.removeprefix("shared."))


@pytest.mark.parametrize("key", [f"{MATRIX}.x", "shared.x"])
@pytest.mark.parametrize("method", PARTS)
def test_arrays_that_no_codec_knows_are_refused(method: str, key: str, packed: PackedModels, tmp_path: Path) -> None:
    """They would be counted, and used by nobody."""
    directory = copied(packed, method, tmp_path)
    rearrange(directory, lambda arrays: arrays.update({key: np.zeros(3, np.uint8)}))
    refused(directory, "stores .*, but here are .*x")


@pytest.mark.parametrize("value", [..., 0.5, 2**62, -1, "more"])
@pytest.mark.parametrize("method", PARTS)
def test_numbers_that_the_codec_cannot_have_written_are_refused(
    method: str, value: object, packed: PackedModels, tmp_path: Path
) -> None:
    """Each number of a matrix in turn: taken out, no integer, out of all bounds; or one that is not the codec's."""
    directory = copied(packed, method, tmp_path)
    entry = json.loads((directory / MANIFEST).read_bytes())["tensors"][MATRIX]
    numbers = ["more"] if value == "more" else sorted(entry.keys() - {"codec", "shape"})
    assert numbers
    for key in numbers:
        if (key, value) in {("group", 2**62), ("base", -1)}:
            continue  # as good as any: a group may be longer than its row, a step have any small exponent
        changed = {k: v for k, v in entry.items() if k != key} | ({} if value is ... else {key: value})
        changed = {k: 3 if v == "more" else v for k, v in changed.items()}
        reseal(directory, lambda manifest, new=changed: manifest["tensors"].update({MATRIX: new}))  # type: ignore[misc]
        refused(directory, "")


@pytest.mark.parametrize("codec", ["nothing", "../kept", "__init__", "json", "source", "classes"])
def test_codecs_that_are_none_or_another_are_refused(codec: str, packed: PackedModels, tmp_path: Path) -> None:
    directory = copied(packed, "rtn4-g64", tmp_path)
    reseal(directory, lambda manifest: manifest["tensors"][MATRIX].update(codec=codec))
    refused(directory, "")


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("method", ["uniform4", "nash", "rtn4-g64", "gptq3-g128", "paper-uniform4"])
def test_weights_that_are_not_finite_are_refused(
    method: str, value: float, place: int, packed: PackedModels, tmp_path: Path
) -> None:
    directory = copied(packed, method, tmp_path)

    def spoil(arrays: Arrays) -> None:
        key = f"{MATRIX}.{'codes' if method == 'paper-uniform4' else 'scales'}"
        array = arrays[key].copy()
        numbers = array.view(np.float16) if array.dtype == np.uint16 else array
        numbers.reshape(-1)[place] = value
        arrays[key] = array

    rearrange(directory, spoil)
    refused(directory, "not finite")


def test_steps_beyond_float32_are_refused(packed: PackedModels, tmp_path: Path) -> None:
    directory = copied(packed, "market-coded-3_0", tmp_path)
    reseal(directory, lambda manifest: manifest["tensors"][MATRIX].update(base=200 << 16))
    refused(directory, "weights that are not finite were decoded")


def test_a_vector_that_is_not_finite_is_refused(packed: PackedModels, tmp_path: Path) -> None:
    directory = copied(packed, "rtn4-g64", tmp_path)
    rearrange(directory, lambda arrays: arrays.update(vectors=np.full_like(arrays["vectors"], np.inf)))
    with pytest.raises(PackedError, match=r"packed\.safetensors: vectors hold values that are not finite"):
        open_packed(directory)


def test_a_width_beyond_all_memory_takes_none(packed: PackedModels, tmp_path: Path) -> None:
    """2^(2^31) as an integer takes 256 MiB and seconds; it once was computed before it was checked."""
    directory = copied(packed, "gptq3-g128", tmp_path)
    reseal(directory, lambda manifest: manifest["tensors"][MATRIX].update(bits=2**31 - 1))
    refused(directory, "bits is 2147483647, expected one of 2, 3, 4, 8")
