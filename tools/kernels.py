"""Products with packed matrices against torch's, weights cold: make kernels.

Random tiles of the given mean width on the shapes of GPT-2 XL and Llama-7B, as many copies of each matrix as make
`--cold` MiB of packed bytes, which are gone through in turn, so that weights come from memory. In every round each
contestant makes one product with one copy; a ratio is of two times of one round, the median over rounds is printed with
the quartiles. GB/s are packed bytes over the median time. `reading` are torch's threads that add up as many
bytes of float32, in the same rounds: a lower bound of the machine's bandwidth, which `torch float32` may exceed, since
it asks for bytes ahead. The cache of a large server may hold more than `--cold`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import typer

from nashswarm.threads import set_threads, wait_asleep

wait_asleep()  # before torch is loaded

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from nashswarm.bitpack import pack  # noqa: E402
from nashswarm.kernels.matrix import WIDTHS, Matrix  # noqa: E402
from nashswarm.types import PackedTensor  # noqa: E402

SHAPES = {
    "gpt2-xl attn.c_attn": (4800, 1600),
    "gpt2-xl mlp.c_fc": (6400, 1600),
    "gpt2-xl mlp.c_proj": (1600, 6400),
    "llama-7b self_attn": (4096, 4096),
    "llama-7b mlp.up": (11008, 4096),
    "llama-7b mlp.down": (4096, 11008),
}
# Of tiles, by width: about what the market buys at 3.25 bits; 3.21 on average, 3.25 with steps and map.
SHARES = {0: 0.02, 1: 0.06, 2: 0.21, 3: 0.32, 4: 0.26, 5: 0.09, 6: 0.03, 8: 0.01}
ROWS, COLUMNS = 16, 128
GROUP = 128  # of torch's 4-bit format
Product = Callable[[int], object]  # with the copy of that number


def packed(shape: tuple[int, int], rng: np.random.Generator, shares: dict[int, float] = SHARES) -> PackedTensor:
    """Random codes and steps, tiles of each width by their share."""
    strips, groups = -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)
    index = rng.choice(len(WIDTHS), (strips, groups), p=[shares.get(b, 0) for b in WIDTHS.tolist()])
    live = int((index > 0).sum())
    arrays = {
        "codes": rng.integers(0, 256, int(WIDTHS[index].sum()) * ROWS * COLUMNS // 8, np.uint8),
        "scales": rng.integers(180, 200, live * (ROWS // 2 + 1), np.uint8),
        "map": np.concatenate([pack(index, 3), pack(rng.permutation(shape[1]), (shape[1] - 1).bit_length())]),
    }
    return PackedTensor("tiles", shape, arrays, {"rows": ROWS, "columns": COLUMNS, "base": -239})


def int4(shape: tuple[int, int], x: Tensor, copies: int) -> Product | None:
    """torch's own product with 4-bit weights, where this version has it for this shape."""
    codes = torch.randint(0, 16, shape, dtype=torch.int32)
    scales = torch.rand(-(-shape[1] // GROUP), shape[0], 2).bfloat16()
    x = x.bfloat16()  # its fast path
    try:
        made = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).clone() for _ in range(copies)]
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        multiply(x, made[0], GROUP, scales)
    except (AttributeError, RuntimeError) as error:
        print(f"  torch int4: {str(error).splitlines()[0]}")
        return None
    return lambda i: multiply(x, made[i % len(made)], GROUP, scales)


def reading(size: int, copies: int) -> Product:
    """Nothing but reading `size` bytes, with torch's threads."""
    made = [torch.zeros(size // 4) for _ in range(copies)]
    return lambda i: made[i % len(made)].sum()


def seconds(contestants: dict[str, Product], rounds: int) -> dict[str, np.ndarray]:
    """[rounds] of each; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, product in contestants.items():
            started = time.perf_counter()
            product(i)
            found[name].append(time.perf_counter() - started)
    return {name: np.array(times[1:]) for name, times in found.items()}


def spread(values: np.ndarray) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:6.2f} ({low:.2f} to {high:.2f})"


def measure(shape: tuple[int, int], batch: int, cold: int, rounds: int) -> None:
    """Print one shape's table."""
    rng = np.random.default_rng(0)
    first = Matrix(packed(shape, rng))
    size = first.nbytes
    copies = max(2, -(-(cold << 20) // size))
    made = [first, *(Matrix(packed(shape, rng)) for _ in range(copies - 1))]
    x = torch.randn(batch, shape[1])
    dense = [torch.randn(shape) for _ in range(max(2, -(-(cold << 20) // (4 * shape[0] * shape[1]))))]
    contestants: dict[str, Product] = {
        "torch float32": lambda i: torch.nn.functional.linear(x, dense[i % len(dense)]),
        "reading": reading(size, copies),
        "float32": lambda i: made[i % copies].matmul(x),
        "int8": lambda i: made[i % copies].matmul(x, "int8"),
        "float32, AVX2": lambda i: made[i % copies].matmul(x, most="avx2"),
        "int8, AVX2": lambda i: made[i % copies].matmul(x, "int8", most="avx2"),
    }
    other = int4(shape, x, max(2, -(-(cold << 20) // (shape[0] * shape[1] // 2))))
    if other is not None:
        contestants["torch int4"] = other
    times = seconds(contestants, rounds)
    sizes = {
        "torch float32": dense[0].nbytes,
        "torch int4": shape[0] * shape[1] // 2 + 8 * shape[0] * shape[1] // GROUP,
    }
    for name, found in times.items():
        speed = times["torch float32"] / found
        rate = sizes.get(name, size) / np.median(found) / 1e9
        share = sizes.get(name, size) / size * times["reading"] / found
        print(
            f"  {name:14s} {np.median(found) * 1e3:8.3f} ms  {rate:6.1f} GB/s  "
            f"of reading {spread(share)}  over torch float32 {spread(speed)}"
        )


def main(
    only: Annotated[str, typer.Option(help="part of a shape's name")] = "",
    batch: Annotated[int, typer.Option(help="rows of activations")] = 1,
    threads: Annotated[int, typer.Option()] = 2,
    cold: Annotated[int, typer.Option(help="MiB of weights to go through")] = 256,
    rounds: Annotated[int, typer.Option()] = 60,
) -> None:
    """Go through the shapes."""
    set_threads(threads)
    print(f"batch {batch}, {threads} threads, {cold} MiB of weights in turn")
    for name, shape in SHAPES.items():
        if only in name:
            example = Matrix(packed(shape, np.random.default_rng(0)))
            bits = 8 * sum(array.nbytes for array in example.packed.arrays.values()) / (shape[0] * shape[1])
            print(f"{name} {shape[0]} x {shape[1]}, {bits:.2f} bits, {example.instructions()}", flush=True)
            measure(shape, batch, cold, rounds)


if __name__ == "__main__":
    typer.run(main)
