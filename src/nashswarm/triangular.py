"""Factors of positive definite matrices, by a crew of threads (see `threads`) whose number changes no digit.

Libraries cut their work by the number of threads, and late digits follow. Here it is cut into tiles of one size, each a
product of matrices that one thread computes, whichever it is. Equally fast on one thread; and where a matrix is all
that a machine waits for, all of its cores take part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nashswarm.threads import Team, team

TILE = 128  # rows and columns
LEAST = 16  # columns that are solved for together, where there are few


def tiles(count: int, size: int = TILE) -> list[slice]:
    """Rows, or columns, next to each other."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


@dataclass(frozen=True, slots=True)
class Factored:
    """R, upper triangular, with M = R R^T."""

    upper: Tensor  # [n, n]; below the diagonal there is anything
    pivots: list[Tensor]  # the inverses of R's tiles on the diagonal

    def inverse(self, take: Callable[[slice, Tensor], None]) -> None:
        """Hand R^-1, which is upper triangular, to `take(columns, values [columns.stop, TILE])`, tile by tile."""
        places = tiles(len(self.upper))

        def columns(last: int) -> None:
            end = places[last]
            found = self.upper.new_empty(end.stop, end.stop - end.start)
            found[end] = self.pivots[last]
            for number in reversed(range(last)):
                here = places[number]
                found[here] = -self.pivots[number] @ (self.upper[here, here.stop : end.stop] @ found[here.stop :])
            take(end, found)

        with team(len(places)) as run:
            run(columns, reversed(range(len(places))))  # those that take longest come first

    def solve(self, right: Tensor) -> Tensor:
        """M^-1 right, [n, m]."""
        places, found = [*zip(tiles(len(right)), self.pivots, strict=True)], torch.empty_like(right)
        width = max(LEAST, min(TILE, right.shape[1] // 8))

        def columns(own: slice) -> None:
            values = right[:, own].clone(memory_format=torch.contiguous_format)
            for here, pivot in reversed(places):
                values[here] = pivot @ values[here].addmm_(self.upper[here, here.stop :], values[here.stop :], alpha=-1)
            for here, pivot in places:
                above = self.upper[: here.start, here].T
                values[here] = pivot.T @ values[here].addmm_(above, values[: here.start], alpha=-1)
            found[:, own] = values

        with team(right.shape[1]) as run:
            run(columns, tiles(right.shape[1], width))
        return found


def factored(matrix: Tensor) -> Factored | None:
    """Of a symmetric matrix, [n, n], which is overwritten. None where it is not positive definite."""
    places, pivots = tiles(len(matrix)), list[Tensor]()
    with team(len(places)) as run:
        try:
            pivots.append(_pivot(matrix, places[-1]))
            for last in reversed(range(1, len(places))):
                here = places[last]
                _column(matrix, places[:last], here, pivots[-1], pivots.append, run)
        except _NotDefiniteError:
            return None
    return Factored(matrix, pivots[::-1])


class _NotDefiniteError(Exception):
    pass


def _column(
    matrix: Tensor, above: list[slice], here: slice, pivot: Tensor, found: Callable[[Tensor], None], run: Team
) -> None:
    """R's tiles above one on the diagonal; and as soon as it can be had, `found` gets the next one's pivot."""
    behind = slice(here.stop, None)

    def tile(number: int) -> None:
        rows = above[number]
        rest = torch.addmm(matrix[rows, here], matrix[rows, behind], matrix[here, behind].T, alpha=-1)
        matrix[rows, here] = rest @ pivot.T
        if number == len(above) - 1:
            found(_pivot(matrix, rows))

    run(tile, reversed(range(len(above))))


def _pivot(matrix: Tensor, here: slice) -> Tensor:
    """The inverse of R's tile on the diagonal, which this puts in its place."""
    right = matrix[here, here.stop :]
    rest = torch.addmm(matrix[here, here], right, right.T, alpha=-1)
    lower, failed = torch.linalg.cholesky_ex(rest.flip(0, 1))
    if int(failed):
        raise _NotDefiniteError
    matrix[here, here] = upper = lower.flip(0, 1)
    unit = torch.eye(len(upper), dtype=upper.dtype)
    found: Tensor = torch.linalg.solve_triangular(upper, unit, upper=True)
    return found


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, k] right [k, m]."""
    found = left.new_empty(len(left), right.shape[1])

    def rows(own: slice) -> None:
        torch.mm(left[own], right, out=found[own])

    with team(len(left)) as run:
        run(rows, tiles(len(left)))
    return found
