"""Integers to bytes and back: every width, any count, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm import bitpack
from nashswarm.bitpack import MAX_WIDTH, pack, packed_size, unpack

WIDTHS = range(1, MAX_WIDTH + 1)


@settings(deadline=None)  # whatever width comes first is compiled
@given(st.data())
def test_unpack_inverts_pack(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, MAX_WIDTH), "width")
    codes = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=70), "codes")
    packed = pack(np.array(codes, np.uint16), width)
    assert packed.dtype == np.uint8
    assert packed.size == packed_size(len(codes), width)
    assert unpack(packed, width, len(codes)).tolist() == codes


@pytest.mark.parametrize("width", WIDTHS)
def test_every_ragged_count_survives_at_full_range(width: int) -> None:
    rng = np.random.default_rng(width)
    for count in range(50):
        codes = rng.integers(0, 2**width, count)
        codes[:1] = 2**width - 1
        back = unpack(pack(codes, width), width, count)
        assert back.dtype == (np.uint8 if width <= 8 else np.uint16)
        assert np.array_equal(back, codes)


@pytest.mark.parametrize("width", range(1, 9))
def test_memory_may_be_read_only_and_lie_anywhere(width: int) -> None:
    codes = np.random.default_rng(width).integers(0, 2**width, 101).astype(np.uint8)
    packed = pack(codes, width)
    for offset in range(9):
        there = np.frombuffer(bytes(offset) + codes.tobytes() + packed.tobytes(), np.uint8)
        assert np.array_equal(pack(there[offset : offset + 101], width), packed)
        assert np.array_equal(unpack(there[offset + 101 :], width, 101), codes)
    wide = np.repeat(packed, 2)
    assert np.array_equal(unpack(wide[::2], width, 101), codes)


@pytest.mark.parametrize("width", range(1, 9))
def test_without_numba_the_bytes_are_the_same(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [np.random.default_rng(width).integers(0, 2**width, count).astype(np.uint8) for count in (0, 5, 77, 1000)]
    compiled = [pack(codes, width) for codes in many]
    monkeypatch.setattr(bitpack, "_moves", lambda _: None)
    for codes, expected in zip(many, compiled, strict=True):
        assert np.array_equal(pack(codes, width), expected)
        back = unpack(expected, width, codes.size)
        assert back.dtype == np.uint8
        assert np.array_equal(back, codes)


@pytest.mark.parametrize("more", [-9, -1, 0, 1, 8, 13])
@pytest.mark.parametrize("width", range(1, 9))
def test_words_join_without_a_seam(width: int, more: int) -> None:
    codes = np.random.default_rng(width).integers(0, 2**width, 1000 + more).astype(np.uint8)
    packed = pack(codes, width)
    bits = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :width]
    assert np.array_equal(packed, np.packbits(bits, bitorder="little"))
    assert np.array_equal(unpack(packed, width, codes.size), codes)


@pytest.mark.parametrize(
    ("codes", "width", "expected"),
    [
        ([1, 0, 1, 1, 0, 0, 0, 1, 1], 1, "8d01"),
        ([1, 2, 3], 2, "39"),
        ([1, 2, 3, 0, 2], 2, "3902"),
        ([7, 0, 5], 3, "4701"),  # 7 | 0 << 3 | 5 << 6 = 0x147
        ([15, 1, 9], 4, "1f09"),
        ([31, 1, 16], 5, "3f40"),  # 31 | 1 << 5 | 16 << 10 = 0x403f
        ([200, 7], 8, "c807"),
        ([0xABC, 0xDEF], 12, "bcfade"),
        ([0x1234, 0xFFFE], 16, "3412feff"),
        ([], 3, ""),
    ],
)
def test_bytes_are_these(codes: list[int], width: int, expected: str) -> None:
    packed = pack(np.array(codes, np.int64), width)
    assert packed.tobytes().hex() == expected
    assert unpack(packed, width, len(codes)).tolist() == codes


def test_shape_and_order_are_read_in_c_order() -> None:
    codes = np.arange(12).reshape(3, 4)
    assert np.array_equal(pack(codes.T, 5), pack(codes.T.ravel(), 5))
    assert np.array_equal(pack(codes, 4), pack(codes.ravel(), 4))


@pytest.mark.parametrize("width", [3, 5, 6, 7, 11])
def test_chunks_join_without_a_seam(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(0, 2**width, 1000)
    whole = pack(codes, width)
    monkeypatch.setattr(bitpack, "CHUNK", 128)  # 8 to 40 codes per chunk
    for count in (0, 1, 7, 8, 39, 40, 41, 80, 999, 1000):
        assert np.array_equal(pack(codes[:count], width), whole[: packed_size(count, width)] & _mask(count, width))
        assert np.array_equal(unpack(pack(codes[:count], width), width, count), codes[:count])


def _mask(count: int, width: int) -> np.ndarray:
    """Ones for the bits in use."""
    mask = np.full(packed_size(count, width), 0xFF, np.uint8)
    if (count * width) % 8:
        mask[-1] = (1 << (count * width) % 8) - 1
    return mask


@pytest.mark.parametrize(("code", "width"), [(4, 2), (8, 3), (256, 8), (65536, 16), (-1, 4), (-1, 16)])
def test_codes_out_of_range_are_refused(code: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{width} bits cannot hold"):
        pack(np.array([0, code]), width)


@pytest.mark.parametrize("width", [0, -1, 17])
def test_widths_out_of_range_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=r"not in 1\.\.16"):
        pack(np.zeros(1, np.uint8), width)
    with pytest.raises(ValueError, match=r"not in 1\.\.16"):
        unpack(np.zeros(1, np.uint8), width, 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_wrong_length_is_refused(width: int) -> None:
    data = pack(np.zeros(9, np.uint8), width)
    for wrong in (data[:-1], np.append(data, np.uint8(0))):
        with pytest.raises(ValueError, match=f"expected {data.size}"):
            unpack(wrong, width, 9)
    with pytest.raises(ValueError, match="expected"):
        unpack(data.astype(np.int16), width, 9)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 11])
def test_dirty_padding_is_refused(width: int) -> None:
    data = pack(np.zeros(5, np.uint8), width)
    data[-1] |= 0x80
    with pytest.raises(ValueError, match="padding"):
        unpack(data, width, 5)
