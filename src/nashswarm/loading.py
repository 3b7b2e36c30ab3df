"""A packed directory -> a transformers model, with nothing left at random and nothing unverified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nashswarm.config import load_room
from nashswarm.models import load_model, load_original
from nashswarm.packed import MANIFEST, PackedError, PackedModel, open_packed
from nashswarm.types import ModelIndex, NashSwarmError, PackedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(directory: Path) -> PreTrainedModel:
    """The packed model with float32 weights, in evaluation mode. Raises PackedError for what cannot be trusted."""
    packed = open_packed(Path(directory))
    return load_model(packed.directory, dequantized(packed))


def load_for_evaluation(packed: PackedModel, original: Path, index: ModelIndex) -> PreTrainedModel:
    """As `load`; a baseline that stores no weights is taken from the checkpoint in `original`."""
    if packed.provenance.method["codec"] == "source":
        return load_original(original, index)
    return load_model(packed.directory, dequantized(packed))


def dequantized(packed: PackedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of every parameter; matrices in canonical orientation (out, in)."""
    for name, tensor in packed.tensors.items():
        yield name, _decode(packed, name, tensor)
    for name, vector in packed.vectors.items():
        yield name, torch.from_numpy(np.array(vector, np.float32))


def _decode(packed: PackedModel, name: str, tensor: PackedTensor) -> Tensor:
    """One matrix. Raises PackedError for arrays and numbers that its codec did not write."""
    where = f"{packed.directory / MANIFEST}: {name}"
    try:
        weight: Tensor = load_room("codecs", tensor.codec).decode(tensor)
    except NashSwarmError as error:
        raise PackedError(f"{where}: {error}") from error
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PackedError(
            f"{where}: codec {tensor.codec} cannot decode this ({error!r}); get the directory again"
        ) from error
    if tuple(weight.shape) != tensor.shape:
        raise PackedError(f"{where}: {list(weight.shape)} was decoded, expected {list(tensor.shape)}")
    return weight
