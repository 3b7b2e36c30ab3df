"""Check params.yaml and write one recipe per active method and peer: its settings, and its own code's hash.

DVC's `deps` can be templated by a method's name but not by the codec that the method names. The recipe carries that
link: it changes if and only if the method's settings or its code do, and everything of the method depends on it.
"""

from __future__ import annotations

from pathlib import Path

from common import LAYOUT, run

from nashswarm.artifacts import fresh_directory, write_json
from nashswarm.closure import closure, fingerprint
from nashswarm.config import Params
from nashswarm.recipes import method_document, method_files, peer_document, peer_files

SOURCE = Path("src")


def main(params: Params) -> None:
    """Write data/methods/<method>.json and data/methods/<peer>.json."""
    with fresh_directory(LAYOUT.methods) as directory:
        for name in params.active.methods:
            method = params.methods[name]
            code = fingerprint(closure(method_files(SOURCE, method), [SOURCE]), Path())
            write_json(directory / f"{name}.json", {"settings": method_document(method), "code": code})
        for name in params.active.peers:
            peer = params.peers[name]
            code = fingerprint(closure(peer_files(SOURCE, peer), [SOURCE]), Path())
            write_json(directory / f"{name}.json", {"settings": peer_document(peer), "code": code})


if __name__ == "__main__":
    run(main)
