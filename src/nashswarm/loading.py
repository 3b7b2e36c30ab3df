"""A packed directory -> a transformers model, with nothing left at random and nothing unverified."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from nashswarm.artifacts import copy_files, fresh_directory
from nashswarm.config import load_room
from nashswarm.models import build_model, check_shape, fill, is_transposed, load_model, load_streamed
from nashswarm.packed import MANIFEST, PackedError, PackedModel, open_packed
from nashswarm.resident import PackedWeight, keep_packed
from nashswarm.types import InputError, ModelIndex, NashSwarmError, PackedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    directory: Path | str,
    dtype: torch.dtype = torch.float32,
    resident: Literal["dequantized", "packed"] = "dequantized",
) -> PreTrainedModel:
    """The packed model as a transformers model, in evaluation mode.

    Arguments: `dtype`, of its weights and of what it computes in; `resident`, whether matrices are decoded once, or
    stay packed and are decoded by their layers in every forward pass (`nashswarm.resident`).
    Raises PackedError for what cannot be trusted.
    """
    packed = open_packed(Path(directory))
    if resident == "packed":
        return _load_packed(packed, dtype)
    if resident != "dequantized":
        raise InputError(f"resident: {resident!r}; choose 'dequantized' or 'packed'")
    return load_model(packed.directory, dequantized(packed), dtype)


def fill_model(model: PreTrainedModel, directory: Path) -> None:
    """Give a model of this directory's config its weights."""
    fill(model, directory, dequantized(open_packed(directory)))


def _load_packed(packed: PackedModel, dtype: torch.dtype) -> PreTrainedModel:
    model = build_model(packed.directory, dtype)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {group[0]: group for group in names.values()}
    for name, tensor in packed.tensors.items():
        if name not in tied:
            raise InputError(f"{packed.directory}: config.json describes a model that has no parameter {name}")
        transposed, (rows, columns) = is_transposed(model, name), tensor.shape
        own = tuple(model.get_parameter(name).shape)
        check_shape(packed.directory, name, (columns, rows) if transposed else (rows, columns), own)
        weight = PackedWeight(tensor, partial(_decode, packed.directory, name), transposed).to(dtype)
        for other in tied[name]:
            keep_packed(model.get_submodule(other.rpartition(".")[0]), weight)
    fill(model, packed.directory, _vectors(packed))
    model.save_pretrained = partial(_save_again, packed.directory)
    return model


def _save_again(packed: Path, save_directory: Path | str, **_: Any) -> None:
    """What `save_pretrained` does for a model that is resident in packed form: the packed directory, once more."""
    open_packed(packed)
    with fresh_directory(Path(save_directory)) as target:
        copy_files(packed, target)


def load_for_evaluation(packed: PackedModel, original: Path, index: ModelIndex, device: str = "cpu") -> PreTrainedModel:
    """As `load`, with a block's matrices decoded only while it runs or is held (`models.load_streamed`).

    A baseline that stores no weights is taken from the checkpoint in `original`.
    Raises PackedError, of matrices when they are decoded, InputError where the weights are not those of `index`.
    """
    if packed.provenance.method["codec"] == "source":
        return load_streamed(original, index, device=device)
    shapes = {t.name: t.shape for t in index.tensors} | {v.name: v.shape for v in index.vectors}
    found = {n: t.shape for n, t in packed.tensors.items()} | {n: v.shape for n, v in packed.vectors.items()}
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            raise InputError(
                f"{packed.directory}: {name} has shape {found.get(name)}, but {original} says {shapes.get(name)}"
            )
    read = partial(_stored, packed, {t.name: t.kind for t in index.tensors})
    return load_streamed(packed.directory, index, read, device)


def open_for_evaluation(directory: Path, original: Path, index: ModelIndex, device: str = "cpu") -> PreTrainedModel:
    """As `load_for_evaluation`, of a packed directory."""
    return load_for_evaluation(open_packed(directory), original, index, device)


def _stored(packed: PackedModel, kinds: Mapping[str, str], name: str) -> Tensor:
    """A parameter as the model stores it."""
    if name in packed.vectors:
        return torch.from_numpy(np.array(packed.vectors[name], np.float32))
    weight = _decode(packed.directory, name, packed.tensors[name])
    return weight.T.contiguous() if kinds[name] == "conv1d" else weight


def dequantized(packed: PackedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of every parameter; matrices in canonical orientation (out, in)."""
    for name, tensor in packed.tensors.items():
        yield name, _decode(packed.directory, name, tensor)
    yield from _vectors(packed)


def _vectors(packed: PackedModel) -> Iterator[tuple[str, Tensor]]:
    for name, vector in packed.vectors.items():
        yield name, torch.from_numpy(np.array(vector, np.float32))


def _decode(directory: Path, name: str, tensor: PackedTensor) -> Tensor:
    """One matrix. Raises PackedError for arrays and numbers that its codec did not write."""
    where = f"{directory / MANIFEST}: {name}"
    try:
        weight: Tensor = load_room("codecs", tensor.codec).decode(tensor)
    except NashSwarmError as error:
        raise PackedError(f"{where}: {error}") from error
    except (
        ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise PackedError(
            f"{where}: codec {tensor.codec} cannot decode this ({error!r}); get the directory again"
        ) from error
    if tuple(weight.shape) != tensor.shape:
        raise PackedError(f"{where}: {list(weight.shape)} was decoded, expected {list(tensor.shape)}")
    if not bool(weight.isfinite().all()):
        raise PackedError(f"{where}: weights that are not finite were decoded; get the directory again")
    return weight
