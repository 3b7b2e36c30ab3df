"""Factors of positive definite matrices, by a crew of threads (see `threads`) whose number changes no digit.

Libraries cut their work by the number of threads, and late digits follow. Here it is cut by the matrix' size alone,
each piece a call that one thread computes, whichever it is. One thread is as fast with it; and where a matrix is all
that a machine waits for, all of its cores take part. Where a thread lets go of Python's lock, as in every call of
torch, others are woken, which with sixteen threads costs more than small calls do: pieces are few, of one call each.

A factor comes panel by panel, from the last columns to the first. Behind each, everything before it is updated, by as
many threads as there are; the next panel's tile on the diagonal comes first and is factored at once, so that only the
smallest matrices wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Event

import torch
from torch import Tensor

from nashswarm.threads import Team, team

TILE = 128  # rows and columns
LARGE = 2048  # rows from which on panels are twice as wide: where much is before them, fewer pieces are as fast
LEAST = 32  # columns that are solved for together, where there are few


def tiles(count: int, size: int = TILE) -> list[slice]:
    """Rows, or columns, next to each other."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def coarse(count: int) -> int:
    """A tile's size where several matrices are factored beside each other, each by few threads."""
    return max(TILE, count // 16 // TILE * TILE)


def panels(count: int, size: int = TILE) -> list[slice]:
    """Columns that are factored together."""
    if size > TILE:
        return tiles(count, size)
    narrow = min(count, LARGE)
    wide = [slice(narrow + own.start, narrow + own.stop) for own in tiles(count - narrow, 2 * TILE)]
    return tiles(narrow) + wide


@dataclass(frozen=True, slots=True)
class Factored:
    """R, upper triangular, with M = R R^T."""

    upper: Tensor  # [n, n]; below the diagonal there is anything
    places: list[slice]  # of R's tiles on the diagonal
    pivots: list[Tensor]  # their inverses

    def inverse(self, take: Callable[[slice, Tensor], None]) -> None:
        """Hand R^-1, which is upper triangular, to `take(columns, values [columns.stop, TILE or fewer])`."""

        def columns(part: tuple[int, slice]) -> None:
            last, own = part
            end = self.places[last]
            found = self.upper.new_empty(end.stop, own.stop - own.start)
            found[end] = self.pivots[last][:, own.start - end.start : own.stop - end.start]
            for number in reversed(range(last)):
                here = self.places[number]
                found[here] = -self.pivots[number] @ (self.upper[here, here.stop : end.stop] @ found[here.stop :])
            take(own, found[: own.stop])

        parts = [
            (number, slice(end.start + own.start, end.start + own.stop))
            for number, end in enumerate(self.places)
            for own in tiles(end.stop - end.start)
        ]
        with team(len(parts)) as run:
            run(columns, reversed(parts))  # those that take longest come first

    def solve(self, right: Tensor) -> Tensor:
        """M^-1 right, [n, m]."""
        found = torch.empty_like(right)

        def columns(own: slice) -> None:
            half = torch.linalg.solve_triangular(self.upper, right[:, own], upper=True)
            found[:, own] = torch.linalg.solve_triangular(self.upper.T, half, upper=False)

        with team(right.shape[1]) as run:
            run(columns, tiles(right.shape[1], max(LEAST, min(TILE, right.shape[1] // 16))))
        return found


def factored(matrix: Tensor, size: int = TILE) -> Factored | None:
    """Of a symmetric matrix, [n, n], which is overwritten. None where it is not positive definite.

    Arguments: `size`, rows and columns of a tile; with few and large pieces, few threads are faster.
    """
    places, pivots = panels(len(matrix), size), list[Tensor]()
    behind = slice(len(matrix), len(matrix))
    try:
        with team(len(places)) as run:
            for here in reversed(places):
                pivots.append(_panel(matrix, here, behind, size, run))
                behind = here
    except _NotDefiniteError:
        return None
    return Factored(matrix, places, pivots[::-1])


def _panel(matrix: Tensor, here: slice, behind: slice, size: int, run: Team) -> Tensor:
    """Factor a panel, [here.stop, here], once what the one behind it gives is taken off everything before that one.

    Pieces are begun in the order of the list: the pivot, what is before this panel, and last this panel's rows, which
    wait for the pivot. Returns the inverse of its tile on the diagonal.
    """
    ready, pivots, values = Event(), list[Tensor](), matrix.numpy()  # numpy's views cost no turn of Python's lock

    def of(rows: slice, columns: slice) -> Tensor:
        return torch.from_numpy(values[rows, columns])

    def update(rows: slice, columns: slice) -> Tensor:
        found = of(rows, columns)
        right = torch.from_numpy(values[columns, behind].T)
        return torch.addmm(found, of(rows, behind), right, alpha=-1, out=found)

    def diagonal() -> None:
        try:
            matrix[here, here], pivot = _pivot(update(here, here))
            pivots.append(pivot)
        finally:
            ready.set()

    def above(rows: slice) -> None:
        left = update(rows, here)
        ready.wait()
        for pivot in pivots:  # none where it failed
            left.copy_(torch.mm(left, pivot.T))

    tasks: list[Callable[[], object]] = [diagonal]
    if behind.start < len(matrix):
        tasks += [partial(update, *piece) for piece in _pieces(here.start, size)]
    tasks += [partial(above, rows) for rows in tiles(here.start, size)]
    run(_do, tasks)
    return pivots[0]


def _do(task: Callable[[], object]) -> None:
    task()


def _pieces(count: int, size: int) -> list[tuple[slice, slice]]:
    """Rows and columns of what is on and above the diagonal, and little below; the largest come first."""
    width = max(8 * size, count // 4 // size * size)  # few pieces, since threads take turns to begin one
    found = [
        (rows, slice(rows.start + own.start, rows.start + own.stop))
        for rows in tiles(count, size)
        for own in tiles(count - rows.start, width)
    ]
    return sorted(found, key=lambda piece: math.prod(own.stop - own.start for own in piece), reverse=True)


class _NotDefiniteError(Exception):
    pass


def _pivot(tile: Tensor) -> tuple[Tensor, Tensor]:
    """R of a tile on the diagonal, and its inverse."""
    lower, failed = torch.linalg.cholesky_ex(tile.flip(0, 1))
    if int(failed):
        raise _NotDefiniteError
    upper, unit = lower.flip(0, 1), torch.eye(len(tile), dtype=tile.dtype)
    return upper, torch.linalg.solve_triangular(upper, unit, upper=True)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, k] right [k, m]."""
    found = left.new_empty(len(left), right.shape[1])

    def rows(own: slice) -> None:
        torch.mm(left[own], right, out=found[own])

    with team(len(left)) as run:
        run(rows, tiles(len(left)))
    return found
