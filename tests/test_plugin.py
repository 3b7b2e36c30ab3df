"""transformers' own from_pretrained on packed directories: with the plug-in it equals `load`, without it it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, FAMILIES, VOCABULARY, Packed
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import nashswarm

PackedModels = Callable[[str, str], Packed]

METHODS = ["rtn4-g64", "market-coded-3_0", "market-tiles-3_25", "paper-nash"]
IDS = torch.arange(2 * CONTEXT).view(2, CONTEXT) * 5 % VOCABULARY


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    assert type(one) is type(other)
    assert state(one).keys() == state(other).keys()
    for name, value in state(one).items():
        assert torch.equal(value, state(other)[name]), name
        assert value.dtype == state(other)[name].dtype
    for model in (one, other):
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_is_load(
    family: str, method: str, packed: PackedModels, caplog: pytest.LogCaptureFixture
) -> None:
    directory = packed(family, method).directory
    ours = nashswarm.load(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    assert_same(ours, theirs)
    assert not theirs.training
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert not [r for r in caplog.records if r.levelname != "INFO"], caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_dequantized_models(family: str, packed: PackedModels) -> None:
    directory = packed(family, "market-coded-3_0").directory
    models = [
        AutoModelForCausalLM.from_pretrained(directory),
        nashswarm.load(directory),
        nashswarm.load(str(directory), resident="packed"),
    ]
    first, *others = (m.generate(IDS[:, :5], max_new_tokens=12, do_sample=False) for m in models)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_is_what_was_asked_for(family: str, packed: PackedModels) -> None:
    directory = packed(family, "rtn4-g64").directory
    assert AutoModelForCausalLM.from_pretrained(directory).dtype == torch.float32
    half = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert_same(half, nashswarm.load(directory, dtype=torch.bfloat16))


@pytest.mark.parametrize("resident", ["dequantized", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_again_round_trips(family: str, resident: str, packed: PackedModels, tmp_path: Path) -> None:
    directory = packed(family, "rtn4-g64").directory
    nashswarm.load(directory, resident=resident).save_pretrained(tmp_path / "again")  # type: ignore[arg-type]
    assert_same(nashswarm.load(directory), AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    if resident == "packed":
        names = {p.name for p in directory.iterdir()}
        assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == {
            n: (directory / n).read_bytes() for n in names
        }
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    theirs.save_pretrained(tmp_path / "theirs")
    assert "quantization_config" not in json.loads((tmp_path / "theirs/config.json").read_text())
    assert_same(theirs, AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"))


def test_config_and_tokenizer_load_as_before(packed: PackedModels) -> None:
    directory = packed("gpt2", "rtn4-g64").directory
    assert AutoConfig.from_pretrained(directory).model_type == "gpt2"
    assert AutoTokenizer.from_pretrained(directory)("na shi")["input_ids"]


def test_damage_is_refused_by_from_pretrained_too(packed: PackedModels, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(packed("gpt2", "rtn4-g64").directory, tmp_path / "copy")
    data = bytearray((copy / "packed.safetensors").read_bytes())
    data[-7] ^= 1
    (copy / "packed.safetensors").write_bytes(data)
    with pytest.raises(nashswarm.packed.PackedError, match="the SHA-256 is not that of the manifest"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_without_the_plug_in_nothing_is_loaded(packed: PackedModels) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "try: AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except OSError as error: print('refused:', error)\n"
    )
    command = [sys.executable, "-c", code, str(packed("gpt2", "rtn4-g64").directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: Error no file named model.safetensors")
    assert "Unknown quantization type, got nashswarm" in done.stderr


@pytest.mark.parametrize("order", ["import nashswarm, transformers", "import transformers, nashswarm"])
def test_the_order_of_imports_does_not_matter(order: str, packed: PackedModels) -> None:
    code = (
        f"import sys; {order}\nprint(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)\n"
    )
    command = [sys.executable, "-c", code, str(packed("gpt2", "rtn4-g64").directory)]
    environment = {"PYTHONPATH": str(Path(nashswarm.__file__).parents[1]), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "GPT2LMHeadModel"


def test_importing_it_brings_neither_torch_nor_transformers() -> None:
    code = "import sys, nashswarm; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    environment = {"PYTHONPATH": str(Path(nashswarm.__file__).parents[1]), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
