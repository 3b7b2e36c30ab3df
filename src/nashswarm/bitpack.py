"""Integers to bytes and back, any width from 1 to 16 bits.

Below 8 bits, eight codes are moved at a time, as fields of one 64-bit word (SWAR), by code compiled for the width.

Layout: code i occupies bits [i * width, (i + 1) * width) of the stream; bit j of the stream is bit j % 8 of byte
j // 8 (least significant first). The last byte is padded with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from nashswarm import jit

MAX_WIDTH = 16
CHUNK = 1 << 22  # codes per round where bits are spread one by one: bounds their matrix to 64 MiB


def packed_size(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits occupy."""
    return (count * width + 7) // 8


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """Pack unsigned codes.

    Arguments: `codes`, any shape, integers in [0, 2**width), read in C order; `width` in bits, 1 to 16.
    Returns: uint8 [packed_size(codes.size, width)]. Raises ValueError for a code or width out of range.
    """
    _check_width(width)
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size and ((flat.dtype.kind != "u" and int(flat.min()) < 0) or int(flat.max()) >> width):
        raise ValueError(f"codes span [{flat.min()}, {flat.max()}], which {width} bits cannot hold")
    if width == 8:
        return flat.astype(np.uint8)
    if width == 16:
        return flat.astype("<u2").view(np.uint8)
    if width < 8 and (moves := _moves(width)):
        return _pack_words(flat.astype(np.uint8, copy=False), width, moves[0])
    step = _aligned_chunk(width)
    return np.concatenate([_pack_bits(flat[i : i + step], width) for i in range(0, max(flat.size, 1), step)])


def unpack(data: np.ndarray, width: int, count: int) -> np.ndarray:
    """Inverse of `pack`: uint8 [count], or uint16 [count] above 8 bits.

    Raises ValueError when `data` is not exactly as long as `count` codes need, or its padding bits are set.
    """
    _check_width(width)
    if data.dtype != np.uint8 or data.ndim != 1 or data.size != packed_size(count, width):
        raise ValueError(
            f"{data.size} bytes cannot be {count} codes of {width} bits: expected {packed_size(count, width)}"
        )
    used = (count * width) % 8
    if used and int(data[-1]) >> used:
        raise ValueError("padding bits after the last code are set")
    if width == 8:
        return data.copy()
    if width == 16:
        return data.view("<u2").astype(np.uint16)
    if width < 8 and (moves := _moves(width)):
        return _unpack_words(data, width, count, moves[1])
    step = _aligned_chunk(width)
    parts = []
    for i in range(0, count, step):
        n = min(step, count - i)
        start = i * width // 8
        parts.append(_unpack_bits(data[start : start + packed_size(n, width)], width, n))
    return np.concatenate(parts) if parts else np.empty(0, _dtype(width))


def _dtype(width: int) -> Any:
    return np.uint8 if width <= 8 else np.uint16


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width {width} is not in 1..{MAX_WIDTH} bits")


def _aligned_chunk(width: int) -> int:
    """Codes per chunk such that every chunk starts on a byte."""
    return CHUNK // math.lcm(8, width) * 8


# --- eight codes at a time -----------------------------------------------------------------------------------------


def _pack_words(flat: np.ndarray, width: int, squeeze: Callable[..., None]) -> np.ndarray:
    whole, left = divmod(flat.size, 8)
    out = np.empty(packed_size(flat.size, width), np.uint8)
    squeeze(flat[: 8 * whole].view("<u8"), out)
    if left:
        last = np.empty(width, np.uint8)
        squeeze(np.pad(flat[8 * whole :], (0, 8 - left)).view("<u8"), last)
        out[whole * width :] = last[: out.size - whole * width]
    return out


def _unpack_words(data: np.ndarray, width: int, count: int, spread: Callable[..., None]) -> np.ndarray:
    data, (whole, left) = np.ascontiguousarray(data), divmod(count, 8)
    out = np.empty(count, np.uint8)
    spread(data, out[: 8 * whole].view("<u8"))
    if left:
        rest, last = data[whole * width :], np.empty(8, np.uint8)
        spread(np.pad(rest, (0, width - rest.size)), last.view("<u8"))
        out[8 * whole :] = last[:left]
    return out


@cache
def _moves(width: int) -> tuple[Callable[..., None], Callable[..., None]] | None:
    """Eight codes [n] uint64 -> their bytes uint8 [n width], and back; None where numba is not installed.

    Neighbours, then pairs, then fours come together. A number that is known when it is compiled, as `width` is, makes
    it three to five times as fast as one that is not.
    """
    (up, low, high), (up2, low2, high2), (up4, low4, high4) = (_lane(width, lane) for lane in (8, 16, 32))

    def squeeze(words: np.ndarray, out: np.ndarray) -> None:
        for i in range(words.size):
            x = words[i]
            x = x & low | x >> up & high
            x = x & low2 | x >> up2 & high2
            x = x & low4 | x >> up4 & high4
            for byte in range(width):
                out[i * width + byte] = np.uint8(x >> np.uint64(8 * byte))

    def spread(data: np.ndarray, words: np.ndarray) -> None:
        for i in range(words.size):
            x = np.uint64(0)
            for byte in range(width):
                x |= np.uint64(data[i * width + byte]) << np.uint64(8 * byte)
            x = x & low4 | (x & high4) << up4
            x = x & low2 | (x & high2) << up2
            x = x & low | (x & high) << up
            words[i] = x

    try:
        from numba import types
    except ImportError:
        return None
    # What is read may lie anywhere, and in a file's memory.
    words, data = (types.Array(t, 1, "C", readonly=True, aligned=False) for t in (types.uint64, types.uint8))
    return (
        jit.compiled(squeeze, [types.void(words, types.uint8[::1])]),
        jit.compiled(spread, [types.void(data, types.uint64[::1])]),
    )


def _lane(width: int, lane: int) -> tuple[np.uint64, np.uint64, np.uint64]:
    """For fields in lanes of 8, 16, 32 bits: the shift that joins two, where the low one is, where the high one goes.

    (After joining; before, it is that far above.)
    """
    size = lane // 8 * width
    low = sum(((1 << size) - 1) << start for start in range(0, 64, 2 * lane))
    return np.uint64(lane - size), np.uint64(low), np.uint64(low << size)


# --- bit by bit ----------------------------------------------------------------------------------------------------


def _pack_bits(flat: np.ndarray, width: int) -> np.ndarray:
    """Spread every code into its bits, then let numpy gather them."""
    bits = (flat.astype(np.uint16)[:, None] >> np.arange(width, dtype=np.uint16)) & np.uint16(1)
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def _unpack_bits(data: np.ndarray, width: int, count: int) -> np.ndarray:
    bits = np.unpackbits(data, bitorder="little", count=count * width).reshape(count, width)
    out = np.zeros(count, _dtype(width))
    for i in range(width):
        out |= bits[:, i].astype(out.dtype) << out.dtype.type(i)
    return out
