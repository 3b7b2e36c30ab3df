"""What every stage does first: fixed threads, logging, one-line errors, and an end together with its parent."""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nashswarm import __version__, threads
from nashswarm.artifacts import Layout, check_code, write_json
from nashswarm.config import Params, load_params
from nashswarm.console import progress
from nashswarm.processes import die_with_parent
from nashswarm.types import NashSwarmError

__all__ = ["LAYOUT", "progress", "run", "set_threads"]
LAYOUT = Layout()
threads.wait_asleep()  # before a stage's own imports load torch


def run(stage: Callable[..., None], *, reads_params: bool = True) -> None:
    """Call a stage with the command line's words; errors of ours end it with one line and exit code 2."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nashswarm").setLevel(logging.INFO)  # the HTTP client has a line for each request, too
    die_with_parent()  # which is `dvc repro`
    started = time.perf_counter()
    try:
        check_code(LAYOUT, Path(sys.argv[0]).stem)
        params = [load_params(LAYOUT.params)] if reads_params else []
        stage(*params, *sys.argv[1:])
    except NashSwarmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    _note_time(time.perf_counter() - started)


def set_threads(params: Params) -> None:
    """As params say."""
    threads.set_threads(params.compute.threads)


def _note_time(seconds: float) -> None:
    """Times, host and versions lie beside the results, not in them: results are the same from run to run."""
    facts: dict[str, object] = {"seconds": round(seconds, 2), "cores": os.cpu_count(), "nashswarm": __version__}
    facts |= {"host": platform.platform(), "python": platform.python_version()}
    facts |= {m: sys.modules[m].__version__ for m in ("torch", "transformers", "numpy") if m in sys.modules}
    write_json(LAYOUT.times("-".join([Path(sys.argv[0]).stem, *sys.argv[1:]])), facts)
