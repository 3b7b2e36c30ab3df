"""Factors, inverses and solutions: right, and the same digits for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nashswarm import triangular
from nashswarm.threads import set_crew

LARGE = 2 * triangular.TILE  # rows from which on panels are wide, here
# One panel; several; and behind those one that is hardly wide, one as wide as can be, and several.
SIZES = (1, 7, *(triangular.TILE * tiles + more for tiles, more in ((1, 0), (1, 1), (2, 0), (2, 1), (4, 0), (5, 50))))


@pytest.fixture(autouse=True)
def _wide_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangular, "LARGE", LARGE)


def definite(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(2 * size, size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    return x.T @ x / len(x) + 0.1 * torch.eye(size, dtype=dtype)


def inverse_of(found: triangular.Factored) -> Tensor:
    inverse = torch.zeros_like(found.upper)

    def take(columns: slice, values: Tensor) -> None:
        inverse[: columns.stop, columns] = values

    found.inverse(take)
    return inverse


@pytest.fixture(params=[1, 2, 5])
def members(request: pytest.FixtureRequest) -> Iterator[int]:
    set_crew(request.param)
    yield request.param
    set_crew(0)


@pytest.mark.parametrize("size", SIZES)
def test_the_factor_is_one(size: int) -> None:
    matrix = definite(size)
    found = triangular.factored(matrix.clone())
    assert found is not None
    upper = found.upper.triu()
    torch.testing.assert_close(upper @ upper.T, matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse_of(found) @ upper, torch.eye(size, dtype=matrix.dtype), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [1, 2048, 2049, 6400])
def test_panels_are_next_to_each_other(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = triangular.panels(count)
    assert [place for own in found for place in range(own.start, own.stop)] == [*range(count)]
    widths = [own.stop - own.start for own in found[:-1]]
    assert widths == sorted(widths)
    assert {*widths} <= {triangular.TILE, 2 * triangular.TILE}


@pytest.mark.parametrize("columns", [1, 40, 300])
@pytest.mark.parametrize("size", SIZES)
def test_solutions_solve(size: int, columns: int) -> None:
    matrix, right = definite(size), torch.randn(size, columns, dtype=torch.float64)
    kept, found = right.clone(), triangular.factored(matrix.clone())
    assert found is not None
    for given in (right, right.T.contiguous().T):
        torch.testing.assert_close(matrix @ found.solve(given), right, rtol=1e-9, atol=1e-9)
    assert torch.equal(right, kept)


@pytest.mark.parametrize("place", [0, 100, 200, 299, 600, 699])
def test_what_is_not_positive_definite_has_no_factor(place: int, members: int) -> None:
    matrix = definite(700)
    matrix[place, place] = -1
    assert triangular.factored(matrix) is None


@pytest.mark.parametrize("size", [200, 500, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_change_no_digit(dtype: torch.dtype, size: int, members: int) -> None:
    right = torch.randn(size, 200, dtype=dtype, generator=torch.Generator().manual_seed(0))
    matrix = definite(size, dtype)

    def every() -> list[Tensor]:
        found = triangular.factored(matrix.clone())
        assert found is not None
        return [found.upper.triu(), inverse_of(found), found.solve(right), triangular.product(matrix, right)]

    many = every()
    before = torch.get_num_threads()
    set_crew(1)
    torch.set_num_threads(1)
    try:
        assert all(map(torch.equal, many, every())), members
    finally:
        torch.set_num_threads(before)
