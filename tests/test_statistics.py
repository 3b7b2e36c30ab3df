"""Second moments, Fisher information and lookups against a direct computation with autograd on the whole model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, FAMILIES, VOCABULARY, Checkpoints, no_progress
from torch import Tensor
from torch.nn import functional

from nashswarm import artifacts
from nashswarm import statistics as stats
from nashswarm.config import Scoring
from nashswarm.corpora import TokenizedSplit
from nashswarm.models import describe, load_original, load_streamed
from nashswarm.statistics import FREQUENCY_PRIOR, gather
from nashswarm.types import InputError, ModelIndex, NashSwarmError, Statistics

WINDOWS = 6
SCORING = Scoring(tokens=WINDOWS * CONTEXT + 5, batch_tokens=WINDOWS * CONTEXT, seed=3)
# float32 forward and backward passes of two blocks against float64 ones: a few hundred roundings of 6e-8 each, most
# of them cancelling; entries that are sums with cancellation are held against the largest entry of their array.
TOLERANCE = 2e-5

Splits = Callable[..., TokenizedSplit]


def run(directory: Path, ids: np.ndarray, scoring: Scoring = SCORING) -> dict[str, Statistics]:
    index = describe(directory)
    found = gather(partial(load_streamed, directory, index), index, ids, scoring, no_progress)
    return {tensor.name: statistics for tensor, statistics in found}


@dataclasses.dataclass
class Direct:
    """Sums over all tokens, float64, straight from the definitions."""

    second: dict[str, Tensor]
    fisher: dict[str, Tensor]
    lookup: dict[str, Tensor]  # of the gradients of looked-up values
    counts: dict[str, Tensor]


def directly(directory: Path, ids: np.ndarray) -> tuple[ModelIndex, Direct]:
    """One pass of the whole model in float64, hooks on every module that owns a matrix."""
    index = describe(directory)
    model = load_original(directory, index)
    windows = torch.from_numpy(ids[: WINDOWS * CONTEXT].astype(np.int64)).view(WINDOWS, CONTEXT)
    (batch,) = np.random.SeedSequence(SCORING.seed).spawn(1)
    with torch.no_grad():  # labels are drawn from the float32 model's probabilities
        sums = model(windows).logits.flatten(0, 1).softmax(-1).double().cumsum(1)
    passed = sums > torch.from_numpy(np.random.default_rng(batch).random(len(sums)))[:, None] * sums[:, -1:]
    drawn = passed.int().argmax(1)  # the first
    model = copy.deepcopy(model).double().requires_grad_(True)
    canonical = {id(model.get_parameter(t.name)): t.name for t in index.tensors}
    found = Direct({}, {}, {}, {})

    def watch(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        name = canonical[id(module.weight)]
        if isinstance(module, torch.nn.Embedding):
            output.register_hook(lambda g: found.lookup.update({name: g.flatten(0, -2).T @ g.flatten(0, -2)}))
            return
        x = args[0].detach().flatten(0, -2)
        found.second[name] = x.T @ x
        output.register_hook(lambda g: found.fisher.update({name: g.flatten(0, -2).square().sum(0)}))

    for module in model.modules():
        if id(getattr(module, "weight", None)) in canonical:
            module.register_forward_hook(watch)
    logits = model(windows).logits.flatten(0, 1)
    functional.cross_entropy(logits, drawn, reduction="sum").backward()
    p = logits.detach().softmax(-1)
    found.fisher[index.head] = (p * (1 - p)).sum(0)  # the expectation over labels, not the draw
    positions = torch.zeros(0)
    for tensor in index.tensors:
        if tensor.kind == "embedding" and tensor.shape[0] == VOCABULARY:
            found.counts[tensor.name] = torch.bincount(windows.flatten(), minlength=VOCABULARY).double()
        elif tensor.kind == "embedding":  # positions; OPT's begin at row 2
            positions = torch.zeros(tensor.shape[0], dtype=torch.float64)
            positions[tensor.shape[0] - CONTEXT :] = WINDOWS
            found.counts[tensor.name] = positions
    return index, found


def close(found: np.ndarray | None, expected: Tensor) -> None:
    assert found is not None
    assert found.dtype == np.float32
    wanted = expected.numpy()
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=TOLERANCE * np.abs(wanted).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_a_direct_computation(family: str, checkpoint: Checkpoints, split: Splits) -> None:
    ids = split(family).ids
    found = run(checkpoint(family), ids)
    index, expected = directly(checkpoint(family), ids)
    tokens = WINDOWS * CONTEXT
    assert found.keys() == {t.name for t in index.tensors}
    for tensor in index.tensors:
        statistics = found[tensor.name]
        projects = tensor.kind != "embedding" or tensor.name == index.head
        assert (statistics.second_moment is not None) == (statistics.fisher is not None) == projects
        if projects:
            assert tensor.shape == (len(expected.fisher[tensor.name]), len(expected.second[tensor.name]))
            close(statistics.second_moment, expected.second[tensor.name] / tokens)
            close(statistics.fisher, expected.fisher[tensor.name] / tokens)
        looked_up = tensor.kind == "embedding"
        assert (statistics.frequency is not None) == (statistics.lookup_moment is not None) == looked_up
        if looked_up:
            close(statistics.frequency, (expected.counts[tensor.name] + FREQUENCY_PRIOR) / tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_lookup_moment_is_that_of_the_looked_up_values(family: str, checkpoint: Checkpoints, split: Splits) -> None:
    """For the tokens' table; the positions' values are added once for each window, so their gradients are alike."""
    ids = split(family).ids
    found = run(checkpoint(family), ids)
    index, expected = directly(checkpoint(family), ids)
    for tensor in index.tensors:
        if tensor.kind == "embedding" and tensor.shape[0] == VOCABULARY:
            close(found[tensor.name].lookup_moment, expected.lookup[tensor.name] / (WINDOWS * CONTEXT))


def test_opts_positions_are_counted_in_their_own_rows(checkpoint: Checkpoints, split: Splits) -> None:
    """Rows 0 and 1 are never looked up, whatever the module's own arguments say; each other row once a window."""
    frequency = run(checkpoint("opt"), split("opt").ids)["model.decoder.embed_positions.weight"].frequency
    assert frequency is not None
    tokens = WINDOWS * CONTEXT
    assert frequency[:2] == pytest.approx(FREQUENCY_PRIOR / tokens)
    assert frequency[2:] == pytest.approx((WINDOWS + FREQUENCY_PRIOR) / tokens)


def test_a_tied_table_has_both_uses(checkpoint: Checkpoints, split: Splits) -> None:
    found = run(checkpoint("gpt2"), split("gpt2").ids)["transformer.wte.weight"]
    missing = {f.name for f in dataclasses.fields(found) if getattr(found, f.name) is None}
    assert missing == {"gradient_moment"}  # a vocabulary squared is too large


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_do_not_matter_beyond_rounding(
    family: str, checkpoint: Checkpoints, split: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the labels that are drawn, by which Fisher information differs by tens of percent: here they are not."""
    monkeypatch.setattr(stats, "_labels", lambda p, *_: p.argmax(-1))
    ids = split(family).ids
    whole = run(checkpoint(family), ids)
    for batch_tokens in (1, 2 * CONTEXT, 4 * CONTEXT + 1):
        parts = run(checkpoint(family), ids, dataclasses.replace(SCORING, batch_tokens=batch_tokens))
        for name, statistics in whole.items():
            for field in dataclasses.fields(statistics):
                one, other = getattr(statistics, field.name), getattr(parts[name], field.name)
                if one is not None:
                    message = f"{name}.{field.name} at {batch_tokens} tokens a batch"
                    scale = np.abs(one).max()
                    np.testing.assert_allclose(other, one, rtol=1e-3, atol=TOLERANCE * scale, err_msg=message)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_passes_make_nearly_the_same_sums(family: str, checkpoint: Checkpoints, split: Splits) -> None:
    directory, ids = checkpoint(family), split(family).ids
    index = describe(directory)
    load = partial(load_streamed, directory, index, dtype="bfloat16")
    exact = run(directory, ids)
    for tensor, found in gather(load, index, ids, SCORING, no_progress):
        ours, theirs = found.second_moment, exact[tensor.name].second_moment
        if ours is not None and theirs is not None:
            assert ours.dtype == np.float32
            gap = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            assert 0 < gap < 0.03, tensor.name


def test_the_seed_decides_the_labels(checkpoint: Checkpoints, split: Splits) -> None:
    directory, ids = checkpoint("gpt2"), split("gpt2").ids
    name = "transformer.h.0.mlp.c_fc.weight"
    one, same = (run(directory, ids)[name] for _ in range(2))
    other = run(directory, ids, dataclasses.replace(SCORING, seed=4))[name]
    assert np.array_equal(one.fisher, same.fisher)  # type: ignore[arg-type]
    assert np.array_equal(one.second_moment, same.second_moment)  # type: ignore[arg-type]
    assert not np.allclose(one.fisher, other.fisher, rtol=1e-3)  # type: ignore[arg-type]
    np.testing.assert_allclose(one.second_moment, other.second_moment, rtol=1e-6)  # type: ignore[arg-type]


def test_batches_draw_their_labels_by_themselves() -> None:
    """Each batch has numbers of its own, whichever were drawn before."""
    p = torch.full((64, 50), 0.02)
    drawn = [stats._labels(p, 3, number) for number in (0, 1, 2)]
    assert len({tuple(labels.tolist()) for labels in drawn}) == 3
    assert torch.equal(stats._labels(p, 3, 1), drawn[1])
    assert not torch.equal(stats._labels(p, 4, 1), drawn[1])


def test_labels_are_drawn_with_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).repeat(30_000, 1)
    drawn = stats._labels(p, 0, 0)
    assert drawn.bincount(minlength=6).div(len(p)).tolist() == pytest.approx(p[0].tolist(), abs=0.01)
    assert not drawn.bincount(minlength=6)[[0, 2, 5]].any()
    assert abs(float(np.corrcoef(drawn[1:], drawn[:-1])[0, 1])) < 0.02
    monkeypatch.setattr(stats, "CUMULATED", 7)
    assert torch.equal(stats._labels(p, 0, 0), drawn)


def test_stripes_cover_every_moment_once(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "STRIPE", 700)  # bytes
    index = describe(checkpoint("gpt2"))
    for layer in range(index.layers + 1):
        rows: dict[tuple[str, str], list[int]] = {}
        for stripe in stats.stripes(index, layer):
            rows.setdefault((stripe.tensor, stripe.moment), []).extend(stripe.rows)
        own = [t for t in index.tensors if t.layer == layer or (layer == index.layers and t.name == index.head)]
        sides = {(t.name, "second"): t.shape[1] for t in own}
        sides |= {(t.name, "fisher" if layer == index.layers else "gradient"): t.shape[0] for t in own}
        assert rows == {place: list(range(side)) for place, side in sides.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_stripes_change_no_byte(
    family: str, checkpoint: Checkpoints, split: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, ids = checkpoint(family), split(family).ids
    scoring = dataclasses.replace(SCORING, batch_tokens=2 * CONTEXT)
    whole = run(directory, ids, scoring)
    monkeypatch.setattr(stats, "STRIPE", 700)
    for name, found in run(directory, ids, scoring).items():
        for field in dataclasses.fields(found):
            one, other = getattr(whole[name], field.name), getattr(found, field.name)
            assert (one is None and other is None) or one.tobytes() == other.tobytes(), (name, field.name)


def test_a_matrix_that_the_index_lacks_is_named(checkpoint: Checkpoints, split: Splits) -> None:
    """As one of another layer: its statistics would be lost."""
    directory, name = checkpoint("llama"), "model.layers.1.mlp.up_proj.weight"
    index = describe(directory)
    moved = tuple(dataclasses.replace(t, layer=0) if t.name == name else t for t in index.tensors)
    wrong = dataclasses.replace(index, tensors=moved)
    with pytest.raises(NashSwarmError, match=rf"^{name}: run where the model's index has no such matrix$"):
        list(gather(lambda: load_original(directory, index), wrong, split("llama").ids, SCORING, no_progress))


def test_tensors_come_head_first_and_blocks_from_last_to_first(checkpoint: Checkpoints, split: Splits) -> None:
    names = list(run(checkpoint("llama"), split("llama").ids))
    assert names[0] == "lm_head.weight"
    assert names[-1] == "model.embed_tokens.weight"
    layers = [int(n.split(".")[2]) for n in names if ".layers." in n]
    assert layers == sorted(layers, reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family: str, checkpoint: Checkpoints, split: Splits) -> None:
    directory = checkpoint(family)
    index = describe(directory)
    model = load_original(directory, index)
    ids = torch.from_numpy(split(family).ids[:CONTEXT].astype(np.int64))[None]
    with torch.no_grad():
        before = model(ids).logits
    list(gather(lambda: model, index, split(family).ids, SCORING, no_progress))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_window_is_enough_where_the_settings_ask_for_less(checkpoint: Checkpoints, split: Splits) -> None:
    ids = split("gpt2").ids[:CONTEXT]
    found = run(checkpoint("gpt2"), ids, Scoring(tokens=64, batch_tokens=1))
    assert found["transformer.wte.weight"].second_moment is not None


@pytest.mark.parametrize("count", [0, 1, CONTEXT - 1])
def test_too_little_text_is_refused(count: int, checkpoint: Checkpoints, split: Splits) -> None:
    with pytest.raises(InputError, match=f"{count} calibration tokens do not fill one window of {CONTEXT}"):
        run(checkpoint("gpt2"), split("gpt2").ids[:count])


def test_a_matrix_that_never_ran_is_named(checkpoint: Checkpoints, split: Splits, monkeypatch: Any) -> None:
    directory = checkpoint("llama")
    index = describe(directory)
    model = load_original(directory, index)
    block = model.get_submodule("model.layers.1.mlp")
    monkeypatch.setattr(block, "forward", lambda x: x)
    with pytest.raises(NashSwarmError, match=r"model\.layers\.1\.mlp\.\w+\.weight: no statistics were gathered"):
        list(gather(lambda: model, index, split("llama").ids, SCORING, no_progress))


# --- interrupted runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 11])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_run_goes_on_behind_its_finished_steps(
    family: str, taken: int, checkpoint: Checkpoints, split: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, ids = checkpoint(family), split(family).ids
    index = describe(directory)
    scoring = dataclasses.replace(SCORING, batch_tokens=2 * CONTEXT)
    expected = run(directory, ids, scoring)
    runs: list[tuple[int, int]] = []
    block = stats._block
    monkeypatch.setattr(stats, "_block", lambda m, at, n, *rest: (runs.append((at, n)), block(m, at, n, *rest))[1])
    journal = artifacts.Journal.of(tmp_path, "scores", ids.tolist(), scoring)
    first = gather(partial(load_streamed, directory, index), index, ids, scoring, no_progress, journal)
    for _ in range(taken):
        next(first, None)
    first.close()
    again = artifacts.Journal.of(tmp_path, "scores", ids.tolist(), scoring)
    found = dict(gather(partial(load_streamed, directory, index), index, ids, scoring, no_progress, again))
    assert sorted(runs) == [(at, n) for at in (0, 1) for n in range(3)]  # each once, in whichever of the two runs
    assert {tensor.name for tensor in found} == expected.keys()
    for tensor, one in found.items():
        for field in dataclasses.fields(one):
            ours, theirs = getattr(one, field.name), getattr(expected[tensor.name], field.name)
            assert (ours is None and theirs is None) or np.array_equal(ours, theirs), (tensor.name, field.name)
    again.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_kept_of_blocks_takes_no_space_twice(
    family: str, checkpoint: Checkpoints, split: Splits, tmp_path: Path
) -> None:
    directory, ids = checkpoint(family), split(family).ids
    index, journal = describe(directory), artifacts.Journal.of(tmp_path / "journal", "scores")
    for tensor, found in gather(partial(load_streamed, directory, index), index, ids, SCORING, no_progress, journal):
        artifacts.write_statistics(tmp_path / "linked", tensor.name, found, journal)
        artifacts.write_statistics(tmp_path / "written", tensor.name, found)
    linked, written = ({p.name: p for p in (tmp_path / at).iterdir()} for at in ("linked", "written"))
    assert {name: p.read_bytes() for name, p in linked.items()} == {name: p.read_bytes() for name, p in written.items()}
    inside = {f"{tensor.name}.safetensors" for tensor in index.tensors if tensor.layer is not None}
    assert {name for name, p in linked.items() if p.stat().st_nlink > 1} == inside
    journal.close()
    assert all(p.stat().st_nlink == 1 for p in linked.values())


def test_a_run_of_other_settings_does_not_go_on(checkpoint: Checkpoints, split: Splits, tmp_path: Path) -> None:
    one = artifacts.Journal.of(tmp_path, "scores", SCORING, {"model.safetensors": "a"})
    one.keep("state", {"layer": np.array(0)})
    assert artifacts.Journal.of(tmp_path, "scores", SCORING, {"model.safetensors": "a"}).read("state") is not None
    other = artifacts.Journal.of(tmp_path, "scores", SCORING, {"model.safetensors": "b"})
    assert other.read("state") is None
    assert not one.directory.exists()
