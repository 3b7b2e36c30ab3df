"""Work in a process of its own: its memory can be told from all other, and goes when it ends."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import resource
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from nashswarm.threads import set_threads
from nashswarm.types import InputError

T = TypeVar("T")
Make = Callable[..., tuple[Callable[[], Any], Any]]  # of arguments: the work, and what is to be said of it
SPAWN = multiprocessing.get_context("spawn")  # a forked child would begin with its parent's memory
LOST = "the process was killed, most likely for want of memory: choose a smaller model under `benchmark`"


def alone(threads: int, work: Callable[..., T], *arguments: Any) -> T:
    """The result of `work`, a function of a module, in a new process. Raises InputError where that was killed."""
    with ProcessPoolExecutor(1, SPAWN, _begin, (threads,)) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise InputError(f"{work.__qualname__}: {LOST}") from error


class Worker:
    """A process that makes something once, says what it holds, and then works on it whenever it is asked."""

    def __init__(self, name: str, threads: int, make: Make, *given: Any) -> None:
        """Arguments: `make`, a function of a module, and what it is `given`."""
        self.name = name
        self._pipe, other = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(other, threads, make, given), daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pipe.close()  # which ends it
        self._process.join(5)
        self._process.kill()

    def said(self) -> Any:
        """What `make` said, or, after each `ask`, what came of the work. Raises InputError where it died."""
        try:
            return self._pipe.recv()
        except EOFError as error:
            raise InputError(f"{self.name}: {LOST}, or see what it wrote above") from error

    def ask(self) -> Any:
        """Have the work done once."""
        try:
            self._pipe.send(None)
        except BrokenPipeError as error:
            raise InputError(f"{self.name}: {LOST}") from error
        return self.said()


def _serve(pipe: Connection, threads: int, make: Make, given: Any) -> None:
    _begin(threads)
    work, said = make(*given)
    pipe.send(said)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(work())


def _begin(threads: int) -> None:
    """In the new process: it computes with so many threads, and ends when its parent does, however that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    set_threads(threads)


def resident_bytes() -> int:
    """Of this process, now, after what is no longer needed went."""
    import psutil

    gc.collect()
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Of this process, since it began."""
    try:  # getrusage would count what the parent held when it started this process
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
