"""What a larger model, and more machines, would take: docs/scale.md, metrics/benchmarks/scale.json.

    record    time every task of the pipeline on models of true widths with random weights; an hour on a quiet core
    workers   two Ray workers of one thread against one process with two; wants a quiet machine, ten minutes
    crews     what all wait for, by 1, 2, 4, ... threads; wants a machine with as many cores
    predict   fit the cost model, simulate schedules, predict; seconds
    show      the tables of docs/scale.md

Each keeps what the others found. `make scale` runs all but crews.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from nashswarm.threads import wait_asleep

wait_asleep()  # before torch is loaded

from nashswarm import artifacts  # noqa: E402
from nashswarm.benchmarks import costs, crews, recording, scale, tables, workers  # noqa: E402
from nashswarm.benchmarks.machine import machine  # noqa: E402
from nashswarm.benchmarks.quantization import Shape  # noqa: E402
from nashswarm.benchmarks.timing import plain  # noqa: E402
from nashswarm.benchmarks.workload import CHAINED  # noqa: E402
from nashswarm.config import HEAD  # noqa: E402
from nashswarm.console import progress  # noqa: E402

PATH = artifacts.Layout().metrics("benchmarks", "scale")
WORDS = 50257
SMALL = 4096  # a vocabulary for markets, whose tables take as long as they have rows
DENSE, MARKETS = ("rtn4-g64", "gptq4-g128"), ("market-tiles-3_25", "market-coded-3_0")
app = typer.Typer(help=__doc__, no_args_is_help=True)


def runs(width: int) -> Iterator[tuple[Shape, tuple[str, ...], bool]]:
    """Models of a width, the methods for each, and whether its scoring counts."""
    heads = width // HEAD
    if width == 256:
        yield Shape(2, width, heads, SMALL), DENSE + MARKETS, True  # the reference model's vocabulary
        return
    yield Shape(2, width, heads, WORDS), DENSE, True
    yield Shape(2, width, heads, SMALL), MARKETS, False


@app.command()
def record(widths: Annotated[list[int], typer.Argument()] = [256, 768, 1024, 1600]) -> None:  # noqa: B006
    """Time every task."""
    change({"rates": asdict(costs.rates())})
    for width in widths:
        for shape, methods, scored in runs(width):
            for found in recording.record(shape, methods, scored, progress):
                artifacts.write_json(PATH, scale.without(read(), found))  # calls may have other names by now
                change(scale.noted(found))


@app.command("workers")
def compare(rounds: int = 5) -> None:
    """Two Ray workers against one process."""
    change({"workers": workers.compare(rounds), "machine": plain(machine(2, 256, 20))})


@app.command("crews")
def measure(
    counts: Annotated[list[int], typer.Argument(help="of threads, 1 among them")] = [1, 2, 4, 8, 16],  # noqa: B006
    method: Annotated[list[str] | None, typer.Option(help="of the markets; can be given again")] = None,
) -> None:
    """What everything waits for, by more and more threads."""
    found = crews.measure(counts, progress, method or CHAINED)
    kept = read().get("crews", {}).get("seconds", {})
    seconds = {n: {**kept.get(n, {}), **own} for n, own in {**kept, **found}.items()}
    change({"crews": {"seconds": seconds, "machine": plain(machine(max(counts), 256, 20))}})


@app.command()
def predict() -> None:
    """All that follows from what was recorded."""
    document = read()
    artifacts.write_json(PATH, {**document, **scale.derived(document)})


@app.command()
def show() -> None:
    """Print Markdown."""
    for name, table in tables.tables(read()).items():
        print(f"<!-- table: {name} -->\n{table}\n")


def read() -> dict[str, Any]:
    """What was found so far."""
    return artifacts.read_json(PATH) if PATH.exists() else {}


def change(found: dict[str, Any]) -> None:
    """Add to it; mappings are joined."""
    document = read()
    for key, value in found.items():
        document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    artifacts.write_json(PATH, document)


if __name__ == "__main__":
    app()
