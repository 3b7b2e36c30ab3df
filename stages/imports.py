"""Write down the code of every stage: what its script imports, at any depth and in any scope, and the files' hashes.

It stands as one dependency for all these files, because DVC reads and writes the whole dvc.lock after each stage.
"""

from __future__ import annotations

from pathlib import Path

from common import LAYOUT, run

from nashswarm.artifacts import fresh_directory, write_json
from nashswarm.closure import PACKAGE, closure, fingerprint

SOURCE, STAGES = Path("src"), Path("stages")
APART = ("common", "imports")  # no stage, and this one, which depends on the folders
# The rooms from which a stage takes files by name, beyond what a recipe tells of.
ROOMS = {
    "methods": ("allocators", "codecs", "importance", "peers"),
    "benchmark": ("allocators", "codecs", "importance"),
}


def main() -> None:
    """Write data/imports/<stage>.json."""
    with fresh_directory(LAYOUT.imports) as directory:
        for script in (p for p in STAGES.glob("*.py") if p.stem not in APART):
            named = (p for room in ROOMS.get(script.stem, ()) for p in (SOURCE / PACKAGE / room).glob("*.py"))
            code = fingerprint(closure([script, *named], [SOURCE, STAGES]), Path())
            write_json(directory / f"{script.stem}.json", code)


if __name__ == "__main__":
    run(main, reads_params=False)
