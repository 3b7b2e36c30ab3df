"""Kernels in Triton over `tiles` in the device's layout (see `gpu`); imports without Triton, too.

A byte of a plane of p bits holds 8 / p fields, of columns k0 + P e. Masked where it stands and read as float16, a field
c at bit p e is the subnormal number c 2^(p e - 24), exactly; times 2^15 it is a normal one, c 2^(p e - 9). So two
weights cost an AND and a product, and tensor cores do the rest, with exact products and float32 sums; what is left of
powers of two goes to the sums. (Tensor cores align subnormal numbers by their exponent alone: without the factor, sums
beside an outlier lost up to 4 bits.)

In upper case: C columns and R rows of a tile, BC and BR the powers of two that hold them (BR at least 16), N columns of
digits, ASM whether registers are taken apart by hand (Triton's interpreter cannot), PDL whether a kernel may start
before the one in front of it has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # `gpu` says so when it is asked for a product
    triton = tl = None

AVAILABLE = triton is not None


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, if there is Triton."""
    return triton.jit(function) if triton else function


# --- activations ---------------------------------------------------------------------------------------------------


@jit
def prepare(
    x: tl.tensor,
    order: tl.tensor,
    digits: tl.tensor,
    sums: tl.tensor,
    arrived: tl.tensor,
    columns_in: tl.tensor,
    batch: tl.tensor,
    strips: tl.tensor,
    DIGITS: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One group of columns: digits float16 [group, N, C]; sums float32 [group, 2, N], of digits and their unit.

    Column n of N is row n % batch of x, its first or second digit: x = unit (first + 2^-11 second). Some programs also
    set the strips' counters to 0.
    """
    group = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    zeroed = group * BC + tl.arange(0, BC)
    while tl.min(zeroed) < strips:
        tl.store(arrived + zeroed, 0, zeroed < strips)
        zeroed += tl.num_programs(0) * BC
    n, c = tl.arange(0, N), tl.arange(0, BC)
    place = group * C + c
    column = tl.load(order + place, (c < C) & (place < columns_in), 0)
    mine = (n < batch * DIGITS)[:, None] & ((c < C) & (place < columns_in))[None, :]
    values = tl.load(x + (n % batch)[:, None].to(tl.int64) * columns_in + column[None, :], mine, 0).to(tl.float32)
    # 2^14 and up for a group's largest, so that float16 ends 2^-39 of it further down; below 2^-90 it counts as zero.
    exponent = (tl.max(tl.abs(values), 1).to(tl.int32, bitcast=True) >> 23) & 255
    live = exponent >= 37
    values *= tl.where(live, (268 - exponent) << 23, 0).to(tl.float32, bitcast=True)[:, None]
    digit = values.to(tl.float16)
    unit = tl.where(live, (exponent - 14) << 23, 0).to(tl.float32, bitcast=True)
    if DIGITS == 2:
        second = n >= batch
        low = ((values - digit.to(tl.float32)) * 2048).to(tl.float16)
        digit = tl.where(second[:, None], low, digit)
        unit = tl.where(second, unit * (1 / 2048), unit)
    tl.store(digits + (group * N + n)[:, None] * C + c[None, :], digit, (c < C)[None, :] & (n >= 0)[:, None])
    tl.store(sums + group * 2 * N + n, tl.sum(digit.to(tl.float32), 1))
    tl.store(sums + group * 2 * N + N + n, unit)


# --- products ------------------------------------------------------------------------------------------------------


def _assembly(mask: int) -> str:
    """Four bytes of a register to two pairs of 16 bits, a mask on each, and the factor 2^15."""
    move = "prmt.b32 {0}, $2, 0, 0x{1}; and.b32 {0}, {0}, 0x{2:08x}; mul.rn.f16x2 {0}, {0}, f;"
    moves = " ".join(move.format(place, bytes_, mask * 0x10001) for place, bytes_ in (("$0", 4140), ("$1", 4342)))
    return "{ .reg .b32 f; mov.b32 f, 0x78007800; " + moves + " }"


if triton:
    _assembly = triton.constexpr_function(_assembly)


@jit
def _field(v: tl.tensor, MASK: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """Bits of bytes [...], times 2^-9, as float16 [...]."""
    if ASM:
        return tl.inline_asm_elementwise(_assembly(MASK), "=r,=r,r", [v], tl.float16, True, 4)
    return (v.to(tl.int16) & MASK).to(tl.float16, bitcast=True) * 32768.0


@jit
def _plane(
    codes: tl.tensor,
    digits: tl.tensor,
    used: tl.tensor,
    BITS: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    N: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """sum c x float32 [BR, N] of one plane; digits [N, C] of the tile's group, the first `used` rows not zero."""
    P: tl.constexpr = C * BITS // 8
    BP: tl.constexpr = max(16, BC * BITS // 8)
    r, k, n = tl.arange(0, BR), tl.arange(0, BP), tl.arange(0, N)
    at = codes + r[:, None] * P + k[None, :]
    v = tl.load(at) if BR == R and BP == P else tl.load(at, (r < R)[:, None] & (k < P)[None, :], 0)
    total = tl.zeros([BR, N], tl.float32)
    for e in tl.static_range(8 // BITS):
        b = tl.load(digits + n[None, :] * C + (e * P + k)[:, None], (n < used)[None, :] & (k < P)[:, None], 0)
        total += tl.dot(_field(v, ((1 << BITS) - 1) << (BITS * e), ASM), b) * (2.0 ** (9 - BITS * e))
    return total


@jit
def _steps(
    nibbles: tl.tensor, tile: tl.tensor, byte: tl.tensor, base: tl.tensor, R: tl.constexpr, BR: tl.constexpr
) -> tl.tensor:
    """Steps of a tile's rows float32 [BR], and 1 where the grid has zero in it."""
    r = tl.arange(0, BR)
    row = (tl.load(nibbles + tile * (R // 8) + r // 8, r < R, 0) >> (4 * (r % 8))) & 15
    eighths = row + byte
    return tl.where(row > 0, tl.exp2((eighths + (base - 1)).to(tl.float32) * 0.125), 0.0), eighths & 1


@jit
def _item(items: tl.tensor) -> tuple[tl.tensor, ...]:
    """This program's: width, strip, first tile, number of tiles, first unit of codes."""
    at = items + tl.program_id(0) * 8
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@jit
def _run(
    codes: tl.tensor,
    nibbles: tl.tensor,
    labels: tl.tensor,
    digits: tl.tensor,
    sums: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    unit: tl.tensor,
    base: tl.tensor,
    used: tl.tensor,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    N: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """y float32 [BR, N] of tiles of one width."""
    n = tl.arange(0, N)
    acc = tl.zeros([BR, N], tl.float32)
    UNIT: tl.constexpr = R * C // 8
    label = tl.load(labels + first)
    for i in tl.range(0, count, num_stages=STAGES):
        tile = first + i
        group, byte = label & 65535, label >> 16
        label = tl.load(labels + tile + 1)
        x = digits + group * (N * C)
        at = codes + (unit + i * WIDTH).to(tl.int64) * UNIT
        total = tl.zeros([BR, N], tl.float32)
        if WIDTH & 8:
            total += _plane(at, x, used, 8, R, BR, C, BC, N, ASM)
        if WIDTH & 4:
            total += _plane(at, x, used, 4, R, BR, C, BC, N, ASM)
        if WIDTH & 2:
            total += _plane(at + (WIDTH & 12) * UNIT, x, used, 2, R, BR, C, BC, N, ASM) * (1 << (WIDTH & 12))
        if WIDTH & 1:
            total += _plane(at + (WIDTH & 14) * UNIT, x, used, 1, R, BR, C, BC, N, ASM) * (1 << (WIDTH & 14))
        step, odd = _steps(nibbles, tile, byte, base, R, BR)
        middle = ((1 << WIDTH) - 1) * 0.5 + 0.5 * odd.to(tl.float32)
        total -= middle[:, None] * tl.load(sums + group * 2 * N + n)[None, :]
        acc += total * (step[:, None] * tl.load(sums + group * 2 * N + N + n)[None, :])
    return acc


@jit
def multiply(
    codes: tl.tensor,
    nibbles: tl.tensor,
    labels: tl.tensor,
    digits: tl.tensor,
    sums: tl.tensor,
    items: tl.tensor,
    partial: tl.tensor,
    arrived: tl.tensor,
    y: tl.tensor,
    base: tl.tensor,
    out: tl.tensor,
    batch: tl.tensor,
    DIGITS: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    N: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One item: a run of tiles of one width in one strip. The last one of a strip to arrive adds up its items."""
    width, strip, first, count, unit = _item(items)
    places = items + tl.program_id(0) * 8 + 5
    begin, end, slot = tl.load(places), tl.load(places + 1), tl.load(places + 2)
    used = batch * DIGITS
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BR, N], tl.float32)
    for W in tl.static_range(1, 9):
        if width == W:
            acc = _run(
                codes, nibbles, labels, digits, sums, first, count, unit, base, used, W, R, BR, C, BC, N, ASM, STAGES
            )
    r, n = tl.arange(0, BR), tl.arange(0, N)
    inner = r[:, None] * N + n[None, :]
    tl.store(partial + slot * (BR * N) + inner, acc)
    tl.debug_barrier()
    if tl.atomic_add(arrived + strip, 1, sem="acq_rel", scope="gpu") == end - begin - 1:
        tl.debug_barrier()
        acc = tl.zeros([BR, N], tl.float32)
        for start in range(begin, end, CHUNK):
            for j in tl.static_range(CHUNK):
                for d in tl.static_range(DIGITS):
                    inside = (n < tl.where(start + j < end, batch, 0))[None, :] & (r < R)[:, None]
                    own = partial + (start + j) * (BR * N) + inner + d * batch
                    acc += tl.load(own, inside, 0.0, cache_modifier=".cg")
        row = strip * R + r
        inside = ((r < R) & (row < out))[:, None] & (n < batch)[None, :]
        tl.store(y + n[None, :].to(tl.int64) * out + row[:, None], acc.to(y.dtype.element_ty), inside)


# --- decoding ------------------------------------------------------------------------------------------------------


@jit
def _codes(
    at: tl.tensor, BITS: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, C: tl.constexpr, BC: tl.constexpr
) -> tl.tensor:
    """One plane's bits int32 [BR, BC]."""
    r, c = tl.arange(0, BR), tl.arange(0, BC)
    P: tl.constexpr = C * BITS // 8
    v = tl.load(at + r[:, None] * P + (c % P)[None, :], (r < R)[:, None] & (c < C)[None, :], 0).to(tl.int32)
    return (v >> (c // P * BITS)[None, :]) & ((1 << BITS) - 1)


@jit
def decode(
    codes: tl.tensor,
    nibbles: tl.tensor,
    labels: tl.tensor,
    items: tl.tensor,
    dense: tl.tensor,
    base: tl.tensor,
    out: tl.tensor,
    columns_in: tl.tensor,
    R: tl.constexpr,
    BR: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Weights of one item into dense [out, in], columns in rounding order."""
    width, strip, first, count, unit = _item(items)
    UNIT: tl.constexpr = R * C // 8
    r, c = tl.arange(0, BR), tl.arange(0, BC)
    row = strip * R + r
    for i in range(0, count):
        tile = first + i
        label = tl.load(labels + tile)
        group, byte = label & 65535, label >> 16
        at = codes + (unit + i * width).to(tl.int64) * UNIT
        code = tl.zeros([BR, BC], tl.int32)
        for q in tl.static_range(4):
            if width & (8 >> q):
                wider = width & (255 << (4 - q))  # planes before this one
                code += _codes(at + wider * UNIT, 8 >> q, R, BR, C, BC) << wider
        step, odd = _steps(nibbles, tile, byte, base, R, BR)
        middle = ((1 << width) - 1).to(tl.float32) * 0.5 + 0.5 * odd.to(tl.float32)
        column = group * C + c
        inside = ((r < R) & (row < out))[:, None] & ((c < C) & (column < columns_in))[None, :]
        w = (code.to(tl.float32) - middle[:, None]) * step[:, None]
        tl.store(dense + row[:, None].to(tl.int64) * columns_in + column[None, :], w.to(dense.dtype.element_ty), inside)
