"""Blocks of GPT-2 that write a token in one call of tiles.cpp: norms, attention and GELU run between the products.

Behind a product the caches are full of codes, and each of some 60 small steps of torch in a block takes ten times as
long as by itself; in one call they are loops between products, and its threads look out for each other in place of
sleeping. What is kept of a token goes into room behind the keys and values of those before it, without a copy.

All else is left to the block's own forward: several tokens or sequences, masks, gradients, training, hooks, parts that
are not as they were, and caches that are no `DynamicCache`.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from nashswarm.kernels.build import library
from nashswarm.kernels.matrix import DIGITS, SETS, Activations, Layout, Matrix, Set

if TYPE_CHECKING:
    from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 64  # tokens by which a cache grows; it grows by half of what it holds where that is more
# Arguments of a block that change nothing for one token without a mask.
WITHOUT_EFFECT = {"use_cache", "position_ids", "encoder_attention_mask"}


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
    """Let the blocks of GPT-2 write a token in one call, where all of their layers multiply by tiles on the processor.

    Returns how many do. For `accelerate`, which has given the layers their `Matrix`.
    """
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    count = 0
    for module in model.modules():
        kind = getattr(module, "alone", type(module))
        if kind is not GPT2Block:
            continue
        block: Any = module
        fits = library() is not None and _fits(block)
        if fits and type(block) is kind:
            block.__class__ = _writing(kind)
        block.writer = Writer(block, activations) if fits else None
        count += fits
    return count


def _fits(block: Any) -> bool:
    """Whether it is made of what `nashswarm_write` does."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention

    if type(block.attn) is not GPT2Attention or type(block.mlp) is not GPT2MLP:
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


def _parts(block: nn.Module) -> list[nn.Module | None]:
    """The modules that a block's forward calls."""
    own = block._modules
    attention, mlp = own["attn"], own["mlp"]
    assert attention
    assert mlp
    return [*own.values(), *attention._modules.values(), *mlp._modules.values()]


def _writing(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *others: Any,
        **named: Any,
    ) -> Any:
        plain = attention_mask is None and encoder_hidden_states is None and not others
        if plain and self.writer is not None and self.writer.takes(hidden_states, past_key_values, named):
            return self.writer.write(hidden_states, past_key_values)
        return kind.forward(
            self, hidden_states, past_key_values, attention_mask, encoder_hidden_states, *others, **named
        )

    return type(f"Writing{kind.__name__}", (kind,), {"forward": forward, "alone": kind})


class Writer:
    """One block's matrices and vectors, as tiles.cpp takes them."""

    def __init__(self, block: Any, activations: Activations) -> None:
        attention = block.attn
        self._block, self._digits = block, DIGITS[activations]
        self._library: Any = library()
        self._number, self._heads, self._width = attention.layer_idx, attention.num_heads, attention.embed_dim
        self._parts = _parts(block)
        self._kinds = [type(part) for part in self._parts]
        self._matrices = [layer.kernel for layer in _layers(block)]
        self._seen: list[Any] = []
        self._layout = _Block(
            *(ctypes.pointer(matrix.layout) for matrix in self._matrices),
            width=self._width,
            heads=self._heads,
            scale=attention.scaling,
            exact=bool(_exact(block.mlp.act)),
        )

    def takes(self, x: Tensor, cache: Any, named: dict[str, Any]) -> bool:
        """Whether a forward with these arguments, and no mask, is `write`."""
        return (
            x.shape == (1, 1, self._width)
            and x.dtype is torch.float32
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not any(value is not None for name, value in named.items() if name not in WITHOUT_EFFECT)
            and self._as_it_was()
            and self._holds(cache)
        )

    def write(self, x: Tensor, cache: Any, threads: int | None = None, most: Set = "avx512") -> Tensor:
        """What the block's own forward returns, and leaves in the cache; the last two as in `Matrix.matmul`."""
        layer = cache.layers[self._number]
        if type(layer) is not _growing():
            layer = cache.layers[self._number] = _growing()(layer)
        keys, values = layer.space()
        x, y = x.contiguous(), torch.empty(1, 1, self._width)
        failed = self._library.nashswarm_write(
            ctypes.byref(self._layout),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(keys.data_ptr()),
            ctypes.c_void_p(values.data_ptr()),
            keys.shape[2],
            layer.keys.shape[2],
            self._digits,
            max(1, threads or torch.get_num_threads()),
            SETS.index(most),
            ctypes.c_void_p(y.data_ptr()),
        )
        if failed:
            raise MemoryError(f"no memory for a token of {self._width}")
        layer.grow()
        return y

    def _holds(self, cache: Any) -> bool:
        """Whether a cache has tokens of one sequence for this block, as it keeps them itself."""
        plain, layers = _plain(), getattr(cache, "layers", ())
        if type(cache) is not plain[0] or cache.offloading or self._number >= len(layers):
            return False
        layer = layers[self._number]
        if type(layer) not in (plain[1], _growing()) or not layer.is_initialized:
            return False
        keys, values = layer.keys, layer.values
        return (
            keys.dim() == 4
            and keys.shape == values.shape
            and keys.shape[:2] == (1, self._heads)
            and keys.shape[3] * self._heads == self._width
            and keys.dtype is values.dtype is torch.float32
            and keys.device.type == values.device.type == "cpu"
        )

    def _as_it_was(self) -> bool:
        """Whether the block's parts are those it was made with, and no hook is among them."""
        parts = _parts(self._block)
        return (
            parts == self._parts
            and [type(part) for part in parts] == self._kinds
            and self._block.attn.config._attn_implementation in ("sdpa", "eager")
            and not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
            and not any(_overheard(part.__dict__) for part in parts)
            and self._vectors_fit()
        )

    def _vectors_fit(self) -> bool:
        """Whether norms and biases can be used where they lie now, which may not be where they lay before."""
        norms = [part._parameters for part in (self._block.ln_1, self._block.ln_2)]
        found = [norm[name] for norm in norms for name in ("weight", "bias")]
        found += [part._parameters["bias"] for part in _layers(self._block)]
        seen = [v if v is None else (v.data_ptr(), v.dtype, v.shape) for v in found]
        if seen == self._seen:
            return True
        self._seen = []
        lengths = [self._width] * 4 + [matrix.shape[0] for matrix in self._matrices]
        for vector, length in zip(found, lengths, strict=True):
            if vector is not None and not _usable(vector, length):
                return False
        if None in seen[:4]:
            return False
        places = [None if vector is None else vector.data_ptr() for vector in found]
        for norm, at, module in zip(self._layout.norms, (0, 2), (self._block.ln_1, self._block.ln_2), strict=True):
            norm.weight, norm.bias, norm.epsilon = places[at], places[at + 1], module.eps
        for name, place in zip(("qkv_bias", "out_bias", "up_bias", "down_bias"), places[4:], strict=True):
            setattr(self._layout, name, place)
        self._seen = seen
        return True


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
