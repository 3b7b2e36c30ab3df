"""Packed directories that were changed by somebody who also makes their hashes again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from nashswarm.artifacts import sha256_file
from nashswarm.packed import MANIFEST, PAYLOAD, _sealed


def reseal(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and seal it as `write_packed` does."""
    manifest = json.loads((directory / MANIFEST).read_bytes())
    del manifest["seal"]
    change(manifest)
    (directory / MANIFEST).write_bytes(_sealed(manifest))


def relist(directory: Path, name: str) -> None:
    """Note a file in the manifest as it is now."""
    entry = [(directory / name).stat().st_size, sha256_file(directory / name)]
    reseal(directory, lambda manifest: manifest["files"].update({name: entry}))


def rearrange(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the payload's arrays, and note the file as it then is."""
    arrays = load_file(directory / PAYLOAD)
    change(arrays)
    save_file(arrays, directory / PAYLOAD)
    relist(directory, PAYLOAD)
