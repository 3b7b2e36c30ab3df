"""Models whose layers multiply by packed bits: logits within rounding of the decoded ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, Packed

from nashswarm import loading
from nashswarm.kernels import build, matrix, serving
from nashswarm.kernels.matrix import Matrix
from nashswarm.resident import PackedWeight
from nashswarm.types import PackedTensor

PackedModels = Callable[[str, str], Packed]

METHOD = "market-tiles-2_5"
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]) % VOCABULARY
pytestmark = pytest.mark.skipif(build.library() is None, reason="no compiler here")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of x of all products with kernels so far."""
    seen: list[tuple[int, ...]] = []
    multiply = Matrix.matmul

    def counted(self: Matrix, x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return multiply(self, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Matrix, "matmul", counted)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_decoded_models(family: str, packed: PackedModels, products: list[tuple[int, ...]]) -> None:
    directory = packed(family, METHOD).directory
    with torch.inference_mode():
        expected = loading.load(directory)(TOKENS).logits
        found = serving.load(directory, resident="packed")(TOKENS).logits
        assert products
        coarse = serving.load(directory, resident="packed", activations="int8")(TOKENS).logits
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert 1e-5 < float((coarse - expected).abs().max() / expected.abs().max()) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_written_are_the_decoded_models(family: str, packed: PackedModels) -> None:
    directory = packed(family, METHOD).directory
    written = [
        model.generate(TOKENS, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for model in (loading.load(directory), serving.load(directory, resident="packed"))
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_is_looked_up_without_decoding_its_table(
    family: str, packed: PackedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = packed(family, METHOD).directory
    model, expected = serving.load(directory, resident="packed"), loading.load(directory)
    tables = model.get_input_embeddings(), expected.get_input_embeddings()
    assert torch.equal(*(table(TOKENS.repeat(1, 20)) for table in tables))  # many: the table is decoded
    monkeypatch.setattr(PackedWeight, "forward", lambda _: pytest.fail("a whole table was decoded"))
    assert torch.equal(*(table(TOKENS[:, :2]) for table in tables))
    with pytest.raises(IndexError):
        tables[0](torch.tensor([VOCABULARY]))


def test_many_rows_and_gradients_are_decoded(
    packed: PackedModels, products: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "DECODED_ABOVE", 15)
    directory = packed("gpt2", METHOD).directory
    model, expected = serving.load(directory, resident="packed"), loading.load(directory)
    many = TOKENS.repeat(2, 1)
    with torch.inference_mode():
        assert torch.equal(model(many).logits, expected(many).logits)
    with torch.enable_grad():
        seen = torch.randn(1, 8, model.config.n_embd, requires_grad=True)
        assert model(inputs_embeds=seen).logits.requires_grad
    assert products == []


def test_a_prompt_is_multiplied_by_the_bits(packed: PackedModels, products: list[tuple[int, ...]]) -> None:
    model = serving.load(packed("gpt2", METHOD).directory, resident="packed")
    prompt = TOKENS.repeat(1, 3)
    with torch.inference_mode():
        expected = loading.load(packed("gpt2", METHOD).directory)(prompt).logits
        assert torch.allclose(model(prompt).logits, expected, atol=1e-5 * float(expected.abs().max()))
    assert (1, 24, model.config.n_embd) in products


def test_other_codecs_are_left_alone(packed: PackedModels) -> None:
    assert serving.accelerate(loading.load(packed("gpt2", "rtn4-g64").directory, resident="packed")) == 0


def test_layers_can_be_taken_again(packed: PackedModels) -> None:
    """A model that was loaded, and so accelerated, on the processor may have been moved since."""
    model = serving.load(packed("gpt2", METHOD).directory, resident="packed")
    layers = [m for m in model.modules() if hasattr(m, "kernel")]
    classes = [type(layer).__name__ for layer in layers]
    assert serving.accelerate(model, "int8") == len(layers)
    assert [type(layer).__name__ for layer in layers] == classes
    assert all(layer.options == ("int8",) for layer in layers)
    with torch.inference_mode():
        expected = serving.load(packed("gpt2", METHOD).directory, resident="packed", activations="int8")(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, expected)


def test_bytes_are_those_that_are_resident(packed: PackedModels) -> None:
    model = serving.load(packed("gpt2", METHOD).directory, resident="packed")
    layers = [m for m in model.modules() if hasattr(m, "kernel")]
    assert len(layers) > 4
    for layer in layers:
        own: PackedTensor = layer.kernel.packed
        assert own.shape == layer.packed_weight.packed.shape
        for part, array in own.arrays.items():
            assert array.ctypes.data == layer.packed_weight.get_buffer(f"bytes_{part}").data_ptr()
