"""Threads beside each other: each follows the one before it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from nashswarm.threads import all_hands, crew, in_step, set_crew, team

Step = Callable[[], None]


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("items", "steps"), [(0, 3), (1, 3), (4, 1), (7, 30)])
def test_nobody_overtakes(threads: int, items: int, steps: int) -> None:
    places, seen = [0] * items, set()

    def work(number: int, wait: Step, done: Step) -> None:
        seen.add(threading.get_ident())
        assert torch.get_num_threads() == (1 if threads > 1 and min(items, steps) > 1 else threads)
        for step in range(steps):
            wait()
            assert number == 0 or places[number - 1] > step
            places[number] += 1
            done()

    in_step(work, range(items), steps)
    assert places == [steps] * items
    assert len(seen) <= max(1, min(threads, items, steps))
    assert torch.get_num_threads() == threads


def test_two_work_at_once() -> None:
    """Each step of the second needs the first to be a step ahead, and the other way round."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    meet = threading.Barrier(2, timeout=20)

    def work(number: int, wait: Step, done: Step) -> None:
        for step in range(4):
            wait()
            if 0 < step + number < 4:
                meet.wait()
            done()

    try:
        in_step(work, range(2), 4)
    finally:
        torch.set_num_threads(before)


def test_what_the_first_raised_is_raised(threads: int) -> None:
    def work(number: int, wait: Step, done: Step) -> None:
        for step in range(9):
            wait()
            if (number, step) in {(2, 4), (4, 1)}:
                raise ValueError(f"{number} failed")
            done()

    with pytest.raises(ValueError, match=r"^2 failed$"):
        in_step(work, range(6), 9)
    assert torch.get_num_threads() == threads


def test_a_crew_is_as_large_as_is_said(threads: int) -> None:
    assert crew() == threads
    meet = threading.Barrier(3, timeout=20)

    def work(number: int) -> int:
        if number < 3:
            meet.wait()
        assert crew() == torch.get_num_threads() == 1
        return -number

    set_crew(3)
    try:
        with team(5) as run:
            assert run(work, range(7)) == [-number for number in range(7)]
        with all_hands():
            assert torch.get_num_threads() == 3
    finally:
        set_crew(0)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("members", "most", "share"), [(2, 2, 1), (5, 3, 1), (7, 3, 2), (16, 8, 2), (8, 2, 4)])
def test_a_small_team_shares_out_its_crew(members: int, most: int, share: int) -> None:
    def own(number: int) -> tuple[int, int, int]:
        return number, crew(), torch.get_num_threads()

    def work(number: int) -> list[tuple[int, int, int]]:
        assert own(number) == (number, share, 1)
        meet = threading.Barrier(share, timeout=20)
        with team(share) as run:
            found = run(lambda item: (meet.wait(), own(item))[1], range(share))
        places = list[int]()
        in_step(lambda item, wait, done: (wait(), places.append(item), done())[2], range(3), 1)
        assert places == [0, 1, 2]
        assert own(number) == (number, share, 1)
        return found

    before = torch.get_num_threads()
    set_crew(members)
    try:
        with team(most) as run:
            assert run(work, range(9)) == [[(item, 1, 1) for item in range(share)]] * 9
        assert crew() == members
    finally:
        set_crew(0)
    assert torch.get_num_threads() == before


def test_a_team_within_a_team_of_this_thread_is_that_team(threads: int) -> None:
    with team(threads) as outer, team(2) as inner:
        assert (inner is outer) == (threads > 1)
        assert inner(lambda number: number + crew(), range(9)) == [number + 1 for number in range(9)]
    with team(threads) as again:
        assert again is not outer
        assert again(str, range(3)) == ["0", "1", "2"]
