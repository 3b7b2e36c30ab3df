"""Packed models in other programs' formats: read back exactly by those formats' own libraries, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, Packed, no_progress

from nashswarm import artifacts, models, quantize
from nashswarm.config import Scoring, parse_method
from nashswarm.exports import ExportError, _gguf_blocks, _grid, export
from nashswarm.loading import dequantized, load
from nashswarm.packed import open_packed
from nashswarm.statistics import gather
from nashswarm.types import InputError, NashSwarmError

gguf = pytest.importorskip("gguf")
pytest.importorskip("compressed_tensors")

PackedModels = Callable[[str, str], Packed]
Make = Callable[..., Path]
IDS = torch.arange(48).view(2, 24) * 5 % VOCABULARY
WIDTH = 64


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tokenizers: Callable[[str], Path]) -> Make:
    """(family, **settings of the method) -> a packed model whose rows are a multiple of 32."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    configs = {
        "gpt2": GPT2Config(n_positions=32, n_embd=WIDTH, n_layer=2, n_head=4, **common),
        "opt": OPTConfig(
            max_position_embeddings=32, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_hidden_layers=2,
            num_attention_heads=4, ffn_dim=96, **common,
        ),
        "llama": LlamaConfig(
            max_position_embeddings=32, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, **common,
        ),
    }  # fmt: skip

    def packed(family: str, scope: str = "all", codec: str = "grouped", **settings: Any) -> Path:
        root = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(configs[family]).save_pretrained(root / "model")
        for file in tokenizers(family).iterdir():
            (root / "model" / file.name).write_bytes(file.read_bytes())
        index = models.describe(root / "model")
        record = artifacts.SourceRecord("path", str(root / "model"), None, None, {})
        checkpoint = models.Checkpoint.open(root / "model", index)
        ids = np.random.default_rng(0).integers(0, VOCABULARY, 512).astype(np.int32)
        found = {}
        if "allocator" in settings or codec == "gptq":
            original = models.load_original(root / "model", index)
            found = {t.name: s for t, s in gather(lambda: original, index, ids, Scoring(512, 256), no_progress)}
        model = quantize.Model(family, index, record, checkpoint, found.get)
        given = settings if "allocator" in settings else {"allocator": "uniform", "bits": 4, **settings}
        method = parse_method("m", {"scope": scope, "codec": codec, **given})
        allocation = quantize.allocate(model, method, no_progress)
        quantize.pack(model, method, allocation, np.zeros(1, np.int32), root / "packed", no_progress)
        return root / "packed"

    return packed


# --- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group", "kind"), [(4, 32, "Q4_0"), (4, 64, "Q4_0"), (8, 32, "Q8_0")])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gguf_holds_every_weight(family: str, bits: int, group: int, kind: str, make: Make, tmp_path: Path) -> None:
    packed = make(family, bits=bits, group=group, symmetric=True)
    size = export(packed, tmp_path / "out", "gguf")
    path = tmp_path / "out/model.gguf"
    assert size == path.stat().st_size
    reader = gguf.GGUFReader(path)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    matrices = {n for n, k in kinds.items() if k == kind}
    assert len(matrices) == len(open_packed(packed).tensors)
    assert {k for n, k in kinds.items() if n not in matrices} == {"F32"}
    assert reader.fields["general.architecture"].contents() == family
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == VOCABULARY


def test_gguf_loads_in_transformers_with_the_same_logits(make: Make, tmp_path: Path) -> None:
    """An independent reader, which also undoes the order of rows that llama.cpp wants."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    packed = make("llama", group=32, symmetric=True)
    export(packed, tmp_path / "out", "gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.allclose(load(packed)(IDS).logits, theirs(IDS).logits, atol=1e-5)


def test_a_grid_with_a_zero_that_float16_holds_is_q4_1() -> None:
    from nashswarm.exports import Grid

    codes = np.arange(64, dtype=np.uint8).reshape(1, 64) % 16
    grid = Grid(codes, np.array([[0.25, 0.5]], np.float16), np.array([[3, 7]], np.uint8), 4, 32)
    kind, data = _gguf_blocks("x", grid)
    assert kind.name == "Q4_1"
    expected = (codes.reshape(2, 32).astype(np.float32) - [[3], [7]]) * [[0.25], [0.5]]
    assert np.array_equal(gguf.quants.dequantize(data, kind).reshape(2, 32), expected)


# --- compressed-tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 16), (3, 32)])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_compressed_tensors_holds_every_weight(family: str, bits: int, group: int, make: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if family == "opt":
        tied = make(family, "linear", bits=bits, group=group, symmetric=True)
        with pytest.raises(ExportError, match=r"embed_tokens\.weight: .* is of a Embedding; leave it out"):
            export(tied, tmp_path / "out", "compressed-tensors")
        return
    packed = make(family, "linear", bits=bits, group=group, symmetric=True)
    size = export(packed, tmp_path / "out", "compressed-tensors")
    assert size == (tmp_path / "out/model.safetensors").stat().st_size
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["format"], config["ignore"]) == ("pack-quantized", [])
    dense = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=dense)
    for name, weight in dequantized(open_packed(packed)):
        assert torch.equal(theirs.get_parameter(name), weight), name


# --- a market for what can be expressed ----------------------------------------------------------------------------


def between(make: Make, family: str, fused: bool = False, **settings: Any) -> Path:
    """A market's purchase of widths 4 and 8, half way between all at 4 bits and all at 8."""
    least, most = (open_packed(make(family, bits=bits, **settings)).size.file_bytes for bits in (4, 8))
    budget = (least + most) // 2
    return make(family, allocator="market", budget_bytes=budget, widths=[4, 8], fused=fused, **settings)


@pytest.mark.parametrize("codec", ["grouped", "gptq"])
def test_a_market_of_fused_widths_goes_to_compressed_tensors(codec: str, make: Make, tmp_path: Path) -> None:
    packed = between(make, "llama", scope="linear", codec=codec, group=32, symmetric=True, fused=True)
    opened = open_packed(packed)
    bits = {name: tensor.scalars["bits"] for name, tensor in opened.tensors.items() if "bits" in tensor.scalars}
    assert {*bits.values()} == {4, 8}
    for layer in (0, 1):
        for team in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({bits[f"model.layers.{layer}.{module}.weight"] for module in team}) == 1
    assert export(packed, tmp_path / "out", "compressed-tensors") > 0


def test_a_market_of_two_widths_goes_to_gguf(make: Make, tmp_path: Path) -> None:
    packed = between(make, "gpt2", group=32, symmetric=True)
    export(packed, tmp_path / "out", "gguf")
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert kinds == {"F32", "Q4_0", "Q8_0"}
    certificate = open_packed(packed).provenance.certificate
    assert certificate["predicted_rise"] > 0
    assert set(certificate["histogram"]) == {"4", "8"}


# --- what cannot be expressed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "to", "reason"),
    [
        ("gpt2", "market-coded-3_0", "gguf", "no other format has what codec coded makes"),
        ("llama", "market-tiles-2_5", "compressed-tensors", "no other format has what codec tiles makes"),
        ("gpt2", "rtn4-g64", "gguf", "GGUF has blocks of 32 weights, but its rows have 72"),
        ("opt", "rtn4-g64", "gguf", "model_type 'opt' has no exact map to GGUF here; known are gpt2, llama"),
        ("llama", "rtn4-g64", "compressed-tensors", "lm_head.weight: only symmetric grids are exported"),
        ("llama", "rtn4-g64", "onnx", "onnx: not a format to export to; choose gguf or compressed-tensors"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_reason(
    family: str, method: str, to: str, reason: str, packed: PackedModels, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=reason):
        export(packed(family, method).directory, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"group": 32}, "zeros of its grids times their scales are no float16"),
        ({"group": 48, "symmetric": True}, "its groups 48; pack it in groups of a multiple of 32"),
        ({"group": 32, "bits": 3, "symmetric": True}, "GGUF has no grids of 3 bits"),
        ({"group": 32, "bits": 8}, "GGUF has no asymmetric grids of 8 bits"),
    ],
)
def test_grids_that_gguf_lacks_are_refused(settings: dict[str, Any], reason: str, make: Make, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=reason):
        export(make("gpt2", **settings), tmp_path / "out", "gguf")


def test_what_reads_back_differently_is_not_kept(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = make("gpt2", group=32, symmetric=True)
    monkeypatch.setattr(gguf.quants, "dequantize", lambda data, kind: np.zeros(1_000_000)[:0])
    with pytest.raises((NashSwarmError, ValueError)):
        export(packed, tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_symmetric_grids_store_no_zeros(make: Make) -> None:
    tensor = next(iter(open_packed(make("gpt2", group=32, symmetric=True)).tensors.values()))
    assert set(tensor.arrays) == {"codes", "scales"}
    assert _grid("x", tensor).zeros is None
