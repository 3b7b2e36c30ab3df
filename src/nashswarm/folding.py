"""Sums over what tasks return, made where it was returned: see `Engine.fold`.

A task returns something to the caller, and parts, by key, of which the caller sees the sums alone. Parts of a key are
added in the order of the items, so that wherever it is done the sum has the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Protocol

Parts = Mapping[Hashable, Any]


class Total(Protocol):
    """A sum of the parts of one key. On a cluster it is pickled between parts, and made of parts that are read-only."""

    def add(self, part: Any) -> None:
        """What one task gave."""

    def result(self) -> Any:
        """What all parts make; asked for once."""


class Folding(Protocol):
    """Tasks whose parts are added up."""

    def __iter__(self) -> Iterator[Any]:
        """What each task returns to the caller, in the order of the items. Raises what tasks raise."""

    def totals(self) -> dict[Hashable, Any]:
        """Key -> result of its total, once what tasks return was taken to the end."""


def in_order(parts: Parts, keys: Sequence[Hashable]) -> list[Any]:
    """The parts of one task in the order of `keys`. Raises ValueError unless they are of these keys."""
    if parts.keys() != set(keys):
        raise ValueError(f"parts of {sorted(map(str, parts))}, expected {sorted(map(str, keys))}")
    return [parts[key] for key in keys]


class Here:
    """A `Folding` in this process: parts are added as they come."""

    def __init__(
        self, found: Iterable[tuple[Any, Parts]], keys: Sequence[Hashable], total: Callable[[], Total]
    ) -> None:
        """Arguments: `found`, what each task returns."""
        self.found, self.keys = found, keys
        self._totals = [total() for _ in keys]

    def __iter__(self) -> Iterator[Any]:
        for own, parts in self.found:
            self.add(parts)
            del parts  # before the next task makes its own
            yield own

    def add(self, parts: Parts) -> None:
        """What one task gave."""
        for total, part in zip(self._totals, in_order(parts, self.keys), strict=True):
            total.add(part)

    def totals(self) -> dict[Hashable, Any]:
        """As `Folding.totals`."""
        self._totals.reverse()  # each is let go before the next one's result is made
        return {key: self._totals.pop().result() for key in self.keys}


class Apart:
    """A `Folding` on workers, by references to what they hold: as many tasks at a time as may be under way.

    Once these have returned, their parts are added to the totals, a task to a key, and then the next ones begin. The
    first begin at once.
    """

    def __init__(
        self,
        items: Iterable[tuple[Any, ...]],
        keys: Sequence[Hashable],
        window: int,
        run: Callable[..., list[Any]],
        add: Callable[..., Any],
        get: Callable[[Any], Any],
        wait: Callable[[list[Any]], None],
    ) -> None:
        """Arguments: `window`, of tasks; `run(*item)`, `add(last, total, *parts)` begin tasks, and return references.

        Those of `run` are to what is the caller's and to the parts; that of `add` is to a total, to its result for the
        `last` parts. `total` is None for the first ones. `get` and `wait` are of references.
        """
        self.items, self.keys, self.window = iter(items), keys, window
        self.run, self.add, self.get, self.wait = run, add, get, wait
        self._sums: list[Any] = [None for _ in keys]
        self._begin()

    def __iter__(self) -> Iterator[Any]:
        while self._under_way:
            for own in [references[0] for references in self._under_way]:
                yield self.get(own)
            following = list(islice(self.items, 1))
            self._add(last=not following)
            if following:
                self.wait(self._sums)  # parts of no more than one window are kept
            self.items = chain(following, self.items)
            self._begin()

    def totals(self) -> dict[Hashable, Any]:
        """As `Folding.totals`."""
        return {key: self.get(found) for key, found in zip(self.keys, self._sums, strict=True)}

    def _begin(self) -> None:
        self._under_way = [self.run(*item) for item in islice(self.items, self.window)]

    def _add(self, last: bool) -> None:
        _, *parts = zip(*self._under_way, strict=True)
        self._under_way = []  # what is added is let go
        self._sums = [self.add(last, s, *own) for s, own in zip(self._sums, parts, strict=True)]
