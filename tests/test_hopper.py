"""The layout of `hopper`: the processor finds every bit where hopper.cu reads it. And what is said where it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpu_kernels import ROUNDING, check
from test_kernels import WIDTHS, activations_of, not_finite, random_packed
from torch import Tensor

from nashswarm.codecs import tiles
from nashswarm.kernels import gpu, hopper
from nashswarm.kernels.gpu import GpuMatrix
from nashswarm.kernels.matrix import checked_arrays
from nashswarm.types import PackedTensor

CPU = torch.device("cpu")
HOPPER = torch.cuda.is_available() and gpu.kernels.AVAILABLE and hopper.kernels(torch.device("cuda")) is not None
needs_hopper = pytest.mark.skipif(not HOPPER, reason="no H100 or H200 here, or no NVRTC")


def slots(arrays: dict[str, Tensor], strips: int, groups: int) -> Iterator[tuple[int, int, int, int]]:
    """Slot, strip, first group and groups."""
    count, deep, _ = arrays["meta"].shape
    splits = -(-groups // deep)
    for slot in range(count):
        item, warp = divmod(slot, hopper.STRIPS)
        four, split = divmod(item, splits)
        first, end = (k * groups // splits for k in (split, split + 1))
        if four * hopper.STRIPS + warp < strips:
            yield slot, four * hopper.STRIPS + warp, first, end - first


def codes_of(data: np.ndarray, width: int) -> np.ndarray:
    """[16, 128] of a tile's bytes, as `unpack` takes them to lanes."""
    found = np.zeros((4, 4, 32, 4), np.int64)  # [q, i, lane, j]
    at = up = 0
    for plane in (8, 4, 2, 1):
        if not width & plane:
            continue
        own = data[at * 256 : (at + plane) * 256]
        q, i, lane, j = np.ogrid[:4, :4, :32, :4]
        if plane == 8:
            field = own[q * 512 + lane * 16 + i * 4 + j]
        elif plane == 4:
            field = own[q % 2 * 512 + lane * 16 + i * 4 + j] >> (q // 2 * 4)
        elif plane == 2:
            field = own[lane * 16 + i * 4 + j + 0 * q] >> (2 * q)
        else:
            field = own[lane * 8 + i % 2 * 4 + j + 0 * q] >> (2 * q + i // 2)
        found += (field.astype(np.int64) & (2**plane - 1)) << up
        at, up = at + plane, up + plane
    lanes = found.reshape(4, 2, 2, 8, 4, 4)  # [q, a, b, g, t, j]: row g + 8 b, column 32 q + 16 a + 4 t + j
    return lanes.transpose(2, 3, 0, 1, 4, 5).reshape(16, 128)


def decoded(packed: PackedTensor, deep: int | None) -> Tensor:
    arrays, (out, columns) = hopper.layout(checked_arrays(packed), packed.shape, CPU, deep), packed.shape
    strips, groups = -(-out // 16), -(-columns // 128)
    weight, most = np.zeros((strips * 16, groups * 128)), np.zeros(len(arrays["meta"]), np.int64)
    codes, meta = arrays["codes"].numpy().reshape(-1), arrays["meta"].numpy().view(np.uint32).astype(np.int64)
    for slot, strip, first, count in slots(arrays, strips, groups):
        unit, most[slot], early, before = arrays["table"][slot].tolist()
        assert before == most[slot // 4 * 4 : slot].sum()
        for j in range(count):
            low, high, label = meta[slot, j, :3].tolist()
            width, units = label >> 8 & 15, label >> 16
            assert units == early or j != count // 2
            at = (unit + units) * 256
            nibbles = np.array([(low, high)[r // 8] >> (4 * (r % 8)) & 15 for r in range(16)])
            exponents = nibbles + (label & 255)
            steps = np.where(nibbles > 0, 2.0 ** ((exponents + packed.scalars["base"] - 1) / 8), 0)
            middle = ((1 << width) - 1 + (exponents & 1)) / 2
            tile = (codes_of(codes[at : at + width * 256], width) - middle[:, None]) * steps[:, None] if width else 0
            weight[strip * 16 : strip * 16 + 16, (first + j) * 128 : (first + j + 1) * 128] = tile
    assert int(arrays["most"]) == most.reshape(-1, 4).sum(1).max()
    return torch.from_numpy(weight[:out, :columns])[:, torch.argsort(arrays["order"])]


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_lies_where_lanes_load_it(bits: int) -> None:
    packed = random_packed((40, 300), widths=(bits,), seed=bits)
    assert torch.allclose(decoded(packed, None).float(), tiles.decode(packed), rtol=1e-6, atol=0)


@pytest.mark.parametrize("deep", [1, 2, 5, 11])
@pytest.mark.parametrize("shape", [(1, 1), (130, 1500), (64, 1408)])
def test_any_shape_and_depth_is_the_same_matrix(shape: tuple[int, int], deep: int) -> None:
    packed = random_packed(shape, seed=deep)
    assert torch.allclose(decoded(packed, deep).float(), tiles.decode(packed), rtol=1e-6, atol=0)


def test_depth_is_large_where_items_then_run_at_once() -> None:
    assert [hopper.depth(out // 16, columns // 128) for out, columns in ((4096, 11008), (11008, 4096))] == [11, 11]
    assert [hopper.depth(out // 16, columns // 128) for out, columns in ((4096, 4096), (8192, 28672))] == [8, 8]


def test_shared_memory_holds_the_largest_item() -> None:
    most = hopper.STRIPS * hopper.DEEP * max(WIDTHS)
    assert all(hopper.shared_bytes(size, hopper.DEEP, most) <= hopper.LARGEST_SHARED for size in hopper.SIZES)


def test_structures_are_those_of_the_driver_and_of_the_source() -> None:
    assert hopper.ctypes.sizeof(hopper._Attribute) == 72
    assert hopper.ctypes.sizeof(hopper._Launch) == 56
    source = hopper.SOURCE.read_text(encoding="utf-8")
    declared = source[source.index("struct Args {") : source.index("};", source.index("struct Args {"))]
    code = "\n".join(line.partition("//")[0] for line in declared.splitlines())
    names = [name for name, _ in hopper._Args._fields_]
    places = [code.index(f" {name}{end}") for name in names for end in ";," if f" {name}{end}" in code]
    assert len(places) == len(names)
    assert places == sorted(places)


def test_sizes_are_those_of_the_source() -> None:
    source = hopper.SOURCE.read_text(encoding="utf-8")
    sizes = {"W": hopper.STRIPS, "F": hopper.ITEMS, "S": hopper.RING, "D": hopper.DIGITS}
    assert all(f"constexpr int {name} = {size};" in source for name, size in sizes.items())


def test_other_devices_have_no_kernels_and_failure_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert hopper.kernels(CPU) is None

    def fail(device: torch.device) -> None:
        raise OSError("no NVRTC")

    monkeypatch.setattr(hopper, "Kernels", fail)
    with caplog.at_level(logging.WARNING, hopper.__name__):
        assert hopper._loaded(99) is None
        assert hopper._loaded(99) is None
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "no NVRTC" in caplog.records[0].getMessage()


# --- on such a card ------------------------------------------------------------------------------------------------


@needs_hopper
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_of_every_width_are_within_the_bound(bits: int, dtype: torch.dtype) -> None:
    for batch in (1, 2, 3, 8, 9, 16):
        check(
            random_packed((40, 1500), widths=(bits,), seed=bits), activations_of("normal", batch, 1500, bits).to(dtype)
        )


@needs_hopper
@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 400), st.integers(1, 3000)),
    batch=st.integers(1, 16),
    kind=st.sampled_from(["normal", "outlier", "tiny", "zeros"]),
    dtype=st.sampled_from([*ROUNDING]),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_of_ragged_shapes_are_within_the_bound(
    shape: tuple[int, int], batch: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    check(random_packed(shape, seed=seed), activations_of(kind, batch, shape[1], seed).mul(0.01).to(dtype))


@needs_hopper
@pytest.mark.parametrize("batch", [3, 8, 9, 16])
@pytest.mark.parametrize("shape", [(16, 128), (64, 500), (130, 1500), (700, 9000)])
def test_blocks_of_one_item_and_of_few_groups_are_within_the_bound(shape: tuple[int, int], batch: int) -> None:
    packed, x = random_packed(shape), activations_of("outlier", batch, shape[1], batch).mul(0.01)
    for dtype in ROUNDING:
        check(packed, x.to(dtype))


@needs_hopper
def test_results_are_the_same_bits_while_copies_and_products_overlap() -> None:
    made = GpuMatrix(random_packed((8192, 8192), widths=(4,)))  # more blocks than run at once
    for batch in (1, 2, 8, 16):
        x = torch.randn(batch, 8192, device="cuda", dtype=torch.float16)
        found = torch.stack([made.matmul(x) for _ in range(200)])
        assert bool((found == found[0]).all())


@needs_hopper
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_decoding_is_that_of_the_processor(dtype: torch.dtype) -> None:
    for shape in ((70, 300), (333, 1111)):
        packed, close = random_packed(shape), 2.0**-21 + 2 * ROUNDING[dtype]
        found = GpuMatrix(packed).dequantize(dtype).float().cpu()
        assert torch.allclose(found, tiles.decode(packed), rtol=close, atol=2.0**-25)
    packed, x = random_packed((40, 300)), activations_of("normal", 40, 300, 0).to(dtype).cuda()
    made = GpuMatrix(packed)
    expected = x.double() @ made.dequantize().double().T
    assert torch.allclose(made.matmul(x).double(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@needs_hopper
def test_inf_and_nan_make_their_row_nan() -> None:
    for packed, x in not_finite():
        for batch in (2, 5):
            found = GpuMatrix(packed).matmul(x[[0] + [1] * (batch - 1)].cuda())
            assert not bool(found[0].isfinite().any())
            assert bool(found[1:].isfinite().all())


@needs_hopper
def test_streams_at_once_and_graphs_give_the_same_bits() -> None:
    made = GpuMatrix(random_packed((700, 9000)))
    assert made._hopper
    streams = [torch.cuda.Stream() for _ in range(3)]
    for batch in (1, 2, 7, 16):
        x = activations_of("normal", batch, 9000, 0).half().cuda()
        expected = made.matmul(x)
        torch.cuda.synchronize()
        found = []
        for _ in range(30):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(made.matmul(x))
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected) for y in found)
        graph, given_ = torch.cuda.CUDAGraph(), torch.zeros_like(x)
        with torch.cuda.graph(graph):
            chain = [made.matmul(given_ * 1) for _ in range(5)]
        given_.copy_(x)
        graph.replay()
        assert all(torch.equal(y, expected) for y in chain)


@needs_hopper
def test_tritons_kernels_stay_at_hand() -> None:
    assert GpuMatrix(random_packed((40, 300)), fastest=False)._hopper is None
    assert GpuMatrix(random_packed((40, 300), 16, 64))._hopper is None
