"""Rows of matrices become a grid, whatever the names of the family."""

from __future__ import annotations

import pytest

from nashswarm import metrics
from nashswarm.bitmap import BitMap, bit_map, column

GPT2 = [
    ["transformer.wte.weight", "embedding", None, 1000, 3.5],
    ["transformer.wpe.weight", "embedding", None, 100, 4.75],
    ["transformer.h.0.attn.c_attn.weight", "attention", 0, 30, 2.0],
    ["transformer.h.0.attn.c_proj.weight", "attention", 0, 10, 2.5],
    ["transformer.h.0.mlp.c_fc.weight", "mlp", 0, 40, 3.0],
    ["transformer.h.0.mlp.c_proj.weight", "mlp", 0, 40, 3.25],
    ["transformer.h.1.attn.c_attn.weight", "attention", 1, 30, 1.0],
]


def test_gpt2_by_hand() -> None:
    assert bit_map(GPT2) == BitMap(
        layers=(0, 1),
        columns=("q, k, v", "attn out", "MLP up", "MLP down"),
        cells={
            (0, "q, k, v"): 2.0,
            (0, "attn out"): 2.5,
            (0, "MLP up"): 3.0,
            (0, "MLP down"): 3.25,
            (1, "q, k, v"): 1.0,
        },
        outside={"wte": 3.5, "wpe": 4.75},
    )


def test_nothing_gives_no_map() -> None:
    assert bit_map([]) is None


@pytest.mark.parametrize(
    ("family", "columns", "outside"),
    [
        ("gpt2", ("q, k, v", "attn out", "MLP up", "MLP down"), {"wte", "wpe"}),
        ("opt", ("q", "k", "v", "attn out", "MLP up", "MLP down"), {"embed_tokens", "embed_positions"}),
        ("llama", ("q", "k", "v", "attn out", "MLP gate", "MLP up", "MLP down"), {"embed_tokens", "lm_head"}),
    ],
)
def test_columns_of_real_models(family: str, columns: tuple[str, ...], outside: set[str], quantizable, packed) -> None:  # type: ignore[no-untyped-def]
    index = quantizable(family).index
    found = bit_map(metrics.tensor_rows(packed(family, "rtn4-g64").opened, index))
    assert found is not None
    assert (found.layers, found.columns, found.outside.keys()) == ((0, 1), columns, outside)
    assert len(found.values()) == len(index.tensors), "no two matrices share a cell"


def test_unknown_names_keep_their_last_word_and_come_last() -> None:
    rows = [["net.4.mixer.odd.weight", "mlp", 4, 8, 2.0], ["net.4.attn.q_proj.weight", "attention", 4, 8, 3.0]]
    assert bit_map(rows) == BitMap((4,), ("q", "odd"), {(4, "odd"): 2.0, (4, "q"): 3.0}, {})
    assert column("weight", "other") == "weight"


def test_experts_share_a_cell_by_weights() -> None:
    rows = [[f"m.layers.0.moe.experts.{e}.w1.weight", "mlp", 0, n, b] for e, n, b in ((0, 10, 2.0), (1, 30, 4.0))]
    assert bit_map(rows) == BitMap((0,), ("MLP gate",), {(0, "MLP gate"): 3.5}, {})
