"""tiles.cpp as a loaded library: the one that was built at install, or one compiled at its first use.

A library fits if the hash of source and flags that is compiled into it is that of the source beside this file. An
install with a compiler leaves one here (setup.py); a checkout on PYTHONPATH, or one whose source has changed since it
was installed, compiles its own, once, into the user's cache under that hash. There is no third place to look. Whatever
goes wrong ends in a warning and None: callers then do without.

Imports nothing of the project, since setup.py runs this file before the project is installed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("tiles.cpp")
# No contraction into fused products: results are equal on all instruction sets. No -march: each function names its own.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-pthread")
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 300  # gcc 12 takes 2 s


def source_hash() -> str:
    """SHA-256 of flags and source, in hex, first 16 digits."""
    return hashlib.sha256(" ".join(FLAGS).encode() + SOURCE.read_bytes()).hexdigest()[:16]


def definition() -> tuple[str, str]:
    """The macro that a library is compiled with, to be known again."""
    return "NASHSWARM_SOURCE", f'"{source_hash()}"'


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library of this source, or None, with one warning, where there is none and none can be made."""
    try:
        wanted = source_hash()
        return _fitting(_installed(), wanted) or _fitting(_cached(wanted), wanted) or _fitting(_compile(wanted), wanted)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            "no kernels for packed matrices (%s): they are decoded for every product, which is slow; "
            "a C++17 compiler on PATH or in CXX is all that is missing",
            error,
        )
        return None


def _fitting(path: Path, wanted: str) -> ctypes.CDLL | None:
    if not path.is_file():
        return None
    try:
        found = ctypes.CDLL(str(path))
        found.nashswarm_source.restype = ctypes.c_char_p
        return found if found.nashswarm_source() == wanted.encode() else None
    except (OSError, AttributeError) as error:  # of another machine, cut short, or no library at all
        logger.info("%s cannot be used: %s", path, error)
        return None


def _installed() -> Path:
    return SOURCE.with_name("_tiles" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))


def _cached(wanted: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    machine = sysconfig.get_platform()
    return Path(base) / "nashswarm" / f"tiles-{machine}-{wanted}.so"


def _compile(wanted: str) -> Path:
    """Into the cache, in one step, so that two processes may do it at once. Raises RuntimeError, OSError."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"none of {', '.join(COMPILERS)} is on PATH")
    target = _cached(wanted)
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("compiling %s", SOURCE.name)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        name, value = definition()
        words = [*compiler.split(), *FLAGS, f"-D{name}={value}", "-shared", str(SOURCE), "-o", str(made)]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"{compiler} ended with {done.returncode}: {done.stderr.strip()[:300]}")
        os.replace(made, target)
    return target
