"""The paper's mix: weights fall into classes by importance, each class has its own min-max grid over the tensor.

The paper does not store which weight is in which class; without that nothing can be decoded. Here the class map is
stored, entropy-coded: the classes are independent of position to within what a coder could use, so its size is the
entropy of the class shares (1.157 bits per weight at 70/20/10 %) and a few bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nashswarm import entropy
from nashswarm.bitpack import pack, packed_size, unpack
from nashswarm.codecs.uniform import min_max_grid, on_grid
from nashswarm.types import InputError, Job, PackedTensor

SELLS = ("classes",)
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Settings:
    """No settings: classes and widths are the allocator's."""


def class_map(importance: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """The class of each weight, int64 [out, in]: how many thresholds its importance reaches."""
    return torch.bucketize(importance, torch.tensor(thresholds, dtype=torch.float32), right=True)


def encode(job: Job, settings: Settings) -> PackedTensor:
    """Class by class: codes of the class's width in the order of the weights, and the class's grid; then the map."""
    assert job.importance is not None
    assert job.choice.classes
    classes = class_map(job.importance, job.choice.thresholds)
    codes, grids = [], []
    for index, bits in enumerate(job.choice.classes):
        members, grid = min_max_grid(job.weight[classes == index], bits)
        codes.append(pack(members.numpy(), bits))
        grids.append(grid)
    coded, tables = _encode_map(classes.numpy().astype(np.int32))
    arrays = {"codes": np.concatenate(codes), "scales": np.stack(grids), "map": coded, "tables": tables}
    scalars = {f"bits{index}": bits for index, bits in enumerate(job.choice.classes)}
    return PackedTensor("classes", job.tensor.shape, arrays, scalars)


def decode(packed: PackedTensor) -> Tensor:
    """float32 [out, in]. Raises InputError, or another's error from `bitpack` or `entropy`, for what is not ours."""
    count, flat = len(packed.scalars), ("uint8", (None,))
    numbers = [f"bits{index}" for index in range(count)]
    packed.expect(numbers, codes=flat, scales=("float32", (count, 2)), map=flat, tables=flat)
    classes = _decode_map(packed).reshape(-1)
    weights = np.empty(classes.size, np.float32)
    start = 0
    for index, key in enumerate(numbers):
        bits, mask = packed.scalars[key], classes == index
        count = int(np.count_nonzero(mask))
        stop = start + packed_size(count, bits)
        codes = unpack(packed.arrays["codes"][start:stop], bits, count)
        weights[mask] = on_grid(codes, packed.arrays["scales"][index])
        start = stop
    if start != packed.arrays["codes"].size:
        raise InputError(f"codes are {packed.arrays['codes'].size} bytes, expected {start} by the map")
    return torch.from_numpy(weights).view(packed.shape)


def _encode_map(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The map's stream and its table, uint8 each. One context: a class says nothing about its neighbours."""
    rows, columns = (np.zeros(n, np.int8) for n in classes.shape)
    tables = entropy.fit_tables(entropy.histogram(classes, rows, columns))
    stream = entropy.encode(classes, rows, columns, tables)
    return np.frombuffer(stream, np.uint8), np.frombuffer(entropy.tables_to_bytes(tables), np.uint8)


def _decode_map(packed: PackedTensor) -> np.ndarray:
    rows, columns = (np.zeros(n, np.int8) for n in packed.shape)
    tables = entropy.tables_from_bytes(packed.arrays["tables"].tobytes())
    return entropy.decode(packed.arrays["map"].tobytes(), packed.shape, rows, columns, tables)
