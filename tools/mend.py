"""Before `dvc repro`: clear away what a killed run may have left of DVC's own files.

DVC 3.67 writes dvc.lock and .dvc/tmp/rwlock in place: a kill at the wrong moment leaves half of one, and the next run
refuses to start. dvc.lock is taken back from git (or removed); what it no longer says, DVC finds in its run cache.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import yaml
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from voluptuous import Invalid

LOCKFILE, RWLOCK = Path("dvc.lock"), Path(".dvc/tmp/rwlock")


def main() -> None:
    """Mend the project in the working directory; says what was done."""
    if LOCKFILE.exists() and not _is_lockfile():
        if subprocess.run(["git", "checkout", "--quiet", "--", str(LOCKFILE)], check=False).returncode:
            LOCKFILE.unlink()
        print(f"{LOCKFILE}: half written by a run that was killed; taken back to the last commit")
    if RWLOCK.exists() and not _is_json():
        time.sleep(0.5)  # it may be in writing just now
        if not _is_json():
            RWLOCK.unlink(missing_ok=True)
            print(f"{RWLOCK}: half written by a run that was killed; removed")


def _is_lockfile() -> bool:
    try:
        COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(LOCKFILE.read_text(encoding="utf-8")))
    except (Invalid, UnicodeDecodeError, yaml.YAMLError):
        return False
    return True


def _is_json() -> bool:
    try:
        json.loads(RWLOCK.read_bytes() or b"{}")
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main()
