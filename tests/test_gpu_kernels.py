"""Products on a GPU: within the stated bound of the decoded matrix. Without one, Triton's interpreter runs kernels."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import UNIT, WIDTHS, activations_of, not_finite, random_packed
from torch import Tensor, nn

from nashswarm.codecs import tiles
from nashswarm.kernels import gpu, serving
from nashswarm.kernels.gpu import MOST_ROWS, GpuMatrix
from nashswarm.resident import PackedWeight, keep_packed
from nashswarm.types import InputError, PackedTensor

TRITON = gpu.kernels.AVAILABLE
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(not TRITON, reason="no Triton here")
needs_kernels = pytest.mark.skipif(
    not TRITON or not (INTERPRETED or torch.cuda.is_available()), reason="no GPU here: see the interpreter's test"
)
needs_gpu = pytest.mark.skipif(not TRITON or not torch.cuda.is_available(), reason="no GPU here")
# The interpreter cuts bfloat16 off, GPUs round.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0 ** (-7 if INTERPRETED else -8), torch.float32: 2.0**-24}


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this is it, or there is a GPU")
def test_kernels_are_right_in_tritons_interpreter() -> None:
    """This file once more, in a process that asks for the interpreter before Triton is loaded."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this Triton's interpreter cannot work with this numpy: one of the two is too old or too new")
    assert done.returncode == 0, done.stdout[-3000:]


def bound(packed: PackedTensor, x: Tensor) -> Tensor:
    """As `GpuMatrix` states it, float64 [batch, out]."""
    cut = tiles._Cut(packed.shape, packed.scalars["rows"], packed.scalars["columns"])
    widths, order = tiles._read_map(packed, cut)
    places = tiles._file_order(widths)
    count = len(places[0])
    scales = packed.arrays["scales"]
    row = tiles._unpack_nibbles(scales[: count * cut.nibble_bytes], cut.rows)
    ranges = np.zeros((*widths.shape, cut.rows))
    ranges[places] = tiles._steps(scales[count * cut.nibble_bytes :], row, packed.scalars["base"])
    ranges *= 2.0 ** widths[..., None]
    by_row = torch.from_numpy(ranges.transpose(0, 2, 1).reshape(-1, cut.tiles)[: packed.shape[0]])
    sums = torch.zeros(len(x), cut.tiles, dtype=torch.float64)
    for t in range(cut.tiles):
        own = x.double()[:, torch.from_numpy(order[t * cut.columns : (t + 1) * cut.columns])].abs()
        sums[:, t] = (cut.tiles + 64) * own.sum(1) + 8 * cut.columns * own.amax(1)
    return sums @ by_row.T * UNIT


def check(packed: PackedTensor, x: Tensor) -> None:
    expected = x.double() @ tiles.decode(packed).double().T
    found = GpuMatrix(packed, DEVICE).matmul(x.to(DEVICE)).cpu()
    assert found.dtype == x.dtype
    error, allowed = (found.double() - expected).abs(), bound(packed, x)
    allowed += (expected.abs() + allowed) * ROUNDING[x.dtype] + 2.0**-25
    largest = torch.finfo(x.dtype).max
    assert bool(((error <= allowed) | (expected.abs() > 0.99 * largest)).all())


@needs_kernels
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_is_within_the_bound(bits: int, dtype: torch.dtype) -> None:
    x = activations_of("normal", 2, 300, bits).mul(0.01).to(dtype)
    check(random_packed((40, 300), widths=(bits,), seed=bits), x)


@needs_kernels
@pytest.mark.parametrize("batch", range(1, MOST_ROWS + 1))
def test_every_batch_is_within_the_bound(batch: int) -> None:
    for dtype in ROUNDING:
        check(random_packed((24, 200), seed=batch), activations_of("normal", batch, 200, batch).mul(0.01).to(dtype))


@needs_kernels
@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 500)),
    rows=st.sampled_from([8, 16, 24, 32, 48, 64]),
    columns=st.sampled_from([32, 64, 96, 128, 160, 256]),
    batch=st.integers(1, MOST_ROWS),
    kind=st.sampled_from(["normal", "outlier", "tiny", "zeros"]),
    dtype=st.sampled_from([*ROUNDING]),
    seed=st.integers(0, 2**32 - 1),
)
def test_ragged_shapes_of_many_tiles_are_within_the_bound(
    shape: tuple[int, int], rows: int, columns: int, batch: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    check(
        random_packed(shape, rows, columns, seed=seed), activations_of(kind, batch, shape[1], seed).mul(0.01).to(dtype)
    )


@needs_kernels
@pytest.mark.parametrize("work", [1, 7, 10**6])
def test_strips_of_one_item_and_of_many_are_the_same_product(work: int) -> None:
    packed, x = random_packed((40, 1500)), activations_of("normal", 3, 1500, 0)
    expected = x.double() @ tiles.decode(packed).double().T
    found = GpuMatrix(packed, DEVICE, work, fastest=False).matmul(x.to(DEVICE)).cpu()
    assert bool(((found.double() - expected).abs() <= bound(packed, x) + expected.abs() * UNIT).all())


@needs_kernels
@pytest.mark.parametrize("rows", [8, 24, 64])
def test_decoded_on_the_device_and_here_are_alike(rows: int) -> None:
    """But for the powers of two, which a GPU takes to 2^-22."""
    packed = random_packed((70, 300), rows)
    expected = tiles.decode(packed)
    assert torch.allclose(GpuMatrix(packed, DEVICE).dequantize().cpu(), expected, rtol=2.0**-21, atol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_many_rows_are_decoded_and_multiplied(dtype: torch.dtype) -> None:
    packed, x = random_packed((40, 300)), activations_of("normal", MOST_ROWS + 1, 300, 0).mul(0.01).to(dtype)
    made = GpuMatrix(packed, DEVICE)
    expected = x.to(DEVICE) @ made.dequantize(dtype).T
    close = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(made.matmul(x.to(DEVICE)), expected, rtol=close, atol=close * float(expected.abs().max()))


@needs_kernels
def test_what_is_not_finite_is_not_hidden() -> None:
    for packed, x in not_finite():
        found = GpuMatrix(packed, DEVICE).matmul(x.to(DEVICE))
        assert not bool(found[0].isfinite().any())
        assert bool(found[1].isfinite().all())


@needs_kernels
def test_shape_and_dtype_of_x_come_back() -> None:
    made = GpuMatrix(random_packed((30, 100)), DEVICE)
    found = made.matmul(torch.randn(2, 3, 100, dtype=torch.bfloat16, device=DEVICE))
    assert (found.shape, found.dtype) == ((2, 3, 30), torch.bfloat16)
    assert made.matmul(torch.randn(100, device=DEVICE)).shape == (30,)
    assert made.matmul(torch.randn(0, 100, device=DEVICE)).shape == (0, 30)


@needs_kernels
def test_memory_is_that_of_the_packed_bytes() -> None:
    packed = random_packed((2048, 2048), widths=(3,))
    assert GpuMatrix(packed, DEVICE).nbytes < 1.03 * sum(array.nbytes for array in packed.arrays.values())


@needs_gpu
def test_products_are_the_same_bits_again_and_in_a_graph() -> None:
    made, x = GpuMatrix(random_packed((700, 900))), activations_of("normal", 16, 900, 0).cuda()
    for rows in (x[:1], x, x.repeat(2, 1), x.half()):
        expected = made.matmul(rows)
        graph, given_ = torch.cuda.CUDAGraph(), torch.zeros_like(rows)
        with torch.cuda.graph(graph):
            found = made.matmul(given_)
        for _ in range(3):
            given_.copy_(rows)
            graph.replay()
            assert torch.equal(found, expected)
            assert torch.equal(made.matmul(rows), expected)


@needs_gpu
@pytest.mark.parametrize("batch", [1, 17])
def test_layers_on_a_gpu_multiply_there_and_keep_their_gradients(batch: int) -> None:
    packed = random_packed((40, 300))
    layer, plain = nn.Linear(300, 40), nn.Linear(300, 40)
    plain.weight.data, plain.bias.data = tiles.decode(packed), layer.bias.data.clone()
    keep_packed(layer, PackedWeight(packed, tiles.decode, transposed=False))
    model, plain = nn.Sequential(layer), plain.cuda()
    for place in ("cpu", "cuda", "cuda"):  # as it is loaded, moved, and once more
        assert serving.accelerate(model.to(place)) == 1
    x = activations_of("normal", batch, 300, 0).cuda()
    with torch.inference_mode():
        assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-3 * float(plain(x).abs().max()))
    assert isinstance(layer.kernel, GpuMatrix)
    assert all(buffer.device.type == "cpu" for name, buffer in layer.named_buffers() if "bytes" in name)
    assert model(x.requires_grad_()).requires_grad


# --- what is refused -----------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(("rows", "columns"), [(4, 128), (12, 128), (72, 128), (16, 288)])
def test_tiles_that_kernels_are_not_made_for_are_refused(rows: int, columns: int) -> None:
    with pytest.raises(InputError, match=f"tiles of {rows} x {columns}"):
        GpuMatrix(random_packed((40, 300), rows, columns), DEVICE)


@needs_kernels
def test_malformed_arrays_and_other_activations_are_refused() -> None:
    packed = random_packed((40, 300))
    with pytest.raises(InputError, match="codes"):
        GpuMatrix(dataclasses.replace(packed, arrays={**packed.arrays, "codes": packed.arrays["codes"][:-1]}), DEVICE)
    with pytest.raises(InputError, match="codec coded"):
        GpuMatrix(dataclasses.replace(packed, codec="coded"), DEVICE)
    for x in (torch.ones(2, 299), torch.ones(2, 300, dtype=torch.float64)):
        with pytest.raises(InputError, match="expected float16, bfloat16 or float32"):
            GpuMatrix(packed, DEVICE).matmul(x.to(DEVICE))


def test_without_triton_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.kernels, "AVAILABLE", False)
    with pytest.raises(InputError, match=r"nash-swarm\[gpu\]"):
        GpuMatrix(random_packed((16, 128)))
