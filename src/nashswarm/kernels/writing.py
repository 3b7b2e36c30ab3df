"""GPT-2 that writes a token in one call of tiles.cpp: norms, attention and GELU of all blocks run between the products.

Behind a product the caches are full of codes, and each of some 60 small steps of torch in a block, and of their Python,
takes ten times as long as by itself; in one call they are loops between products, and its threads look out for each
other in place of sleeping. What is kept of a token goes into room behind the keys and values of those before it,
without a copy.

All else is left to the model's own forward: several tokens or sequences, masks, gradients, training, hooks within the
blocks (transformers leaves some, once a model was asked for attentions or hidden states), parts that are not as they
were, and caches that are no `DynamicCache`.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from nashswarm.kernels.build import library
from nashswarm.kernels.matrix import DIGITS, SETS, Activations, Layout, Matrix, Set

if TYPE_CHECKING:
    from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 64  # tokens by which a cache grows; it grows by half of what it holds where that is more
TAKEN = {"past_key_values", "attention_mask", "position_ids", "inputs_embeds", "use_cache"}  # arguments of a forward


class _Norm(ctypes.Structure):
    """`Norm` of tiles.cpp."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class _Block(ctypes.Structure):
    """`Block` of tiles.cpp."""

    _fields_ = (
        *((name, ctypes.POINTER(Layout)) for name in ("qkv", "out", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "out_bias", "up_bias", "down_bias")),
        ("norms", _Norm * 2),
        *((name, ctypes.c_int32) for name in ("width", "heads")),
        ("scale", ctypes.c_float),
        ("exact", ctypes.c_int32),
    )


def fuse(model: nn.Module, activations: Activations) -> int:
    """Let GPT-2 write in one call, where all layers of its blocks multiply by tiles on the processor.

    Returns how many do. For `accelerate`, which has given the layers their `Matrix`.
    """
    from transformers import GPT2Model

    count = 0
    for module in model.modules():
        kind = getattr(module, "unfused", type(module))
        if kind is not GPT2Model:
            continue
        gpt2: Any = module
        fits = library() is not None and len(gpt2.h) > 0 and all(map(_fits, gpt2.h))
        if fits and type(gpt2) is kind:
            gpt2.__class__ = _writing(kind)
        gpt2.writer = Writer(gpt2, activations) if fits else None
        count += fits
    return count


def _fits(block: Any) -> bool:
    """Whether it is made of what `nashswarm_write` does."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block

    if type(block) is not GPT2Block or type(block.attn) is not GPT2Attention or type(block.mlp) is not GPT2MLP:
        return False
    attention, mlp = block.attn, block.mlp
    matrices = [getattr(layer, "kernel", None) for layer in _layers(block)]
    width, inner = attention.embed_dim, getattr(matrices[2], "shape", (0,))[0]
    shapes = [(3 * width, width), (width, width), (inner, width), (width, inner)]
    return (
        all(isinstance(matrix, Matrix) for matrix in matrices)
        and [matrix.shape for matrix in matrices if matrix] == shapes
        and all(type(norm) is nn.LayerNorm and norm.normalized_shape == (width,) for norm in (block.ln_1, block.ln_2))
        and _exact(mlp.act) is not None
        and not attention.is_cross_attention
        and not attention.reorder_and_upcast_attn
    )


def _layers(block: Any) -> tuple[Any, ...]:
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


def _exact(activation: nn.Module) -> bool | None:
    """Whether it is GELU itself or its approximation by tanh; None if it is neither."""
    from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation

    return {GELUActivation: True, GELUTanh: False, NewGELUActivation: False}.get(type(activation))


def _writing(kind: type[nn.Module]) -> type[nn.Module]:
    """Of the same name, by which transformers knows what outputs of a model can be recorded."""

    def forward(self: Any, input_ids: Tensor | None = None, *others: Any, **named: Any) -> Any:
        if self.writer is not None and not others and self.writer.takes(input_ids, named):
            return self.writer.forward(input_ids, named)
        return kind.forward(self, input_ids, *others, **named)

    return type(kind.__name__, (kind,), {"forward": forward, "unfused": kind, "__module__": kind.__module__})


class Writer:
    """The matrices and vectors of a GPT-2's blocks, as tiles.cpp takes them."""

    def __init__(self, model: Any, activations: Activations) -> None:
        attention = model.h[0].attn
        self._model, self._digits = model, DIGITS[activations]
        self._library: Any = library()
        self._heads, self._width = attention.num_heads, attention.embed_dim
        self._parts = _parts(model)
        self._kinds = [type(part) for part in self._parts]
        self._matrices = [[layer.kernel for layer in _layers(block)] for block in model.h]
        self._seen: list[Any] = []
        self._blocks = (_Block * len(model.h))(
            *(
                _Block(
                    *(ctypes.pointer(matrix.layout) for matrix in matrices),
                    width=self._width,
                    heads=self._heads,
                    scale=block.attn.scaling,
                    exact=bool(_exact(block.mlp.act)),
                )
                for block, matrices in zip(model.h, self._matrices, strict=True)
            )
        )

    def takes(self, input_ids: Tensor | None, named: dict[str, Any]) -> bool:
        """Whether a forward with these arguments is this one's: one token behind others, nothing masked, no more."""
        config, embeddings = self._model.config, named.get("inputs_embeds")
        positions, mask, use_cache = (named.get(key) for key in ("position_ids", "attention_mask", "use_cache"))
        cache: Any = named.get("past_key_values")
        if (input_ids is None) is (embeddings is None):
            return False
        given = embeddings if input_ids is None else input_ids
        assert given is not None
        return bool(
            given.shape[:2] == (1, 1)
            and given.device.type == "cpu"
            and given.dim() == (3 if input_ids is None else 2)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and all(value is None or value is False for name, value in named.items() if name not in TAKEN)
            and (config.use_cache if use_cache is None else use_cache)
            and config.return_dict
            and not config.output_attentions
            and not config.output_hidden_states
            and config._attn_implementation in ("sdpa", "eager")
            and (positions is None or positions.shape == (1, 1))
            and self._holds(cache)
            and (mask is None or (mask.shape == (1, cache.get_seq_length() + 1) and bool(mask.all())))
            and self._as_it_was()
        )

    def forward(self, input_ids: Tensor | None, named: dict[str, Any]) -> Any:
        """What the model's own forward returns, and leaves in the cache."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        model, cache, positions = self._model, named["past_key_values"], named.get("position_ids")
        if positions is None:
            positions = torch.tensor([[cache.get_seq_length()]])
        if input_ids is not None:
            model.warn_if_padding_and_no_attention_mask(input_ids, named.get("attention_mask"))
        found = named["inputs_embeds"] if input_ids is None else model.wte(input_ids)
        found = model.ln_f(self.write(found + model.wpe(positions), cache))
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=found, past_key_values=cache)

    def write(self, x: Tensor, cache: Any, threads: int | None = None, most: Set = "avx512") -> Tensor:
        """x [1, 1, width] through all blocks; the last two arguments are those of `Matrix.matmul`."""
        tokens, layers = cache.get_seq_length(), cache.layers
        for i, layer in enumerate(layers):
            if type(layer) is not _growing():
                layers[i] = _growing()(layer)
        rooms = [layer.space() for layer in layers]
        pasts = np.array([[keys.data_ptr(), values.data_ptr(), keys.shape[2]] for keys, values in rooms], np.int64)
        y = x.to(torch.float32, copy=True).contiguous()
        failed = self._library.nashswarm_write(
            self._blocks,
            ctypes.c_void_p(pasts.ctypes.data),
            len(layers),
            tokens,
            self._digits,
            max(1, threads or torch.get_num_threads()),
            SETS.index(most),
            ctypes.c_void_p(y.data_ptr()),
        )
        if failed:
            raise MemoryError(f"no memory for a token of {self._width}")
        for layer in layers:
            layer.grow()
        return y

    def _holds(self, cache: Any) -> bool:
        """Whether a cache has tokens of one sequence for all blocks, as it keeps them itself."""
        dynamic, plain = _plain()
        if type(cache) is not dynamic or cache.offloading or len(cache.layers) != len(self._blocks):
            return False
        if any(type(layer) not in (plain, _growing()) or not layer.is_initialized for layer in cache.layers):
            return False
        shape = (1, self._heads, cache.get_seq_length(), self._width // self._heads)
        kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return all(t.shape == shape and t.dtype is torch.float32 and t.device.type == "cpu" for t in kept)

    def _as_it_was(self) -> bool:
        """Whether the blocks' parts are those it was made with, and no hook is among them."""
        parts = _parts(self._model)
        return (
            parts == self._parts
            and [type(part) for part in parts] == self._kinds
            and not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
            and not any(_overheard(part.__dict__) for part in parts)
            and self._vectors_fit()
        )

    def _vectors_fit(self) -> bool:
        """Whether norms and biases can be used where they lie now, which may not be where they lay before."""
        found = [vector for block in self._model.h for vector in _vectors(block)]
        seen = [v if v is None else (v.data_ptr(), v.dtype, v.shape) for v in found]
        if seen == self._seen:
            return True
        self._seen = []
        for layout, block, matrices in zip(self._blocks, self._model.h, self._matrices, strict=True):
            vectors = _vectors(block)
            lengths = [self._width] * 4 + [matrix.shape[0] for matrix in matrices]
            if None in [v if v is None else 0 for v in vectors[:4]]:
                return False
            if not all(v is None or _usable(v, length) for v, length in zip(vectors, lengths, strict=True)):
                return False
            places = [None if v is None else v.data_ptr() for v in vectors]
            layout.norms[0] = _Norm(*places[:2], block.ln_1.eps)
            layout.norms[1] = _Norm(*places[2:4], block.ln_2.eps)
            layout.qkv_bias, layout.out_bias, layout.up_bias, layout.down_bias = places[4:]
        self._seen = seen
        return True


def _parts(model: Any) -> list[Any]:
    """The modules between a model's embeddings and its last norm."""
    parts = [model.drop, model.h]
    for block in model.h:
        own = block._modules
        parts += [block, *own.values(), *own["attn"]._modules.values(), *own["mlp"]._modules.values()]
    return parts


def _vectors(block: Any) -> list[Tensor | None]:
    """Weights and biases of its norms, then the biases of its layers."""
    norms = [part._parameters[name] for part in (block.ln_1, block.ln_2) for name in ("weight", "bias")]
    return norms + [part._parameters["bias"] for part in _layers(block)]


def _overheard(state: dict[str, Any]) -> bool:
    """Whether a module, by its attributes, drops what it should not, or somebody waits for it to be called."""
    return bool(state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)


def _usable(vector: Tensor, length: int) -> bool:
    return (
        vector.shape == (length,)
        and vector.dtype is torch.float32
        and vector.device.type == "cpu"
        and vector.is_contiguous()
    )


# --- the cache -----------------------------------------------------------------------------------------------------


class Growing:
    """A `DynamicLayer` whose keys and values have room behind them, mixed in front of it.

    A place is written once. Whoever else changed the layer (a crop, more tokens, other sequences) has put tensors of
    his own in the place of these views, and what he left is copied into new room. Copies of a layer are plain ones.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._room: tuple[Tensor, Tensor] = self.keys, self.values
        self._given: tuple[Tensor, Tensor] | None = None

    def space(self) -> tuple[Tensor, Tensor]:
        """Room that begins with keys and values, and goes on for a token at least."""
        tokens, given = self.keys.shape[2], self._given
        own = given is not None and self.keys is given[0] and self.values is given[1]
        if not own or tokens == self._room[0].shape[2]:
            room = tokens + max(LEAST_ROOM, tokens // 2)
            self._room = _moved(self.keys, room), _moved(self.values, room)
        return self._room

    def grow(self) -> None:
        """Count the token that was written into that room."""
        tokens = self.keys.shape[2] + 1
        self.keys, self.values = self._given = self._room[0][:, :, :tokens], self._room[1][:, :, :tokens]

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_room", "_given")}
        if state["is_initialized"]:
            state |= {"keys": self.keys.clone(), "values": self.values.clone()}
        return _plain()[1], (), state


def _moved(tensor: Tensor, room: int) -> Tensor:
    """[1, heads, tokens, size] -> [1, heads, room, size]"""
    moved = tensor.new_empty(*tensor.shape[:2], room, tensor.shape[3])
    moved[:, :, : tensor.shape[2]] = tensor
    return moved


@functools.cache
def _plain() -> tuple[Any, Any]:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return DynamicCache, DynamicLayer


@functools.cache
def _growing() -> Any:
    return type("GrowingLayer", (Growing, _plain()[1]), {})
