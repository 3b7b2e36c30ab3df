"""Wrong input: each mistake of a user's is named in one line, with its fix, and changes no file."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from miniature import SPLITS, Project


@dataclass(frozen=True)
class Mistake:
    """What a user may do wrong, and what the answer must name."""

    make: Callable[[Project], None]
    culprit: str
    fix: str  # a pattern
    stage: tuple[str, ...] = ("methods",)


def _own_model(project: Project) -> Path:
    project.set(models={"reference": {"source": "path", "path": "own"}})
    shutil.copytree(project.root / "data/reference", project.root / "own")
    return project.root / "own"


def _own_text(project: Project, text: str) -> None:
    (project.root / "own.txt").write_text(text, encoding="utf-8")
    files = {**{split: f"data/reference/{split}.txt" for split in SPLITS}, "test": "own.txt"}
    project.set(corpora={"sampled": {"source": "path", **files}})


def _copied_text(project: Project) -> None:
    text = (project.root / "data/reference/calibration.txt").read_text(encoding="utf-8")
    own = (project.root / "data/reference/test.txt").read_text(encoding="utf-8")
    _own_text(project, f"{own}{text[500:1000]}")


def _set_method(project: Project, name: str, **settings: Any) -> None:
    project.set(methods={name: {**project.raw()["methods"][name], **settings}})


def _missing_model(project: Project) -> None:
    shutil.rmtree(_own_model(project))


def _only_a_pickle(project: Project) -> None:
    weights = _own_model(project) / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))


def _not_a_number(project: Project) -> None:
    from safetensors.numpy import load_file, save_file

    weights = _own_model(project) / "model.safetensors"
    arrays = {k: np.array(v) for k, v in load_file(weights).items()}
    next(v for k, v in arrays.items() if k.endswith("h.1.attn.c_attn.weight"))[3, 5] = np.nan
    save_file(arrays, weights, {"format": "pt"})


def _half_a_line(project: Project) -> None:
    with (project.root / "src/nashswarm/figures.py").open("a", encoding="utf-8") as file:
        file.write("\ndef draw(\n")


DOWNLOAD = ("download", "reference")
MISTAKES = {
    "unknown key": Mistake(lambda p: p.set(scoring={"tokns": 64}), "scoring.tokns", "did you mean 'tokens'"),
    "wrong type": Mistake(lambda p: p.set(evaluation={"block": "many"}), "evaluation.block", "expected a whole number"),
    "no such width": Mistake(
        lambda p: _set_method(p, "rtn4-g64", bits=5), "methods.rtn4-g64.bits: 5", r"offers 2, 3, 4"
    ),
    "shares": Mistake(
        lambda p: _set_method(p, "nash", shares=[0.7, 0.2, 0.2]), "methods.nash.shares", r"1\.1, not to 1"
    ),
    "missing model": Mistake(_missing_model, "own: no such model directory", "check `path` under `models`", DOWNLOAD),
    "only a pickle": Mistake(_only_a_pickle, "pytorch_model.bin", "save_pretrained", DOWNLOAD),
    "empty text": Mistake(lambda p: _own_text(p, "\n \n"), "own.txt", "give|check|name", DOWNLOAD),
    "short text": Mistake(lambda p: _own_text(p, "o mar"), "corpora.sampled.test", "give more text", DOWNLOAD),
    "copied text": Mistake(_copied_text, "sampled.test and sampled.calibration share", "take it out", DOWNLOAD),
    "NaN": Mistake(_not_a_number, "h.1.attn.c_attn.weight", "NaN.*(repair|again|another|train|convert)", DOWNLOAD),
    "long texts": Mistake(
        lambda p: p.set(evaluation={"paper": {"length": 33}}),
        "evaluation.paper.length: 33 tokens",
        "context of 32; lower it",
        DOWNLOAD,
    ),
    "half a line": Mistake(_half_a_line, "src/nashswarm/figures.py:", "mend it", ("imports",)),
    "no hub": Mistake(
        lambda p: p.set(active={"models": ["gpt2"]}), "127.0.0.1:9", "set HF_ENDPOINT to a mirror", ("download", "gpt2")
    ),
}


@pytest.mark.pipeline
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_wrong_input_is_named_with_its_fix(mistake: Mistake, copy: Project) -> None:
    mistake.make(copy)
    before = copy.files()
    stage, *words = mistake.stage
    done = copy.call(
        sys.executable,
        f"stages/{stage}.py",
        *words,
        ok=False,
        timeout=60,
        PYTHONPATH="src",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert mistake.culprit in line
    assert re.search(mistake.fix, line), line
    assert copy.files() == before
