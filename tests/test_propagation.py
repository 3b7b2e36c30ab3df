"""Aims of matrices behind what is already quantized, on tiny models whose every sum can be computed directly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, FAMILIES, VOCABULARY, Models
from torch import Tensor

from nashswarm import streams
from nashswarm.blocks import batches_of
from nashswarm.models import load_original
from nashswarm.propagation import Propagation
from nashswarm.regression import EDGE, Aim, Sums, lower, lower_size, products, square
from nashswarm.streams import Streams
from nashswarm.types import NashSwarmError, TensorSpec

FREQUENCY = 1 / np.arange(4, VOCABULARY + 4)


def text(windows: int, seed: int) -> np.ndarray:
    """Independent tokens of skewed frequencies, int32."""
    rng = np.random.default_rng(seed)
    return rng.choice(VOCABULARY, windows * CONTEXT, p=FREQUENCY / FREQUENCY.sum()).astype(np.int32)


TEXT, HELD_OUT = text(160, seed=1), text(40, seed=2)


class Walk(Propagation):
    """One whose streams are here."""

    streams: Streams


@pytest.fixture
def walk_of(quantizable: Models) -> Callable[..., Walk]:
    """(family, ids=..., batch_tokens=...) -> a walk over a fresh copy of that tiny model."""

    def make(
        family: str,
        ids: np.ndarray = TEXT[: 40 * CONTEXT],
        batch_tokens: int = 8 * CONTEXT,
        edit: Callable[[Any], None] = lambda model: None,
    ) -> Propagation:
        model = quantizable(family)
        loaded = load_original(model.checkpoint.directory, model.index)
        edit(loaded)
        made = Streams.prepare(loaded, model.index, ids, 10**9, batch_tokens)
        made.start()
        return Walk(made)

    return make


def weight_of(walk: Walk, tensor: TensorSpec) -> Tensor:
    """As the model holds it now, canonical, a copy."""
    weight = walk.streams.model.get_parameter(tensor.name).detach()
    return (weight.T if tensor.kind == "conv1d" else weight).clone()


def coarse(weight: Tensor, step: float = 0.6) -> Tensor:
    """Rounded to a grid of `step` standard deviations: about 1.5 to 3 bits."""
    width = step * weight.std()
    return (weight / width).round() * width


def take(walk: Walk, tensor: TensorSpec, rounding: Callable[[Tensor], Tensor]) -> Aim:
    """Aim, round and settle one matrix."""
    aim = walk.aim(tensor, weight_of(walk, tensor))
    walk.settle(tensor, rounding(aim.weight))
    return aim


def exact(weight: Tensor) -> Tensor:
    return weight


def biases(walk: Walk) -> dict[str, Tensor]:
    return {v.name: walk.streams.model.get_parameter(v.name).detach().clone() for v in walk.streams.index.vectors}


@torch.no_grad()
def final_states(walk: Walk, ids: np.ndarray) -> Tensor:
    windows = torch.from_numpy(ids.astype(np.int64)).view(-1, CONTEXT)
    found: Tensor = walk.streams.model.base_model(windows, use_cache=False).last_hidden_state
    return found


@torch.no_grad()
def inputs_of(walk: Walk, tensor: TensorSpec) -> Tensor:
    """What a matrix really gets on the calibration text in the model as it is now, float64 [tokens, in]."""
    module, found = walk.streams.model.get_submodule(tensor.name.rpartition(".")[0]), []
    if tensor.layer is None:
        module = walk.streams.model.get_output_embeddings()
    handle = module.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0].flatten(0, -2)))
    walk.streams.model(walk.streams.windows, use_cache=False)
    handle.remove()
    return torch.cat(found).double()


def has_bias(walk: Walk, tensor: TensorSpec) -> bool:
    return getattr(walk.streams.model.get_submodule(tensor.name.rpartition(".")[0]), "bias", None) is not None


# --- the order of things -------------------------------------------------------------------------------------------

ORDERS = {
    "gpt2": (
        ["transformer.wte.weight", "transformer.wpe.weight"],
        [f"transformer.h.{{}}.{m}.weight" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
        [],
    ),
    "opt": (
        ["model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"],
        [f"model.decoder.layers.{{}}.self_attn.{m}_proj.weight" for m in ("q", "k", "v", "out")]
        + [f"model.decoder.layers.{{}}.{m}.weight" for m in ("fc1", "fc2")],
        [],
    ),
    "llama": (
        ["model.embed_tokens.weight"],
        [f"model.layers.{{}}.self_attn.{m}_proj.weight" for m in "qkvo"]
        + [f"model.layers.{{}}.mlp.{m}_proj.weight" for m in ("gate", "up", "down")],
        ["lm_head.weight"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_come_as_the_model_runs_them(family: str, walk_of: Callable[..., Walk]) -> None:
    walk = walk_of(family)
    first, block, last = ORDERS[family]
    middle = [name.format(layer) for layer in range(walk.streams.index.layers) for name in block]
    assert [t.name for t in walk.order()] == [*first, *middle, *last]
    assert sorted(t.name for t in walk.order()) == sorted(t.name for t in walk.streams.index.tensors)


# --- nothing lost, nothing to make up for --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_the_original_every_matrix_aims_at_itself(family: str, walk_of: Callable[..., Walk]) -> None:
    walk = walk_of(family)
    before, states = biases(walk), final_states(walk, HELD_OUT)
    for tensor in walk.order():
        weight = weight_of(walk, tensor)
        aim = take(walk, tensor, lambda _, own=weight: own)
        assert float((aim.weight - weight).norm()) <= 1e-4 * float(weight.norm()), tensor.name
    for name, value in biases(walk).items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final_states(walk, HELD_OUT), states, rtol=1e-3, atol=1e-3)


def test_tables_aim_at_themselves_whatever_came_before(walk_of: Callable[..., Walk]) -> None:
    walk = walk_of("gpt2")
    for tensor in walk.order()[:2]:
        weight = weight_of(walk, tensor)
        aim = take(walk, tensor, coarse)
        assert torch.equal(aim.weight, weight)
        assert aim.second_moment is None


# --- less error ----------------------------------------------------------------------------------------------------


def errors_after(
    make: Callable[..., Walk], family: str, rounding: Callable[[TensorSpec], Callable[[Tensor], Tensor]]
) -> dict[str, list[float]]:
    """Mean squared errors of final hidden states on calibration and on other text: with aims, and without."""
    found: dict[str, list[float]] = {}
    for aimed in (True, False):
        walk = make(family, TEXT)
        texts = TEXT[: 40 * CONTEXT], HELD_OUT
        before = [final_states(walk, ids) for ids in texts]
        for tensor in walk.order():
            weight = weight_of(walk, tensor)
            if aimed:
                weight = walk.aim(tensor, weight).weight
            walk.settle(tensor, rounding(tensor)(weight))
        found["aimed" if aimed else "plain"] = [
            float((final_states(walk, ids) - states).square().mean()) for ids, states in zip(texts, before, strict=True)
        ]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_exact_makes_up_for_what_was_rounded(family: str, walk_of: Callable[..., Walk]) -> None:
    """Embeddings and the first block are coarse, the second block is free: its outputs come nearer, on any text."""
    found = errors_after(walk_of, family, lambda t: exact if t.layer == 1 else coarse)
    for aimed, plain in zip(found["aimed"], found["plain"], strict=True):
        assert aimed < 0.95 * plain


@pytest.mark.parametrize("family", FAMILIES)
def test_aims_pay_where_every_matrix_is_coarse(family: str, walk_of: Callable[..., Walk]) -> None:
    found = errors_after(walk_of, family, lambda _: coarse)
    for aimed, plain in zip(found["aimed"], found["plain"], strict=True):
        assert aimed < plain


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blocks_output_comes_nearer(family: str, walk_of: Callable[..., Walk]) -> None:
    """The last matrix of the first block, alone, behind coarse ones: what it writes is what the stream lacked."""
    errors = []
    for aimed in (True, False):
        walk = walk_of(family, TEXT)
        inside = [t for t in walk.order() if t.layer == 0]
        for tensor in walk.order()[: walk.order().index(inside[-1])]:
            walk.settle(tensor, coarse(weight_of(walk, tensor)))
        last = inside[-1]
        if aimed:
            take(walk, last, exact)
        else:
            walk.aim(inside[0], weight_of(walk, inside[0]))  # enters the block, nothing else
        outputs = [walk.streams.run(0, n, hidden) for n, hidden in enumerate(walk.streams.embedded())]
        errors.append(sum(float((a - b).square().mean()) for a, b in zip(outputs, walk.streams._outputs, strict=True)))
    assert errors[0] < 0.9 * errors[1]


# --- biases and moments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_modules_own_bias_moves(family: str, walk_of: Callable[..., Walk]) -> None:
    walk = walk_of(family)
    for tensor in walk.order():
        before = biases(walk)
        take(walk, tensor, coarse)
        moved = {n for n, value in biases(walk).items() if not torch.equal(value, before[n])}
        owner = tensor.name.rpartition(".")[0]
        assert moved == ({f"{owner}.bias"} if has_bias(walk, tensor) else set()), tensor.name


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_bias_takes_up_the_mean_of_the_rounding_error(family: str, walk_of: Callable[..., Walk]) -> None:
    """Over the calibration text the rounded module's mean output is what the aimed one's would have been."""
    walk = walk_of(family)
    for tensor in walk.order():
        weight = weight_of(walk, tensor)
        if not has_bias(walk, tensor):
            walk.settle(tensor, coarse(weight))
            continue
        aim = walk.aim(tensor, weight)
        bias = walk.streams.model.get_parameter(tensor.name.removesuffix("weight") + "bias")
        shifted = bias + walk._corrections[tensor.name].shift
        wanted = inputs_of(walk, tensor).mean(0) @ aim.weight.double().T + shifted.double()
        walk.settle(tensor, coarse(aim.weight))
        found = inputs_of(walk, tensor).mean(0) @ weight_of(walk, tensor).double().T + bias.double()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_tokens", [CONTEXT, 7 * CONTEXT, 10**6])
@pytest.mark.parametrize("family", FAMILIES)
def test_second_moments_are_of_the_inputs_behind_the_quantized_prefix(
    family: str, batch_tokens: int, walk_of: Callable[..., Walk]
) -> None:
    """About the mean where a bias can follow."""
    walk = walk_of(family, TEXT[: 20 * CONTEXT], batch_tokens)
    for tensor in walk.order():
        aim = walk.aim(tensor, weight_of(walk, tensor))
        if aim.second_moment is not None:
            x = inputs_of(walk, tensor)
            if has_bias(walk, tensor):
                x = x - x.mean(0)
            expected = (x.T @ x / len(x)).numpy()
            scale = np.abs(expected).max()
            np.testing.assert_allclose(aim.second_moment, expected, atol=2e-4 * scale, rtol=0, err_msg=tensor.name)
        else:
            assert tensor.kind == "embedding"
        walk.settle(tensor, coarse(aim.weight))


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_do_not_matter(family: str, walk_of: Callable[..., Walk]) -> None:
    """Not even to cross-validation: folds are every other window, wherever batches end."""
    runs = []
    for windows in (1, 3, 12):
        walk = walk_of(family, TEXT[: 12 * CONTEXT], windows * CONTEXT)
        for tensor in walk.order()[:4]:
            walk.settle(tensor, coarse(weight_of(walk, tensor)))
        rest = next(t for t in walk.order()[4:] if t.kind != "embedding")
        runs.append(walk.aim(rest, weight_of(walk, rest)).weight)
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-3, atol=1e-4)


# --- folds and sums ---------------------------------------------------------------------------------------------------


def folds_of(streams: Streams) -> list[int]:
    """Of every window."""
    found = [torch.full((len(hidden),), -1) for hidden in streams.original]
    for number, own in enumerate(found):
        for fold, windows in streams._folds(number):
            own[windows] = fold
    return torch.cat(found).tolist()


@pytest.mark.parametrize("batch_tokens", [CONTEXT, 3 * CONTEXT, 10**6])
def test_folds_are_runs_of_text_in_turn(
    batch_tokens: int, walk_of: Callable[..., Walk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "FOLDED", 4 * CONTEXT)
    whole = walk_of("gpt2", TEXT[: 10 * CONTEXT], batch_tokens).streams
    assert folds_of(whole) == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert folds_of(walk_of("gpt2", TEXT[: 3 * CONTEXT], batch_tokens).streams) == [0, 1, 0]  # half of all, at most
    assert folds_of(walk_of("gpt2", TEXT[:CONTEXT], batch_tokens).streams) == [0]


@pytest.mark.parametrize("batch_tokens", [CONTEXT, 3 * CONTEXT])
def test_a_part_of_the_windows_is_of_the_same_folds(batch_tokens: int, walk_of: Callable[..., Walk]) -> None:
    whole = walk_of("gpt2", TEXT[: 13 * CONTEXT], batch_tokens).streams
    parts = []
    for own in batches_of(len(whole.batches()), 2):
        batches = whole.batches()[own]
        part = replace(whole, windows=whole.windows[batches[0].start : batches[-1].stop], first=own.start)
        part.start()
        parts += folds_of(part)
    assert parts == folds_of(whole)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_a_moment_is_the_square_of_its_lower_part(size: int) -> None:
    x = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    flat = lower(x)
    assert flat.shape == (lower_size(size),)
    assert len(flat) <= size * (size + EDGE) / 2
    moment, mean = x.T.double() @ x.double() / 40, x.mean(0).double()
    for centered, expected in ((False, moment), (True, moment - mean.outer(mean))):
        for dtype in (torch.float32, torch.float64):
            found = square(flat.double(), 40, mean, centered, dtype)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found, found.T, rtol=1e-6, atol=1e-6)


# --- how much is believed ------------------------------------------------------------------------------------------


def sums_of(x: Tensor, original: Tensor, lacking: Tensor | None, weight: Tensor) -> Sums:
    """Every other window, [windows, context, ...], in the other fold."""
    sums = Sums()
    for fold in (0, 1):
        rest = None if lacking is None else lacking[fold::2]
        sums.add((fold, products(x[fold::2], original[fold::2], rest, weight)))
    return sums


@pytest.mark.parametrize("centered", [False, True])
def test_noise_corrects_nothing(centered: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x, noise = torch.randn(4, 32, 48, generator=rng), torch.randn(4, 32, 40, generator=rng)
    found = sums_of(x, x, noise, torch.zeros(40, 48)).correction(torch.zeros(40, 48), centered)
    assert float(found.aim.weight.abs().max()) < 1e-6
    expected = noise.flatten(0, 1).mean(0) if centered else torch.zeros(40)
    torch.testing.assert_close(found.shift, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("centered", [False, True])
def test_what_can_be_learned_is_made_up_for(centered: bool) -> None:
    """A lack that is linear in the inputs, with plenty of text: nearly all of it, with the mean in the bias."""
    rng = torch.Generator().manual_seed(0)
    x, gain = torch.randn(8, 256, 12, generator=rng), torch.randn(5, 12, generator=rng)
    offset = 3.0 if centered else 0.0
    found = sums_of(x, x, x @ gain.T + offset, torch.zeros(5, 12)).correction(torch.zeros(5, 12), centered)
    assert float((found.aim.weight - gain).norm()) < 0.05 * float(gain.norm())
    torch.testing.assert_close(found.shift, torch.full((5,), offset), rtol=0.02, atol=0.1)


def test_inputs_that_only_shrank_are_stretched() -> None:
    x = torch.randn(8, 256, 12, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    found = sums_of(x / 2, x, None, weight).correction(weight, False)
    assert float((found.aim.weight - 2 * weight).norm()) < 0.05 * float(weight.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_window_is_enough_to_run(family: str, walk_of: Callable[..., Walk]) -> None:
    """No second fold, so no cross-validation: the middle ridge."""
    walk = walk_of(family, TEXT[:CONTEXT])
    for tensor in walk.order():
        aim = take(walk, tensor, coarse)
        assert bool(aim.weight.isfinite().all())
    assert all(bool(value.isfinite().all()) for value in biases(walk).values())


def test_constant_inputs_keep_a_trace_of_their_power() -> None:
    """About their mean nothing is left of them but rounding, which may be negative and could not be factored."""
    constant = torch.full((4, 8, 6), 0.3)
    moment = sums_of(constant, constant, None, torch.ones(3, 6)).correction(torch.ones(3, 6), True).aim.second_moment
    assert moment is not None
    assert bool((moment.diagonal() > 0).all())
    assert float(moment.diagonal().max()) < 1e-6


def test_dead_inputs_correct_nothing() -> None:
    zeros = torch.zeros(4, 8, 6)
    found = sums_of(zeros, zeros, None, torch.ones(3, 6)).correction(torch.ones(3, 6), True)
    assert torch.equal(found.aim.weight, torch.ones(3, 6))
    assert not bool(found.shift.any())


# --- models of other makes -----------------------------------------------------------------------------------------


def scale_block(model: Any) -> None:
    """The first block's output is halved: no longer the sum of what is written to the stream."""
    block = model.transformer.h[0]
    forward = block.forward
    block.forward = lambda *a, **k: forward(*a, **k) / 2


def test_a_block_that_is_no_sum_of_its_parts_only_lacks_the_streams_term(
    walk_of: Callable[..., Walk], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nashswarm")
    walk = walk_of("gpt2", edit=scale_block)
    inside = [t for t in walk.order() if t.layer is not None]
    for tensor in walk.order():
        weight = weight_of(walk, tensor)
        aim = take(walk, tensor, coarse)
        if tensor.layer is not None:
            assert not torch.equal(aim.weight, weight)  # inputs are still made up for
            assert aim.second_moment is not None
            assert bool(walk.streams._streams) == (tensor.layer == 1)
    assert [r.message for r in caplog.records] == [
        "block 0 is not the sum of its parts; its residual stream is not corrected"
    ]
    assert len(inside) == 8


def test_exact_blocks_that_are_no_sums_stay_as_they_are(walk_of: Callable[..., Walk]) -> None:
    walk = walk_of("gpt2", edit=scale_block)
    for tensor in walk.order():
        weight = weight_of(walk, tensor)
        aim = take(walk, tensor, exact)
        assert float((aim.weight - weight).norm()) <= 1e-4 * float(weight.norm())


def route(model: Any, chosen: Callable[[Tensor], Tensor]) -> None:
    """Only tokens that `chosen` marks, bool [tokens], reach the first block's feed-forward part."""
    mlp = model.model.layers[0].mlp
    forward = mlp.forward

    def routed(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        here, result = chosen(flat), torch.zeros_like(flat)
        if bool(here.any()):
            result[here] = forward(flat[here])
        return result.view_as(x)

    mlp.forward = routed


def routed_names(walk: Walk) -> set[str]:
    return {t.name for t in walk.order() if t.layer == 0 and "mlp" in t.name}


def check_left_alone(walk: Walk) -> None:
    for tensor in walk.order():
        weight = weight_of(walk, tensor)
        aim = take(walk, tensor, coarse)
        alone = tensor.name in routed_names(walk) or tensor.kind == "embedding"
        assert (aim.second_moment is None) == alone, tensor.name
        assert torch.equal(aim.weight, weight) == alone, tensor.name


def test_routed_experts_are_left_alone(walk_of: Callable[..., Walk]) -> None:
    check_left_alone(walk_of("llama", edit=lambda model: route(model, lambda x: x[:, 0] > 0)))


def test_an_expert_that_nothing_reaches_any_more_is_left_alone(walk_of: Callable[..., Walk]) -> None:
    """All tokens come to it in the original, none once the embeddings are quantized."""
    reached = [True]
    walk = walk_of("llama", edit=lambda model: route(model, lambda x: torch.full((len(x),), reached[0])))
    tensors = walk.order()
    take(walk, tensors[0], coarse)
    walk.streams._enter(0)
    reached[0] = False
    for tensor in (t for t in tensors if t.layer == 0):
        aim = take(walk, tensor, coarse)
        assert (aim.second_moment is None) == (tensor.name in routed_names(walk)), tensor.name


def test_an_expert_that_nothing_reached_is_still_quantized(walk_of: Callable[..., Walk]) -> None:
    walk = walk_of("llama", edit=lambda model: route(model, lambda x: torch.zeros(len(x), dtype=torch.bool)))
    assert sorted(t.name for t in walk.order()) == sorted(t.name for t in walk.streams.index.tensors)
    check_left_alone(walk)


# --- what is kept and what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_the_model_as_it_is_now(family: str, walk_of: Callable[..., Walk]) -> None:
    walk = walk_of(family)
    for tensor in walk.order():
        take(walk, tensor, coarse)
    for name, value in biases(walk).items():
        assert np.array_equal(walk.vector(name), value.numpy())
        assert walk.vector(name).dtype == np.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_correction_out_of_all_bounds_is_refused(bad: float, walk_of: Callable[..., Walk]) -> None:
    walk = walk_of("gpt2")
    name = "transformer.h.1.mlp.c_proj.bias"
    walk.streams.model.get_parameter(name).data[3] = bad
    with pytest.raises(NashSwarmError, match=f"^{name}: its correction is not finite; set prefix_tokens: 0"):
        walk.vector(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_originals_activations_of_one_block_are_kept(family: str, walk_of: Callable[..., Walk]) -> None:
    walk = walk_of(family)
    for tensor in walk.order():
        take(walk, tensor, coarse)
        if tensor.kind == "embedding":
            assert not walk.streams._inputs
            continue
        here = {t.name for t in walk.streams.index.tensors if t.layer == tensor.layer and t.kind != "embedding"}
        assert set(walk.streams._inputs) == here
        assert set(walk.streams._streams) <= here
        assert len(walk.streams.original) == len(walk.streams.quantized) == len(walk.streams.batches())
        assert len(walk.streams._outputs) == (0 if tensor.layer is None else len(walk.streams.batches()))
    assert not walk._corrections


def test_queries_keys_and_values_share_their_sums(walk_of: Callable[..., Walk]) -> None:
    walk = walk_of("llama")
    found = {}
    for tensor in walk.order():
        take(walk, tensor, coarse)
        found[tensor.name.removesuffix(".weight").rpartition(".")[2], tensor.layer] = walk._sums
    for layer in (0, 1):
        assert found["q_proj", layer] is found["k_proj", layer] is found["v_proj", layer]
        assert found["gate_proj", layer] is found["up_proj", layer]
        assert len({id(found[m, layer]) for m in ("q_proj", "o_proj", "gate_proj", "down_proj")}) == 4


def test_the_same_text_gives_the_same_aims(walk_of: Callable[..., Walk]) -> None:
    runs = []
    for _ in range(2):
        walk = walk_of("opt")
        runs.append([take(walk, tensor, coarse).weight for tensor in walk.order()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_a_walk_is_enough_to_make_it_anew(family: str, walk_of: Callable[..., Walk]) -> None:
    """As where a worker is lost: nothing was asked of its successor in between (`engine.Member`)."""
    walk, changes = walk_of(family), list[Callable[[Streams], object]]()
    for tensor in walk.order():
        weight, moved = weight_of(walk, tensor), None
        if walk.streams.reaches(tensor):
            sums, successor = Sums(), walk_of(family).streams
            for change in changes:
                change(successor)
            for one, other in zip(walk.streams.compare(tensor), successor.compare(tensor), strict=True):
                assert one is not None
                assert other is not None
                assert one[0] == other[0]
                assert all(torch.equal(one[1][key], other[1][key]) for key in one[1])
                sums.add(one)
            correction = sums.correction(weight, has_bias(walk, tensor))
            moved, weight = correction.moved(coarse(correction.aim.weight)), correction.aim.weight
        changes.append(partial(Streams.put, tensor=tensor, weight=coarse(weight), moved=moved))
        changes[-1](walk.streams)


@pytest.mark.parametrize("family", FAMILIES)
def test_remembered_outputs_are_those_that_would_be_computed(
    family: str, walk_of: Callable[..., Walk], monkeypatch: pytest.MonkeyPatch
) -> None:
    remembering, forgetful = walk_of(family), walk_of(family)
    monkeypatch.setattr(forgetful.streams, "_once", set())
    calls = {id(walk): 0 for walk in (remembering, forgetful)}
    for walk in (remembering, forgetful):
        for module in map(walk.streams.model.get_submodule, (n.rpartition(".")[0] for n in walk.streams.sequence)):
            forward = module.forward

            def counted(*arguments: Any, own: Any = forward, walk: Walk = walk) -> Any:
                calls[id(walk)] += 1
                return own(*arguments)

            module.forward = counted
    for tensor in remembering.order():
        one, other = (take(walk, tensor, coarse) for walk in (remembering, forgetful))
        assert torch.equal(one.weight, other.weight), tensor.name
    for vector in remembering.streams.index.vectors:
        assert np.array_equal(remembering.vector(vector.name), forgetful.vector(vector.name)), vector.name
    assert calls[id(remembering)] < 0.8 * calls[id(forgetful)]
