"""All codes at once: the codes of the trellis, on any number of threads, and on a GPU; and viterbi.cu without one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nashswarm import entropy, trellis
from nashswarm.kernels import viterbi
from nashswarm.patches import Patch
from nashswarm.rounding import Gpu, Processor, blocks, search
from nashswarm.threads import set_crew

SHAPES = [(70, 130), (1, 5), (300, 1), (1100, 190)]  # the last is of several blocks
CPU, STATES = torch.device("cpu"), sorted(trellis.POLYNOMIALS)
KERNEL = viterbi.kernel(32, torch.device("cuda")) if torch.cuda.is_available() else None
needs_gpu = pytest.mark.skipif(KERNEL is None, reason="no GPU here, or no NVRTC")
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
# What viterbi.cu takes from CUDA, for a processor that goes through its threads one after the other.
STAND_IN = """
#include <math.h>
#include <string.h>
#define __device__
#define __constant__ static const
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(threads)
#define __restrict__
struct Index { int x; };
static Index blockIdx, blockDim, threadIdx;
static float __int_as_float(int bits) { float value; memcpy(&value, &bits, 4); return value; }
"""
ALL = """
extern "C" void all(const float* latents, Bits* decided, Bits* swapped, float* values, int* codes,
                    const long long* begins, const int* strides, const int* rows, int count) {
  blockDim.x = 1;
  for (blockIdx.x = 0; blockIdx.x < count; blockIdx.x++)
    round_columns(latents, decided, swapped, values, codes, begins, strides, rows, count);
}
"""


def latents_of(kind: str, count: int) -> Tensor:
    """Usual ones; small ones with zeros; such as have no symbol; such as are beyond float32's whole numbers; halves."""
    rng = np.random.default_rng(len(kind))
    scale = {"usual": 1.5, "small": 0.2, "escapes": 200.0, "huge": 3e7, "ties": 1.0}[kind]
    found = rng.standard_normal(count) * scale
    if kind == "small":
        found[::3] = 0
    if kind == "ties":  # of what a sum with the path's cost decides, too
        found = (60 + np.round(found * 4) / 4) * rng.choice([1, 1 + 1e-7, -1], count)
    return torch.from_numpy(found.astype(np.float32))


KINDS = ("usual", "small", "escapes", "huge", "ties")


def by_trellis(latents: Tensor, states: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values, matrix by matrix, block by block."""
    codes, values, machine, flat = [], [], trellis.machine(states), latents.numpy()
    for rows, columns in SHAPES:
        own, flat = flat[: rows * columns].reshape(rows, columns), flat[rows * columns :]
        edges, found = entropy.first_rows((rows, columns)), np.empty((rows, columns), np.int32)
        for first, last in pairwise(edges):
            ones, start = np.ones(max(rows, columns), np.float32), np.full(columns, trellis.START, np.uint8)
            patch = Patch.alone(own[first:last].T.copy())
            found[first:last] = trellis.round_patch(patch, ones[: last - first], ones[:columns], start, machine).T
        codes.append(found.reshape(-1))
        values.append(trellis.values(found, trellis.quantizers(found, edges, machine)).reshape(-1))
    return np.concatenate(codes), np.concatenate(values)


def check(codes: np.ndarray, values: np.ndarray, latents: Tensor, states: int) -> None:
    expected, nearest = by_trellis(latents, states)
    assert np.array_equal(codes, expected)
    known = expected != trellis.OUT_OF_BOUNDS
    assert np.array_equal(values[known & (np.abs(nearest) < 1 << 21)], nearest[known & (np.abs(nearest) < 1 << 21)])


TOTAL = sum(rows * columns for rows, columns in SHAPES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", [8, 32])
def test_codes_are_the_trellis_own_on_any_number_of_threads(kind: str, states: int) -> None:
    latents, found = latents_of(kind, TOTAL), torch.empty(TOTAL)
    before = latents.clone()
    for threads in (1, 2):
        set_crew(threads)
        try:
            made = search(SHAPES, states, CPU)
            made.values(latents, found)
            check(made.codes(latents), found.numpy(), latents, states)
        finally:
            set_crew(0)
    assert torch.equal(latents, before)
    assert isinstance(made, Processor)


def test_blocks_are_the_coders() -> None:
    found = blocks(SHAPES)
    assert [block.rows for block in found] == [70, 1, 300, 366, 367, 367]
    assert found[3].begin == 70 * 130 + 5 + 300
    assert found[4].begin == found[3].begin + 366 * 190


@pytest.mark.skipif(COMPILER is None, reason="no compiler here")
@pytest.mark.parametrize("states", STATES)
def test_the_kernels_source_gives_the_trellis_codes(states: int, tmp_path: Path) -> None:
    """Compiled for this processor, without contraction, as NVRTC is told."""
    assert COMPILER is not None
    source, library = tmp_path / "all.cpp", tmp_path / "all.so"
    source.write_text(STAND_IN + viterbi.source(states).decode() + ALL)
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-o", str(library))
    subprocess.run([COMPILER, *flags, str(source)], check=True)
    function = ctypes.CDLL(str(library)).all
    bits = np.uint64 if states > 32 else np.uint32
    every = blocks(SHAPES)
    begins = np.concatenate([block.begin + np.arange(block.columns) for block in every])
    strides, rows = (np.concatenate([np.full(b.columns, n) for b, n in zip(every, side, strict=True)]).astype(np.int32)
                     for side in ([b.columns for b in every], [b.rows for b in every]))  # fmt: skip
    for kind in KINDS:
        latents, values, codes = latents_of(kind, TOTAL), np.empty(TOTAL, np.float32), np.empty(TOTAL, np.int32)
        arrays = (latents.numpy(), np.empty(TOTAL, bits), np.empty(TOTAL, bits), values, codes, begins, strides, rows)
        function(*(ctypes.c_void_p(a.ctypes.data) for a in arrays), ctypes.c_int(len(begins)))
        check(codes, values, latents, states)


def test_the_processor_rounds_where_there_is_no_gpu() -> None:
    assert viterbi.kernel(32, CPU) is None


@needs_gpu
@pytest.mark.parametrize("states", STATES)
def test_a_gpu_gives_the_trellis_codes(states: int) -> None:
    made = search(SHAPES, states, torch.device("cuda"))
    assert isinstance(made, Gpu)
    for kind in KINDS:
        latents = latents_of(kind, TOTAL)
        placed, found = latents.cuda(), torch.empty(TOTAL, device="cuda")
        made.values(placed, found)
        check(made.codes(placed), found.cpu().numpy(), latents, states)
