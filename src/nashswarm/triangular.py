"""Factors of positive definite matrices, by a crew of threads (see `threads`) whose number changes no digit.

Libraries cut their work by the number of threads, and late digits follow. Here it is cut into tiles of one size, each a
product of matrices that one thread computes, whichever it is. One thread is as fast with it, but for many columns that
are solved for in float64 (half as slow again); and where a matrix is all that a machine waits for, all of its cores
take part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nashswarm.threads import in_step, team

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
    """Of a symmetric matrix, [n, n], which is overwritten. None where it is not positive definite.

    Columns of tiles come from the last to the first, each tile of them from the diagonal up; a column follows the one
    behind it two tiles below, since it begins with what that one left of its diagonal.
    """
    places = tiles(len(matrix))
    pivots = dict[int, Tensor]()

    def column(number: int, wait: Callable[[], None], done: Callable[[], None]) -> None:
        here, behind = places[number], slice(places[number].stop, None)
        right = matrix[here, behind].T
        wait()
        for row in reversed(range(number + 1)):
            wait()
            rows = places[row]
            rest = torch.addmm(matrix[rows, here], matrix[rows, behind], right, alpha=-1)
            if row == number:
                matrix[rows, here], pivots[number] = _pivot(rest)
            else:
                matrix[rows, here] = rest @ pivots[number].T
            done()

    try:
        in_step(column, range(len(places))[::-1], len(places) + 1)
    except _NotDefiniteError:
        return None
    return Factored(matrix, [pivots[number] for number in range(len(places))])


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
