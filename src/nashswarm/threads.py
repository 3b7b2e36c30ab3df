"""How many threads torch computes with, how they wait, and that they compute alike; and threads of Python beside."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

R = TypeVar("R")
T = TypeVar("T")
# What a model's layers take from libraries of vector mathematics.
FIRST_CALLS = ("exp", "log", "tanh", "erf", "sigmoid", "sin", "cos", "rsqrt")


def wait_asleep() -> None:
    """Let idle threads soon sleep, not spin; call it before torch is loaded. What the environment says already stays.

    A thread that spins for another, which has no core at the moment, takes the core that this one needs: beside
    two other programs on 2 cores, packing `gptq4-g128` took 33 to 57 s; with threads that sleep after 20,000 turns
    (some 50 us, in GNU's OpenMP, which torch brings along) 4 to 8 s, and 4 s alone. Threads that sleep at once took
    13.4 s on average for an evaluation alone, these 11.2 s.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & {*os.environ}:
        os.environ["GOMP_SPINCOUNT"] = "20000"


def set_threads(count: int) -> None:
    """Late digits of sums follow the number of threads, so it is fixed.

    Libraries of vector mathematics choose their code for the processor when they are first called. Once, in 14 runs of
    the original model, one of two threads made something else of its half of the first batch (2.4e-4 in hidden states),
    and of no other: so the first calls are made here, on one thread.
    """
    import torch

    torch.set_num_threads(count)
    for function in FIRST_CALLS:
        getattr(torch, function)(torch.ones(64))
    torch.ones(64, 64) @ torch.ones(64, 64)


@contextmanager
def single_threads(count: int, own: int = 1) -> Iterator[ThreadPoolExecutor]:
    """So many threads for Python, each of which lets torch compute with one and has a crew of `own`."""
    import torch

    def begin() -> None:
        torch.set_num_threads(1)
        set_crew(own)

    with ThreadPoolExecutor(count, initializer=begin) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(torch.get_num_threads())  # new threads start with what was set last


_own = threading.local()


def set_crew(count: int) -> None:
    """How many threads of Python may compute beside each other where this one waits for them; 0: as torch does."""
    _own.crew = count


def crew() -> int:
    """How many may; see `set_crew`."""
    import torch

    return getattr(_own, "crew", None) or torch.get_num_threads()


class Team(Protocol):
    """Works on items beside each other."""

    def __call__(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """work(item) of every item, which are begun in this order. Raises what the first that failed raised."""


@contextmanager
def team(most: int) -> Iterator[Team]:
    """The crew, but no more than `most` of it; torch computes with one thread each. Alone, this thread as it is.

    Where the team is smaller than the crew, its members have crews of their own, of what is left over. Within another
    team of this thread it is that one, since threads take time to begin.
    """
    whole, outer = crew(), getattr(_own, "team", None)
    count = min(whole, most)
    if count < 2:
        yield lambda work, items: [work(item) for item in items]
    elif outer:
        yield outer
    else:
        with single_threads(count, whole // count) as pool:
            _own.team = partial(_share, pool, count)
            try:
                yield _own.team
            finally:
                _own.team = None


def _share(pool: ThreadPoolExecutor, count: int, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """No item has a future of its own: threads wait for each other wherever one lets go of Python's lock."""
    given = list(items)
    numbers, found, failed = iter(range(len(given))), dict[int, R](), dict[int, BaseException]()

    def take() -> None:
        for number in numbers:
            if failed:
                return
            try:
                found[number] = work(given[number])
            except BaseException as error:
                failed[number] = error

    members = [pool.submit(take) for _ in range(min(count, len(given)))]
    try:
        wait(members)
    except BaseException as error:  # nobody begins another item
        failed[-1] = error
        raise
    if failed:
        raise failed[min(failed)]
    return [found[number] for number in range(len(given))]


@contextmanager
def all_hands() -> Iterator[None]:
    """Within, torch has as many threads as the crew; for what computes element by element, where none is shared."""
    import torch

    before, count = torch.get_num_threads(), crew()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_step(work: Callable[[T, Callable[[], None], Callable[[], None]], None], items: Sequence[T], steps: int) -> None:
    """work(item, wait, done) for every item, each of which follows the one before it, step by step.

    `work` calls `done` behind each of its steps. The first `wait` of an item returns once the one before it has called
    `done`, the second once it has done so twice; `steps` is how often an item may wait. Items are worked on by the
    crew, each of which lets torch compute with one thread; alone, by this thread as it is. Raises what the first item
    that failed raised; those behind it are abandoned.
    """
    threads = min(crew(), len(items), steps)
    turns = [threading.Semaphore(0) for _ in items]
    failed: set[int] = set()

    def follow(number: int) -> None:
        def wait() -> None:
            if number:
                turns[number - 1].acquire()
                if number - 1 in failed:
                    raise RuntimeError("what this follows has failed")

        try:
            work(items[number], wait, turns[number].release)
        except BaseException:
            failed.add(number)
            turns[number].release(steps)
            raise

    if threads < 2:
        for number in range(len(items)):
            follow(number)
        return
    with single_threads(threads) as pool:
        for ended in [pool.submit(follow, number) for number in range(len(items))]:
            ended.result()
