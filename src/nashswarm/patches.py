"""What is rounded at once: a few columns and rows of a matrix, whose errors act on each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

PATCH = 64  # rows, at most, where rows interact


@dataclass(frozen=True, slots=True)
class Patch:
    """Columns and rows next to each other in rounding order, as the errors of those before left them. Float32.

    Who rounds it goes column by column and, in a column, row by row. An element's target is its value less what is
    handed to it; the error of what it becomes is handed on to later rows of the column. The value less what it becomes,
    over U_cc, is handed on to the same row of later columns, as it is without interaction of rows.
    """

    columns: np.ndarray  # int64 [C], in the matrix
    rows: np.ndarray  # int64 [R], in the matrix
    first: int  # place of the first row
    values: np.ndarray  # [C, R]; becomes what is handed on to later columns
    handed: np.ndarray  # [C, R]; becomes what is handed on to later rows
    upper: np.ndarray  # [C, C], of the columns' factor, or [0, 0] where they do not interact
    spread: np.ndarray  # [R, R], see `feedback.spread`, or [0, 0] where rows do not interact

    @classmethod
    def alone(cls, values: np.ndarray) -> Self:
        """Of values, float32 [C, R], that do not interact; they are overwritten."""
        columns, rows, nothing = *map(np.arange, values.shape), np.zeros((0, 0), np.float32)
        return cls(columns, rows, 0, values, np.zeros_like(values), nothing, nothing)
