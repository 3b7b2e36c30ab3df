"""Checkpoints: what a model's matrices are, what is read of them, and every directory that is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, FAMILIES, VOCABULARY, WIDTH, Checkpoints, edit_json, no_progress, tiny_config
from safetensors.torch import load_file, save_file

from nashswarm import models
from nashswarm.metrics import claimed_figures
from nashswarm.models import (
    Checkpoint,
    check_finite,
    checkpoint_files,
    context_of,
    describe,
    load_model,
    load_original,
    load_streamed,
    load_tokenizer,
)
from nashswarm.types import InputError, ModelIndex, TensorSpec

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(checkpoint: Checkpoints, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint that a test may damage."""

    def make(family: str = "gpt2", sharded: bool = False) -> Path:
        return shutil.copytree(checkpoint(family, sharded=sharded), tmp_path / "model")

    return make


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace the weights of a copy by changed ones."""
    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS, metadata={"format": "pt"})


def by_name(index: ModelIndex) -> dict[str, TensorSpec]:
    return {t.name: t for t in index.tensors}


# --- what a model has ----------------------------------------------------------------------------------------------


def test_gpt2_has_conv1d_in_canonical_orientation_and_one_tied_matrix(checkpoint: Checkpoints) -> None:
    index = describe(checkpoint("gpt2"))
    tensors = by_name(index)
    assert index.architecture == "GPT2LMHeadModel"
    assert (index.context, index.vocabulary, index.layers) == (CONTEXT, VOCABULARY, 2)
    assert index.head == "transformer.wte.weight"
    attention = tensors["transformer.h.1.attn.c_attn.weight"]
    assert attention == TensorSpec(attention.name, (3 * WIDTH, WIDTH), "conv1d", "attention", 1)
    projection = tensors["transformer.h.0.mlp.c_proj.weight"]
    assert projection == TensorSpec(projection.name, (WIDTH, 4 * WIDTH), "conv1d", "mlp", 0)
    tied = tensors["transformer.wte.weight"]
    assert tied == TensorSpec(
        tied.name, (VOCABULARY, WIDTH), "embedding", "embedding", None, tied=("lm_head.weight",), linear=True
    )
    positions = tensors["transformer.wpe.weight"]
    assert positions == TensorSpec(positions.name, (CONTEXT, WIDTH), "embedding", "embedding", None)
    assert len(index.tensors) == 2 + 2 * 4
    assert {v.name: v.shape for v in index.vectors}["transformer.h.0.attn.c_attn.bias"] == (3 * WIDTH,)


def test_opt_has_linears_a_tied_matrix_and_offset_positions(checkpoint: Checkpoints) -> None:
    index = describe(checkpoint("opt"))
    tensors = by_name(index)
    assert index.head == "model.decoder.embed_tokens.weight"
    assert tensors[index.head].tied == ("lm_head.weight",)
    assert tensors["model.decoder.embed_positions.weight"].shape == (CONTEXT + 2, WIDTH)
    query = tensors["model.decoder.layers.1.self_attn.q_proj.weight"]
    assert query == TensorSpec(query.name, (WIDTH, WIDTH), "linear", "attention", 1, linear=True)
    up = tensors["model.decoder.layers.0.fc1.weight"]
    assert up == TensorSpec(up.name, (100, WIDTH), "linear", "mlp", 0, linear=True)


def test_llama_has_a_head_of_its_own_and_grouped_queries(checkpoint: Checkpoints) -> None:
    index = describe(checkpoint("llama"))
    tensors = by_name(index)
    assert index.head == "lm_head.weight"
    assert tensors["lm_head.weight"] == TensorSpec(
        "lm_head.weight", (VOCABULARY, WIDTH), "linear", "head", None, linear=True
    )
    table = tensors["model.embed_tokens.weight"]
    assert table == TensorSpec(table.name, (VOCABULARY, WIDTH), "embedding", "embedding", None)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (WIDTH // 2, WIDTH)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (WIDTH, 100)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_transformers_does(family: str, checkpoint: Checkpoints) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    assert describe(checkpoint(family)).parameters == model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_scope_linear_is_what_isinstance_finds(family: str, checkpoint: Checkpoints) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    found = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    index = describe(checkpoint(family))
    assert {id(model.get_parameter(t.name)) for t in index.scope("linear")} == found
    assert index.scope("all") == index.tensors
    if family == "gpt2":
        assert [t.name for t in index.scope("linear")] == ["transformer.wte.weight"]


# The paper's table: parameters of GPT-2 by its published shapes, MiB in float32 and of the head at 4 bits.
GPT2 = {
    "gpt2": (768, 12, 12, 124_439_808, "474.70", "18.40"),
    "gpt2-medium": (1024, 24, 16, 354_823_168, "1353.54", "24.54"),
    "gpt2-large": (1280, 36, 20, 774_030_080, "2952.69", "30.67"),
    "gpt2-xl": (1600, 48, 25, 1_557_611_200, "5941.82", "38.34"),
}


@pytest.mark.parametrize("name", GPT2)
def test_the_papers_sizes_come_out_for_true_shapes(name: str, tmp_path: Path) -> None:
    width, layers, heads, parameters, fp32, uniform4 = GPT2[name]
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": width, "n_layer": layers, "n_head": heads}))
    index = describe(tmp_path)
    assert index.parameters == parameters
    assert f"{claimed_figures({32: index.parameters})['claimed_mib']:.2f}" == fp32
    touched = {4: sum(t.weights for t in index.scope("linear"))}
    assert f"{claimed_figures(touched)['claimed_mib']:.2f}" == uniform4
    assert claimed_figures(touched)["claimed_compression"] == 0.875


# --- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_read_in_canonical_orientation(family: str, checkpoint: Checkpoints) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    directory = checkpoint(family)
    model, index = AutoModelForCausalLM.from_pretrained(directory), describe(directory)
    reader = Checkpoint.open(directory, index)
    for spec in index.tensors:
        weight, stored = reader.tensor(spec), model.get_parameter(spec.name)
        conv1d = isinstance(model.get_submodule(spec.name.rpartition(".")[0]), Conv1D)
        assert spec.kind == "conv1d" or not conv1d
        assert weight.dtype == torch.float32
        assert weight.is_contiguous()
        assert tuple(weight.shape) == spec.shape
        assert torch.equal(weight, stored.T if conv1d else stored)
    for vector in index.vectors:
        assert torch.equal(reader.vector(vector), model.get_parameter(vector.name))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_floats_are_read_exactly(dtype: str, checkpoint: Checkpoints) -> None:
    wide, narrow = checkpoint("llama"), checkpoint("llama", dtype)
    index = describe(narrow)
    for spec in index.tensors:
        exact = Checkpoint.open(wide, index).tensor(spec).to(getattr(torch, dtype)).float()
        assert torch.equal(Checkpoint.open(narrow, index).tensor(spec), exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_hold_what_a_single_file_holds(family: str, checkpoint: Checkpoints) -> None:
    single, sharded = checkpoint(family), checkpoint(family, sharded=True)
    shards = [n for n in checkpoint_files(sharded) if n.endswith(".safetensors")]
    assert len(shards) > 1
    assert INDEX in checkpoint_files(sharded)
    assert describe(sharded) == describe(single)
    one, many = (Checkpoint.open(d, describe(single)) for d in (single, sharded))
    assert one.keys.keys() == many.keys.keys()
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.keys)


def test_files_are_weights_and_companions_alone(copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / "training_args.bin").write_bytes(b"pickle")
    (directory / "notes.md").write_text("x")
    names = checkpoint_files(directory)
    assert {WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    assert list(names) == sorted(names)
    assert not {"training_args.bin", "notes.md"} & set(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_without_the_base_prefix_load(
    family: str, copy: Callable[..., Path], checkpoint: Checkpoints
) -> None:
    """As the hub's gpt2: "h.0.ln_1.weight", and causal masks that are no parameters."""
    directory = copy(family)
    prefix = "transformer." if family == "gpt2" else "model."
    extra = {"h.0.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT)}
    rewrite(directory, lambda weights: {k.removeprefix(prefix): v for k, v in weights.items()} | extra)
    index = describe(directory)
    bare, whole = Checkpoint.open(directory, index), Checkpoint.open(checkpoint(family), index)
    assert all(torch.equal(bare.read(name), whole.read(name)) for name in whole.keys)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_original_says_what_transformers_says(family: str, dtype: str, checkpoint: Checkpoints) -> None:
    from transformers import AutoModelForCausalLM

    directory = checkpoint(family, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = load_original(directory, describe(directory))
    ids = torch.arange(2 * CONTEXT).view(2, CONTEXT) * 7 % VOCABULARY
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    head, table = ours.get_output_embeddings().weight, ours.get_input_embeddings().weight
    assert (head is table) == (family != "llama")


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast", "gelu", "relu"])
def test_a_streamed_model_takes_gelu_in_one_step(activation: str, copy: Callable[..., Path]) -> None:
    directory = copy("gpt2")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"activation_function": activation}))
    index = describe(directory)
    theirs, ours = load_original(directory, index), load_streamed(directory, index)
    fused = [m for m in ours.modules() if isinstance(m, torch.nn.GELU)]
    assert len(fused) == (index.layers if activation in ("gelu_new", "gelu_fast") else 0)
    ids = torch.arange(2 * CONTEXT).view(2, CONTEXT) * 7 % VOCABULARY
    with torch.inference_mode():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such model directory; check `path` under `models`"):
        checkpoint_files(tmp_path / "nowhere")


def test_a_directory_without_config_is_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: missing"):
        checkpoint_files(directory)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(text: str, copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
        checkpoint_files(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.ckpt", "model.pth"])
def test_pickled_weights_are_refused(name: str, copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / WEIGHTS).rename(directory / name)
    with pytest.raises(InputError, match=rf"only pickled weights \({name}\).*safe_serialization"):
        checkpoint_files(directory)


def test_a_directory_without_weights_is_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        checkpoint_files(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(name: str, copy: Callable[..., Path]) -> None:
    directory = copy()
    edit_json(directory / name, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(InputError, match=rf"/{name}: `auto_map` asks to run code"):
        checkpoint_files(directory)


@pytest.mark.parametrize("name", [WEIGHTS, INDEX, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("inside", [False, True])
def test_links_may_not_leave_the_directory(name: str, inside: bool, copy: Callable[..., Path], tmp_path: Path) -> None:
    directory = copy(sharded=name == INDEX)
    target = directory / "beside" if inside else tmp_path / "outside"
    (directory / name).rename(target)
    (directory / name).symlink_to(target)
    if inside:
        assert name in checkpoint_files(directory)
        return
    with pytest.raises(InputError, match=f"{name}.* leaves the directory"):
        checkpoint_files(directory)


def test_an_unknown_architecture_is_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    edit_json(directory / "config.json", model_type="nothing")
    with pytest.raises(InputError, match=r"config\.json: transformers cannot build this model"):
        describe(directory)


@pytest.mark.parametrize("place", ["../{}", "{absolute}", "sub/{}", "link"])
def test_shards_that_leave_the_directory_are_refused(place: str, copy: Callable[..., Path], tmp_path: Path) -> None:
    directory = copy(sharded=True)
    document = json.loads((directory / INDEX).read_text())
    shard = sorted(set(document["weight_map"].values()))[0]
    outside = tmp_path / shard
    (directory / "sub").mkdir()
    shutil.copy(directory / shard, directory / "sub" / shard)
    shutil.move(directory / shard, outside)
    (directory / "link").symlink_to(outside)
    name = place.format(shard, absolute=outside)
    document["weight_map"] = {k: name if v == shard else v for k, v in document["weight_map"].items()}
    (directory / INDEX).write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"shard name '{name}' leaves the directory"):
        checkpoint_files(directory)


@pytest.mark.parametrize("weight_map", [{}, None, [], {"a": ""}, {"a": "."}, {"a": ".."}, {"a": 5}])
def test_an_index_that_names_no_files_is_refused(weight_map: object, copy: Callable[..., Path]) -> None:
    directory = copy(sharded=True)
    edit_json(directory / INDEX, weight_map=weight_map)
    with pytest.raises(InputError, match=r"weight_map|leaves the directory"):
        checkpoint_files(directory)


def test_a_missing_shard_is_refused(copy: Callable[..., Path]) -> None:
    directory = copy(sharded=True)
    shard = next(n for n in checkpoint_files(directory) if n.endswith(".safetensors"))
    (directory / shard).unlink()
    with pytest.raises(InputError, match=f"{shard}: this shard is named by the index but missing"):
        checkpoint_files(directory)


def test_a_missing_tensor_is_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    name = "transformer.h.1.mlp.c_fc.weight"
    rewrite(directory, lambda weights: {k: v for k, v in weights.items() if k != name})
    with pytest.raises(InputError, match=f"no weights for {name}; is it for this config.json"):
        Checkpoint.open(directory, describe(directory))


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias"])
def test_a_wrong_shape_is_refused(name: str, copy: Callable[..., Path]) -> None:
    directory = copy()
    rewrite(directory, lambda weights: weights | {name: weights[name][:-1].contiguous()})
    with pytest.raises(InputError, match=rf"{name} has shape \[.*\], but config.json says \["):
        Checkpoint.open(directory, describe(directory))


def test_a_transposed_conv1d_is_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    name = "transformer.h.0.attn.c_attn.weight"
    rewrite(directory, lambda weights: weights | {name: weights[name].T.contiguous()})
    with pytest.raises(InputError, match=rf"{name} has shape \[216, 72\], but config.json says \[72, 216\]"):
        Checkpoint.open(directory, describe(directory))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["transformer.h.0.attn.c_proj.weight", "transformer.h.1.ln_2.bias"])
def test_values_that_are_not_finite_are_named(value: float, name: str, copy: Callable[..., Path]) -> None:
    directory = copy()

    def poison(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights[name].view(-1)[[0, 5]] = value
        return weights

    rewrite(directory, poison)
    checkpoint = Checkpoint.open(directory, describe(directory))
    with pytest.raises(InputError, match=f"{name} holds 2 NaN or infinite values"):
        checkpoint.read(name)
    with pytest.raises(InputError, match=f"{name} holds 2 NaN or infinite values; save or download"):
        check_finite(directory, no_progress)


def test_integers_for_weights_are_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    name = "transformer.wpe.weight"
    rewrite(directory, lambda weights: weights | {name: weights[name].to(torch.int8)})
    with pytest.raises(InputError, match=f"{name} is I8, no float"):
        Checkpoint.open(directory, describe(directory))


def test_masks_beside_the_weights_may_be_infinite(copy: Callable[..., Path]) -> None:
    """As in half-precision checkpoints that store causal masks; they are no parameters."""
    directory = copy()
    mask = {"transformer.h.0.attn.bias": torch.full((1, 1, 4, 4), -torch.inf), "masked": torch.tensor(-torch.inf)}
    rewrite(directory, lambda weights: weights | mask | {"counts": torch.zeros(3, dtype=torch.int8)})
    check_finite(directory, no_progress)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_is_known_before_the_model_is_built(family: str, checkpoint: Checkpoints) -> None:
    assert context_of(checkpoint(family)) == describe(checkpoint(family)).context == CONTEXT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "transformers cannot build this model"),
        ({"vocab_size": "many"}, "transformers cannot build this model"),
    ],
)
def test_configs_that_cannot_be_are_refused(
    changes: dict[str, object], message: str, copy: Callable[..., Path]
) -> None:
    directory = copy()
    edit_json(directory / "config.json", **changes)
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        describe(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"blocks of several kinds \(full_attention, sliding",
        ),
        ({"logit_scale": 0.0625}, r"logit_scale 0\.0625 changes what the head gives"),
        ({"logits_scaling": 8.0}, r"logits_scaling 8\.0 changes"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping 30\.0 changes"),
    ],
)
def test_what_would_be_measured_wrongly_is_refused(
    changes: dict[str, object], message: str, copy: Callable[..., Path]
) -> None:
    directory = copy("llama")
    describe(directory)
    edit_json(directory / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        describe(directory)


def test_experts_stored_as_one_are_refused(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    MixtralConfig(**sizes, **heads, architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"belongs to no Embedding, Linear or Conv1D \(routed experts"):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": None}, "no eos_token_id; the paper's protocol pads with it"),
        ({"eos_token_id": []}, "no eos_token_id"),
        ({"eos_token_id": 50256}, f"eos_token_id 50256 is not in the vocabulary of {VOCABULARY}"),
        ({"eos_token_id": [-1, 0]}, "eos_token_id -1 is not in the vocabulary"),
    ],
)
def test_padding_that_the_model_has_no_row_for_is_refused(
    changes: dict[str, object], message: str, copy: Callable[..., Path]
) -> None:
    directory = copy()
    assert models.padding_token(models.config_of(directory)) == 0
    edit_json(directory / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        models.padding_token(models.config_of(directory))


def test_a_config_without_context_is_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    edit_json(directory / "config.json", model_type="mamba")
    with pytest.raises(InputError, match=r"config\.json: transformers cannot build this model"):
        context_of(directory)


def test_weights_that_do_not_fit_or_come_twice_are_refused(checkpoint: Checkpoints) -> None:
    """A row would be spread over the whole matrix in silence."""
    directory = checkpoint("llama")
    name = "model.embed_tokens.weight"
    with pytest.raises(InputError, match=rf"{name} has shape \[1, {WIDTH}\]"):
        load_model(directory, iter([(name, torch.zeros(1, WIDTH))]))
    with pytest.raises(InputError, match=f"weights for {name} came twice"):
        load_model(directory, iter([(name, torch.zeros(VOCABULARY, WIDTH))] * 2))
    with pytest.raises(InputError, match=r"has no parameter model\.nothing\.weight"):
        load_model(directory, iter([("model.nothing.weight", torch.zeros(1, 1))]))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-7],
    "no header": lambda data: data[:4],
    "nothing": lambda _: b"",
    "header larger than the file": lambda data: len(data).to_bytes(8, "little") + data[8:],
    "header of 2^63 bytes": lambda data: (1 << 63).to_bytes(8, "little") + data[8:],
    "header of all bytes there are": lambda data: b"\xff" * 8 + data[8:],
    "header no JSON": lambda data: data.replace(b"{", b"[", 1),
    "bytes behind the last array": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_named(damage: Callable[[bytes], bytes], copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / WEIGHTS).write_bytes(damage((directory / WEIGHTS).read_bytes()))
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
        Checkpoint.open(directory, describe(directory))


def test_a_directory_without_tokenizer_is_named(copy: Callable[..., Path]) -> None:
    directory = copy()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json, vocab\.json or tokenizer\.model; save the tokenizer"):
        load_tokenizer(directory)


def test_a_damaged_tokenizer_is_named(copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot load a tokenizer from here"):
        load_tokenizer(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_is_left_at_random(family: str, checkpoint: Checkpoints) -> None:
    directory = checkpoint(family)
    index = describe(directory)
    reader = Checkpoint.open(directory, index)
    weights = {t.name: reader.tensor(t) for t in index.tensors} | {v.name: reader.vector(v) for v in index.vectors}
    for name in (index.tensors[0].name, index.tensors[-1].name, index.vectors[-1].name):
        with pytest.raises(InputError, match=f"no weights came for {name}"):
            load_model(directory, ((k, v) for k, v in weights.items() if k != name))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="Linear: no list of transformer blocks found"):
        models.block_path(torch.nn.Linear(2, 2))


def test_configs_of_the_fixtures_are_what_they_claim() -> None:
    assert tiny_config("llama").num_key_value_heads < tiny_config("llama").num_attention_heads
    assert not tiny_config("llama").tie_word_embeddings
    assert tiny_config("gpt2").tie_word_embeddings
