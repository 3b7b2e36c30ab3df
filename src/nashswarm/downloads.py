"""From a source in params.yaml, or a word on a command line, to a local directory: there already, or from the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from nashswarm.artifacts import COMPANIONS, Layout, link_files
from nashswarm.config import CorpusSource, ModelSource
from nashswarm.types import InputError

MODEL_PATTERNS = ("*.safetensors", "model.safetensors.index.json", *COMPANIONS)


def resolve_model(name: str, source: ModelSource, layout: Layout, target: Path) -> tuple[Path, Path]:
    """Where a model's files lie now, and where they will lie once `target` has become the download's directory.

    Hub files are fetched into a folder of their revision that DVC does not delete, and hard-linked into `target`: one
    copy on disk, and no second transfer when the stage runs again. Models from elsewhere stay where they are. Raises
    hub.HubError for what the hub refuses or cannot deliver.
    """
    if source.source == "embedded":
        return layout.reference, layout.reference.relative_to(layout.root)
    if source.source == "path":
        assert source.path is not None
        return layout.root / source.path, Path(source.path)
    link_files(_fetch(source, "model", MODEL_PATTERNS, layout.staging), target / "snapshot")
    return target / "snapshot", layout.download(name).relative_to(layout.root) / "snapshot"


def resolve_word(model: str, revision: str | None, cache: Path) -> tuple[Path, ModelSource]:
    """A model named in one word: a directory, or else a repository of the hub, fetched into `cache` and verified.

    Raises InputError where it is neither, or where a repository comes without a commit; hub.HubError as above.
    """
    if Path(model).is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision}: {model} is a directory here, and has none")
        return Path(model), ModelSource("path", path=model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or Path(model).parent.is_dir():
        raise InputError(f"{model}: no such directory, and no name on the hub (ORGANISATION/NAME)")
    if revision is None:
        raise InputError(f"{model}: no such directory; if it is a name on the hub, add --revision and its full commit")
    try:
        source = ModelSource("hub", id=model, revision=revision)
    except ValueError as error:
        raise InputError(f"{model}: {error}") from error
    return _fetch(source, "model", MODEL_PATTERNS, cache), source


def resolve_corpus(source: CorpusSource, layout: Layout) -> Path:
    """Where a hub corpus's files lie after fetching; for other sources a path that is not used."""
    if source.source != "hub":
        return layout.staging
    return _fetch(source, "dataset", (f"{source.config}/*.parquet",), layout.staging) / str(source.config)


def _fetch(
    source: ModelSource | CorpusSource, kind: Literal["model", "dataset"], patterns: tuple[str, ...], staging: Path
) -> Path:
    """The folder of a pinned revision, complete and verified."""
    from nashswarm import hub

    assert source.id is not None
    assert source.revision is not None
    directory = staging / "complete" / source.id.replace("/", "--") / source.revision
    hub.fetch(source.id, source.revision, repo_type=kind, patterns=patterns, directory=directory, staging=staging)
    return directory
