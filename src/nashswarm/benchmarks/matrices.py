"""Random matrices and models in packed form: nothing but shapes, widths and bytes matters to times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nashswarm.bitpack import pack
from nashswarm.config import DecodeBenchmark
from nashswarm.kernels.matrix import TILES, WIDTHS
from nashswarm.resident import PackedWeight, keep_packed
from nashswarm.types import PackedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of tiles, by width: about what the market buys at 3.25 bits; 3.21 on average, 3.25 with steps and map.
SHARES = {0: 0.02, 1: 0.06, 2: 0.21, 3: 0.32, 4: 0.26, 5: 0.09, 6: 0.03, 8: 0.01}
ROWS, COLUMNS = 16, 128
BLOCK = 1 << 20  # random numbers that a dense model's weights repeat
DEVIATION = 0.02  # of them, as in GPT-2


def packed(shape: tuple[int, int], rng: np.random.Generator, shares: Mapping[int, float] = SHARES) -> PackedTensor:
    """Random codes and steps of the codec `tiles`, tiles of each width by their share."""
    strips, groups = -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)
    index = rng.choice(len(WIDTHS), (strips, groups), p=[shares.get(b, 0) for b in WIDTHS.tolist()])
    live = int((index > 0).sum())
    arrays = {
        "codes": rng.integers(0, 256, int(WIDTHS[index].sum()) * ROWS * COLUMNS // 8, np.uint8),
        "scales": rng.integers(180, 200, live * (ROWS // 2 + 1), np.uint8),
        "map": np.concatenate([pack(index, 3), pack(rng.permutation(shape[1]), (shape[1] - 1).bit_length())]),
    }
    return PackedTensor("tiles", shape, arrays, {"rows": ROWS, "columns": COLUMNS, "base": -239})


def dense_model(settings: DecodeBenchmark, dtype: torch.dtype) -> PreTrainedModel:
    """A model of GPT-2's make with random weights of this dtype."""
    model = _built(settings, dtype)
    block = torch.randn(BLOCK) * DEVIATION
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for i in range(0, len(flat), BLOCK):
            flat[i : i + BLOCK] = block[: len(flat) - i]
    return model


def packed_model(settings: DecodeBenchmark) -> PreTrainedModel:
    """The same with every matrix in packed form, heads tied, as `loading.load(..., resident="packed")` makes it."""
    with torch.device("meta"):
        model = _built(settings, torch.float32)
    rng, made = np.random.default_rng(0), dict[int, PackedWeight]()
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            continue
        if id(weight) not in made:
            transposed = not isinstance(module, nn.Linear | nn.Embedding)
            rows, columns = reversed(weight.shape) if transposed else weight.shape
            made[id(weight)] = PackedWeight(packed((rows, columns), rng), TILES.decode, transposed)
        keep_packed(module, made[id(weight)])
    _settle(model)
    return model


def _built(settings: DecodeBenchmark, dtype: torch.dtype) -> PreTrainedModel:
    """Without initial weights: they take longer to draw than a benchmark may."""
    from transformers import AutoModelForCausalLM, GPT2Config
    from transformers.initialization import no_init_weights

    config = GPT2Config(
        n_layer=settings.layers,
        n_embd=settings.width,
        n_head=settings.heads,
        vocab_size=settings.vocabulary,
        n_positions=max(1024, settings.prompt + settings.tokens + 1),
        bos_token_id=0,
        eos_token_id=0,
    )
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


def _settle(model: nn.Module) -> None:
    """Give memory to what still has none: norms and biases."""
    for module in model.modules():
        for name, vector in module._parameters.items():
            if vector is not None and vector.is_meta:
                module._parameters[name] = nn.Parameter(_ones(vector))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _ones(buffer)


def _ones(like: Tensor) -> Tensor:
    return torch.ones_like(like, device="cpu")
