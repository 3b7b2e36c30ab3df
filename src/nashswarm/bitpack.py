"""Integers to bytes and back, any width from 1 to 16 bits, vectorised and pure.

Up to 8 bits, eight codes are moved at a time, as fields of one 64-bit word (SWAR), in blocks that fit the cache.

Layout: code i occupies bits [i * width, (i + 1) * width) of the stream; bit j of the stream is bit j % 8 of byte
j // 8 (least significant first). The last byte is padded with zeros.
"""

from __future__ import annotations

import math

import numpy as np

MAX_WIDTH = 16
CHUNK = 1 << 22  # codes per round above 8 bits: bounds their bit matrix to 64 MiB
BLOCK = 1 << 17  # codes per round up to 8 bits


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
    if width < 8:
        return _pack_narrow(flat.astype(np.uint8, copy=False), width)
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
    if width < 8:
        return _unpack_narrow(data, width, count)
    step = _aligned_chunk(width)
    parts = []
    for i in range(0, count, step):
        n = min(step, count - i)
        start = i * width // 8
        parts.append(_unpack_bits(data[start : start + packed_size(n, width)], width, n))
    return np.concatenate(parts) if parts else np.empty(0, np.uint16)


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width {width} is not in 1..{MAX_WIDTH} bits")


def _aligned_chunk(width: int) -> int:
    """Codes per chunk such that every chunk starts on a byte."""
    return CHUNK // math.lcm(8, width) * 8


def _pack_narrow(flat: np.ndarray, width: int) -> np.ndarray:
    whole = flat.size // 8 * 8
    out = np.empty(packed_size(flat.size, width), np.uint8)
    for i in range(0, whole, BLOCK):
        _squeeze(flat[i : min(i + BLOCK, whole)], width, out[i // 8 * width : min(i + BLOCK, whole) // 8 * width])
    if whole < flat.size:
        last = np.empty(width, np.uint8)
        _squeeze(np.pad(flat[whole:], (0, -flat.size % 8)), width, last)
        out[whole // 8 * width :] = last[: out.size - whole // 8 * width]
    return out


def _unpack_narrow(data: np.ndarray, width: int, count: int) -> np.ndarray:
    whole = count // 8 * 8
    out = np.empty(count, np.uint8)
    for i in range(0, whole, BLOCK):
        end = min(i + BLOCK, whole)
        _spread(data[i // 8 * width : end // 8 * width], width, out[i:end])
    if whole < count:
        rest, last = data[whole // 8 * width :], np.empty(8, np.uint8)
        _spread(np.pad(rest, (0, width - rest.size)), width, last)
        out[whole:] = last[: count - whole]
    return out


def _squeeze(codes: np.ndarray, width: int, out: np.ndarray) -> None:
    """uint8 [8 n] -> uint8 [n width]."""
    if 8 % width == 0:  # a byte at a time: its codes lie in a word of as many bytes, and the lowest byte collects them
        words = codes.view(f"<u{8 // width}")
        for shift in _shifts(width):
            words = words | words >> words.dtype.type(shift)
        np.copyto(out, words, casting="unsafe")
        return
    words = codes.view("<u8")
    for up, low, high in _lanes(width):
        above = words >> up
        above &= high
        words = words & low
        words |= above
    for i, byte in enumerate(words.view(np.uint8).reshape(-1, 8).T[:width]):
        out[i::width] = byte


def _spread(data: np.ndarray, width: int, out: np.ndarray) -> None:
    """Inverse of `_squeeze`."""
    if 8 % width == 0:
        words = out.view(f"<u{8 // width}")
        words[:] = data
        for shift in reversed(_shifts(width)):
            words |= words << words.dtype.type(shift)
        out &= np.uint8((1 << width) - 1)
        return
    words = out.view("<u8")
    words[:] = 0
    for i, byte in enumerate(out.reshape(-1, 8).T[:width]):
        byte[:] = data[i::width]
    for up, low, high in reversed(_lanes(width)):
        above = words & high
        above <<= up
        words &= low
        words |= above


def _shifts(width: int) -> list[int]:
    """By which neighbours, pairs and fours of codes come together."""
    return [lane - lane // 8 * width for lane in (8, 16, 32)[: (8 // width).bit_length() - 1]]


def _lanes(width: int) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
    """For fields in lanes of 8, 16, 32 bits: the shift that joins two, where the low one is, where the high one goes.

    (After joining; before, it is that far above.)
    """
    found = []
    for lane in (8, 16, 32):
        size = lane // 8 * width
        low = sum(((1 << size) - 1) << start for start in range(0, 64, 2 * lane))
        found.append((np.uint64(lane - size), np.uint64(low), np.uint64(low << size)))
    return found


def _pack_bits(flat: np.ndarray, width: int) -> np.ndarray:
    """Above 8 bits: spread every code into its bits, then let numpy gather them."""
    bits = (flat.astype(np.uint16)[:, None] >> np.arange(width, dtype=np.uint16)) & np.uint16(1)
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def _unpack_bits(data: np.ndarray, width: int, count: int) -> np.ndarray:
    bits = np.unpackbits(data, bitorder="little", count=count * width).reshape(count, width)
    out = np.zeros(count, np.uint16)
    for i in range(width):
        out |= bits[:, i].astype(np.uint16) << np.uint16(i)
    return out
