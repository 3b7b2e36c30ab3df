"""What a report was made of: hashes and revisions that lead back to the commit, the models, the texts, the packages.

Only inputs of the report's stage are quoted, so that equal inputs give equal bytes. The commit is not one: it holds
dvc.lock, which holds the report's own hash. The hash of the metrics is in both, and leads from the one to the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nashswarm import artifacts
from nashswarm.artifacts import Layout, SourceRecord
from nashswarm.config import Active, CorpusSource
from nashswarm.rendering import Block, Heading, Table, Text

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "numba", "matplotlib", "dvc")


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text as one model reads it."""

    source: CorpusSource
    splits: Mapping[str, Mapping[str, Any]]  # split -> sha256 of the token ids, tokens, texts


@dataclass(frozen=True, slots=True)
class Origin:
    """All inputs of a run that a report can name."""

    metrics: str  # MD5 of the folder, as dvc.lock has it, with the suffix .dir
    files: int  # in it
    models: Mapping[str, SourceRecord]
    corpora: Mapping[tuple[str, str], Corpus]  # of (model, corpus)
    constraints: str  # SHA-256 of constraints.txt
    packages: Mapping[str, str]  # name -> version that constraints.txt pins


def gather(layout: Layout, active: Active, corpora: Mapping[str, CorpusSource]) -> Origin:
    """Read the records of the active models and texts that are at hand, and hash the metrics and constraints.txt."""
    names = dict.fromkeys((active.calibration, *active.corpora))
    present = [model for model in active.models if layout.download(model).exists()]
    read = {
        (model, name): Corpus(corpora[name], artifacts.read_json(layout.download(model) / "tokens" / f"{name}.json"))
        for model in present
        for name in names
    }
    models = {model: artifacts.read_source(layout.download(model)) for model in present}
    metrics, pins = layout.metrics("any", "any").parents[1], layout.root / "constraints.txt"
    files = [path for path in metrics.rglob("*") if path.is_file()]
    return Origin(
        folder_md5(metrics, files), len(files), models, read, artifacts.sha256_file(pins), pinned(pins.read_text())
    )


def folder_md5(folder: Path, files: Sequence[Path]) -> str:
    """The hash that DVC 3 gives a folder: MD5 of the JSON list of its files' MD5 and relative paths, by path."""
    entries = [{"md5": _md5(path.read_bytes()), "relpath": path.relative_to(folder).as_posix()} for path in files]
    return _md5(json.dumps(sorted(entries, key=lambda e: e["relpath"]), sort_keys=True).encode()) + ".dir"


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def pinned(constraints: str) -> dict[str, str]:
    """The versions of PACKAGES in a constraints file; what it does not pin is left out."""
    found = dict(re.findall(r"^([\w.-]+)==(\S+)", constraints, re.MULTILINE))
    return {name: found[name] for name in PACKAGES if name in found}


# --- in the report -------------------------------------------------------------------------------------------------

COLUMNS = ("What", "Which", "Revision or hash")


def section(origin: Origin) -> list[Block]:
    """The report's last part."""
    bare = origin.metrics.removesuffix(".dir")
    words = (
        "The hash of the metrics is the one that dvc.lock has under stages, report, deps, beside the hashes of all "
        f"code, inputs and outputs of every stage. The last line of 'git log --oneline -S{bare} -- dvc.lock' names the "
        "commit that brought these metrics; it cannot be quoted here, since its dvc.lock holds this page's own hash. "
        "Revisions are full commits on the hub; hashes of texts are of their token ids as 32-bit integers."
    )
    packages = ", ".join(f"{name} {version}" for name, version in origin.packages.items())
    environment = (
        f"Environment: what 'make install' installs is pinned by constraints.txt, among it {packages}. Which machine "
        "ran a stage, and in how many seconds, is kept in data/times, outside of what is hashed."
    )
    rows = [("metrics", f"{origin.files} files", f"md5 {origin.metrics}"), *_models(origin), *_texts(origin)]
    rows.append(("packages", "constraints.txt", f"sha256 {origin.constraints}"))
    return [Heading("Environment and provenance"), Text(words), Text(environment), Table("Inputs", COLUMNS, rows, 3)]


def _models(origin: Origin) -> list[tuple[str, str, str]]:
    rows = []
    for model, record in origin.models.items():
        place = record.id or f"{record.source}, {record.directory}"
        rows.append((f"model {model}", place, _commit(record.revision)))
        rows += [("", name, f"sha256 {digest}") for name, digest in record.files.items()]
    return rows


def _texts(origin: Origin) -> list[tuple[str, str, str]]:
    rows = []
    for (model, name), corpus in origin.corpora.items():
        source = corpus.source
        place = f"{source.id}, {source.config}" if source.id else source.source
        rows.append((f"text {name} for {model}", place, _commit(source.revision)))
        rows += [
            ("", f"{split}, {facts['tokens']:,} tokens in {facts['texts']:,} texts", f"sha256 {facts['sha256']}")
            for split, facts in corpus.splits.items()
        ]
    return rows


def _commit(revision: str | None) -> str:
    return f"commit {revision}" if revision else ""
