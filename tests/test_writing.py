"""Blocks that write a token in one call: what they return and keep is what their own forward does, within rounding."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import FAMILIES, Packed
from torch import Tensor, nn

from nashswarm.benchmarks.matrices import packed_model
from nashswarm.config import DecodeBenchmark
from nashswarm.kernels import build, matrix, serving, writing
from nashswarm.kernels.matrix import SETS, Activations
from nashswarm.kernels.writing import Growing, Writer

PackedModels = Callable[[str, str], Packed]

METHOD = "market-tiles-2_5"
VOCABULARY, LAYERS = 90, 2
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SHAPES = [(72, 4), (40, 5), (33, 3), (96, 1), (160, 2), (5, 1)]  # width and heads: heads of 18, 8, 11, 96, 80, 5
pytestmark = pytest.mark.skipif(build.library() is None, reason="no compiler here")


def made(width: int = 72, heads: int = 4, activations: Activations = "float32", **changes: Any) -> Any:
    """A packed model of random weights, none of its vectors ones, whose blocks may write."""
    model: Any = packed_model(DecodeBenchmark(LAYERS, width, heads, VOCABULARY, 8, 8))
    torch.manual_seed(width)
    for name, vector in model.named_parameters():
        vector.data = torch.randn_like(vector) * 0.3 + (".ln" in name and name.endswith("weight"))
    for name, value in changes.items():
        setattr(model.config, name, value)
    serving.accelerate(model, activations)
    return model


def alone(model: Any) -> Any:
    """The same, as transformers wrote it."""
    model.transformer.writer = None
    return model


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of all tokens that blocks wrote so far."""
    seen: list[int] = []
    write = Writer.write

    def counted(self: Writer, x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.shape[-1])
        return write(self, x, *rest)

    monkeypatch.setattr(Writer, "write", counted)
    return seen


def steps(model: Any, prompt: Tensor = PROMPT, count: int = 6, **named: Any) -> tuple[Tensor, Any]:
    """Logits of a prompt's last token and of `count` given ones behind it, and the cache."""
    with torch.no_grad():
        found = model(prompt, use_cache=True)
        logits, cache = [found.logits[:, -1:]], found.past_key_values
        for i in range(count):
            token = torch.full_like(prompt[:, :1], 7 * i + 1)
            logits.append(model(token, past_key_values=cache, **named).logits)
    return torch.cat(logits, 1), cache


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_behind_a_prompt_are_those_of_the_blocks_alone(shape: tuple[int, int], written: list[int]) -> None:
    (found, kept), count = steps(made(*shape)), len(written)
    assert count == 6
    expected, cache = steps(alone(made(*shape)))
    assert len(written) == count
    assert near(found, expected)
    for layer, other in zip(kept.layers, cache.layers, strict=True):
        assert isinstance(layer, Growing)
        assert near(layer.keys, other.keys)
        assert near(layer.values, other.values)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_int8_differs_no_more_than_its_rounding(shape: tuple[int, int], written: list[int]) -> None:
    found, _ = steps(made(*shape, activations="int8"))
    assert written
    assert near(found, steps(alone(made(*shape, activations="int8")))[0], 0.02)


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_generate_writes_what_the_blocks_alone_write(activations: Activations, written: list[int]) -> None:
    model = made(activations=activations)
    options: dict[str, Any] = {"max_new_tokens": 80, "min_new_tokens": 80, "do_sample": False, "pad_token_id": 0}
    found = model.generate(PROMPT, **options)
    assert len(written) == 79  # beyond the first room
    assert torch.equal(found, alone(model).generate(PROMPT, **options))


def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    model = made(160, 2)
    _, cache = steps(model, count=0)
    writer, x = model.transformer.writer, torch.randn(1, 1, 160)
    with torch.no_grad():
        assert writer.takes(None, {"inputs_embeds": x, "past_key_values": cache})
        ways = itertools.product((1, 2, 3), SETS)
        found = [writer.write(x, copy.deepcopy(cache), threads, most) for threads, most in ways]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_is_not_finite_stays_so(written: list[int]) -> None:
    model, found = made(), []
    for _ in range(2):
        _, cache = steps(model, count=0)
        with torch.no_grad():
            x = torch.full((1, 1, 72), float("nan"))
            found.append(model(inputs_embeds=x, past_key_values=cache).logits.isnan())
        alone(model)
    assert len(written) == 1
    assert bool(found[0].any())
    assert torch.equal(*found)


def test_bytes_of_a_stored_model_are_written_with(packed: PackedModels, written: list[int]) -> None:
    model: Any = serving.load(packed("gpt2", METHOD).directory, resident="packed")
    found, _ = steps(model)
    assert written
    assert near(found, steps(alone(model))[0])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt2"])
def test_other_architectures_write_as_they_did(family: str, packed: PackedModels, written: list[int]) -> None:
    model = serving.load(packed(family, METHOD).directory, resident="packed")
    steps(model)
    assert written == []


# --- what is left to the block -------------------------------------------------------------------------------------


def test_several_tokens_and_sequences_are_not_written(written: list[int]) -> None:
    model = made()
    steps(model, torch.cat([PROMPT, PROMPT + 1]))
    _, cache = steps(model, count=0)
    with torch.no_grad():
        model(PROMPT[:, :2], past_key_values=cache)
        model(PROMPT[:, :1], use_cache=False)
        model(PROMPT[:, :1])  # nothing is kept yet
    assert written == []


def test_padding_is_masked(written: list[int]) -> None:
    model = made()
    mask = torch.ones(1, 9, dtype=torch.int64)
    mask[:, :3] = 0
    with torch.no_grad():
        cache = model(PROMPT, attention_mask=mask[:, :8]).past_key_values
        model(PROMPT[:, :1], attention_mask=mask, past_key_values=cache)
        assert written == []
        model(PROMPT[:, :1], attention_mask=torch.ones(1, 10), past_key_values=cache)
    assert len(written) == 1


def test_attentions_and_states_are_those_asked_for(written: list[int]) -> None:
    model = made()
    model.set_attn_implementation("eager")
    _, cache = steps(model, count=0)
    with torch.no_grad():
        found = model(PROMPT[:, :1], past_key_values=cache, output_attentions=True, output_hidden_states=True)
    assert written == []
    assert [a.shape for a in found.attentions] == [(1, 4, 1, 9)] * LAYERS
    assert len(found.hidden_states) == LAYERS + 1


def test_states_around_the_blocks_may_be_overheard(written: list[int]) -> None:
    model, seen = made(), []
    _, cache = steps(model, count=0)
    for part in (model.transformer, model.transformer.wte, model.transformer.ln_f, model.lm_head):
        part.register_forward_hook(lambda *of: seen.append(type(of[0])))
    with torch.no_grad():
        model(PROMPT[:, :1], past_key_values=cache)
    assert len(written) == 1
    assert len(seen) == 4


@contextlib.contextmanager
def gradients(model: Any) -> Iterator[None]:
    del model
    with torch.enable_grad():
        yield


@contextlib.contextmanager
def training(model: Any) -> Iterator[None]:
    model.transformer.h[0].attn.resid_dropout.train()
    yield


@contextlib.contextmanager
def overheard(model: Any) -> Iterator[None]:
    model.transformer.h[0].mlp.register_forward_hook(lambda *_: None)
    yield


@contextlib.contextmanager
def overheard_before(model: Any) -> Iterator[None]:
    model.transformer.h[1].attn.c_attn.register_forward_pre_hook(lambda *_: None)
    yield


@contextlib.contextmanager
def overheard_everywhere(model: Any) -> Iterator[None]:
    del model
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def replaced(model: Any) -> Iterator[None]:
    for block in model.transformer.h:
        block.mlp.act = nn.ReLU()
    yield


@contextlib.contextmanager
def overridden(model: Any) -> Iterator[None]:
    for block in model.transformer.h:
        block.ln_1.forward = lambda x: x
    yield


@contextlib.contextmanager
def scattered(model: Any) -> Iterator[None]:
    for block in model.transformer.h:
        block.ln_2.bias.data = torch.randn(144)[::2]
    yield


@contextlib.contextmanager
def autocast(model: Any) -> Iterator[None]:
    del model
    with torch.autocast("cpu"):
        yield


CHANGES = [
    gradients,
    training,
    overheard,
    overheard_before,
    overheard_everywhere,
    replaced,
    overridden,
    scattered,
    autocast,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_is_not_as_it_was_does_it_alone(change: Any, written: list[int]) -> None:
    model = made()
    _, cache = steps(model, count=0)
    with torch.no_grad(), change(model):
        model(PROMPT[:, :1], past_key_values=cache)
    assert written == []


def test_other_caches_are_left_alone(written: list[int]) -> None:
    from transformers import StaticCache

    model = made()
    with torch.no_grad():
        cache = StaticCache(model.config, max_cache_len=16)
        model(PROMPT, past_key_values=cache)
        model(PROMPT[:, :1], past_key_values=cache)
    assert written == []


@pytest.mark.parametrize(
    ("activation", "writes"),
    [("gelu", True), ("gelu_new", True), ("gelu_pytorch_tanh", True), ("relu", False), ("quick_gelu", False)],
)
def test_activations(activation: str, writes: bool, written: list[int]) -> None:
    from transformers.activations import get_activation

    model = made()
    for block in model.transformer.h:
        block.mlp.act = get_activation(activation).eval()
    serving.accelerate(model)
    found, _ = steps(model)
    assert bool(written) is writes
    assert near(found, steps(alone(model))[0])


def test_attention_is_scaled_as_configured(written: list[int]) -> None:
    model = made()
    for i, block in enumerate(model.transformer.h):
        block.attn.scaling = 1 / (i + 1)
    serving.accelerate(model)
    found, _ = steps(model)
    assert written
    assert near(found, steps(alone(model))[0])


def test_a_layer_without_a_matrix_keeps_a_model_from_writing(written: list[int]) -> None:
    model = made()
    layer = model.transformer.h[1].mlp.c_fc
    kernel, layer.kernel = layer.kernel, None
    assert writing.fuse(model, "float32") == 0
    layer.kernel = kernel
    steps(model)
    assert written == []
    assert writing.fuse(model, "float32") == 1


def test_without_a_compiler_blocks_do_it_alone(monkeypatch: pytest.MonkeyPatch, written: list[int]) -> None:
    expected, _ = steps(alone(made()))
    for module in (writing, matrix):
        monkeypatch.setattr(module, "library", lambda: None)
    found, _ = steps(made())
    assert written == []
    assert near(found, expected)


# --- vectors and caches that change between tokens -----------------------------------------------------------------


def test_vectors_are_those_of_the_moment(written: list[int]) -> None:
    model = made()
    steps(model)
    for block in model.transformer.h:
        block.ln_2.weight.data = block.ln_2.weight.data * 2
        block.mlp.c_proj.bias.data.mul_(3)
        block.attn.c_proj.bias = None
    count = len(written)
    found, _ = steps(model)
    assert len(written) == 2 * count
    assert near(found, steps(alone(model))[0])


def test_a_cache_that_was_cropped_or_copied_is_gone_on_with(written: list[int]) -> None:
    model, results = made(), []
    for _ in range(2):
        _, cache = steps(model)
        held = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), copy.copy(cache.layers[0])]
        assert not any(isinstance(layer, Growing) for layer in (*copies[0].layers, *copies[1].layers, copies[2]))
        cache.crop(-3)
        with torch.no_grad():
            for kept in (cache, *copies[:2]):
                results += [model(PROMPT[:, :count], past_key_values=kept).logits for count in (1, 1, 3, 1)]
        assert all(torch.equal(*pair) for pair in held)
        assert cache.get_seq_length() == 8 + 6 - 3 + 6
        alone(model)
    half = len(results) // 2
    assert written
    assert all(near(a, b) for a, b in zip(results[:half], results[half:], strict=True))


def test_a_cache_that_was_reset_or_repeated_is_gone_on_with(written: list[int]) -> None:
    model = made()
    _, cache = steps(model)
    with torch.no_grad():
        cache.batch_repeat_interleave(2)
        twice = model(torch.tensor([[7], [7]]), past_key_values=cache).logits
        cache.batch_select_indices(torch.tensor([1]))
        count = len(written)
        model(PROMPT[:, :1], past_key_values=cache)
        assert len(written) == count + 1
        cache.reset()
        expected = model(PROMPT).logits
        assert near(model(PROMPT, past_key_values=cache).logits, expected)
    assert near(twice[0], twice[1])


def test_beams_are_those_of_the_blocks_alone() -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    model = made()
    found = model.generate(PROMPT, **options)
    assert torch.equal(found, alone(model).generate(PROMPT, **options))
