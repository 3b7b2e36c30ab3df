"""Products with tiles of 16 x 128 on compute capability 9.0 (H100, H200): hopper.cu, compiled at its first use.

NVRTC, which comes with torch's builds for CUDA, compiles it for the process in a few seconds; the driver's interface
starts kernels, as programmatic launches: a product's codes are on their way before the one before it has ended. Both
are called by ctypes. Whatever goes wrong ends in a warning and None: callers then do without.

Loading re-orders the codes and adds no bit to them. 4 strips of tiles are cut into runs of groups of columns (items), a
strip of an item is a slot; a slot's tiles lie one after another by group, a tile's planes as the lanes of a warp load
them. What is added: 7 bytes for a tile, 16 for a slot and for a tile of width 0, 4 for a column. Of 4096 x 11008 at
3.24 bits that is 1.2 %.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nashswarm.kernels import nvrtc
from nashswarm.kernels.matrix import TILES, WIDTHS

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("hopper.cu")
CAPABILITY = (9, 0)
ROWS, COLUMNS = 16, 128  # of tiles
UNIT = ROWS * COLUMNS // 8  # bytes of a plane of one bit
STRIPS = 4  # of an item, each of a warp
FEW = 2  # rows of activations up to which a block has one item
ITEMS, RING = 2, 3  # of a block above that; records of activations that it holds
# Groups of columns in an item. On an H100, batch 1, us by depth at 4 bits and at 3.25: 4096 x 11008: 8: 14.5 and 14.5,
# 11: 13.4 and 13.1; 11008 x 4096: 8: 14.1 and 13.6, 11: 12.7 and 12.7. 16 rows, 4096 x 11008: 8: 23.1, 11: 21.5 us.
SHALLOW, DEEP = 8, 11
AT_ONCE, PROCESSORS = 4, 132  # items of DEEP groups that a multiprocessor holds, at 4 bits; multiprocessors
DIGITS = 3
SIZES = (1, 2, 8, 16)  # rows of activations that kernels are made for
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
AT_A_TIME = 4096  # tiles whose codes are re-ordered at once: 8 MiB
LARGEST_SHARED = 226 << 10  # bytes, about what there is; 2 items of 11 groups of 8 bits, with 16 rows, take 197 KiB
# Of the driver's interface: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES and
# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
SHARED_SIZE, PROGRAMMATIC = 8, 6


class _Args(ctypes.Structure):
    """`Args` of hopper.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "meta", "table", "order", "arrived", "x", "y", "rec")),
        ("partial", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("base", "out", "nin", "batch", "groups", "strips", "splits", "deep")),
        *((name, ctypes.c_int32) for name in ("most", "kind")),
    )


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_int32),
        ("pad", ctypes.c_int32),
        ("value", ctypes.c_int32),
        ("rest", ctypes.c_char * 60),
    )


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint32),
    )


# --- compiling and starting ----------------------------------------------------------------------------------------


class Kernels:
    """Those of hopper.cu, loaded on one device. Raises OSError, RuntimeError."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            torch.empty(1, device=device)  # torch's context is there, and current
            self._driver = ctypes.CDLL("libcuda.so.1")
            self._context, module = ctypes.c_void_p(), ctypes.c_void_p()
            self._checked(self._driver.cuCtxGetCurrent(ctypes.byref(self._context)))
            self._checked(self._driver.cuModuleLoadData(ctypes.byref(module), compiled()))
            names = [f"{work}_{size}" for work in ("prepare", "multiply") for size in SIZES]
            self._functions = {name: self._function(module, name) for name in [*names, "decode"]}

    def start(self, name: str, grid: tuple[int, int], block: tuple[int, int], shared: int, args: _Args) -> None:
        """On the device's current stream, where the device is current; early, as far as kernels say."""
        attribute = _Attribute(id=PROGRAMMATIC, value=1)
        stream = torch.cuda.current_stream().cuda_stream
        launch = _Launch(*grid, 1, *block, 1, shared, stream, ctypes.pointer(attribute), 1)
        values = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        self._checked(self._driver.cuCtxSetCurrent(self._context))  # a thread's first call may come without
        self._checked(self._driver.cuLaunchKernelEx(ctypes.byref(launch), self._functions[name], values, None))

    def _function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        self._checked(self._driver.cuModuleGetFunction(ctypes.byref(found), module, name.encode()))
        self._checked(self._driver.cuFuncSetAttribute(found, SHARED_SIZE, LARGEST_SHARED))
        return found

    def _checked(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"CUDA's driver: {(text.value or b'unknown error').decode()} ({code})")


def kernels(device: torch.device) -> Kernels | None:
    """Those of a device; None, with one warning for a device, where they cannot be had, and on other devices."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != CAPABILITY:
        return None
    return _loaded(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _loaded(index: int) -> Kernels | None:
    try:
        return Kernels(torch.device("cuda", index))
    except (OSError, RuntimeError, AttributeError) as error:
        logger.warning("kernels for Hopper cannot be used (%s): products take Triton's, which are slower", error)
        return None


@functools.cache
def compiled() -> bytes:
    """hopper.cu as machine code for compute capability 9.0. Raises OSError, RuntimeError."""
    return nvrtc.compiled(SOURCE.read_bytes(), SOURCE.name, "--gpu-architecture=sm_90a", "--std=c++17")


# --- products ------------------------------------------------------------------------------------------------------


def multiply(loaded: Kernels, arrays: dict[str, Tensor], shape: tuple[int, int], base: int, x: Tensor) -> Tensor:
    """[batch, in] -> [batch, out] of x's dtype; batch up to 16, x contiguous. `arrays` as `layout` made them.

    All that is written is this call's own: products may run on several streams at once.
    """
    batch, groups = len(x), -(-shape[1] // COLUMNS)
    y = torch.empty(batch, shape[0], dtype=x.dtype, device=x.device)
    if not batch:
        return y
    size = next(size for size in SIZES if batch <= size)
    slots, deep, _ = arrays["meta"].shape
    splits, most = -(-groups // deep), int(arrays["most"])
    strips = slots // STRIPS // splits
    ends = [*accumulate((groups * record_bytes(size), slots * ROWS * size * 4, strips * 4))]
    scratch = torch.empty(ends[-1], dtype=torch.uint8, device=x.device)
    at = scratch.data_ptr()
    args = _args(arrays, shape, base, x, y)
    args.rec, args.partial, args.arrived = at, at + ends[0], at + ends[1]
    args.batch, args.strips, args.most = batch, strips, most
    rows = min(size, STRIPS)  # of activations in a block
    if size <= FEW:
        blocks, warps = strips * splits, STRIPS
    else:
        blocks, warps = -(-strips // ITEMS) * splits, ITEMS * STRIPS + 1  # one of which copies
    with torch.cuda.device(x.device):
        loaded.start(f"prepare_{size}", (groups, size // rows), (32, rows), 0, args)
        loaded.start(f"multiply_{size}", (blocks, 1), (32 * warps, 1), shared_bytes(size, deep, most), args)
    return y


def decode(loaded: Kernels, arrays: dict[str, Tensor], shape: tuple[int, int], base: int, dtype: torch.dtype) -> Tensor:
    """W [out, in], its columns in rounding order."""
    meta = arrays["meta"]
    dense = torch.zeros(shape, dtype=dtype, device=meta.device)  # tiles of width 0 are left out
    with torch.cuda.device(meta.device):
        args = _args(arrays, shape, base, dense, dense)
        loaded.start("decode", (len(meta) // STRIPS, 1), (32 * STRIPS, 1), 0, args)
    return dense


def record_bytes(size: int) -> int:
    """Of a group's activations, up to `size` rows; as in hopper.cu."""
    return size * DIGITS * COLUMNS + (48 if size <= FEW else size * 8)


def shared_bytes(size: int, deep: int, most: int) -> int:
    """Of a block; as hopper.cu lays it out. `most`: units of the largest item."""
    if size <= FEW:
        return 256 + STRIPS * deep * 68 + 16 + deep * record_bytes(size) + 128 + most * UNIT
    head = 128 + ITEMS * STRIPS * deep * 16 + deep * size * 8 + 127
    return head + RING * size * DIGITS * COLUMNS + ITEMS * most * UNIT


def _args(arrays: dict[str, Tensor], shape: tuple[int, int], base: int, x: Tensor, y: Tensor) -> _Args:
    deep, groups = arrays["meta"].shape[1], -(-shape[1] // COLUMNS)
    places = {name: arrays[name].data_ptr() for name in ("codes", "meta", "table", "order")}
    sides = {"base": base, "out": shape[0], "nin": shape[1], "groups": groups}
    return _Args(
        **places, **sides, x=x.data_ptr(), y=y.data_ptr(), splits=-(-groups // deep), deep=deep, kind=KINDS[x.dtype]
    )


# --- the device's layout -------------------------------------------------------------------------------------------


def depth(strips: int, groups: int) -> int:
    """Groups of an item: DEEP where all items then run at once, and do not at SHALLOW; else SHALLOW."""
    fours, room = -(-strips // STRIPS), AT_ONCE * PROCESSORS
    return DEEP if fours * -(-groups // DEEP) <= room < fours * -(-groups // SHALLOW) else SHALLOW


def layout(
    arrays: dict[str, np.ndarray], shape: tuple[int, int], device: torch.device, deep: int | None = None
) -> dict[str, Tensor]:
    """From those of `checked_arrays`; `most`, the units of the largest item, stays on the processor.

    `deep`, at most 11, else that of `depth`.
    """
    strips, groups = -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)
    splits = -(-groups // (deep or depth(strips, groups)))
    counts = np.where(WIDTHS > 0, arrays["counts"].astype(np.int64), 0)
    widths = WIDTHS[
        np.tile(np.arange(len(WIDTHS)), strips).repeat(counts.reshape(-1))
    ]  # of tiles, as the file has them
    strip, group = np.arange(strips).repeat(counts.sum(1)), arrays["groups"].astype(np.int64)
    bounds = np.arange(splits + 1) * groups // splits  # of items
    split = np.searchsorted(bounds, group, "right") - 1
    slot, j = (strip // STRIPS * splits + split) * STRIPS + strip % STRIPS, group - bounds[split]
    slots = -(-strips // STRIPS) * splits * STRIPS
    order, to = np.lexsort((j, slot)), np.empty(len(widths), np.int64)
    to[order] = np.cumsum(widths[order]) - widths[order]  # unit where a tile goes
    half = j < np.diff(bounds)[split] // 2
    units, early = (np.bincount(slot, of, slots).astype(np.int64) for of in (widths, widths * half))
    items = units.reshape(-1, STRIPS)
    before = np.cumsum(items, 1) - items
    table = np.stack([np.cumsum(units) - units, units, early, before.reshape(-1)], 1)
    wide = np.zeros((slots, -(-groups // splits)), np.int64)
    wide[slot, j] = widths
    meta = np.zeros((*wide.shape, 4), np.uint32)
    meta[slot, j, :2] = arrays["nibbles"].reshape(-1, ROWS // 2).copy().view(np.uint32)
    meta[..., 2] = wide << 8 | np.cumsum(wide, 1) - wide << 16
    meta[slot, j, 2] |= arrays["bytes"]
    return {
        "codes": _codes(arrays["codes"], widths, to, device),
        "meta": torch.from_numpy(meta.view(np.int32)).to(device),
        "table": torch.from_numpy(table.astype(np.int32)).to(device),
        "order": torch.from_numpy(arrays["order"]).to(device),
        "most": torch.tensor(items.sum(1).max()),
    }


def _codes(codes: np.ndarray, widths: np.ndarray, to: np.ndarray, device: torch.device) -> Tensor:
    """The units of tiles, in the lanes' order, at `to`. Only the result is as large as the matrix on the device."""
    units, starts = codes.reshape(-1, UNIT), np.cumsum(widths) - widths
    made = torch.empty(units.shape, dtype=torch.uint8, device=device)
    for bits in map(int, TILES.TILE_WIDTHS[1:]):
        found, planes = np.flatnonzero(widths == bits), np.arange(bits)
        for i in range(0, len(found), AT_A_TIME):
            own = found[i : i + AT_A_TIME]
            tiles = torch.from_numpy(units[starts[own][:, None] + planes]).to(device)
            target = torch.from_numpy(to[own][:, None] + planes).to(device)
            made[target.view(-1)] = _lanes(tiles, bits).view(-1, UNIT)
    return made


def _lanes(tiles: Tensor, bits: int) -> Tensor:
    """uint8 [tiles, bits, UNIT] of the file -> the same bits as hopper.cu loads them."""
    n, at, codes = len(tiles), 0, torch.zeros(len(tiles), ROWS, COLUMNS, dtype=torch.uint8, device=tiles.device)
    planes = [p for p in TILES.PLANES if bits & p]
    for plane in planes:
        size = ROWS * plane
        blocks = tiles[:, at : at + plane].reshape(n, size // 4, ROWS, 4).transpose(1, 2).reshape(n, ROWS, size)
        fields = [blocks >> plane * i & (1 << plane) - 1 for i in range(8 // plane)]
        codes |= torch.cat(fields, 2) << at
        at += plane
    # Row g + 8 b, column 32 q + 16 a + 4 t + j -> [q, i = 2 a + b, lane = 4 g + t, j]
    lanes = codes.view(n, 2, 8, 4, 2, 4, 4).permute(0, 3, 4, 1, 2, 5, 6).reshape(n, 4, 4, 32, 4)
    made, at = [], 0
    for plane in planes:
        field = lanes >> at & (1 << plane) - 1
        at += plane
        if plane == 8:
            words = field.transpose(2, 3)
        elif plane == 4:
            words = (field[:, :2] | field[:, 2:] << 4).transpose(2, 3)
        elif plane == 2:
            words = _either([field[:, q] << 2 * q for q in range(4)]).transpose(1, 2)
        else:
            halves = [field[:, q, 2 * a : 2 * a + 2] << 2 * q + a for q in range(4) for a in range(2)]
            words = _either(halves).transpose(1, 2)
        made.append(words.reshape(n, plane * UNIT))
    return torch.cat(made, 1)


def _either(fields: list[Tensor]) -> Tensor:
    return functools.reduce(torch.bitwise_or, fields)
