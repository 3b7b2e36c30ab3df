"""What people see of a run: progress bars on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def progress(items: Sequence[Any], title: str) -> Iterable[Any]:
    """Wrap a loop; on a terminal, a bar on standard error shows how far it is."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, title, console=console, disable=not console.is_terminal)


def quiet(items: Sequence[Any], _: str) -> Iterable[Any]:
    """Nothing."""
    return items
