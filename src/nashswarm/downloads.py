"""From a source in params.yaml to a local directory: embedded, given by path, or fetched from the hub."""

from __future__ import annotations

from pathlib import Path

from nashswarm.artifacts import Layout
from nashswarm.config import CorpusSource, ModelSource
from nashswarm.models import COMPANIONS
from nashswarm.types import Progress

MODEL_PATTERNS = ("*.safetensors", "model.safetensors.index.json", *COMPANIONS)


def resolve_model(name: str, source: ModelSource, layout: Layout, target: Path, progress: Progress) -> tuple[Path, Path]:
    """Where a model's files lie now, and where they will lie once `target` has become the download's directory.

    Hub weights are fetched into `target` itself, so that DVC's cache and the workspace share one copy; models from
    elsewhere stay where they are. Raises hub.HubError for what the hub refuses or cannot deliver.
    """
    if source.source == "embedded":
        return layout.reference, layout.reference.relative_to(layout.root)
    if source.source == "path":
        assert source.path is not None
        return layout.root / source.path, Path(source.path)
    from nashswarm import hub

    assert source.id is not None
    assert source.revision is not None
    snapshot = target / "snapshot"
    staging = layout.staging / "models" / name
    hub.fetch(source.id, source.revision, repo_type="model", patterns=MODEL_PATTERNS, directory=snapshot, staging=staging)
    return snapshot, layout.download(name).relative_to(layout.root) / "snapshot"


def resolve_corpus(name: str, source: CorpusSource, layout: Layout, progress: Progress) -> Path:
    """Where a hub corpus's files lie after fetching; for other sources a path that is not used."""
    directory = layout.staging / "corpora" / name
    if source.source == "hub":
        from nashswarm import hub

        assert source.id is not None
        assert source.revision is not None
        hub.fetch(
            source.id,
            source.revision,
            repo_type="dataset",
            patterns=(f"{source.config}/*.parquet",),
            directory=directory / "snapshot",
            staging=directory / "staging",
        )
    return directory / "snapshot" / (source.config or "")
