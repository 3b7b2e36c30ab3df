"""Training all codes: what it gains, when it is refused, that files hold what came of it, and the budget."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, FAMILIES, VOCABULARY, Models, no_progress

from nashswarm import quantize, tuning
from nashswarm.codecs import coded
from nashswarm.config import ConfigError, Method, parse_method
from nashswarm.loading import load
from nashswarm.models import load_original
from nashswarm.packed import file_bytes, open_packed
from nashswarm.quantize import Model
from nashswarm.recipes import method_document
from nashswarm.tuning import Tuned
from nashswarm.types import InputError, TokenizedSplit, Tuning

BLOCK = {"allocator": "market", "codec": "coded", "budget": 3.0, "prefix_tokens": 256}
SOME = Tuning(steps=40, tokens=128, rate=0.02)
# Tiny models with random weights move all at once where codes begin to flip; norms and biases gain in any case.
RATES = {"gpt2": 0.01, "opt": 0.005, "llama": 0.02}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

Splits = Callable[..., TokenizedSplit]


_rounded: dict[str, list[coded.Rounded]] = {}


def rounded(model: Model) -> list[coded.Rounded]:
    """All matrices of a tiny model, each by itself, at 3 bits."""
    if model.name not in _rounded:
        method = parse_method("mine", BLOCK)
        choices = quantize.allocate(model, method, no_progress).choices
        _rounded[model.name] = [quantize._encode(model, t, method, choices[t.name]) for t in model.index.tensors]
    return _rounded[model.name]


def vectors_of(model: Model) -> dict[str, np.ndarray]:
    return {v.name: model.checkpoint.vector(v).numpy() for v in model.index.vectors}


def tuned(model: Model, split: Splits, settings: Tuning, device: str = "cpu") -> Tuned[coded.Rounded]:
    original = partial(load_original, model.checkpoint.directory, model.index)
    ids = split(model.name, seed=3).ids
    work = model.index, coded.search, rounded(model), vectors_of(model), ids, settings, no_progress, device
    return tuning.tune(original, *work)


def packed_by(model: Model, split: Splits, directory: Path, **settings: Any) -> tuple[Path, Tuned[Any] | None]:
    """A packing, and what the tuning of its last round returned."""
    method, found = parse_method("mine", BLOCK | settings), list[Tuned[Any]]()
    allocation = quantize.allocate(model, method, no_progress)

    def watch(*arguments: Any) -> Tuned[Any]:
        found.append(tuning.tune(*arguments))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "tune", watch)
        quantize.pack(model, method, allocation, split(model.name, seed=3).ids, directory, no_progress)
    return directory, found[-1] if found else None


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_on_text_held_out_falls(family: str, quantizable: Models, split: Splits) -> None:
    model = quantizable(family)
    found = tuned(model, split, dataclasses.replace(SOME, rate=RATES[family]))
    assert found.kept
    assert found.after < 0.97 * found.before
    assert any(not np.array_equal(found.vectors[n], v) for n, v in vectors_of(model).items())
    for before, after in zip(rounded(model), found.items, strict=True):
        assert (before.name, before.steps, before.base) == (after.name, after.steps, after.base)


def test_codes_are_trained(quantizable: Models, split: Splits) -> None:
    """Without norms and biases there is a gain, too, and it is that of other codes."""
    model = quantizable("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "VECTOR_RATE", 0.0)
        found = tuned(model, split, dataclasses.replace(SOME, steps=80))
    assert found.after < 0.97 * found.before
    assert all(np.array_equal(found.vectors[n], v) for n, v in vectors_of(model).items())
    assert any(not np.array_equal(a.codes, b.codes) for a, b in zip(rounded(model), found.items, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_have_the_losses_slopes(family: str, quantizable: Models, split: Splits) -> None:
    """Of every matrix, also one that is stored transposed or used twice: along its gradient KL moves as it says."""
    model, place = quantizable(family), torch.device("cpu")
    original, student = (load_original(model.checkpoint.directory, model.index) for _ in range(2))
    search = coded.search(rounded(model), place)
    training = tuning._Student.of(student, search, rounded(model), vectors_of(model))
    ids = split(family, seed=3).ids[: 4 * CONTEXT].astype(np.int64)
    windows = torch.from_numpy(ids).view(4, CONTEXT).to(place)

    def loss() -> torch.Tensor:
        return next(iter(tuning.divergences(original, student, windows, model.index)))

    training.round()
    with torch.enable_grad():
        kl = loss()
        kl.backward()
    for matrix in training.matrices:
        matrix.pull()
        slope = matrix.latent.grad
        assert slope is not None
        assert slope.shape == matrix.latent.shape
        kls, size = [], 0.005 * float(kl.detach()) / float(slope.square().sum())  # which moves KL by half a per cent
        for sign in (1, -1):
            matrix.rounded.add_(slope, alpha=sign * size)
            matrix.write()
            with torch.no_grad():
                kls.append(float(loss()))
            matrix.rounded.sub_(slope, alpha=sign * size)
        matrix.write()
        assert (kls[0] - kls[1]) / (2 * size) == pytest.approx(float(slope.square().sum()), rel=0.02)


def test_training_that_destroys_is_refused(
    quantizable: Models, split: Splits, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantizable("opt")
    with caplog.at_level(logging.INFO, tuning.__name__):
        found = tuned(model, split, Tuning(steps=3, tokens=64, rate=2.0))
    assert not found.kept
    assert found.items == rounded(model)
    assert found.vectors.keys() == vectors_of(model).keys()
    assert all(np.array_equal(found.vectors[n], v) for n, v in vectors_of(model).items())
    assert f"{found.before:.5f} -> {found.after:.5f}): it is not used" in caplog.text


def test_codes_out_of_bounds_are_named(quantizable: Models, split: Splits) -> None:
    with pytest.raises(InputError, match=r"weight: codes reach 16777216 in tuning; lower tuning_rate"):
        tuned(quantizable("opt"), split, Tuning(steps=1, tokens=64, rate=1e9))


def test_the_same_comes_again(quantizable: Models, split: Splits) -> None:
    one, other = (tuned(quantizable("llama"), split, dataclasses.replace(SOME, steps=10)) for _ in range(2))
    assert (one.before, one.after) == (other.before, other.after)
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(one.items, other.items, strict=True))
    assert all(np.array_equal(v, other.vectors[n]) for n, v in one.vectors.items())


def test_without_text_nothing_can_be_drawn(quantizable: Models) -> None:
    model = quantizable("opt")
    with pytest.raises(InputError, match="first token of each window"):
        tuning.tune(lambda: None, model.index, coded.search, [], {}, np.empty(0, np.int32), SOME, no_progress)  # type: ignore[arg-type, return-value]


def test_the_rate_rises_evenly_and_falls_to_nothing() -> None:
    shares = [tuning.share_of_rate(k, 1000) for k in range(1000)]
    assert shares[:2] == [0.01, 0.02]
    assert (max(shares), shares.index(1.0), shares[-1]) == (1.0, 99, pytest.approx(0, abs=1e-5))
    assert tuning.share_of_rate(0, 1) == 1.0
    assert tuning.rate_of(Tuning(1000, 4096, None)) == pytest.approx(0.006, abs=1e-5)
    assert tuning.rate_of(Tuning(1000, 4096, 0.5)) == 0.5


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_drawn_from_the_model_and_fills_windows(family: str, quantizable: Models, split: Splits) -> None:
    """One token at a time with kept keys and values is what whole windows say; ends of texts end no window."""
    model, ids = quantizable(family), np.array([7, 9], np.int32)
    original, generator = load_original(model.checkpoint.directory, model.index), torch.Generator().manual_seed(5)
    windows = tuning.draw(original, model.index, ids, 200, generator, no_progress)
    assert windows.shape == (200, CONTEXT)
    assert set(windows[:, 0].tolist()) == {7, 9}
    assert int((windows[:, 1:-1] == 0).sum())  # the end of a text
    generator.manual_seed(5)
    torch.randint(2, (200,), generator=generator)
    with torch.no_grad():
        chances = original(input_ids=windows.long()).logits.softmax(-1)
    for place in range(1, CONTEXT):
        noise = torch.empty(200, VOCABULARY).exponential_(generator=generator)
        expected = (chances[:, place - 1] / noise).argmax(-1)
        assert int((windows[:, place] != expected).sum()) <= 1  # late digits may decide


def test_memory_bounds_how_many_windows_are_drawn_at_once(quantizable: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    index = quantizable("llama").index
    window = 4 * (2 * 2 * 72 * CONTEXT + 4 * VOCABULARY)
    monkeypatch.setattr(tuning, "DRAWING_BYTES", 5 * window)
    assert tuning._drawn_at_once(index, torch.device("cpu")) == 5
    monkeypatch.setattr(tuning, "DRAWING_BYTES", 1)
    assert tuning._drawn_at_once(index, torch.device("cpu")) == 1


# --- packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_files_hold_what_came_of_it_within_the_budget(
    family: str, quantizable: Models, split: Splits, tmp_path: Path
) -> None:
    model = quantizable(family)
    own = {"tuning_steps": 12, "tuning_tokens": 64, "tuning_rate": RATES[family]}
    directory, found = packed_by(model, split, tmp_path / "packed", **own)
    assert found is not None
    assert found.kept
    opened = open_packed(directory)
    assert opened.provenance.method["tuning_steps"] == 12
    for item in found.items:
        assert torch.equal(coded.decode(opened.tensors[item.name]), item.weight())
    for name, vector in found.vectors.items():
        assert np.array_equal(opened.vectors[name], vector.astype(np.float16))
    asked = 3.0 * model.index.parameters / 8
    assert 0.985 * asked < file_bytes(directory) <= asked  # tiny models jump: half a per cent is one matrix' scales
    assert load(directory).config.vocab_size == VOCABULARY


def test_packing_comes_again_to_the_byte(quantizable: Models, split: Splits, tmp_path: Path) -> None:
    own = {"tuning_steps": 3, "tuning_tokens": 64, "tuning_rate": 0.02, "prefix_tokens": 0}
    one, other = (packed_by(quantizable("opt"), split, tmp_path / name, **own)[0] for name in "ab")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def test_nothing_is_tuned_unless_asked_and_never_in_trials(
    quantizable: Models, split: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packed_by(quantizable("opt"), split, tmp_path / "plain")[1] is None

    def fail(*arguments: Any) -> None:
        raise AssertionError("this is a trial")

    monkeypatch.setattr(quantize, "tune", fail)
    method = parse_method("mine", BLOCK | {"tuning_steps": 5})
    quantize.allocate(quantizable("opt"), method, no_progress)


# --- settings ------------------------------------------------------------------------------------------------------


def test_a_method_without_tuning_has_the_document_of_before() -> None:
    def document(**settings: Any) -> dict[str, Any]:
        return method_document(parse_method("mine", BLOCK | settings))

    assert not [key for key in document() if key.startswith("tuning")]
    assert document(tuning_steps=0, tuning_tokens=64) == document()
    stated = document(tuning_steps=5)
    assert {k: v for k, v in stated.items() if k not in document()} == {
        "tuning_steps": 5,
        "tuning_tokens": 4096,
        "tuning_rate": None,
    }
    again: Method = parse_method("mine", stated)
    assert again == parse_method("mine", BLOCK | {"tuning_steps": 5})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tuning_steps", -1, "negative; 0 turns tuning off"),
        ("tuning_tokens", 0, "too small; at least 1"),
        ("tuning_rate", 0.0, "moves nothing; give more than 0, or null"),
        ("tuning_rate", "fast", "expected a finite number"),
    ],
)
def test_settings_that_cannot_be_are_named(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"methods\.mine\.{key}: .*{words}"):
        parse_method("mine", BLOCK | {key: value})


@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_trains_too(family: str, quantizable: Models, split: Splits) -> None:
    found = tuned(quantizable(family), split, dataclasses.replace(SOME, rate=RATES[family]), "cuda")
    assert found.after < 0.97 * found.before
