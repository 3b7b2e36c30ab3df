"""Integers to bytes and back, any width from 1 to 16 bits, vectorised and pure.

Layout: code i occupies bits [i * width, (i + 1) * width) of the stream; bit j of the stream is bit j % 8 of byte
j // 8 (least significant first). The last byte is padded with zeros.
"""

from __future__ import annotations

import math

import numpy as np

MAX_WIDTH = 16
CHUNK = 1 << 22  # codes per round: bounds the bit matrix of the slow path to 64 MiB


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
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >> width):
        raise ValueError(f"codes span [{flat.min()}, {flat.max()}], which {width} bits cannot hold")
    if width == 8:
        return flat.astype(np.uint8)
    if width == 16:
        return flat.astype("<u2").view(np.uint8)
    if 8 % width == 0:
        return _pack_fields(flat.astype(np.uint8), width)
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
    if 8 % width == 0:
        return _unpack_fields(data, width)[:count]
    step = _aligned_chunk(width)
    parts = []
    for i in range(0, count, step):
        n = min(step, count - i)
        start = i * width // 8
        parts.append(_unpack_bits(data[start : start + packed_size(n, width)], width, n))
    return np.concatenate(parts) if parts else np.empty(0, np.uint8 if width <= 8 else np.uint16)


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width {width} is not in 1..{MAX_WIDTH} bits")


def _aligned_chunk(width: int) -> int:
    """Codes per chunk such that every chunk starts on a byte."""
    return CHUNK // math.lcm(8, width) * 8


def _pack_fields(flat: np.ndarray, width: int) -> np.ndarray:
    """Widths that divide 8: several codes a byte, by shifts alone."""
    per_byte = 8 // width
    padded = np.zeros(-(-flat.size // per_byte) * per_byte, np.uint8)
    padded[: flat.size] = flat
    fields = padded.reshape(-1, per_byte)
    out = fields[:, 0].copy()
    for i in range(1, per_byte):
        out |= fields[:, i] << np.uint8(i * width)
    return out


def _unpack_fields(data: np.ndarray, width: int) -> np.ndarray:
    per_byte, mask = 8 // width, np.uint8((1 << width) - 1)
    out = np.empty((data.size, per_byte), np.uint8)
    for i in range(per_byte):
        out[:, i] = (data >> np.uint8(i * width)) & mask
    return out.reshape(-1)


def _pack_bits(flat: np.ndarray, width: int) -> np.ndarray:
    """Any width: spread every code into its bits, then let numpy gather them."""
    bits = (flat.astype(np.uint16)[:, None] >> np.arange(width, dtype=np.uint16)) & np.uint16(1)
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def _unpack_bits(data: np.ndarray, width: int, count: int) -> np.ndarray:
    bits = np.unpackbits(data, bitorder="little", count=count * width).reshape(count, width)
    out = np.zeros(count, np.uint16)
    for i in range(width):
        out |= bits[:, i].astype(np.uint16) << np.uint16(i)
    return out.astype(np.uint8) if width <= 8 else out
