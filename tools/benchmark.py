"""Time and memory of score, allocate and pack on a model of GPT-2's true shapes and random weights: make benchmark.

Nothing but the shapes matters to either, so no checkpoint is needed. Prints seconds of each step, as they are and over
those of one forward pass over the same calibration tokens, and the peak of resident memory so far. `--layers` cuts a
large model short: blocks are visited one at a time, so that memory hardly follows their number (a byte per weight does,
where `coded` keeps its codes), and time follows it in proportion.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nashswarm.threads import set_threads, wait_asleep

wait_asleep()  # before torch is loaded

import torch  # noqa: E402

from nashswarm import artifacts, models, packed, quantize, statistics  # noqa: E402
from nashswarm.config import Method, Scoring, load_params, parse_method  # noqa: E402

SHAPES = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}


def main(
    shape: Annotated[str, typer.Argument(help=", ".join(SHAPES))] = "gpt2",
    codec: Annotated[str, typer.Option(help="coded or tiles")] = "coded",
    budget: Annotated[float, typer.Option(help="true bits per weight")] = 3.0,
    tokens: Annotated[int | None, typer.Option(help="of calibration; else as in params.yaml")] = None,
    prefix_tokens: Annotated[int | None, typer.Option(help="to fit to the prefix; else the codec's default")] = None,
    layers: Annotated[int | None, typer.Option(help="blocks, to cut a large model short")] = None,
) -> None:
    """Run the three steps once and print what they took."""
    set_threads(2)
    with tempfile.TemporaryDirectory(prefix="nashswarm-") as scratch:
        root = Path(scratch)
        make = multiprocessing.get_context("spawn").Process(target=_make, args=(root / "model", shape, layers))
        make.start()  # a process of its own, whose memory is not counted
        make.join()
        scoring = load_params(Path("params.yaml")).scoring
        scoring = dataclasses.replace(scoring, tokens=tokens or scoring.tokens)
        method: dict[str, Any] = {"allocator": "market", "codec": codec, "budget": budget}
        if prefix_tokens is not None:
            method["prefix_tokens"] = prefix_tokens
        ids = np.random.default_rng(0).integers(0, 50257, 65_536).astype(np.int32)
        _run(root, ids, parse_method("m", method), scoring)


def _make(directory: Path, shape: str, layers: int | None) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    depth, width, heads = SHAPES[shape]
    config = GPT2Config(n_layer=layers or depth, n_embd=width, n_head=heads)
    GPT2LMHeadModel(config).save_pretrained(directory, max_shard_size="800MB")


def _run(root: Path, ids: np.ndarray, method: Method, scoring: Scoring) -> None:
    index = models.describe(root / "model")
    record = artifacts.SourceRecord("embedded", str(root / "model"), None, None, {})
    checkpoint = models.Checkpoint.open(root / "model", index)
    model = quantize.Model("m", index, record, checkpoint, lambda name: artifacts.read_statistics(root, name))
    original = models.load_streamed(root / "model", index)
    windows = torch.from_numpy(ids[: scoring.tokens].astype(np.int64)).view(-1, index.context)
    started = time.perf_counter()
    with torch.no_grad():
        for window in windows:
            original(window[None], use_cache=False)
    unit, total = time.perf_counter() - started, 0.0

    def note(step: str, started: float) -> None:
        nonlocal total
        seconds = time.perf_counter() - started
        total += seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{step:10s} {seconds:8.1f} s {seconds / unit:6.1f} forward passes  peak {peak:.2f} GiB", flush=True)

    started = time.perf_counter()
    for tensor, found in statistics.gather(original, index, ids, scoring, _quiet):
        artifacts.write_statistics(root, tensor.name, found)
    note("score", started)
    del original
    started = time.perf_counter()
    allocation = quantize.allocate(model, method, _quiet)
    note("allocate", started)
    started = time.perf_counter()
    quantize.pack(model, method, allocation, ids, root / "packed", _quiet)
    note("pack", started)
    size = 8 * packed.file_bytes(root / "packed") / index.parameters
    print(f"{'all':10s} {total:8.1f} s, {total / 60:.1f} minutes; {size:.4f} bits per weight")


def _quiet(items: object, _: str) -> object:
    return items


if __name__ == "__main__":
    typer.run(main)
