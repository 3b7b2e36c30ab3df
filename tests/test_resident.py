"""Models that stay packed in memory: the same logits, the bytes of the payload, ties decoded from one place."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, FAMILIES, METHODS, VOCABULARY, Packed

from nashswarm.loading import load
from nashswarm.packed import PackedModel
from nashswarm.resident import PackedWeight
from nashswarm.types import InputError

PackedModels = Callable[[str, str], Packed]

IDS = torch.arange(2 * CONTEXT).view(2, CONTEXT) * 5 % VOCABULARY


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_dequantized_models(family: str, method: str, packed: PackedModels) -> None:
    directory = packed(family, method).directory
    with torch.inference_mode():
        assert torch.equal(load(directory, resident="packed")(IDS).logits, load(directory)(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_resident_are_the_packed_bytes(family: str, packed: PackedModels) -> None:
    made = packed(family, "rtn4-g64")
    model = load(made.directory, resident="packed")
    own = {id(b): b.nbytes for m in model.modules() if isinstance(m, PackedWeight) for b in m.buffers(recurse=False)}
    assert sum(own.values()) == made.opened.size.matrix_bytes
    assert sum(p.numel() for p in model.parameters()) == sum(v.size for v in made.opened.vectors.values())


def test_another_dtype_leaves_the_packed_bytes_alone(packed: PackedModels) -> None:
    directory = packed("gpt2", "rtn4-g64").directory
    model = load(directory, resident="packed").to(torch.bfloat16)
    expected = load(directory, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert model(IDS).logits.dtype == torch.bfloat16


def test_another_residence_is_refused(packed: PackedModels) -> None:
    with pytest.raises(InputError, match="resident: 'disk'; choose 'dequantized' or 'packed'"):
        load(packed("gpt2", "rtn4-g64").directory, resident="disk")  # type: ignore[arg-type]


def test_a_matrix_is_in_memory_once(packed: PackedModels, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(packed("gpt2", "market-tiles-3_25").directory, tmp_path / "own"))
    model = load(directory, resident="packed")
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is PackedModel and o.directory == directory]
    assert all(not m.packed.arrays for m in model.modules() if isinstance(m, PackedWeight))
