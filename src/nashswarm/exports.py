"""Packed models in other programs' formats, where those can express them exactly; elsewhere a refusal with the reason.

Both formats know grids over groups of a row's weights, as the codecs `grouped` and `gptq` make them, and nothing else
of ours: no entropy coded codes, no widths within a matrix. GGUF (llama.cpp) has blocks of 32 weights: Q4_0 and Q8_0
are symmetric grids, Q4_1 has a float16 offset. compressed-tensors' `pack-quantized` has symmetric grids for linear
modules, and full precision for all else. What was written is read back by the format's own library and compared.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nashswarm.artifacts import COMPANIONS, fresh_directory, write_bytes, write_json
from nashswarm.bitpack import unpack
from nashswarm.loading import dequantized
from nashswarm.packed import CONFIG, PackedModel, open_packed
from nashswarm.types import InputError, NashSwarmError, PackedTensor

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("gguf", "compressed-tensors")
BLOCK = 32  # weights that share a scale in GGUF
GROUPED = ("grouped", "gptq")
KEPT = "kept"
ADVICE = "pack it with codec grouped or gptq, symmetric: true"


class ExportError(InputError):
    """What a format cannot express; the message names the matrix and the reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """A matrix on grids: w = scale (code - zero)."""

    codes: np.ndarray  # uint8 [out, in]
    scales: np.ndarray  # float16 [out, groups]
    zeros: np.ndarray | None  # uint8 [out, groups]; None: symmetric, 2^(bits - 1)
    bits: int
    group: int


def export(directory: Path, output: Path, name: str) -> int:
    """Write a packed model as `name`, one of FORMATS, to the directory `output`; returns its weights' bytes.

    Raises ExportError for what the format cannot express, NashSwarmError where the format's library reads back
    something else than was packed.
    """
    writers: dict[str, Callable[[PackedModel, Path], int]] = {
        "gguf": _write_gguf,
        "compressed-tensors": _write_compressed_tensors,
    }
    if name not in writers:
        raise InputError(f"{name}: not a format to export to; choose {' or '.join(FORMATS)}")
    packed = open_packed(directory)
    with fresh_directory(output) as target:
        return writers[name](packed, target)


def _grid(name: str, tensor: PackedTensor) -> Grid:
    if tensor.codec not in GROUPED:
        raise ExportError(f"{name}: no other format has what codec {tensor.codec} makes; {ADVICE}")
    (rows, columns), bits, group = tensor.shape, tensor.scalars["bits"], tensor.scalars["group"]
    group = min(group, columns)
    groups = -(-columns // group)
    zeros = tensor.arrays.get("zeros")
    return Grid(
        unpack(tensor.arrays["codes"], bits, rows * columns).reshape(rows, columns),
        np.array(tensor.arrays["scales"]).view(np.float16).reshape(rows, groups),
        None if zeros is None else unpack(zeros, bits, rows * groups).reshape(rows, groups),
        bits,
        group,
    )


# --- GGUF ----------------------------------------------------------------------------------------------------------


def _write_gguf(packed: PackedModel, target: Path) -> int:
    import gguf

    config = json.loads((packed.directory / CONFIG).read_bytes())
    path = target / "model.gguf"
    describe, names = _gguf_architecture(packed, config)
    writer = gguf.GGUFWriter(path, config["model_type"])
    describe(writer)
    _gguf_tokenizer(writer, packed.directory, config)
    expected: dict[str, np.ndarray] = {}
    for name, weight in dequantized(packed):
        found, rows = names(name), _rows(name, config)
        expected[found] = rows(weight.numpy())
        tensor = packed.tensors.get(name)
        if tensor is None or tensor.codec == KEPT:
            half = tensor is not None and np.array_equal(expected[found].astype(np.float16), expected[found])
            writer.add_tensor(found, expected[found].astype(np.float16) if half else expected[found])
        else:
            grid = _grid(name, tensor)
            kind, data = _gguf_blocks(name, dataclasses.replace(grid, codes=rows(grid.codes), scales=rows(grid.scales)))
            writer.add_tensor(found, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for tensor in gguf.GGUFReader(path).tensors:
        shape = expected[tensor.name].shape
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if not np.array_equal(read, expected.pop(tensor.name)):
            raise NashSwarmError(f"{path}: {tensor.name} reads back differently; this export cannot be used")
    if expected:
        raise NashSwarmError(f"{path}: {next(iter(expected))} is missing; this export cannot be used")
    return path.stat().st_size


def _gguf_blocks(name: str, grid: Grid) -> tuple[Any, np.ndarray]:
    """The type and the bytes, uint8 [out, bytes of a row], of a matrix whose grids are one of GGUF's."""
    import gguf

    rows, columns = grid.codes.shape
    if columns % BLOCK or grid.group % BLOCK:
        raise ExportError(
            f"{name}: GGUF has blocks of {BLOCK} weights, but its rows have {columns} and its groups {grid.group}; "
            f"pack it in groups of a multiple of {BLOCK}"
        )
    each = np.repeat(grid.scales, grid.group // BLOCK, 1)[:, : columns // BLOCK]
    scales = each.reshape(rows, -1, 1).view(np.uint8)
    codes = grid.codes.reshape(rows, -1, BLOCK)
    nibbles = codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
    symmetric = grid.zeros is None or bool((grid.zeros == 2 ** (grid.bits - 1)).all())
    if grid.bits == 4 and symmetric:
        return gguf.GGMLQuantizationType.Q4_0, np.concatenate([scales, nibbles], -1).reshape(rows, -1)
    if grid.bits == 8 and symmetric:
        signed = (codes.astype(np.int16) - 128).astype(np.int8).view(np.uint8)
        return gguf.GGMLQuantizationType.Q8_0, np.concatenate([scales, signed], -1).reshape(rows, -1)
    if grid.bits == 4 and grid.zeros is not None:
        offsets = -grid.scales.astype(np.float32) * grid.zeros
        if np.array_equal(offsets.astype(np.float16), offsets):
            least = np.repeat(offsets.astype(np.float16), grid.group // BLOCK, 1)[:, : columns // BLOCK]
            parts = [scales, least.reshape(rows, -1, 1).view(np.uint8), nibbles]
            return gguf.GGMLQuantizationType.Q4_1, np.concatenate(parts, -1).reshape(rows, -1)
        raise ExportError(f"{name}: the zeros of its grids times their scales are no float16, as Q4_1 needs; {ADVICE}")
    kind = "" if symmetric else "asymmetric "
    raise ExportError(f"{name}: GGUF has no {kind}grids of {grid.bits} bits that map exactly; {ADVICE} at 4 or 8 bits")


def _gguf_architecture(
    packed: PackedModel, config: dict[str, Any]
) -> tuple[Callable[[Any], None], Callable[[str], str]]:
    """What writes the description, and what names a parameter as GGUF does."""
    import gguf

    known = {"gpt2": (gguf.MODEL_ARCH.GPT2, _describe_gpt2), "llama": (gguf.MODEL_ARCH.LLAMA, _describe_llama)}
    if config["model_type"] not in known:
        raise ExportError(
            f"{packed.directory / CONFIG}: model_type {config['model_type']!r} has no exact map to GGUF here; "
            f"known are {', '.join(known)}"
        )
    architecture, describe = known[config["model_type"]]
    layers = config.get("n_layer", config.get("num_hidden_layers"))
    table = gguf.get_tensor_name_map(architecture, layers)

    def named(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(f"{name}: GGUF has no name for this parameter of {packed.provenance.architecture}")
        return str(found)

    return lambda writer: describe(writer, config), named


def _describe_gpt2(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _describe_llama(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    if config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ExportError("config.json: scaled rotary embeddings are not mapped to GGUF here")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))))
    writer.add_vocab_size(config["vocab_size"])


def _rows(name: str, config: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """The order of rows that llama.cpp wants: queries and keys of Llama have the halves of each head interleaved."""
    if config["model_type"] != "llama" or not any(f".{kind}_proj." in name for kind in "qk"):
        return lambda array: array
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads

    def interleaved(array: np.ndarray) -> np.ndarray:
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)

    return interleaved


def _gguf_tokenizer(writer: Any, directory: Path, config: dict[str, Any]) -> None:
    """A byte-level BPE from tokenizer.json. Raises ExportError for another kind."""
    import gguf

    path = directory / "tokenizer.json"
    document = json.loads(path.read_bytes()) if path.is_file() else {}
    if document.get("model", {}).get("type") != "BPE":
        raise ExportError(f"{path}: only byte-level BPE tokenizers are mapped to GGUF here")
    vocabulary: dict[str, int] = document["model"]["vocab"]
    added = {entry["content"]: entry for entry in document.get("added_tokens", ())}
    by_id = {index: token for token, index in vocabulary.items()} | {e["id"]: t for t, e in added.items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(config["vocab_size"])]
    kinds = [
        gguf.TokenType.CONTROL if added.get(token, {}).get("special")
        else gguf.TokenType.USER_DEFINED if token in added
        else gguf.TokenType.NORMAL if index in by_id
        else gguf.TokenType.UNUSED
        for index, token in enumerate(tokens)
    ]  # fmt: skip
    merges = (m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(list(merges))
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        if isinstance(config.get(key), int):
            add(config[key])


# --- compressed-tensors --------------------------------------------------------------------------------------------


def _write_compressed_tensors(packed: PackedModel, target: Path) -> int:
    import torch
    from safetensors.torch import save
    from transformers import AutoModelForCausalLM

    from nashswarm.models import skeleton

    model = skeleton(packed.directory)
    arrays: dict[str, Tensor] = {}
    schemes: dict[tuple[int, int], list[str]] = {}  # bits and group -> modules
    for name, weight in dequantized(packed):
        tensor, module = packed.tensors.get(name), name.rpartition(".")[0]
        if tensor is None or tensor.codec == KEPT:
            arrays[name] = weight
            continue
        owner = model.get_submodule(module)
        if not isinstance(owner, torch.nn.Linear):
            raise ExportError(
                f"{name}: compressed-tensors packs linear modules, and this is of a {type(owner).__name__}; leave it "
                "out by scope: linear, where it is not tied to the head"
            )
        arrays |= {f"{module}.{part}": value for part, value in _pack_quantized(name, _grid(name, tensor))}
        schemes.setdefault((tensor.scalars["bits"], min(tensor.scalars["group"], tensor.shape[1])), []).append(module)
    write_bytes(target / "model.safetensors", save(arrays, metadata={"format": "pt"}))
    for name in COMPANIONS:
        if (packed.directory / name).is_file() and name != CONFIG:
            shutil.copyfile(packed.directory / name, target / name)
    config = json.loads((packed.directory / CONFIG).read_bytes())
    quantized = {module for modules in schemes.values() for module in modules}
    idle = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in quantized]
    write_json(target / CONFIG, config | {"quantization_config": _scheme(schemes, idle)})
    with warnings.catch_warnings(action="ignore"):  # of what the format can have and ours has not
        # Not `dequantize=True`: that way transformers (5.23) reads all modules by the first group's width.
        loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        loaded.hf_quantizer.compressor.decompress_model(loaded)
    for name, weight in dequantized(packed):
        if not torch.equal(loaded.get_parameter(name), weight):
            raise NashSwarmError(f"{target}: {name} reads back differently; this export cannot be used")
    return (target / "model.safetensors").stat().st_size


def _pack_quantized(name: str, grid: Grid) -> Iterator[tuple[str, Tensor]]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rows, columns = grid.codes.shape
    if grid.zeros is not None:
        raise ExportError(f"{name}: only symmetric grids are exported to compressed-tensors; {ADVICE}")
    if columns % grid.group:
        raise ExportError(f"{name}: groups of {grid.group} do not divide its {columns} columns; choose a divisor")
    signed = torch.from_numpy(grid.codes.astype(np.int16) - 2 ** (grid.bits - 1)).to(torch.int8)
    yield "weight_packed", pack_to_int32(signed, grid.bits)
    yield "weight_scale", torch.from_numpy(grid.scales.astype(np.float32))  # it multiplies in the scales' dtype
    yield "weight_shape", torch.tensor([rows, columns])


def _scheme(schemes: dict[tuple[int, int], list[str]], idle: list[str]) -> dict[str, Any]:
    """The block `quantization_config` of config.json: one group of modules for each width and group size."""
    groups = {
        f"group_{number}": {
            "targets": modules,
            "weights": {
                "num_bits": bits, "group_size": group, "type": "int", "symmetric": True, "strategy": "group",
            },
        }
        for number, ((bits, group), modules) in enumerate(sorted(schemes.items()))
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": idle,
    }
