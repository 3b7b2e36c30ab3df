"""Run the pipeline's stages in order without DVC, each in a process of its own, and note what each took.

    python tools/stages.py WORKSPACE --model 48x1600 --methods gptq4-g128,market-tiles-3_25 --device cuda
    python tools/stages.py OTHER --model reference --against WORKSPACE
    python tools/stages.py THIRD --model FOLDER --also wiki.test.raw

For machines that DVC is not on, and to compare devices: a model of GPT-2's make with random weights, LAYERSxWIDTH, and
the embedded texts; or the embedded model, or another that train_reference.py made, and the texts that it wrote. Stages
that ended before are not run again. Prints, for each stage, seconds and peak memory of the process and of the GPU, and
with --against the largest differences to another workspace.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
import yaml
from safetensors.numpy import load_file

from nashswarm.benchmarks.quantization import Shape, write_model
from nashswarm.config import HEAD, sizes

PROJECT = Path(__file__).resolve().parents[1]
TEXTS = ("calibration", "validation", "test")
TOKENIZER, WEIGHTS = ("tokenizer.json", "tokenizer_config.json"), ("config.json", "model.safetensors")


def main(
    workspace: Annotated[Path, typer.Argument(help="made where it is not there")],
    model: Annotated[str, typer.Option(help="'reference', LAYERSxWIDTH, or a folder")] = "reference",
    methods: Annotated[str, typer.Option(help="of params.yaml, with commas between")] = "gptq4-g128,market-coded-3_0",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps")] = "cpu",
    threads: Annotated[int, typer.Option(help="of each stage")] = 2,
    also: Annotated[Path | None, typer.Option(help="another text to measure on")] = None,
    against: Annotated[Path | None, typer.Option(help="another workspace of the same model and methods")] = None,
) -> None:
    """Prepare, run, print."""
    names = methods.split(",")
    _prepare(workspace, model, names, device, threads, also)
    pairs = [(stage, ["m", name]) for name in names for stage in ("allocate", "pack", "evaluate")]
    for stage, words in [("methods", []), *((s, ["m"]) for s in ("download", "score", "baseline")), *pairs]:
        _run(workspace, stage, words)
    for path in sorted(workspace.glob("took/*.json"), key=lambda p: p.stat().st_mtime):
        took = json.loads(path.read_text())
        print(f"{path.stem:40} {took['seconds']:8.1f} s {took['gib']:6.1f} GiB {took['gpu_gib']:6.1f} GiB of the GPU")
    if against:
        for line in _differences(workspace, against, names):
            print(line)


def _prepare(workspace: Path, model: str, methods: list[str], device: str, threads: int, also: Path | None) -> None:
    (workspace / "data").mkdir(parents=True, exist_ok=True)
    for name in ("src", "stages"):
        shutil.copytree(PROJECT / name, workspace / name, dirs_exist_ok=True)
    given = Path(model).resolve() if Path(model).is_dir() else PROJECT / "data/reference"
    drawn = not Path(model).is_dir() and model != "reference"
    directory, params = workspace.resolve() / "model", yaml.safe_load((PROJECT / "params.yaml").read_text())
    if not directory.exists():
        directory.mkdir()
        if drawn:
            layers, width = sizes(model)
            write_model(directory, Shape(layers, width, width // HEAD))
        for name in TOKENIZER + WEIGHTS * (not drawn):
            shutil.copyfile(given / name, directory / name)
    corpora = {"t": {"source": "path", **{name: str(given / f"{name}.txt") for name in TEXTS}}}
    if also:
        corpora["also"] = {"source": "path", "test": str(also.resolve())}
    params["active"] |= {"models": ["m"], "calibration": "t", "corpora": [*corpora], "methods": methods}
    params["models"] = {"m": {"source": "path", "path": str(directory)}}
    params["corpora"] = corpora
    params["compute"] = {"threads": threads, "device": device}
    (workspace / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def _run(workspace: Path, stage: str, words: list[str]) -> None:
    note = workspace / "took" / f"{'-'.join([stage, *words])}.json"
    if note.exists():
        return
    environment, started = {**os.environ, "PYTHONPATH": "src"}, time.perf_counter()
    process = subprocess.Popen([sys.executable, f"stages/{stage}.py", *words], cwd=workspace, env=environment)
    peaks = _watched(process)
    if process.returncode:
        raise typer.Exit(process.returncode)
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps({"seconds": time.perf_counter() - started, **peaks}))


def _watched(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Peaks until it ends, sampled ten times a second."""
    peaks, before = {"gib": 0.0, "gpu_gib": 0.0}, _gpu_bytes()

    def watch() -> None:
        own = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peaks["gib"] = max(peaks["gib"], own.memory_info().rss / 2**30)
            except psutil.Error:
                return
            peaks["gpu_gib"] = max(peaks["gpu_gib"], (_gpu_bytes() - before) / 2**30)
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    watcher.join()
    return peaks


def _gpu_bytes() -> int:
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def _differences(one: Path, other: Path, methods: list[str]) -> list[str]:
    """Of the statistics, relative to their norms, and of losses and divergences."""
    largest: dict[str, float] = {}
    for path in sorted((one / "data/scores/m").iterdir()):
        ours, theirs = load_file(path), load_file(other / path.relative_to(one))
        for key in ours:
            gap = np.linalg.norm(ours[key] - theirs[key]) / max(np.linalg.norm(theirs[key]), 1e-30)
            largest[key] = max(largest.get(key, 0.0), float(gap))
    lines = [f"statistics, {key}: {gap:.1e} of the norm at most" for key, gap in largest.items()]
    for name in methods:
        found: list[dict[str, Any]] = [json.loads((d / f"metrics/m/{name}.json").read_text()) for d in (one, other)]
        for key in ("loss", "delta_loss", "kl_mean"):
            a, b = (document["quality"]["t"][key] for document in found)
            lines.append(f"{name}, {key}: {a:.6f} and {b:.6f}")
        lines.append(f"{name}, bytes: {found[0]['size']['file_bytes']} and {found[1]['size']['file_bytes']}")
    return lines


if __name__ == "__main__":
    typer.run(main)
