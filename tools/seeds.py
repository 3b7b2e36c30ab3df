"""Methods quantized again with several calibration seeds, and the spread of their figures: make seeds.

Runs score, allocate, pack and evaluate in a throw-away workspace beside the project's own download and baseline, which
`make reproduce` makes, and writes metrics/seeds/MODEL/METHOD.json (see src/nashswarm/seeds.py). Neither dvc.lock nor
anything below data/ is touched.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import typer
import yaml

from nashswarm import artifacts, seeds
from nashswarm.config import Params, load_params
from nashswarm.corpora import SPLITS
from nashswarm.types import InputError, NashSwarmError, TokenizedSplit

METHODS = "market-coded-3_0,market-tiles-3_25,gptq4-g128"
NO_CODE = shutil.ignore_patterns("*.pyc*", "*.tmp.*")  # what numba has compiled goes along (tests/miniature.py, too)


@dataclass(frozen=True)
class Workspace:
    """A copy of the code with one model's download and baseline, in which stages run as they do in the project."""

    home: artifacts.Layout  # the project
    here: artifacts.Layout  # the copy
    model: str
    params: Params

    def prepare(self, methods: Sequence[str]) -> None:
        """Code, the original's place, what it says on the test texts, and a recipe for each method."""
        for name in ("src", "stages"):
            shutil.copytree(self.home.root / name, self.here.root / name, ignore=NO_CODE)
        download = self.home.download(self.model)
        record, index = artifacts.read_source(download), artifacts.read_index(download)
        place = str((self.home.root / record.directory).resolve())  # read where it lies: a model may be gigabytes
        artifacts.write_source(self.here.download(self.model), dataclasses.replace(record, directory=place), index)
        self.here.baseline(self.model).parent.mkdir(parents=True)
        self.here.baseline(self.model).symlink_to(self.home.baseline(self.model).resolve())
        self.settle(0, methods)
        self.stage("methods")

    def settle(self, seed: int, methods: Sequence[str]) -> None:
        """Params and calibration text of one seed."""
        raw: dict[str, Any] = yaml.safe_load(self.home.params.read_text(encoding="utf-8"))
        raw["active"] |= {"models": [self.model], "methods": [*methods], "peers": []}
        raw["scoring"] = {**raw.get("scoring", {}), "seed": self.params.scoring.seed + seed}
        self.here.params.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
        window = self.calibration().window
        for corpus in self.params.corpora_needed:
            splits = _splits(self.home.download(self.model), corpus)
            if corpus == self.params.active.calibration:
                own = splits["calibration"]
                splits["calibration"] = dataclasses.replace(own, ids=seeds.redrawn(own.ids, window, seed))
            artifacts.write_tokens(self.here.download(self.model), corpus, splits)

    def calibration(self) -> seeds.Calibration:
        """What each seed takes."""
        download, corpus = self.home.download(self.model), self.params.active.calibration
        ids = artifacts.read_tokens(download, corpus, "calibration").ids
        return seeds.calibration(corpus, ids, artifacts.read_index(download).context, self.params.scoring.tokens)

    def measure(self, method: str) -> dict[str, Any]:
        """The method's metrics with the seed that was settled and scored last."""
        for stage in ("allocate", "pack", "evaluate"):
            self.stage(stage, self.model, method)
        found: dict[str, Any] = artifacts.read_json(self.here.metrics(self.model, method))
        return found

    def stage(self, name: str, *words: str) -> None:
        """Raises NashSwarmError where the stage fails; it has said why."""
        environment = {**os.environ, "PYTHONPATH": "src", "PYTHONHASHSEED": "0"}
        command = [sys.executable, f"stages/{name}.py", *words]
        if subprocess.run(command, cwd=self.here.root, env=environment, check=False).returncode:
            raise NashSwarmError(f"{' '.join([name, *words])} failed; metrics/seeds is as it was")


def _splits(download: Path, corpus: str) -> dict[str, TokenizedSplit]:
    found = {}
    for split in SPLITS:
        try:
            found[split] = artifacts.read_tokens(download, corpus, split)
        except InputError:  # a corpus need not have all of them
            continue
    return found


def check_current(model: str) -> None:
    """Raise NashSwarmError unless the project's download and baseline are those of its code and params."""
    stages = [f"download@{model}", f"baseline@{model}"]
    words = ["dvc", "status", "--json", "--with-deps", *stages]  # `imports` among them, which alone sees edited code
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise NashSwarmError(f"dvc status: {done.stderr.strip()}")
    if stale := json.loads(done.stdout):
        raise NashSwarmError(f"{', '.join(stale)}: not up to date; run `dvc repro {' '.join(stages)}` first")


def measure(params: Params, model: str, methods: Sequence[str], count: int) -> None:
    """All seeds of all methods, one stage at a time, and their files at the end."""
    home = artifacts.Layout(Path().resolve())
    with tempfile.TemporaryDirectory(prefix="nashswarm-") as scratch:
        work = Workspace(home, artifacts.Layout(Path(scratch)), model, params)
        work.prepare(methods)
        found: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in methods}
        for seed in range(count):
            print(f"seed {seed}", flush=True)
            work.settle(seed, methods)
            work.stage("score", model)
            for method in methods:
                found[method][seed] = work.measure(method)
                print(f"seed {seed}: {method}: {_line(found[method][seed])}", flush=True)
        taken = work.calibration()
    download = home.download(model)
    texts = {c: artifacts.digest(artifacts.read_tokens(download, c, "test").ids) for c in params.active.corpora}
    files = artifacts.read_source(download).files
    original = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
    for method, measured in found.items():
        artifacts.write_json(seeds.path(home, model, method), seeds.document(measured, taken, texts, original))


def _line(document: dict[str, Any]) -> str:
    quality = (f"{corpus} {q['delta_loss_percent']:+.3f} %" for corpus, q in document["quality"].items())
    return f"{document['size']['bits_per_weight']:.4f} true bits, loss rises by {', '.join(quality)}"


def main(
    model: Annotated[str | None, typer.Argument(help="of params.yaml; else the first active one")] = None,
    methods: Annotated[str, typer.Option(help="names of params.yaml, between commas")] = METHODS,
    count: Annotated[int, typer.Option(min=2, help="seeds 0, 1, ... of this number")] = 3,
) -> None:
    """Measure, and write what is to be committed."""
    try:
        params = load_params(Path("params.yaml"))
        model = model or params.active.models[0]
        names = [name for name in dict.fromkeys(methods.split(",")) if name]
        if unknown := [name for name in names if name not in params.methods]:
            raise NashSwarmError(f"methods: {', '.join(unknown)} not in params.yaml; name others with --methods")
        check_current(model)
        measure(params, model, names, count)
    except NashSwarmError as error:
        sys.exit(f"error: {error}")
    written = " ".join(str(seeds.path(artifacts.Layout(), model, name)) for name in names)
    print(f"written, to be committed: {written}; dvc repro report shows them")


if __name__ == "__main__":
    typer.run(main)
