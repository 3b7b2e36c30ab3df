"""Where the bits of a model went: the metrics' rows of matrices as a grid of layers and kinds of matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Titles in the order of the columns, each with its part and the last words of names: GPT-2, OPT, Llama and their kin.
KINDS: Mapping[str, tuple[str, frozenset[str]]] = {
    "q, k, v": ("attention", frozenset({"c_attn", "qkv_proj", "query_key_value", "Wqkv"})),
    "q": ("attention", frozenset({"q_proj", "query"})),
    "k": ("attention", frozenset({"k_proj", "key"})),
    "v": ("attention", frozenset({"v_proj", "value"})),
    "attn out": ("attention", frozenset({"c_proj", "out_proj", "o_proj", "dense"})),
    "MLP gate": ("mlp", frozenset({"gate_proj", "w1"})),
    "MLP gate+up": ("mlp", frozenset({"gate_up_proj"})),
    "MLP up": ("mlp", frozenset({"c_fc", "fc1", "fc_in", "up_proj", "dense_h_to_4h", "w3"})),
    "MLP down": ("mlp", frozenset({"c_proj", "fc2", "fc_out", "down_proj", "dense_4h_to_h", "w2"})),
}


@dataclass(frozen=True, slots=True)
class BitMap:
    """Bits per weight, or another amount, of every matrix; those of one layer and kind (experts, say) share a cell."""

    layers: tuple[int, ...]
    columns: tuple[str, ...]  # kinds of matrix
    cells: Mapping[tuple[int, str], float]  # (layer, column) -> amount
    outside: Mapping[str, float]  # what lies in no layer: embeddings, head

    def values(self) -> list[float]:
        """All amounts that are shown."""
        return [*self.cells.values(), *self.outside.values()]


def bit_map(rows: Sequence[Sequence[Any]]) -> BitMap | None:
    """The map of the metrics' `allocation.tensors`: [name, part, layer, weights, bits]. None where there are none."""
    if not rows:
        return None
    inside = [((layer, column(name, part)), n, bits) for name, part, layer, n, bits in rows if layer is not None]
    outside = [(_words(name)[-1], n, bits) for name, _, layer, n, bits in rows if layer is None]
    return _arranged(_means(inside), _means(outside))


def kinds_of(rows: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Kind of matrix -> true bits per weight over all layers, from the same rows; what lies in no layer by its name."""
    named = [
        (_words(name)[-1] if layer is None else column(name, part), n, bits) for name, part, layer, n, bits in rows
    ]
    return _means(named)


def sum_map(rows: Sequence[tuple[str, str, int | None, float]]) -> BitMap | None:
    """A map of what adds up: [name, part, layer, amount], a cell holds its matrices' sum. None where there are none."""
    inside: dict[tuple[int, str], float] = {}
    outside: dict[str, float] = {}
    for name, part, layer, amount in rows:
        if layer is None:
            outside[_words(name)[-1]] = outside.get(_words(name)[-1], 0.0) + amount
        else:
            cell = layer, column(name, part)
            inside[cell] = inside.get(cell, 0.0) + amount
    return _arranged(inside, outside) if rows else None


def _arranged(cells: Mapping[tuple[int, str], float], outside: Mapping[str, float]) -> BitMap:
    """Layers in their order, columns in that of KINDS."""
    found = dict.fromkeys(title for _, title in cells)
    columns = [c for c in KINDS if c in found] + [c for c in found if c not in KINDS]
    return BitMap(tuple(sorted({layer for layer, _ in cells})), tuple(columns), cells, outside)


def column(name: str, part: str) -> str:
    """The kind of a matrix, from the last word of its name: 'model.layers.0.self_attn.q_proj.weight' is a 'q'."""
    word = _words(name)[-1]
    return next((title for title, (of, names) in KINDS.items() if of == part and word in names), word)


def _words(name: str) -> list[str]:
    words = [w for w in name.split(".") if not w.isdigit()]
    return words[:-1] if len(words) > 1 and words[-1] == "weight" else words


def _means(pieces: Iterable[tuple[Any, int, float]]) -> dict[Any, float]:
    """Bits over weights of all pieces that share a key."""
    weights: dict[Any, int] = {}
    bits: dict[Any, float] = {}
    for key, count, each in pieces:
        weights[key] = weights.get(key, 0) + count
        bits[key] = bits.get(key, 0.0) + count * each
    return {key: bits[key] / weights[key] for key in weights}
