"""The same width for every matrix; embeddings and the head may have a width of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from nashswarm.types import Allocation, Choice, Offer, TensorSpec

BUYS = "widths"
NEEDS_IMPORTANCE = False


@dataclass(frozen=True, slots=True)
class Settings:
    """`bits` for every weight; `embedding_bits`, where given, for embeddings and the head."""

    bits: int = 4
    embedding_bits: int | None = None


def widths(settings: Settings) -> tuple[int, ...]:
    """Every width in bits that `settings` can lead to."""
    return (settings.bits,) if settings.embedding_bits is None else (settings.bits, settings.embedding_bits)


def allocate(offers: Iterable[Offer], settings: Settings) -> Allocation:
    """One Choice per tensor; nothing is weighed, so there is no certificate."""
    choices: dict[str, Choice] = {}
    histogram: Counter[int] = Counter()
    for offer in offers:
        bits = _bits(offer.tensor, settings)
        choices[offer.tensor.name] = Choice(bits=bits)
        histogram[bits] += offer.tensor.weights
    return Allocation(choices, dict(histogram))


def _bits(tensor: TensorSpec, settings: Settings) -> int:
    own = tensor.part in ("embedding", "head") and settings.embedding_bits is not None
    return settings.embedding_bits if own and settings.embedding_bits is not None else settings.bits
