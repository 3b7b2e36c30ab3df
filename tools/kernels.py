"""Products with packed matrices beside torch's and ONNX Runtime's, weights cold: make kernels.

What `stages/benchmark.py kernels` measures (nashswarm.benchmarks.kernels says how), printed while it runs and written
nowhere. The cache of a large server may hold more than `--cold`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from nashswarm.threads import set_threads, wait_asleep

wait_asleep()  # before torch is loaded

from nashswarm.benchmarks import kernels  # noqa: E402
from nashswarm.benchmarks.machine import machine  # noqa: E402
from nashswarm.benchmarks.timing import Row  # noqa: E402
from nashswarm.config import Benchmark, sizes  # noqa: E402


def line(row: Row) -> str:
    """One contestant, for a terminal."""
    if row.seconds is None:
        return f"  {row.contestant:32s} {row.note}"
    return (
        f"  {row.contestant:32s} {row.seconds.median * 1e3:8.3f} ms  {(row.rate or 0) / 1e9:6.1f} GB/s  "
        f"of reading {row.share}  over {kernels.REFERENCE} {row.ratio}"
    )


def main(
    only: Annotated[str, typer.Option(help="part of a shape, e.g. 4096x")] = "",
    batch: Annotated[int, typer.Option(help="rows of activations")] = 1,
    threads: Annotated[int, typer.Option()] = 2,
    cold: Annotated[int, typer.Option(help="MiB of weights to go through")] = 256,
    rounds: Annotated[int, typer.Option()] = 60,
) -> None:
    """Go through the shapes."""
    set_threads(threads)
    settings = Benchmark(rounds=rounds, cold_mib=cold, batches=(batch,))
    found = machine(threads, cold, rounds)
    print(
        f"{found.processor}, {threads} threads, {found.instructions}, reading at "
        f"{found.reading.median / 1e9:.1f} GB/s, load {found.load}; {cold} MiB of weights in turn"
    )
    for text in settings.shapes:
        if only in text:
            rows = kernels.case(sizes(text), batch, settings, threads)
            print("\n".join([rows[0].what, *map(line, rows)]), flush=True)


if __name__ == "__main__":
    typer.run(main)
