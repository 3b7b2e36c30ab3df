"""The packed directory: the same bytes every time, sizes that add up, and no damage that goes unnoticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import FAMILIES, METHODS, Models, Packed, edit_json, no_progress
from forging import rearrange, relist, reseal
from safetensors.numpy import load_file

from nashswarm import quantize
from nashswarm.artifacts import PICKLES, sha256_file
from nashswarm.loading import load
from nashswarm.packed import (
    FORMAT,
    MANIFEST,
    PAYLOAD,
    PackedError,
    Provenance,
    _sealed,
    file_bytes,
    open_packed,
    write_packed,
)
from nashswarm.recipes import KEPT
from nashswarm.types import InputError, NashSwarmError, PackedTensor, VectorSpec

if TYPE_CHECKING:
    from nashswarm.corpora import TokenizedSplit

PROVENANCE = Provenance("m", "A", 12, "path", None, None, {"codec": "kept"}, {"histogram": {}})

TENSOR = "transformer.h.0.attn.c_attn.weight"

PackedModels = Callable[[str, str], Packed]


@pytest.fixture
def copy(packed: PackedModels, tmp_path: Path) -> Path:
    """A packed directory that a test may damage."""
    return shutil.copytree(packed("gpt2", "rtn4-g64").directory, tmp_path / "packed")


def names_of(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_was_encoded(family: str, method: str, packed: PackedModels, quantizable: Models) -> None:
    made, model = packed(family, method), quantizable(family)
    opened = made.opened
    assert set(opened.tensors) == {t.name for t in model.index.tensors}
    assert all(opened.tensors[t.name].shape == t.shape for t in model.index.tensors)
    provenance = opened.provenance
    assert (provenance.model, provenance.architecture) == (family, model.index.architecture)
    assert provenance.parameters == model.index.parameters
    assert provenance.method["name"] == method
    if made.method.codec == "source":
        assert opened.vectors == {}
        return
    for spec in model.index.vectors:
        assert np.array_equal(opened.vectors[spec.name], made.vectors[spec.name].astype(np.float16)), spec.name
        if not getattr(made.method.codec_settings, "prefix_tokens", 0):  # nothing else moves a vector
            assert np.array_equal(made.vectors[spec.name], model.checkpoint.vector(spec).numpy()), spec.name
    in_scope = {t.name for t in model.index.scope(made.method.scope)}
    assert {n for n, t in opened.tensors.items() if t.codec != KEPT} == in_scope
    assert {t.codec for n, t in opened.tensors.items() if n not in in_scope} <= {"kept"}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_model_is_packed_to_the_same_bytes(
    method: str, packed: PackedModels, quantizable: Models, split: Callable[..., TokenizedSplit], tmp_path: Path
) -> None:
    made, model = packed("llama", method), quantizable("llama")
    allocation = quantize.allocate(model, made.method, no_progress)
    quantize.pack(model, made.method, allocation, split("llama", seed=3).ids, tmp_path / "again", no_progress)
    assert names_of(tmp_path / "again") == names_of(made.directory)
    for name in names_of(made.directory):
        assert (tmp_path / "again" / name).read_bytes() == (made.directory / name).read_bytes(), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_sum_to_the_size_on_disk(family: str, method: str, packed: PackedModels, quantizable: Models) -> None:
    made = packed(family, method)
    size = made.opened.size
    assert sum(size.parts.values()) == size.file_bytes
    assert all(count >= 0 for count in size.parts.values())
    parameters = quantizable(family).index.parameters
    if made.method.codec == "source":
        assert size.file_bytes == 4 * parameters
        assert size.parts == {"source": 4 * parameters}
        return
    on_disk = sum((made.directory / name).stat().st_size for name in (MANIFEST, PAYLOAD))
    assert size.file_bytes == file_bytes(made.directory) == on_disk
    arrays = load_file(made.directory / PAYLOAD)
    assert sum(size.parts.values()) - size.parts["headers"] == sum(a.nbytes for a in arrays.values())
    assert size.parts["vectors"] == 2 * sum(int(np.prod(v.shape)) for v in quantizable(family).index.vectors)
    kept = sum(a.nbytes for t in made.opened.tensors.values() if t.codec == "kept" for a in t.arrays.values())
    assert size.matrix_bytes == size.file_bytes - size.parts["headers"] - size.parts["vectors"] - kept


def test_a_packed_directory_stands_alone(packed: PackedModels) -> None:
    from transformers import AutoConfig, AutoTokenizer

    directory = packed("gpt2", "rtn4-g64").directory
    assert set(names_of(directory)) >= {MANIFEST, PAYLOAD, "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert "model.safetensors" not in names_of(directory)
    assert AutoConfig.from_pretrained(directory).model_type == "gpt2"
    assert AutoTokenizer.from_pretrained(directory)("bit").input_ids


def test_the_manifest_lists_every_other_file(packed: PackedModels) -> None:
    directory = packed("gpt2", "nash").directory
    manifest = json.loads((directory / MANIFEST).read_bytes())
    assert manifest["format"] == FORMAT == 1
    expected = {n: [(directory / n).stat().st_size, sha256_file(directory / n)] for n in names_of(directory)}
    del expected[MANIFEST]
    assert manifest["files"] == expected


def test_vectors_come_back_by_name_whatever_their_order(tmp_path: Path) -> None:
    specs = [VectorSpec("z", (3,)), VectorSpec("a", (2,)), VectorSpec("m", (1,))]
    values = [np.array(v, np.float32) for v in ([1, 2, 3], [4, 5], [6])]
    six = dataclasses.replace(PROVENANCE, parameters=6)
    write_packed(tmp_path / "p", six, [], zip(specs, values, strict=True), tmp_path)
    opened = open_packed(tmp_path / "p")
    assert {n: v.tolist() for n, v in opened.vectors.items()} == {"z": [1, 2, 3], "a": [4, 5], "m": [6]}


def test_scalars_and_arrays_come_back_exactly(tmp_path: Path) -> None:
    tensor = PackedTensor(
        "c",
        (2, 3),
        {"codes": np.arange(5, dtype=np.uint8), "scales": np.array([[0.1, 2]], np.float32)},
        {"base": -12.345678901234567, "bits": 3},
        {"tables": np.arange(4, dtype=np.uint8)},
    )
    write_packed(tmp_path / "p", PROVENANCE, [("x.weight", tensor), ("y.weight", tensor)], [], tmp_path)
    opened = open_packed(tmp_path / "p")
    for name in ("x.weight", "y.weight"):
        found = opened.tensors[name]
        assert (found.codec, found.shape, dict(found.scalars)) == ("c", (2, 3), dict(tensor.scalars))
        assert found.arrays.keys() == tensor.arrays.keys()
        assert all(
            np.array_equal(found.arrays[k], v) and found.arrays[k].dtype == v.dtype for k, v in tensor.arrays.items()
        )
        assert found.shared["tables"].tolist() == [0, 1, 2, 3]
    assert opened.size.parts["tables"] == 4
    assert opened.size.parts["codes"] == 10


@pytest.mark.parametrize("value", [70000.0, -1e9])
def test_a_vector_beyond_float16_is_refused_and_nothing_is_written(value: float, tmp_path: Path) -> None:
    vector = (VectorSpec("ln.weight", (2,)), np.array([1, value], np.float32))
    with pytest.raises(NashSwarmError, match=r"ln\.weight: values reach .*beyond float16"):
        write_packed(tmp_path / "p", PROVENANCE, [], [vector], tmp_path)
    assert names_of(tmp_path) == []


def test_a_failure_leaves_the_old_directory(copy: Path) -> None:
    def tensors() -> Any:
        yield "x.weight", PackedTensor("c", (1, 1), {"codes": np.zeros(1, np.uint8)})
        raise NashSwarmError("stop")

    before = {n: (copy / n).read_bytes() for n in names_of(copy)}
    with pytest.raises(NashSwarmError, match="stop"):
        write_packed(copy, PROVENANCE, tensors(), [], copy)
    assert {n: (copy / n).read_bytes() for n in names_of(copy)} == before
    assert names_of(copy.parent) == ["packed"]


# --- what is refused -----------------------------------------------------------------------------------------------

FILES = ("config.json", "generation_config.json", PAYLOAD, "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 9, 0.3, 0.7, -1])
def test_a_flipped_bit_is_refused(name: str, place: float, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(PackedError, match=f"{name}: the SHA-256 is not that of the manifest"):
        open_packed(copy)


@pytest.mark.parametrize("bit", [0, 1, 4])
def test_a_flipped_bit_in_the_manifest_is_refused(bit: int, copy: Path) -> None:
    """It holds every scale's exponent, width and shape: a changed digit is a changed model."""
    data = (copy / MANIFEST).read_bytes()
    accepted = []
    for place in range(bit, len(data), 37):
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        (copy / MANIFEST).write_bytes(changed)
        try:
            open_packed(copy)
        except PackedError:
            continue
        except Exception as error:
            accepted.append(f"{place} ({type(error).__name__})")
        else:
            accepted.append(f"{place} {bytes(changed[place - 10 : place + 10])!r}")
    assert not accepted, f"{len(accepted)} changes of {len(range(bit, len(data), 37))} went unnoticed: {accepted[:6]}"


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "drop tensors": lambda m: m.pop("tensors"),
    "drop files": lambda m: m.update(files={}),
    "rename codec": lambda m: m["tensors"][TENSOR].update(codec="uniform"),
    "other shape": lambda m: m["tensors"][TENSOR].update(shape=m["tensors"][TENSOR]["shape"][::-1]),
    "other bits": lambda m: m["tensors"][TENSOR].update(bits=2),
    "unlist config": lambda m: m["files"].pop("config.json"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_was_edited_is_refused(change: str, copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    CHANGES[change](manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest, sort_keys=True, separators=(",", ":")))
    with pytest.raises(PackedError, match=r"manifest\.json: its seal is not the SHA-256"):
        open_packed(copy)


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_was_edited_and_sealed_is_refused(change: str, copy: Path) -> None:
    """A seal proves no more than that a manifest is whole: codecs, shapes and files must fit all the same."""
    reseal(copy, CHANGES[change])
    with pytest.raises(PackedError):
        load(copy)


# What is put in the place that the keys lead to, or ... to remove it; and what the message must say.
FORMS: list[tuple[tuple[str, ...], object, str]] = [
    *(
        ((block,), value, f"no {block}")
        for block in ("files", "provenance", "tensors", "vectors")
        for value in (..., 5)
    ),
    (("files", PAYLOAD), ..., f"no {PAYLOAD}"),
    *((("files", "config.json"), value, "files: 'config.json'") for value in (None, "x", [1], ["x", 1], [True, "x"])),
    *((("tensors", "t"), value, "tensors: 't'") for value in (None, 5, [], {}, {"codec": "kept"}, {"shape": [1, 1]})),
    *(
        (("tensors", TENSOR, "shape"), value, f"tensors: '{TENSOR}'")
        for value in (
            None,
            5,
            [],
            [1],
            [72, 72, 3],
            ["a", "b"],
            [-1, 5],
            [0, 5],
            [72.0, 216.0],
            [True, 1],
            [1 << 62, 1],
        )
    ),
    *((("tensors", TENSOR, "codec"), value, f"tensors: '{TENSOR}'") for value in (..., None, 4, ["kept"])),
    *((("tensors", TENSOR, "bits"), value, f"tensors: '{TENSOR}'") for value in (None, "4", [4], True, 1 << 63)),
    *(
        (("vectors",), [value], "vectors: ")
        for value in (None, 5, "ab", [], ["a"], [5, [1]], ["a", 5], ["a", ["b"]], ["a", [-1]], ["a", [1.0]])
    ),
    (("vectors",), [["a", [7]]], r"vectors are float16 \[\d+\], but the manifest speaks of float16 \[7\]"),
    *((("tensors", name), ..., f"{name}.* belongs to no tensor") for name in (TENSOR,)),
    (("provenance", "more"), 1, "provenance: the keys are"),
    (("provenance", "model"), ..., "provenance: the keys are"),
    *(
        (("provenance", key), value, rf"provenance\.{key}")
        for key in ("model", "architecture", "source", "id", "revision", "method", "certificate")
        for value in (5, ["x"])
    ),
    *((("provenance", "parameters"), value, r"provenance\.parameters") for value in (None, 0, -1, 1.5, "12", True)),
    (("provenance", "method"), {}, r"provenance\.method: no codec"),
    (("more",), 1, "the keys are .*more"),
    (("provenance", "parameters"), 12, r"shapes of \d+ weights, but provenance\.parameters says 12"),
]


@pytest.mark.parametrize(("keys", "value", "says"), FORMS)
def test_a_sealed_manifest_of_another_form_is_refused(
    keys: tuple[str, ...], value: object, says: str, copy: Path
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        *way, last = keys
        place = manifest
        for key in way:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    reseal(copy, change)
    with pytest.raises(PackedError, match=says):
        open_packed(copy)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1" + "0" * 400, "9" * 5000])
def test_numbers_that_no_codec_writes_are_refused(number: str, copy: Path) -> None:
    body = (copy / MANIFEST).read_bytes()[: -len(_sealed({})) + 1]
    body = body.replace(b'"bits":4', b'"bits":' + number.encode())
    (copy / MANIFEST).write_bytes(body + b',"seal":"%s"}' % hashlib.sha256(body).hexdigest().encode())
    with pytest.raises(PackedError, match=r"manifest\.json: (tensors: |not valid JSON)"):
        open_packed(copy)


LAYOUTS: dict[str, Callable[[bytes], bytes]] = {
    "a space": lambda body: body.replace(b'"format":1', b'"format": 1'),
    "a line": lambda body: body.replace(b"{", b"{\n", 1),
    "another order": lambda body: b'{"format":1,' + body[1:].replace(b'"format":1,', b""),
    "a key twice": lambda body: body.replace(b'"format":1', b'"format":1,"format":1'),
    "a number beyond float64": lambda body: body.replace(b'"certificate":{', b'"certificate":{"a":1e999,'),
    "a number in other words": lambda body: body.replace(b'"certificate":{', b'"certificate":{"a":1e1,'),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_manifest_in_another_layout_is_refused(layout: str, copy: Path) -> None:
    """What two readers could read differently, `write_packed` does not write."""
    body = (copy / MANIFEST).read_bytes()[: -len(_sealed({})) + 1]
    changed = LAYOUTS[layout](body)
    assert changed != body
    (copy / MANIFEST).write_bytes(changed + b',"seal":"%s"}' % hashlib.sha256(changed).hexdigest().encode())
    with pytest.raises(PackedError, match=r"manifest\.json: not one line of JSON with sorted keys and finite numbers"):
        open_packed(copy)


def test_a_manifest_that_cannot_be_read_is_refused(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    (copy / MANIFEST).mkdir()
    with pytest.raises(PackedError, match=r"manifest\.json: cannot be read \(Is a directory\)"):
        open_packed(copy)


def test_a_manifest_too_deep_to_parse_is_refused(copy: Path) -> None:
    (copy / MANIFEST).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(PackedError, match=r"manifest\.json: not valid JSON"):
        open_packed(copy)


def test_a_sealed_model_that_is_not_the_configs_is_refused(copy: Path) -> None:
    """Names and shapes are held against config.json when the model is built."""

    def rename(manifest: dict[str, Any]) -> None:
        manifest["vectors"][0][0] = "transformer.nothing.bias"

    reseal(copy, rename)
    with pytest.raises(InputError, match=r"no parameter transformer\.nothing\.bias"):
        load(copy)


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_grown_files_are_refused(name: str, copy: Path) -> None:
    data = (copy / name).read_bytes()
    for changed in (data[:-1], data + b"\0", b""):
        (copy / name).write_bytes(changed)
        with pytest.raises(PackedError, match=f"{name}: {len(changed)} bytes, expected {len(data)}"):
            open_packed(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"5"])
def test_a_manifest_that_is_none_is_refused(content: bytes, copy: Path) -> None:
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(PackedError, match=r"manifest\.json: (not valid JSON|format None)"):
        open_packed(copy)


def test_a_truncated_manifest_is_refused(copy: Path) -> None:
    data = (copy / MANIFEST).read_bytes()
    for changed in (data[:-1], data + b"}", data[: len(data) // 2]):
        (copy / MANIFEST).write_bytes(changed)
        with pytest.raises(PackedError, match=r"manifest\.json: not valid JSON"):
            open_packed(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(PackedError, match=f"{name}: the manifest lists this file, but it is not there"):
        open_packed(copy)


def test_a_directory_without_manifest_is_no_packed_one(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    with pytest.raises(PackedError, match=r"no manifest\.json; this is not a packed directory"):
        open_packed(copy)
    with pytest.raises(PackedError, match=r"no manifest\.json"):
        open_packed(copy / "nowhere")


@pytest.mark.parametrize("version", [0, FORMAT + 1, "1", None])
def test_an_unknown_format_is_refused(version: object, copy: Path) -> None:
    edit_json(copy / MANIFEST, format=version)
    with pytest.raises(PackedError, match=rf"manifest\.json: format {version!r}, this version reads format {FORMAT}"):
        open_packed(copy)


STRAYS = (
    *("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json", "MODEL.SAFETENSORS"),
    *(f"pytorch_model{suffix}" for suffix in PICKLES),
    *("vocab.json", "tokenizer.model", "adapter_config.json", "chat_template.jinja", "spiece.model", "vocab.txt"),
)


@pytest.mark.parametrize("name", STRAYS)
def test_a_stray_file_that_could_be_loaded_is_refused(name: str, copy: Path) -> None:
    """transformers' own from_pretrained would take these in place of ours."""
    (copy / name).write_bytes(b"x")
    with pytest.raises(PackedError, match=f"{name}: not listed in the manifest"):
        open_packed(copy)


@pytest.mark.parametrize("name", ["notes.txt", ".gitattributes", "results.json"])
def test_a_stray_file_that_nobody_loads_may_stay(name: str, copy: Path) -> None:
    (copy / name).write_bytes(b"x")
    open_packed(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_other_weights_are_refused_though_they_are_listed(name: str, copy: Path) -> None:
    (copy / name).write_bytes(b"x")
    reseal(copy, lambda m: m["files"].update({name: [1, sha256_file(copy / name)]}))
    with pytest.raises(PackedError, match=f"{name}: listed, though it could be loaded"):
        open_packed(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_packed_config_that_asks_for_code_is_refused(name: str, copy: Path) -> None:
    edit_json(copy / name, auto_map={"AutoModelForCausalLM": "mine.Mine"})
    relist(copy, name)
    with pytest.raises(PackedError, match=rf"{name}: `auto_map` asks to run code"):
        open_packed(copy)


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
@pytest.mark.parametrize("outside", [True, False])
def test_a_link_in_place_of_a_file_is_refused(name: str, outside: bool, copy: Path, tmp_path: Path) -> None:
    """Also one to a file of the same bytes beside it."""
    target = tmp_path / "elsewhere" if outside else copy / "elsewhere"
    shutil.move(copy / name, target)
    (copy / name).symlink_to(target)
    with pytest.raises(PackedError, match=f"{name}: (a link in place of|the manifest lists this file, but it is not)"):
        open_packed(copy)


def test_a_name_that_leaves_the_directory_is_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    files = json.loads((copy / MANIFEST).read_text())["files"]
    listed = {**files, "../x": [1, sha256_file(tmp_path / "x")]}
    reseal(copy, lambda manifest: manifest.update(files=listed))
    with pytest.raises(PackedError, match=r"\.\./x: the manifest lists this file, but it is not there"):
        open_packed(copy)


def test_a_listed_file_in_a_folder_is_refused(copy: Path) -> None:
    (copy / "sub").mkdir()
    (copy / "sub/x").write_bytes(b"x")
    reseal(copy, lambda m: m["files"].update({"sub/x": [1, sha256_file(copy / "sub/x")]}))
    with pytest.raises(PackedError, match="sub/x: the manifest lists this file, but it is not there"):
        open_packed(copy)


# --- payloads that were forged, hashes and all ----------------------------------------------------------------------


def header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Of a safetensors file: its header, and what follows."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        document, rest = header(data)
        change(document)
        text = json.dumps(document).encode()
        return len(text).to_bytes(8, "little") + text + rest

    return changed


def with_length(length: int) -> Callable[[bytes], bytes]:
    return lambda data: length.to_bytes(8, "little") + data[8:]


def swapped(document: dict[str, Any]) -> None:
    """Two arrays claim the same bytes, and some are nobody's."""
    one, other = (document[f"{TENSOR}.{part}"] for part in ("codes", "zeros"))
    one["data_offsets"] = [other["data_offsets"][0], other["data_offsets"][0] + one["data_offsets"][1]]


PAYLOADS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "no header": lambda data: data[:4],
    "header larger than the file": lambda data: with_length(len(data))(data),
    "header of 2^63 bytes": with_length(1 << 63),
    "header of no bytes": with_length(0),
    "header cut short": lambda data: with_length(header_size(data) - 9)(data),
    "header no JSON": lambda data: data.replace(b"{", b"[", 1),
    "bytes behind the last array": lambda data: data + b"\0",
    "last array cut": lambda data: data[:-1],
    "overlapping arrays": with_header(swapped),
    "shape beyond the bytes": with_header(lambda h: h["vectors"].update(shape=[1 << 40])),
    "unknown dtype": with_header(lambda h: h["vectors"].update(dtype="F13")),
    "negative offsets": with_header(lambda h: h["vectors"].update(data_offsets=[-2, 0])),
}


def header_size(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("damage", PAYLOADS)
def test_a_listed_payload_that_is_no_safetensors_file_is_refused(damage: str, copy: Path) -> None:
    (copy / PAYLOAD).write_bytes(PAYLOADS[damage]((copy / PAYLOAD).read_bytes()))
    relist(copy, PAYLOAD)
    with pytest.raises(PackedError, match=r"packed\.safetensors: not a valid safetensors file"):
        open_packed(copy)


Arrays = dict[str, np.ndarray]
PIECES: dict[str, tuple[Callable[[Arrays], object], str]] = {
    "of no matrix": (lambda a: a.update({"x.codes": np.zeros(3, np.uint8)}), r"x\.codes belongs to no tensor"),
    "of no name": (lambda a: a.update(codes=np.zeros(3, np.uint8)), "codes belongs to no tensor"),
    "vectors cut": (lambda a: a.update(vectors=a["vectors"][:-1]), r"vectors are float16 \[\d+\], but .* float16 \["),
    "vectors float32": (lambda a: a.update(vectors=a["vectors"].astype(np.float32)), "vectors are float32"),
    "vectors gone": (lambda a: a.pop("vectors"), r"vectors are float16 \[0\]"),
}


@pytest.mark.parametrize("change", PIECES)
def test_a_listed_payload_of_other_arrays_is_refused(change: str, copy: Path) -> None:
    rearrange(copy, PIECES[change][0])
    with pytest.raises(PackedError, match=rf"packed\.safetensors: {PIECES[change][1]}"):
        open_packed(copy)


@pytest.mark.parametrize("kind", ["vectors", "both"])
def test_weights_that_come_twice_are_refused(kind: str, copy: Path) -> None:
    """The second ones would silently win. Lengths and parameter counts are made to agree."""
    name, shape = json.loads((copy / MANIFEST).read_bytes())["vectors"][0]

    def again(manifest: dict[str, Any]) -> None:
        manifest["vectors"].append([name if kind == "vectors" else TENSOR, shape])
        manifest["provenance"]["parameters"] += shape[0]

    rearrange(copy, lambda a: a.update(vectors=np.append(a["vectors"], np.zeros(shape, np.float16))))
    reseal(copy, again)
    with pytest.raises(PackedError, match=f"weights for {name if kind == 'vectors' else TENSOR} come twice"):
        open_packed(copy)


def test_arrays_of_a_packed_model_cannot_be_written(packed: PackedModels) -> None:
    array = packed("gpt2", "rtn4-g64").opened.tensors["transformer.wte.weight"].arrays["codes"]
    assert not array.flags.writeable
