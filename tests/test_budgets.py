"""Budgets through the real steps: bytes, certificates, and losses that fall."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import no_progress

from nashswarm import artifacts, loading, models, packed, quantize, statistics
from nashswarm.config import Scoring, parse_method

BUDGETS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
REFERENCE = Path(__file__).parents[1] / "data/reference"
TOKENS = 4096  # of calibration and of test: enough to tell budgets half a bit apart


def scored(directory: Path, ids: np.ndarray, tokens: int, scratch: Path) -> quantize.Model:
    """A model with its statistics, as the stages `download` and `score` leave it."""
    index = models.describe(directory)
    original = models.load_original(directory, index)
    for tensor, found in statistics.gather(lambda: original, index, ids, Scoring(tokens=tokens), no_progress):
        artifacts.write_statistics(scratch, tensor.name, found)
    record = artifacts.SourceRecord(source="embedded", directory=str(directory), id=None, revision=None, files={})
    checkpoint = models.Checkpoint.open(directory, index)
    return quantize.Model("m", index, record, checkpoint, partial(artifacts.read_statistics, scratch))


def bought(model: quantize.Model, ids: np.ndarray, target: Path, **settings: Any) -> tuple[Any, packed.PackedModel]:
    method = parse_method("m", {"allocator": "market", **settings})
    allocation = quantize.allocate(model, method, no_progress)
    quantize.pack(model, method, allocation, ids, target, no_progress)
    return allocation, packed.open_packed(target)


@pytest.mark.scale
def test_every_budget_is_met_and_buys_less_loss(tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(REFERENCE)
    calibration, test = (
        np.array(
            tokenizer((REFERENCE / f"{split}.txt").read_text(encoding="utf-8")[: 8 * TOKENS])["input_ids"], np.int32
        )
        for split in ("calibration", "test")
    )
    model = scored(REFERENCE, calibration, TOKENS, tmp_path)
    original = models.load_original(REFERENCE, model.index)
    windows = torch.from_numpy(test[:TOKENS].astype(np.int64)).view(-1, model.index.context)
    with torch.no_grad():
        truth = original(windows).logits.log_softmax(-1)
    divergences = []
    for budget in BUDGETS:
        allocation, opened = bought(model, calibration, tmp_path / "packed", codec="coded", budget=budget)
        asked = allocation.asked_bytes
        assert 0 <= asked - opened.size.file_bytes <= 0.001 * asked, budget
        assert allocation.largest_deviation_gain <= 1e-3 * allocation.predicted_rise
        assert 0 <= allocation.duality_gap <= 1e-3 * allocation.predicted_rise
        with torch.no_grad():
            found = loading.load(opened.directory)(windows).logits.log_softmax(-1)
        divergences.append(float((truth.exp() * (truth - found)).sum(-1).mean()))
    assert divergences == sorted(divergences, reverse=True)
