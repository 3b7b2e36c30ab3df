"""The file format: a directory of a packed model, written whole or not at all, verified whenever it is opened.

    manifest.json        format version, method, certificate, source, shapes, SHA-256 and size of every other file, and
                         a seal: the SHA-256 of all that stands before it
    packed.safetensors   `<tensor>.<part>` for each packed array (codes, scales, zeros, map, tables), `shared.<part>`
                         for those that all tensors have in common, and `vectors`
    config.json, ...     what transformers needs beside weights
    README.md            a model card for people

This module knows arrays and hashes, not algorithms: `loading` has the codecs decode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import typing
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from nashswarm.artifacts import (
    COMPANIONS,
    PICKLES,
    REMOTE_CODE,
    asking_for_code,
    fresh_directory,
    sha256_file,
    write_bytes,
    write_json,
)
from nashswarm.card import card
from nashswarm.payload import Payload
from nashswarm.types import InputError, NashSwarmError, PackedTensor, VectorSpec

FORMAT = 1
MANIFEST, PAYLOAD, CONFIG = "manifest.json", "packed.safetensors", "config.json"
CARD = "README.md"
QUANT_METHOD = "nashswarm"  # in config.json: to transformers, a name that it knows only with our plug-in
FP32_BYTES = 4
SEAL = b',"seal":"%s"}'
WEIGHTS = (".safetensors", ".safetensors.index.json", *PICKLES)  # what transformers may take for weights, by its end
SETTINGS = ("config.json", ".model", ".jinja", "vocab.txt")  # and what for a config, a tokenizer, or a part of one
SHARED = "shared"  # stands for a tensor's name where an array serves all of them


class PackedError(InputError):
    """A packed directory that cannot be trusted or read; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a packed model comes from and how it was made."""

    model: str
    architecture: str
    parameters: int
    source: str
    id: str | None
    revision: str | None
    method: Mapping[str, Any]  # the method's block of params.yaml, defaults filled in
    certificate: Mapping[str, Any]  # of the allocation


@dataclass(frozen=True, slots=True)
class PackedModel:
    """A verified packed directory. Arrays are read-only views of the file's bytes."""

    directory: Path
    provenance: Provenance
    tensors: Mapping[str, PackedTensor]
    vectors: Mapping[str, np.ndarray]  # float16
    size: Size


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes on disk, config and tokenizer aside, and what they are for. The parts sum to `file_bytes`."""

    file_bytes: int
    parts: Mapping[str, int]
    matrix_bytes: int  # of the quantized matrices: codes and their side information


def write_packed(
    directory: Path,
    provenance: Provenance,
    tensors: Iterable[tuple[str, PackedTensor]],
    vectors: Iterable[tuple[VectorSpec, np.ndarray]],
    companions: Path,
) -> None:
    """Write a packed directory in the place of `directory`.

    Arguments: `tensors` in the model's order, each made when its turn comes; `vectors`, float32; `companions`, the
    directory whose config and tokenizer go along. Raises NashSwarmError where float16 cannot hold a vector.
    """
    entries: dict[str, Any] = {}
    specs, values = [], []
    with fresh_directory(directory) as target, Payload(target / PAYLOAD) as payload:
        for name, packed in tensors:
            for part, array in packed.arrays.items():
                payload.add(f"{name}.{part}", array)
            for part, array in packed.shared.items():
                payload.add(f"{SHARED}.{part}", array)
            entries[name] = {"codec": packed.codec, "shape": packed.shape, **packed.scalars}
        for spec, value in vectors:
            specs.append([spec.name, list(spec.shape)])
            values.append(_to_float16(spec.name, value).reshape(-1))
        if values:
            payload.add("vectors", np.concatenate(values))
        files = {PAYLOAD: payload.finish(), **_copy_companions(companions, target)}
        manifest = {
            "format": FORMAT,
            "provenance": dataclasses.asdict(provenance),
            "tensors": entries,
            "vectors": specs,  # a list: their order is that of the payload
            "files": files,
        }
        _write_manifest(target, manifest)


def _write_manifest(target: Path, manifest: dict[str, Any]) -> None:
    """The manifest, and the model card, which it lists and which tells its size: so they are made until they agree."""
    text, stated = b"", -1
    payload = manifest["files"][PAYLOAD][0]
    for _ in range(8):  # the second round settles it, unless a size gains a digit
        manifest["files"][CARD] = (len(text), hashlib.sha256(text).hexdigest())
        sealed = _sealed(manifest)
        if (total := payload + len(sealed)) == stated:
            break
        stated, text = total, card(manifest["provenance"], total).encode()
    write_bytes(target / CARD, text)
    write_bytes(target / MANIFEST, sealed)


def _copy_companions(source: Path, target: Path) -> dict[str, tuple[int, str]]:
    """Config and tokenizer; returns name -> bytes and SHA-256.

    The config says in addition what the plug-in goes by, and that decoded weights are float32.
    """
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / CONFIG).is_file():
        config = json.loads((source / CONFIG).read_bytes())
        config.pop("torch_dtype", None)  # the older name of dtype
        config |= {"dtype": "float32", "quantization_config": {"quant_method": QUANT_METHOD}}
        write_json(target / CONFIG, config)
    copied = ((name, target / name) for name in COMPANIONS if (target / name).is_file())
    return {name: (path.stat().st_size, sha256_file(path)) for name, path in copied}


def open_packed(directory: Path) -> PackedModel:
    """Read a packed directory; every file's size and SHA-256 is compared first. Raises PackedError."""
    manifest = _read_manifest(directory)
    listed = manifest["files"]
    for name, (size, expected) in listed.items():
        path = directory / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise PackedError(f"{path}: the manifest lists this file, but it is not there; get the directory again")
        if path.stat().st_size != size:
            raise PackedError(f"{path}: {path.stat().st_size} bytes, expected {size}; get the directory again")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != expected:
            raise PackedError(f"{path}: the SHA-256 is not that of the manifest; the file is corrupt, get it again")
        if name == PAYLOAD:  # what was hashed is what is used
            payload = data
    _check_others(directory, listed)
    try:
        arrays = load(payload)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # the latter for a dtype that numpy lacks
        raise PackedError(f"{directory / PAYLOAD}: not a valid safetensors file ({error})") from error
    _check_arrays(directory, manifest, arrays)
    return _assemble(directory, manifest, arrays)


def _check_others(directory: Path, listed: Collection[str]) -> None:
    """Raise PackedError for files that a program could load in place of ours, and for configs that ask for code."""
    present = {p.name for p in directory.iterdir()}
    weights = {name for name in present - {PAYLOAD} if name.lower().endswith(WEIGHTS)}
    stray = {name for name in present - {*listed, MANIFEST} if name in COMPANIONS or name.lower().endswith(SETTINGS)}
    if foreign := sorted(weights | stray):
        state = "listed, though it could be loaded" if foreign[0] in listed else "not listed"
        raise PackedError(f"{directory / foreign[0]}: {state} in the manifest; remove it, or get the directory again")
    if asking := asking_for_code(directory):
        raise PackedError(f"{asking}: `{REMOTE_CODE}` asks to run code from the directory; that is refused")


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as one line of JSON whose last key, `seal`, is the SHA-256 of all bytes before it."""
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()[:-1]
    return body + SEAL % hashlib.sha256(body).hexdigest().encode()


def file_bytes(directory: Path) -> int:
    """Bytes of everything that is needed to rebuild the model, config and tokenizer aside."""
    return sum((directory / name).stat().st_size for name in (MANIFEST, PAYLOAD))


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if path.is_symlink():
        raise PackedError(f"{path}: a link in place of the file; get the directory again")
    try:
        data = path.read_bytes()
        manifest = json.loads(data, parse_constant=_refuse_constant)
    except (FileNotFoundError, NotADirectoryError):
        raise PackedError(f"{directory}: no {MANIFEST}; this is not a packed directory") from None
    except OSError as error:
        raise PackedError(f"{path}: cannot be read ({error.strerror}); get the directory again") from None
    except (ValueError, RecursionError) as error:
        raise PackedError(f"{path}: not valid JSON ({error}); get the directory again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise PackedError(f"{path}: format {found!r}, this version reads format {FORMAT}")
    body = data[: -len(SEAL % (b"0" * 64))]
    if data != body + SEAL % hashlib.sha256(body).hexdigest().encode():
        raise PackedError(
            f"{path}: its seal is not the SHA-256 of what stands before it; the file is corrupt, get it again"
        )
    del manifest["seal"]
    if wrong := next(_problems(manifest, data), None):
        raise PackedError(f"{path}: {wrong}; this version writes no such manifest, get the directory again")
    return manifest


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _problems(manifest: Mapping[str, Any], data: bytes) -> Iterator[str]:
    """What a manifest, read from `data`, lacks, or holds in another form than `write_packed` gives it."""
    blocks = {"files": dict, "provenance": dict, "tensors": dict, "vectors": list}
    for key, kind in blocks.items():
        if not isinstance(manifest.get(key), kind):
            yield f"no {key}"
            return
    if PAYLOAD not in manifest["files"]:
        yield f"files: no {PAYLOAD}"
    for name, entry in manifest["files"].items():
        match entry:
            case [int(size), str()] if _is_number(size):
                continue
        yield f"files: {name!r} has no size and SHA-256"
    for name, entry in manifest["tensors"].items():
        match entry:
            case {"codec": str(), "shape": [rows, columns], **scalars} if _is_shape([rows, columns]):
                if all(map(_is_number, scalars.values())):
                    continue
        yield f"tensors: {name!r} has no codec, shape (out, in) and numbers"
    for entry in manifest["vectors"]:
        match entry:
            case [str(), list(shape)] if _is_shape(shape):
                continue
        yield f"vectors: {entry!r} is no name and shape"
    names = Counter([*manifest["tensors"], *(name for name, _ in manifest["vectors"])])
    if twice := [name for name, count in names.items() if count > 1]:
        yield f"weights for {twice[0]} come twice"
    yield from _provenance_problems(manifest["provenance"])
    if manifest.keys() != {*blocks, "format"}:
        yield f"the keys are {', '.join(manifest)}"
    if not _is_what_we_write(manifest, data):  # spaces, another order, keys that come twice, numbers beyond float64
        yield "not one line of JSON with sorted keys and finite numbers"


def _is_what_we_write(manifest: Mapping[str, Any], data: bytes) -> bool:
    try:
        return _sealed(manifest) == data
    except (ValueError, RecursionError):
        return False


def _provenance_problems(provenance: Mapping[str, Any]) -> Iterator[str]:
    if provenance.keys() != {f.name for f in dataclasses.fields(Provenance)}:
        yield f"provenance: the keys are {', '.join(provenance)}"
        return
    for key, kind in (("model", str), ("architecture", str), ("source", str), ("method", dict), ("certificate", dict)):
        if not isinstance(provenance[key], kind):
            yield f"provenance.{key}: {provenance[key]!r}"
    for key in ("id", "revision"):
        if not isinstance(provenance[key], str | None):
            yield f"provenance.{key}: {provenance[key]!r}"
    if not _is_shape([provenance["parameters"]]):
        yield f"provenance.parameters: {provenance['parameters']!r}"
    if "codec" not in provenance["method"]:
        yield "provenance.method: no codec"


def _is_shape(value: list[Any]) -> bool:
    return all(type(count) is int and 0 < count < 2**62 for count in value)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -(2**63) <= typing.cast(float, value) < 2**63  # no NaN, no infinity


def _check_arrays(directory: Path, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raise PackedError where the payload has other arrays than the manifest speaks of."""
    for key in arrays.keys() - {"vectors"}:
        if key.rpartition(".")[0] not in {*manifest["tensors"], SHARED}:
            raise PackedError(f"{directory / PAYLOAD}: {key} belongs to no tensor of the manifest")
    vectors = arrays.get("vectors", np.zeros(0, np.float16))
    expected = sum(math.prod(shape) for _, shape in manifest["vectors"])
    if vectors.dtype != np.float16 or vectors.shape != (expected,):
        raise PackedError(
            f"{directory / PAYLOAD}: vectors are {vectors.dtype} {list(vectors.shape)}, but the manifest speaks of "
            f"float16 [{expected}]"
        )
    if not np.isfinite(vectors).all():
        raise PackedError(f"{directory / PAYLOAD}: vectors hold values that are not finite; get the directory again")
    weights = expected + sum(math.prod(entry["shape"]) for entry in manifest["tensors"].values())
    if arrays and weights != manifest["provenance"]["parameters"]:
        raise PackedError(
            f"{directory / MANIFEST}: shapes of {weights} weights, but provenance.parameters says "
            f"{manifest['provenance']['parameters']}; get the directory again"
        )


def _assemble(directory: Path, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> PackedModel:
    parts: Counter[str] = Counter()
    tensors: dict[str, PackedTensor] = {}
    shared: dict[str, np.ndarray] = {}
    by_tensor: dict[str, dict[str, np.ndarray]] = {name: {} for name in manifest["tensors"]}
    for key, array in arrays.items():
        array.flags.writeable = False
        name, _, part = key.rpartition(".")
        if name == SHARED:
            shared[part] = array
        elif name:
            by_tensor[name][part] = array
        parts[part or key] += array.nbytes
    for name, entry in manifest["tensors"].items():
        scalars = {k: v for k, v in entry.items() if k not in ("codec", "shape")}
        tensors[name] = PackedTensor(entry["codec"], tuple(entry["shape"]), by_tensor[name], scalars, shared)
    vectors, start = {}, 0
    for name, shape in manifest["vectors"]:
        count = int(np.prod(shape))
        vectors[name] = arrays["vectors"][start : start + count].reshape(shape)
        start += count
    provenance = Provenance(**manifest["provenance"])
    own = (a for t in tensors.values() if t.codec != "kept" for a in t.arrays.values())
    matrix_bytes = sum(a.nbytes for a in (*own, *shared.values()))
    if any(t.codec == "source" for t in tensors.values()):
        size = Size(provenance.parameters * FP32_BYTES, {"source": provenance.parameters * FP32_BYTES}, 0)
    else:
        total = file_bytes(directory)
        size = Size(total, {**parts, "headers": total - sum(parts.values())}, matrix_bytes)
    return PackedModel(directory, provenance, tensors, vectors, size)


def _to_float16(name: str, value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    if not np.isfinite(half).all():
        raise NashSwarmError(
            f"{name}: values reach {np.abs(value).max():.3g}, beyond float16; this vector cannot be packed"
        )
    return half
