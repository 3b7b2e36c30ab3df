"""Numba, where plain Python is too slow: compiled once for a signature, and kept for the next process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compiled(function: Callable[..., Any], signatures: Any) -> Callable[..., Any]:
    """The function, compiled for its signatures, as numba takes them; it runs without the GIL.

    Raises ImportError where numba is missing.
    """
    import numba  # type: ignore[import-untyped, unused-ignore]

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(signatures, cache=True, **options)(function)  # type: ignore[no-any-return]
    except (RuntimeError, OSError):  # neither this directory nor the user's cache can be written
        return numba.njit(signatures, **options)(function)  # type: ignore[no-any-return]
