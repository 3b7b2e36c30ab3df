"""How long workers take for tasks whose times are known: list scheduling, by the rules of `engine.Ray`.

One driver makes tasks in order, hands each to the worker that is free first, has no more than AHEAD tasks for each
worker under way, FARTHER where results are small, and handles results in order. What it does itself is serial, and all
bytes pass its link, full duplex. What is added up on workers (`folding`) goes from worker to worker, over a link of
each, and is handled while the next phase's first tasks are under way. No randomness: the same tasks give the same
times.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
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
class Sum:
    """The total of one part of every task of a phase."""

    part: float = 0.0  # bytes of a task's part; of the sum so far, which is wider, twice as many
    add: float = 0.0  # seconds of a worker for each part
    result: float = 0.0  # seconds of the worker for what it makes of the sum
    returned: float = 0.0  # bytes of that


@dataclass(frozen=True, slots=True)
class Phase:
    """Tasks that need nothing of each other; the next phase needs all of them, but not their sums."""

    tasks: Sequence[Task] = ()
    gap: float = 0.0  # seconds of the driver before the first
    start: float = 0.0  # seconds of each worker before its first: what its tasks have in common is made
    ahead: int = AHEAD  # tasks under way for each worker
    sums: Sequence[Sum] = ()
    after: float = 0.0  # seconds of the driver with all results of sums


@dataclass(frozen=True, slots=True)
class Network:
    """Of the driver, and of each worker."""

    bandwidth: float  # bytes a second, each way
    latency: float  # seconds of one message


NONE = Network(float("inf"), 0.0)


def serial(phases: Sequence[Phase]) -> float:
    """Seconds of one process without a network."""
    tasks = sum(t.seconds + t.before + t.after for phase in phases for t in phase.tasks)
    sums = sum(len(phase.tasks) * s.add + s.result for phase in phases for s in phase.sums)
    return tasks + sums + sum(phase.gap + phase.start * bool(phase.tasks) + phase.after for phase in phases)


def makespan(phases: Sequence[Phase], workers: int, network: Network = NONE) -> float:
    """Seconds until the driver has handled the last result."""
    run, behind = _Run(workers, network), Behind()
    for phase in phases:
        behind = run.phase(phase, behind)
    run.settle(behind)
    return run.now


@dataclass(frozen=True, slots=True)
class Made:
    """What lies on a worker."""

    at: float  # seconds
    worker: int


@dataclass(frozen=True, slots=True)
class Behind:
    """Results of sums that the driver has not handled."""

    results: Sequence[tuple[float, float]] = ()  # when each was made, and its bytes
    after: float = 0.0  # seconds of the driver with all of them


class _Run:
    def __init__(self, workers: int, network: Network) -> None:
        self.workers, self.network = workers, network
        self.now = self.out = self.back = 0.0  # of the driver, and when its link's two ways are free
        self.free = [(0.0, worker) for worker in range(workers)]  # when, which
        self.links = [0.0] * workers  # when what each sends to others has left

    def phase(self, phase: Phase, behind: Behind) -> Behind:
        """Run it; what is `behind`, of the phase before, is settled once the first tasks were handed out."""
        self.now += phase.gap
        limit, begun, sums = phase.ahead * self.workers, set[int](), list[Made]()
        size = limit if phase.sums else len(phase.tasks)  # what is added up is handed out window by window
        for first in range(0, len(phase.tasks), size or 1):
            self.now = max([self.now, *(found.at + self.network.latency for found in sums)])
            parts = self.tasks(phase.tasks[first : first + size], limit, phase.start, begun, behind)
            sums = self.fold(phase.sums, parts, sums, first + size >= len(phase.tasks))
            behind = Behind()
        self.settle(behind)
        return Behind([(m.at, s.returned) for m, s in zip(sums, phase.sums, strict=True)], phase.after)

    def tasks(self, tasks: Sequence[Task], limit: int, start: float, begun: set[int], behind: Behind) -> list[Made]:
        """Hand them out, no more than `limit` at a time, and handle what they return."""
        found, under_way = list[Made](), deque[tuple[Made, Task]]()
        for task in tasks:
            found.append(self.hand_out(task, start, begun))
            under_way.append((found[-1], task))
            if len(under_way) >= limit:
                self.settle(behind)
                behind = Behind()
                self.handle(*under_way.popleft())
        self.settle(behind)
        while under_way:
            self.handle(*under_way.popleft())
        return found

    def hand_out(self, task: Task, start: float, begun: set[int]) -> Made:
        """To the worker that is free first."""
        self.now += task.before
        self.out = max(self.out, self.now) + task.sent / self.network.bandwidth
        free, worker = heapq.heappop(self.free)
        end = max(free, self.out + self.network.latency) + start * (worker not in begun) + task.seconds
        begun.add(worker)
        heapq.heappush(self.free, (end, worker))
        return Made(end, worker)

    def handle(self, made: Made, task: Task) -> None:
        """A result."""
        self.receive(made.at, task.returned)
        self.now += task.after

    def settle(self, behind: Behind) -> None:
        """Results of sums."""
        for at, size in behind.results:
            self.receive(at, size)
        self.now += behind.after

    def receive(self, at: float, size: float) -> None:
        """So many bytes, which were there at some time."""
        self.back = max(self.back, at) + size / self.network.bandwidth
        self.now = max(self.now, self.back + self.network.latency)

    def fold(self, sums: Sequence[Sum], parts: Sequence[Made], before: Sequence[Made], last: bool) -> list[Made]:
        """Add up parts, each sum on the worker that is free first; it asks for one part after the other.

        Arguments: `before`, where sums so far are, if there are any; `last`, whether results are made.
        """
        if not sums:
            return []
        found, waiting = [Made(0.0, 0)] * len(sums), deque(range(len(sums)))
        handed = self.now + self.network.latency
        # What happens next: when, where, to which sum, and what it still needs: bytes, of whom, and seconds with them.
        events: list[tuple[float, int, int, Iterator[tuple[float, int, float]]]]
        events = [(max(free, handed), worker, -1, iter(())) for free, worker in self.free]
        self.free = []
        heapq.heapify(events)
        while events:
            now, worker, number, steps = heapq.heappop(events)
            if step := next(steps, None):
                size, source, seconds = step
                if source != worker:
                    self.links[source] = max(self.links[source], now) + size / self.network.bandwidth
                    now = self.links[source] + self.network.latency
                heapq.heappush(events, (now + seconds, worker, number, steps))
                continue
            if number >= 0:
                now += sums[number].result * last
                found[number] = Made(now, worker)
            if waiting:
                number = waiting.popleft()
                held = [(2 * sums[number].part, before[number].worker, 0.0)] if before else []
                own = [(sums[number].part, part.worker, sums[number].add) for part in parts]
                heapq.heappush(events, (now, worker, number, iter([*held, *own])))
            else:
                heapq.heappush(self.free, (now, worker))
        return found


def jobs(seconds: Sequence[float], at_once: int) -> float:
    """Seconds of jobs that need nothing of each other, the longest first, so many at once."""
    free = [0.0] * at_once
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + one)
    return max(free)
