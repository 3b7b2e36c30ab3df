"""Estimates before a run: they grow with what they follow, and say what to lower where it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FAMILIES, Checkpoints

from nashswarm import preflight
from nashswarm.config import Scoring, parse_method
from nashswarm.models import describe
from nashswarm.preflight import GIB, Need
from nashswarm.types import ModelIndex, NashSwarmError

SCORING = Scoring(tokens=32_768)
CODED = parse_method("mine", {"allocator": "market", "codec": "coded", "budget": 3.0})


@pytest.fixture
def index(checkpoint: Checkpoints) -> Callable[[str], ModelIndex]:
    return lambda family: describe(checkpoint(family))


def grown(index: ModelIndex, factor: int) -> ModelIndex:
    """The same model, that many times as wide."""
    tensors = tuple(dataclasses.replace(t, shape=(t.shape[0] * factor, t.shape[1] * factor)) for t in index.tensors)
    return dataclasses.replace(index, tensors=tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_of_anything_needs_more(family: str, index: Callable[[str], ModelIndex]) -> None:
    small, large = index(family), grown(index(family), 20)
    for one, other in zip(*(preflight.needs(i, CODED, SCORING, 1e-6) for i in (small, large)), strict=True):
        assert one.step == other.step
        assert one.memory < other.memory
        assert one.disk < other.disk
    few, many = (preflight.scoring_need(large, Scoring(tokens=t), 1e-6) for t in (4096, 65_536))
    assert few.memory < many.memory
    assert few.seconds < many.seconds


def test_blocks_are_counted_once(index: Callable[[str], ModelIndex]) -> None:
    """They are streamed: a model of a hundred layers needs no more memory for them than one of two."""
    model = index("llama")
    inside = [t for t in model.tensors if t.layer is not None]
    more = tuple(dataclasses.replace(t, layer=(t.layer or 0) + 2) for t in inside)
    deep = dataclasses.replace(model, layers=4, tensors=(*model.tensors, *more))
    assert preflight.scoring_need(deep, SCORING).memory == preflight.scoring_need(model, SCORING).memory
    assert preflight.scoring_need(deep, SCORING).disk > preflight.scoring_need(model, SCORING).disk


def test_what_writes_nothing_needs_no_room(index: Callable[[str], ModelIndex]) -> None:
    large = grown(index("gpt2"), 20)
    blocks = ({"codec": "source", "bits": 32}, {"allocator": "uniform", "codec": "grouped", "bits": 4})
    found, other = (preflight.packing_need(large, parse_method("mine", block)) for block in blocks)
    assert found.disk == 0
    assert found.memory < other.memory


def test_what_does_not_fit_is_named_with_what_to_lower(tmp_path: Path) -> None:
    fits = Need("score", 0, 0, 1.0, "scoring.batch_tokens")
    preflight.check([fits], tmp_path / "not/there/yet")
    large = dataclasses.replace(fits, memory=2**60)
    with pytest.raises(
        NashSwarmError, match=r"score needs about 1073741824\.0 GiB of memory .* lower scoring\.batch_tok"
    ):
        preflight.check([fits, large], tmp_path)
    wide = dataclasses.replace(fits, disk=2**60)
    with pytest.raises(NashSwarmError, match=r"score writes about 1073741824\.0 GiB to .*; make room"):
        preflight.check([wide], tmp_path)


def test_the_settings_own_name_is_said(index: Callable[[str], ModelIndex]) -> None:
    assert preflight.packing_need(index("gpt2"), CODED).lower == "methods.mine.prefix_tokens"
    assert str(preflight.scoring_need(index("gpt2"), SCORING)).startswith("score: about 0.8 GiB of memory, 0.0 GiB")


def test_training_all_codes_asks_for_the_whole_model(index: Callable[[str], ModelIndex]) -> None:
    """Several times over, where all else is done a block at a time; and for time by its steps."""
    large = grown(index("llama"), 40)
    few, many = (dataclasses.replace(CODED.codec_settings, tuning_steps=n) for n in (10, 1000))
    plain, short, long = (
        preflight.packing_need(large, dataclasses.replace(CODED, codec_settings=settings), 0, 1e-6)
        for settings in (CODED.codec_settings, few, many)
    )
    assert plain.memory + 16 * large.parameters < short.memory == long.memory
    assert plain.seconds < short.seconds < long.seconds / 20
    assert short.lower == "methods.mine.tuning_steps to 0 (off)"
    assert plain.disk == short.disk


@pytest.mark.scale
def test_estimates_are_near_what_was_measured() -> None:
    """GPT-2 124M, as `make benchmark` found it; see docs/decisions.md."""
    import tempfile

    from transformers import GPT2Config, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as scratch:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(scratch)
        model = describe(Path(scratch))
    needs = {n.step: n for n in preflight.needs(model, CODED, SCORING, preflight.token_seconds(model))}
    assert 2.5 * GIB < max(n.memory for n in needs.values()) < 6 * GIB
