"""Products with packed matrices on a GPU against cuBLAS' in float16, weights cold: make gpu-kernels.

As tools/kernels.py, whose random tiles these are, at a mean width of 3.25 bits and at 4 bits throughout. A contestant's
products, with every copy of its matrix in turn, are one CUDA graph; in every round each graph is replayed once, and a
ratio is of two times of one round. TB/s are the bytes of a matrix over the median time, beside what `torch.sum` reads.
Then a stack of layers in the shape of GPT-2 XL, without its attention, writes tokens: as a graph, and call by call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn

from nashswarm.benchmarks.matrices import SHARES, packed
from nashswarm.benchmarks.timing import Spread
from nashswarm.kernels.gpu import GpuMatrix
from nashswarm.types import PackedTensor

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672))
MIXES = {"4 bits": {4: 1.0}, "3.25 bits": SHARES}
XL = ((4800, 1600), (1600, 1600), (6400, 1600), (1600, 6400))  # of GPT-2: c_attn, c_proj, c_fc, c_proj
BLOCKS = 48
Replay = Callable[[], float]  # us for a product


def twin(matrix: GpuMatrix) -> GpuMatrix:
    """The same matrix in another place."""
    made = copy.copy(matrix)
    made._arrays = {name: array.clone() for name, array in matrix._arrays.items()}
    torch.cuda.synchronize()  # as when a matrix is loaded
    return made


def twins(matrix: GpuMatrix, cold: int) -> list[GpuMatrix]:
    """The same matrix in as many places as make `cold` MiB."""
    return [matrix, *(twin(matrix) for _ in range(max(1, -(-(cold << 20) // matrix.nbytes) - 1)))]


def both(matrix: PackedTensor) -> dict[str, GpuMatrix]:
    """By a name's ending: as the card is served, and with Triton's kernels where those are others."""
    made = {"": GpuMatrix(matrix)}
    return made | {", Triton": GpuMatrix(matrix, fastest=False)} if made[""]._hopper else made


def captured(product: Callable[[int], object], copies: int, times: int = 2) -> Replay:
    """A graph of products with each copy in turn."""
    for i in range(copies):
        product(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies * times):
            product(i % copies)
    return lambda: 1e3 * milliseconds(graph.replay) / (copies * times)


def milliseconds(work: Callable[[], object]) -> float:
    """By the GPU's clock."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    work()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended)


def bandwidth() -> float:
    """TB/s that `torch.sum` reads of a GiB."""
    values = torch.randn(1 << 28, device="cuda")
    return values.nbytes / float(np.median([milliseconds(values.sum) for _ in range(21)][1:])) / 1e9


def measure(shape: tuple[int, int], batches: list[int], cold: int, rounds: int, reading: float) -> None:
    """Print one shape's table."""
    rng = np.random.default_rng(0)
    dense = [
        torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(-(-(cold << 20) // shape[0] // shape[1]))
    ]
    made = {}
    for name, mix in MIXES.items():
        matrix = packed(shape, rng, mix)
        made |= {f"{name}{of}": twins(m, cold) for of, m in both(matrix).items()}
    for batch in batches:
        x = torch.randn(batch, shape[1], device="cuda", dtype=torch.float16)
        contestants = {"cuBLAS": captured(lambda i, x=x: nn.functional.linear(x, dense[i]), len(dense), 4)}
        for name, own in made.items():
            contestants[name] = captured(lambda i, x=x, own=own: own[i].matmul(x), len(own))
        found = {name: np.array([0.0] * rounds) for name in contestants}
        for i in range(rounds):
            for name, replay in contestants.items():
                found[name][i] = replay()
        for name, times in found.items():
            size = made[name][0].nbytes if name in made else dense[0].nbytes
            rate = size / np.median(times) / 1e6
            print(
                f"  batch {batch:2d}  {name:17s} {np.median(times):7.1f} us  {rate:5.2f} TB/s, "
                f"{rate / reading:4.2f} of reading  over cuBLAS {Spread.of(found['cuBLAS'] / times)}",
                flush=True,
            )


class Stack:
    """The matrices of GPT-2 XL one behind the other, with its norms and GELUs."""

    def __init__(self, multiply: list[Callable[[Tensor], Tensor]]) -> None:
        self.multiply = multiply

    def __call__(self, x: Tensor) -> Tensor:
        """[1, 1600] -> [1, 1600]."""
        width = x.shape[-1:]
        for i in range(0, len(self.multiply), 4):
            attend, project, widen, narrow = self.multiply[i : i + 4]
            values = attend(nn.functional.layer_norm(x, width))[:, -width[0] :]  # of one token, attention is its value
            x = x + project(values)
            x = x + narrow(nn.functional.gelu(widen(nn.functional.layer_norm(x, width))))
        return x


def decode(rounds: int) -> None:
    """Print the time of a token, as a graph and call by call, packed and dense."""
    rng = np.random.default_rng(0)
    first = [both(packed(shape, rng)) for shape in XL]
    dense = [torch.randn(shape, device="cuda", dtype=torch.float16) / 40 for _ in range(BLOCKS) for shape in XL]
    stacks = {f"3.25 bits{of}": Stack([twin(m[of]).matmul for _ in range(BLOCKS) for m in first]) for of in first[0]}
    stacks["cuBLAS"] = Stack([lambda x, w=w: nn.functional.linear(x, w) for w in dense])
    x = torch.randn(1, 1600, device="cuda", dtype=torch.float16)
    for name, stack in stacks.items():
        expected = stack(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = stack(x)
        graph.replay()
        same = torch.equal(y.nan_to_num(), expected.nan_to_num())
        ways = {"graph": graph.replay, "calls": lambda stack=stack: stack(x)}
        times = {way: [milliseconds(work) for _ in range(rounds)] for way, work in ways.items()}
        report = ", ".join(f"{way} {Spread.of(np.array(found[1:]))} ms a token" for way, found in times.items())
        print(f"  {name:17s} {report}; the graph's result is that of the calls: {same}", flush=True)


def main(
    batches: Annotated[str, typer.Option(help="rows of activations")] = "1,4,16",
    cold: Annotated[int, typer.Option(help="MiB of weights to go through")] = 160,
    rounds: Annotated[int, typer.Option()] = 30,
) -> None:
    """Go through the shapes."""
    reading = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch.sum reads {reading:.2f} TB/s, {cold} MiB of weights in turn")
    for shape in SHAPES:
        print(f"{shape[0]} x {shape[1]}", flush=True)
        measure(shape, [int(b) for b in batches.split(",")], cold, rounds, reading)
    print(f"{BLOCKS} blocks in the shape of GPT-2 XL, batch 1")
    decode(rounds)


if __name__ == "__main__":
    typer.run(main)
