"""How long workers take for tasks whose times are known: list scheduling, by the rules of `engine.Ray`.

One driver makes tasks in order, hands each to the worker that is free first, has no more than AHEAD tasks for each
worker under way, FARTHER where results are small, and handles results in order. What it does itself is serial, and all
bytes pass its link, full duplex. No randomness: the same tasks give the same times.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from nashswarm.engine import AHEAD


@dataclass(frozen=True, slots=True)
class Task:
    """One call on a worker."""

    seconds: float  # of the worker
    before: float = 0.0  # of the driver, to make the arguments
    after: float = 0.0  # of the driver, with the result
    sent: float = 0.0  # bytes of the arguments
    returned: float = 0.0  # bytes of the result


@dataclass(frozen=True, slots=True)
class Phase:
    """Tasks that need nothing of each other; the next phase needs all of them."""

    tasks: Sequence[Task] = ()
    gap: float = 0.0  # seconds of the driver before the first
    start: float = 0.0  # seconds of each worker before its first: what its tasks have in common is made
    ahead: int = AHEAD  # tasks under way for each worker


@dataclass(frozen=True, slots=True)
class Network:
    """Of the driver."""

    bandwidth: float  # bytes a second, each way
    latency: float  # seconds of one message


NONE = Network(float("inf"), 0.0)


def serial(phases: Sequence[Phase]) -> float:
    """Seconds of one process without a network."""
    tasks = sum(t.seconds + t.before + t.after for phase in phases for t in phase.tasks)
    return tasks + sum(phase.gap + phase.start * bool(phase.tasks) for phase in phases)


def makespan(phases: Sequence[Phase], workers: int, network: Network = NONE) -> float:
    """Seconds until the driver has handled the last result."""
    now = 0.0
    for phase in phases:
        now = _phase(phase, workers, network, now + phase.gap)
    return now


def _phase(phase: Phase, workers: int, network: Network, now: float) -> float:
    free, fresh = [now] * workers, workers
    out = back = now  # when the link's two ways are free
    under_way: deque[tuple[float, Task]] = deque()  # when its result was made, and whose it is

    def handle() -> None:
        nonlocal now, back
        made, task = under_way.popleft()
        back = max(back, made) + task.returned / network.bandwidth
        now = max(now, back + network.latency) + task.after

    for task in phase.tasks:
        now += task.before
        out = max(out, now) + task.sent / network.bandwidth
        begin = max(heapq.heappop(free), out + network.latency)
        begin, fresh = begin + phase.start * (fresh > 0), fresh - 1
        heapq.heappush(free, begin + task.seconds)
        under_way.append((begin + task.seconds, task))
        if len(under_way) >= phase.ahead * workers:
            handle()
    while under_way:
        handle()
    return now


def jobs(seconds: Sequence[float], at_once: int) -> float:
    """Seconds of jobs that need nothing of each other, the longest first, so many at once."""
    free = [0.0] * at_once
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + one)
    return max(free)
