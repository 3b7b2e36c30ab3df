"""Both protocols by hand, losses and divergences against float64, and the figures made of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, FAMILIES, Models, Packed, no_progress
from torch import Tensor

from nashswarm import evaluation
from nashswarm.config import Evaluation, PaperProtocol
from nashswarm.corpora import TokenizedSplit
from nashswarm.evaluation import (
    Losses,
    Original,
    even_shares,
    measure,
    original_head,
    original_outputs,
    paired_interval,
    paper_figures,
    paper_texts,
    quality_figures,
    windows,
)
from nashswarm.intervals import Blocks, bootstrap, draw
from nashswarm.loading import load
from nashswarm.models import load_original
from nashswarm.types import InputError

SETTINGS = Evaluation(context=CONTEXT, batch_tokens=4 * CONTEXT, paper=PaperProtocol(texts=(5, 8), length=16))
pytestmark = pytest.mark.usefixtures("isolated_modes")
PackedModels = Callable[[str, str], Packed]
Splits = Callable[..., TokenizedSplit]


def split_of(*texts: list[int], lengths: list[int] | None = None) -> TokenizedSplit:
    """A split whose single texts are given; all count as long unless said otherwise."""
    ids = np.concatenate([np.array(t, np.int32) for t in texts])
    ends = np.cumsum([len(t) for t in texts])
    return TokenizedSplit(ids, ids, ends, np.array(lengths or [99] * len(texts)))


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([8, 8, 8, 8, 1], 2, [2, 3]),
        ([8, 8, 8, 8, 1], 1, [5]),
        ([8] * 139, 16, [9, 8, 9, 9, 8, 9, 9, 8, 9, 9, 9, 8, 9, 9, 8, 9]),
        ([8, 8, 1], 8, [1, 1, 1]),
        ([100, 1, 1, 1], 2, [1, 3]),
        ([1, 1, 1, 100], 3, [3, 1]),
    ],
)
def test_shares_of_the_text_are_much_the_same(sizes: list[int], count: int, expected: list[int]) -> None:
    found = even_shares(sizes, count)
    assert [i for own in found for i in range(len(sizes))[own]] == list(range(len(sizes)))
    assert [own.stop - own.start for own in found] == expected


def losses_of(mine: list[float], original: list[float], targets: list[int], **changes: Any) -> Losses:
    base = Losses(
        np.array(mine),
        np.array(targets),
        np.array(original),
        kl=np.zeros(sum(targets), np.float32),
        agreement=1.0,
        paper_losses=np.array([1.0]),
        original_paper_losses=np.array([1.0]),
    )
    return dataclasses.replace(base, **changes)


# --- windows and texts, by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "sizes"), [(8, [4, 4]), (10, [4, 4, 2]), (9, [4, 4]), (5, [4]), (4, [4]), (2, [2]), (1, []), (0, [])]
)
def test_windows_do_not_overlap_and_each_has_a_target(count: int, sizes: list[int]) -> None:
    cut = windows(np.arange(count), 4)
    assert [w.size for w in cut] == sizes
    assert np.concatenate([*cut, np.array([], int)]).tolist() == list(range(sum(sizes)))


def test_paper_texts_are_cut_padded_and_filtered() -> None:
    """Longer than 20 characters, exclusive; cut to 4 tokens; padded with 9 on the right, pads masked."""
    split = split_of([1, 2], [3], [4, 5, 6, 7, 8, 1], [2, 2, 2, 2], [5], lengths=[21, 20, 50, 30, 40])
    ids, mask = paper_texts(split, PaperProtocol(texts=(2, 3), length=4), pad=9)
    assert ids.tolist() == [[1, 2, 9, 9], [4, 5, 6, 7], [2, 2, 2, 2]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert ids.dtype == mask.dtype == np.int64


def test_fewer_texts_than_asked_for_are_all_taken() -> None:
    ids, _ = paper_texts(split_of([1], [2, 3]), PaperProtocol(texts=(20,), length=4), pad=0)
    assert ids.tolist() == [[1, 0, 0, 0], [2, 3, 0, 0]]


def test_no_text_that_is_long_enough_is_an_error() -> None:
    with pytest.raises(InputError, match="no text is longer than 20 characters"):
        paper_texts(split_of([1], lengths=[20]), PaperProtocol(), pad=0)


def test_paper_losses_by_hand() -> None:
    """Text 0 1, padded with EOS = 2: targets 1 2 2 after 0 1 2. Text 1 1 0 0 0 1: cut, targets 1 0 0 after 1 1 0."""
    rows = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75]]).log() + 7
    texts, _ = paper_texts(split_of([0, 1], [1, 1, 0, 0, 0, 1]), PaperProtocol(texts=(2,), length=4), pad=2)
    found = np.array([evaluation._text_loss(rows[ids], ids) for ids in torch.from_numpy(texts)])
    padded = -(math.log(0.25) + math.log(0.25) + math.log(0.75)) / 3
    cut = -(math.log(0.5) + math.log(0.25) + math.log(0.5)) / 3
    assert found == pytest.approx([padded, cut], rel=1e-6)
    figures = paper_figures(
        losses_of([1], [1], [1], paper_losses=found, original_paper_losses=np.array([1.0, 1.0])),
        paper(texts=(2,)),
    )
    mean = (padded + cut) / 2
    assert figures["loss"] == pytest.approx(mean, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert figures["delta_loss_percent"] == pytest.approx(100 * (mean - 1), rel=1e-5)


@pytest.fixture
def short_of_eos(quantizable: Models, split: Splits) -> Callable[[object], np.ndarray]:
    """eos_token_id of the config -> the losses of texts that are padded with it."""
    model, texts = quantizable("gpt2"), split("gpt2")

    def losses(eos: object) -> np.ndarray:
        original = load_original(model.checkpoint.directory, model.index)
        original.config.eos_token_id = eos
        return original_outputs(lambda: original, texts, SETTINGS, CONTEXT, no_progress).paper_losses

    return losses


def test_the_first_of_several_eos_tokens_pads(short_of_eos: Callable[[object], np.ndarray]) -> None:
    first, other = short_of_eos(2), short_of_eos(7)
    assert np.array_equal(short_of_eos([2, 7]), first)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("eos", [None, []])
def test_a_model_without_eos_is_an_error(eos: object, short_of_eos: Callable[[object], np.ndarray]) -> None:
    with pytest.raises(InputError, match="no eos_token_id; the paper's protocol pads with it"):
        short_of_eos(eos)


@pytest.mark.parametrize("family", FAMILIES)
def test_paper_losses_are_transformers_own(family: str, quantizable: Models, split: Splits) -> None:
    """The paper calls model(ids, attention_mask, labels=ids).loss; float32 there, so 1e-6 of 6 nats."""
    model, texts = load_original(quantizable(family).checkpoint.directory, quantizable(family).index), split(family)
    ids, mask = paper_texts(texts, SETTINGS.paper, pad=0)
    assert 0 in mask
    expected = []
    for row, seen in zip(torch.from_numpy(ids), torch.from_numpy(mask), strict=True):
        with torch.inference_mode():
            expected.append(float(model(row[None], attention_mask=seen[None], labels=row[None]).loss))
    found = original_outputs(lambda: model, texts, SETTINGS, CONTEXT, no_progress).paper_losses
    assert found == pytest.approx(expected, abs=6e-6)


def paper(**settings: Any) -> Evaluation:
    return dataclasses.replace(SETTINGS, paper=PaperProtocol(**settings))


def test_counts_beyond_the_texts_are_left_out() -> None:
    losses = losses_of([1], [1], [1], paper_losses=np.array([1.0, 2, 3]), original_paper_losses=np.array([1.0, 1, 1]))
    figures = paper_figures(losses, paper(texts=(2, 3, 4)))
    assert (figures["texts"], figures["loss"], figures["delta_loss_percent"]) == (2, 1.5, 50.0)
    assert {n: row["loss"] for n, row in figures["by_count"].items()} == {"2": 1.5, "3": 2.0}
    few = paper_figures(losses, paper(texts=(20,)))
    assert (few["texts"], few["loss"], few["by_count"]) == (3, 2.0, {})
    every = paper_figures(losses, paper(texts=(2,), all_texts=True))
    assert {n: row["loss"] for n, row in every["by_count"].items()} == {"2": 1.5, "3": 2.0}


def test_a_rise_over_few_texts_has_an_interval() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(0.01, 0.5, 200)
    losses = losses_of([1], [1], [1], paper_losses=5 + differences, original_paper_losses=np.full(200, 5.0))
    rows = paper_figures(losses, paper(texts=(20, 200)))["by_count"]
    for count, row in rows.items():
        low, high = row["delta_loss_percent_ci95"]
        n = int(count)
        assert low < row["delta_loss_percent"] < high
        assert high - low == pytest.approx(100 / 5 * 2 * 1.96 * differences[:n].std() / n**0.5, rel=0.15)
        assert not row["resolved"]


def test_all_texts_are_measured_if_asked(split: Splits) -> None:
    texts = split("gpt2")
    longer = int((texts.text_lengths > 20).sum())
    assert longer > 5
    assert len(paper_texts(texts, PaperProtocol(texts=(5,), length=8), 0)[0]) == 5
    assert len(paper_texts(texts, PaperProtocol(texts=(5,), length=8, all_texts=True), 0)[0]) == longer


# --- against float64 -----------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A quantized model beside its original."""

    original: Any
    quantized: Any
    split: TokenizedSplit
    measured: Callable[..., Losses]  # (model, batch_tokens=...)


@pytest.fixture
def case(request: pytest.FixtureRequest, packed: PackedModels, quantizable: Models, split: Splits) -> Case:
    family = request.param
    model, texts = quantizable(family), split(family)
    original = load_original(model.checkpoint.directory, model.index)
    quantized = load(packed(family, "rtn3-g64").directory)
    head = original_head(model.checkpoint.directory, model.index)

    def measured(which: Any, batch_tokens: int = SETTINGS.batch_tokens) -> Losses:
        settings = dataclasses.replace(SETTINGS, batch_tokens=batch_tokens)
        baseline = original_outputs(lambda: original, texts, settings, CONTEXT, no_progress)
        return measure(lambda: which, lambda: Original(head, baseline), texts, settings, CONTEXT, no_progress)

    return Case(original, quantized, texts, measured)


def log_probabilities(model: Any, ids: np.ndarray) -> Tensor:
    """float64 [targets, vocabulary], by a float64 copy of the model."""
    with torch.inference_mode():
        logits = copy.deepcopy(model).double()(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_losses_and_divergences_equal_float64s(case: Case) -> None:
    """float32 rounds logits of about 10 to 1e-6; the mean over a thousand targets is better than one of them."""
    losses = case.measured(case.quantized)
    mine, original, kl, agreed, counts = [], [], [], 0, []
    for window in windows(case.split.ids, CONTEXT):
        targets = torch.from_numpy(window[1:].astype(np.int64))[:, None]
        log_q, log_p = (log_probabilities(m, window) for m in (case.quantized, case.original))
        mine.append(-float(log_q.gather(1, targets).sum()))
        original.append(-float(log_p.gather(1, targets).sum()))
        kl.append((log_p.exp() * (log_p - log_q)).sum(1).numpy())
        agreed += int((log_q.argmax(1) == log_p.argmax(1)).sum())
        counts.append(len(targets))
    total = sum(counts)
    assert losses.window_targets.tolist() == counts
    assert losses.window_losses.sum() / total == pytest.approx(sum(mine) / total, abs=1e-6)
    assert losses.original_window_losses.sum() / total == pytest.approx(sum(original) / total, abs=1e-6)
    assert losses.window_losses == pytest.approx(np.array(mine), rel=1e-5)
    assert losses.kl == pytest.approx(np.concatenate(kl), abs=1e-5)
    assert losses.kl.mean(dtype=np.float64) == pytest.approx(np.concatenate(kl).mean(), rel=1e-5)
    assert losses.kl.mean() > 1e-3, "3 bits must be felt, or this test sees nothing"
    assert losses.agreement == pytest.approx(agreed / total, abs=1.5 / total)  # a tie within rounding may go either way
    assert losses.agreement < 1


@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_losses_do_not_depend_on_the_batch(case: Case) -> None:
    whole = case.measured(case.quantized, 1000 * CONTEXT)
    for batch_tokens in (1, 3 * CONTEXT):
        parts = case.measured(case.quantized, batch_tokens)
        for name in ("window_losses", "original_window_losses"):
            per_token = [getattr(x, name).sum() / x.window_targets.sum() for x in (whole, parts)]
            assert per_token[0] == pytest.approx(per_token[1], abs=1e-6)
        assert whole.kl.mean() == pytest.approx(parts.kl.mean(), abs=1e-6)
        assert whole.paper_losses == pytest.approx(parts.paper_losses, abs=6e-6)


@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_a_model_does_not_differ_from_itself(case: Case) -> None:
    losses = case.measured(case.original)
    assert np.array_equal(losses.window_losses, losses.original_window_losses)
    assert np.array_equal(losses.paper_losses, losses.original_paper_losses)
    assert not losses.kl.any()
    figures = quality_figures(losses, SETTINGS)
    assert (figures["delta_loss"], figures["delta_loss_ci95"], figures["delta_loss_percent"]) == (0, [0, 0], 0)
    assert (figures["kl_mean"], figures["kl_p99"], figures["top1_agreement"]) == (0, 0, 1)
    assert figures["resolved"]
    assert paper_figures(losses, SETTINGS)["delta_loss_percent"] == 0


@pytest.mark.parametrize("rest", [0, 1, 2, 31])
def test_a_rest_of_any_length_is_measured_alike(rest: int, quantizable: Models, split: Splits) -> None:
    """A rest of one token has no target and is dropped on both sides.

    Products of few rows follow the operands' alignment in memory, so a model equals itself only if both sides have it.
    """
    model = quantizable("gpt2")
    original = load_original(model.checkpoint.directory, model.index)
    texts = dataclasses.replace(split("gpt2"), ids=split("gpt2").ids[: 3 * CONTEXT + rest])
    baseline = original_outputs(lambda: original, texts, SETTINGS, CONTEXT, no_progress)
    assert len(baseline.hidden) == 3 * CONTEXT + (rest if rest > 1 else 0)
    head = original_head(model.checkpoint.directory, model.index)
    losses = measure(lambda: original, lambda: Original(head, baseline), texts, SETTINGS, CONTEXT, no_progress)
    assert losses.window_targets.tolist() == [CONTEXT - 1] * 3 + ([rest - 1] if rest > 1 else [])
    assert not losses.kl.any()


def test_measuring_leaves_gradients_as_they_were(quantizable: Models, split: Splits) -> None:
    model, texts = quantizable("gpt2"), split("gpt2")
    original = load_original(model.checkpoint.directory, model.index)
    baseline = original_outputs(lambda: original, texts, SETTINGS, CONTEXT, no_progress)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    head = original_head(model.checkpoint.directory, model.index)
    measure(lambda: original, lambda: Original(head, baseline), texts, SETTINGS, CONTEXT, no_progress)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_hidden_states_make_the_models_logits(quantizable: Models, split: Splits) -> None:
    model = quantizable("opt")
    original = load_original(model.checkpoint.directory, model.index)
    head = original_head(model.checkpoint.directory, model.index)
    ids = split("opt").ids[: 2 * CONTEXT]
    settings = dataclasses.replace(SETTINGS, batch_tokens=2 * CONTEXT)
    texts = dataclasses.replace(split("opt"), ids=ids)
    hidden = original_outputs(lambda: original, texts, settings, CONTEXT, no_progress).hidden
    with torch.inference_mode():
        logits = original(torch.from_numpy(ids.astype(np.int64)).view(2, CONTEXT)).logits
    assert torch.equal(head(torch.from_numpy(hidden).view(2, CONTEXT, -1)), logits)


def test_compare_by_hand() -> None:
    """P = (1/2, 1/4, 1/4), Q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 + 1/4 ln 1/2 = 1/4 ln 2; then a row where both agree."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log() + 3
    loss, kl, same, original = evaluation._compare(q, p, torch.tensor([0, 1]))
    assert loss == pytest.approx(math.log(4) - math.log(0.8), rel=1e-6)
    assert original == pytest.approx(math.log(2) - math.log(0.8), rel=1e-6)
    assert kl == pytest.approx([math.log(2) / 4, 0], abs=1e-7)
    assert same == 1


# --- intervals and figures -----------------------------------------------------------------------------------------


def test_quality_figures_by_hand() -> None:
    kl = np.arange(10, dtype=np.float32) / 10
    figures = quality_figures(losses_of([10, 20], [9, 18], [4, 6], kl=kl, agreement=0.75), SETTINGS)
    assert figures["loss"] == 3.0
    assert figures["perplexity"] == pytest.approx(math.exp(3), rel=1e-5)
    assert figures["tokens"] == 10
    assert figures["delta_loss"] == 0.3
    assert figures["delta_loss_percent"] == pytest.approx(100 * 0.3 / 2.7, rel=1e-5)
    assert figures["kl_mean"] == 0.45
    assert (figures["kl_median"], figures["kl_max"]) == (pytest.approx(0.45), pytest.approx(0.9))
    assert figures["kl_p99"] == pytest.approx(0.891, rel=1e-5)
    assert figures["top1_agreement"] == 0.75


def test_the_interval_is_drawn_by_the_settings() -> None:
    rng = np.random.default_rng(0)
    targets, differences = np.full(50, 31), rng.normal(size=50)
    settings = dataclasses.replace(SETTINGS, block=8, resamples=2000, seed=0)
    losses = losses_of(list(differences), [0.0] * 50, [31] * 50)
    assert paired_interval(losses, settings) == bootstrap(differences, targets, 8, 2000, seed=0)


def test_window_blocks_give_the_interval_between_any_two() -> None:
    """As good as windows: six digits of each block's sum are kept, so bounds agree to about as many."""
    rng = np.random.default_rng(0)
    targets, original = rng.integers(20, 60, 100), rng.normal(90, 9, 100)
    models = [original + targets * rng.normal(rise, 0.1, 100) for rise in (0.05, 0.08)]
    settings = dataclasses.replace(SETTINGS, block=8)
    ours, theirs = (
        quality_figures(losses_of(list(m), list(original), list(targets)), settings)["window_blocks"] for m in models
    )
    assert ours["targets"] == theirs["targets"] == np.add.reduceat(targets, np.arange(0, 100, 8)).tolist()
    rises = np.array(ours["rises"]) - np.array(theirs["rises"])
    found = draw(Blocks(rises, np.array(ours["targets"])), settings.resamples, settings.seed)
    expected = bootstrap(models[0] - models[1], targets, 8, settings.resamples, settings.seed)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), rel=1e-4)
    json.dumps([ours, theirs])
