"""Time and memory of score, allocate and pack on a model of GPT-2's true shapes and random weights: make benchmark.

What `stages/benchmark.py quantization` measures (nashswarm.benchmarks.quantization says how), for one model and one
method, printed and written nowhere. `--layers` cuts a large model short.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from nashswarm.threads import wait_asleep

wait_asleep()  # before torch is loaded

from nashswarm.benchmarks.quantization import Shape, steps  # noqa: E402
from nashswarm.config import load_params, parse_method  # noqa: E402

SHAPES = {
    "gpt2": Shape(12, 768, 12),
    "gpt2-medium": Shape(24, 1024, 16),
    "gpt2-large": Shape(36, 1280, 20),
    "gpt2-xl": Shape(48, 1600, 25),
}
THREADS = 2


def main(
    shape: Annotated[str, typer.Argument(help=", ".join(SHAPES))] = "gpt2",
    codec: Annotated[str, typer.Option(help="coded or tiles")] = "coded",
    budget: Annotated[float, typer.Option(help="true bits per weight")] = 3.0,
    tokens: Annotated[int | None, typer.Option(help="of calibration; else as in params.yaml")] = None,
    prefix_tokens: Annotated[int | None, typer.Option(help="to fit to the prefix; else the codec's default")] = None,
    layers: Annotated[int | None, typer.Option(help="blocks, to cut a large model short")] = None,
) -> None:
    """Run the three steps once and print what they took."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape}: choose {', '.join(SHAPES)}")
    scoring = load_params(Path("params.yaml")).scoring
    scoring = dataclasses.replace(scoring, tokens=tokens or scoring.tokens)
    settings: dict[str, Any] = {"allocator": "market", "codec": codec, "budget": budget}
    if prefix_tokens is not None:
        settings["prefix_tokens"] = prefix_tokens
    model = dataclasses.replace(SHAPES[shape], layers=layers or SHAPES[shape].layers)
    total = 0.0
    for step in steps(shape, model, [parse_method("m", settings)], scoring, THREADS):
        total += step.seconds
        print(
            f"{step.step:10s} {step.seconds:8.1f} s {step.forward_passes:6.1f} forward passes  "
            f"peak {step.peak_bytes / 2**30:.2f} GiB",
            flush=True,
        )
    print(f"{'all':10s} {total:8.1f} s, {total / 60:.1f} minutes; {step.bits_per_weight:.4f} bits per weight")


if __name__ == "__main__":
    typer.run(main)
