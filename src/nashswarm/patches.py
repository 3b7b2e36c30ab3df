"""What is rounded at once: some columns and rows of a matrix, whose errors act on each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

PATCH = 64  # rows, at most, between two decisions, where rows interact


@dataclass(frozen=True, slots=True)
class Patch:
    """Columns and rows next to each other in rounding order, as the errors of those before left them. Float32.

    Who rounds it goes column by column and, in a column, row by row, and overwrites it; its arrays are parts of larger
    ones. An element's target is its value and what is handed to it. The value less what it becomes is handed on to
    later rows of the column; the weight less what it becomes to the same row of later columns, as it is without
    interaction of rows.
    """

    columns: np.ndarray  # int64 [C], in the matrix
    rows: np.ndarray  # int64 [R], in the matrix
    place: tuple[int, int]  # in rounding order, of the first column and the first row
    edges: np.ndarray  # int64 [pieces + 1], rows of the patch at which pieces begin, and its end
    weights: np.ndarray  # [C, R]; become what is handed on to later columns
    values: np.ndarray  # [C, R], weights and what columns before handed on; become what is handed on to later rows
    handed: np.ndarray  # [C, R], by rows before
    between: np.ndarray  # [C, C], of the columns' factor (`feedback.Factor.unit`); [0, 0] where they do not interact
    spread: np.ndarray  # [R, R], of the rows' factor; [0, 0] where they do not interact

    @classmethod
    def alone(cls, values: np.ndarray) -> Self:
        """Of values, float32 [C, R], that do not interact; they become what is left of them."""
        columns, rows, nothing = *map(np.arange, values.shape), np.zeros((0, 0), np.float32)
        edges = np.array([0, len(rows)])
        return cls(columns, rows, (0, 0), edges, values.copy(), values, np.zeros_like(values), nothing, nothing)
