"""Products with packed matrices beside other products, weights cold.

Random tiles of 3.25 bits, and as many copies of every contestant's matrix as make `cold_mib` MiB, which are gone
through in turn, so that weights come from memory. In every round each contestant makes one product with one copy. The
ratio is to dense float32; the share, of bytes a second, to what reads float32 in the same rounds as fast as torch can.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nashswarm.benchmarks import matmul_nbits
from nashswarm.benchmarks.machine import Readers, document, machine
from nashswarm.benchmarks.matrices import packed
from nashswarm.benchmarks.timing import READING, Row, Turn, in_turn, interleaved, rows
from nashswarm.config import Benchmark, sizes
from nashswarm.kernels.matrix import Matrix, Set
from nashswarm.types import Progress

REFERENCE = "dense float32"
GROUP = 128  # weights that share a step in torch's 4-bit format
BLOCKS = (32, 128)  # the same of MatMulNBits


def measure(settings: Benchmark, threads: int, progress: Progress) -> dict[str, Any]:
    """All shapes with every number of rows of activations."""
    found = machine(threads, settings.cold_mib, settings.rounds)
    cases = [(sizes(text), batch) for batch in settings.batches for text in settings.shapes]
    made = [row for shape, batch in progress(cases, "kernels") for row in case(shape, batch, settings, threads)]
    return document(found, settings, made)


def case(shape: tuple[int, int], batch: int, settings: Benchmark, threads: int) -> list[Row]:
    """One shape (out, in) and one number of rows of activations."""
    entrants = Entrants(torch.randn(batch, shape[1]), shape, settings.cold_mib << 20, threads)
    size = entrants.enter()
    readers = Readers.make(size, entrants.copies(size))
    times = interleaved({**entrants.turns, **readers.turns}, settings.rounds)
    reader = readers.best(times)
    times[READING] = reader.of(size)
    what = f"{shape[0]} x {shape[1]}, {batch} {'row' if batch == 1 else 'rows'}"
    missing = [Row(what, name, note=why) for name, why in entrants.missing.items()]
    known = {**entrants.sizes, READING: size}
    return [*rows(what, times, REFERENCE, known, reader, shape[0] * shape[1]), *missing]


@dataclass(frozen=True, slots=True)
class Entrants:
    """The contestants of one shape."""

    x: Tensor  # float32 [batch, in]
    shape: tuple[int, int]
    cold: int  # bytes
    threads: int
    turns: dict[str, Turn] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of one matrix
    missing: dict[str, str] = field(default_factory=dict)  # contestant -> why

    def enter(self) -> int:
        """Let all contestants in, and return the bytes of a packed matrix."""
        for name, dtype in ((REFERENCE, torch.float32), ("dense bfloat16", torch.bfloat16)):
            self._dense(name, dtype)
        size = self._packed()
        self._int4()
        for block in BLOCKS:
            self._onnx(block)
        return size

    def copies(self, size: int) -> int:
        """Of a matrix of so many bytes, that make `cold`."""
        return max(2, -(-self.cold // size))

    def _dense(self, name: str, dtype: torch.dtype) -> None:
        size = self.shape[0] * self.shape[1] * dtype.itemsize
        made, x = [torch.randn(self.shape).to(dtype) for _ in range(self.copies(size))], self.x.to(dtype)
        self.turns[name] = in_turn(made, lambda weight: torch.nn.functional.linear(x, weight))
        self.sizes[name] = size

    def _packed(self) -> int:
        rng = np.random.default_rng(0)
        first = Matrix(packed(self.shape, rng))
        made = [first, *(Matrix(packed(self.shape, rng)) for _ in range(self.copies(first.nbytes) - 1))]
        ways, x, threads = dict(_ways(first)), self.x, self.threads
        for place, (name, (activations, most)) in enumerate(ways.items()):
            self.turns[name] = in_turn(
                made,
                lambda matrix, a=activations, m=most: matrix.matmul(x, a, threads, m),  # type: ignore[misc]
                place,
                len(ways),
            )
            self.sizes[name] = first.nbytes
        return first.nbytes

    def _int4(self) -> None:
        """torch's own product with 4-bit weights, where this version has it for this shape."""
        rows, columns = self.shape
        name, size = "torch int4", rows * columns // 2 + 4 * rows * -(-columns // GROUP)
        x = self.x.bfloat16()  # its fast path
        scales = torch.rand(-(-columns // GROUP), rows, 2).bfloat16()
        codes = torch.randint(0, 16, self.shape, dtype=torch.int32)
        try:
            made = [
                torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).clone() for _ in range(self.copies(size))
            ]
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
            multiply(x, made[0], GROUP, scales)
        except (AttributeError, RuntimeError) as error:
            self.missing[name] = f"not for this shape: {str(error).splitlines()[0]}"
            return
        self.turns[name] = in_turn(made, lambda weight: multiply(x, weight, GROUP, scales))
        self.sizes[name] = size

    def _onnx(self, block: int) -> None:
        name = f"MatMulNBits, blocks of {block}"
        try:
            size = self.shape[0] * self.shape[1] // 2
            made = matmul_nbits.products(self.x.numpy(), self.shape[0], block, self.copies(size), self.threads)
        except ModuleNotFoundError:
            self.missing[name] = matmul_nbits.MISSING
            return
        self.turns[name] = in_turn(made.turns, lambda turn: turn())
        self.sizes[name] = made.bytes


def _ways(matrix: Matrix) -> Iterator[tuple[str, tuple[Any, Set]]]:
    """Ours: by precision of activations, and with AVX2 alone where the processor has more."""
    for activations in ("float32", "int8"):
        yield f"packed, {activations}", (activations, "avx512")
    if matrix.instructions() == "avx512":
        for activations in ("float32", "int8"):
            yield f"packed, {activations}, AVX2", (activations, "avx2")
