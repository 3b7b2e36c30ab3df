"""A method as a document, and the source files that it alone brings into a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nashswarm.artifacts import read_json
from nashswarm.config import Method, Peer, parse_method, parse_peer

KEPT = "kept"  # the codec of what a method leaves alone
TABLES = "grouped"  # the codec of what another tool leaves alone


def method_document(method: Method) -> dict[str, Any]:
    """A method as one flat block, as it may stand in params.yaml, defaults filled in.

    What belongs to a setting that is off (`with` in a field's metadata names it) is left out, and so is that setting:
    documents of before, and the bytes that hold them, stay as they were.
    """
    document = dataclasses.asdict(method)
    del document["name"]
    settings = document.pop("codec_settings")
    fields = dataclasses.fields(method.codec_settings) if settings else ()
    off = {f.name for f in fields if "with" in f.metadata and not settings[f.metadata["with"]]}
    stated = {key: value for key, value in settings.items() if key not in off}
    return {**document.pop("allocator_settings"), **stated, **document}


def read_recipe(path: Path) -> Method:
    """The method of data/methods/<method>.json."""
    return parse_method(path.stem, read_json(path)["settings"])


def method_files(source: Path, method: Method) -> list[Path]:
    """The files, below `source`, that are found by the names in a method."""
    package = source / "nashswarm"
    return [
        package / "importance" / f"{method.importance}.py",
        package / "allocators" / f"{method.allocator}.py",
        package / "codecs" / f"{method.codec}.py",
        package / "codecs" / f"{KEPT}.py",
    ]


def peer_document(peer: Peer) -> dict[str, Any]:
    """A peer as one flat block, as it may stand in params.yaml, defaults filled in."""
    return {"tool": peer.tool, **dataclasses.asdict(peer.settings)}


def read_peer_recipe(path: Path) -> Peer:
    """The peer of data/methods/<peer>.json."""
    return parse_peer(path.stem, read_json(path)["settings"])


def peer_files(source: Path, peer: Peer) -> list[Path]:
    """The files, below `source`, that are found by the names in a peer, and what stores the tables."""
    package = source / "nashswarm"
    return [package / "peers" / f"{peer.tool}.py", package / "codecs" / f"{TABLES}.py"]
