"""The records that pass between the parts of the pipeline. All are frozen; none knows a file or an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

if TYPE_CHECKING:  # allocators use these records and must not need torch
    from torch import Tensor

Progress = Callable[[Sequence[Any], str], Iterable[Any]]  # wraps a loop and shows how far it is; title second
Kind = Literal["linear", "conv1d", "embedding"]
Part = Literal["attention", "mlp", "embedding", "head", "other"]
LONGEST_CALIBRATION_WINDOW = 1024  # tokens


class NashSwarmError(Exception):
    """An error that a user can act on: it names the culprit (key, tensor, file), what came, and the fix."""


class InputError(NashSwarmError):
    """What the user handed in (a model, a text, a setting) cannot be used as it is."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One weight matrix of the model, in canonical orientation (out, in); a tied matrix is one TensorSpec.

    An embedding's rows are its tokens: (vocabulary, width), the orientation of the head that may be tied to it.
    """

    name: str  # the parameter's name in the model, e.g. transformer.h.0.attn.c_attn.weight
    shape: tuple[int, int]  # (out, in)
    kind: Kind  # of the module that owns it; conv1d is stored (in, out)
    part: Part
    layer: int | None  # index of the transformer block, None outside of the blocks
    tied: tuple[str, ...] = ()  # further names of the same matrix
    linear: bool = False  # whether isinstance(module, nn.Linear) finds it, under any of its names

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """A parameter that is no matrix (norms, biases): kept as fp16 and counted."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """Every parameter of a model, in the order in which the pipeline visits them."""

    architecture: str  # class name, e.g. GPT2LMHeadModel
    context: int  # longest window in tokens
    vocabulary: int
    head: str  # name of the matrix that makes logits of the last hidden states
    layers: int
    tensors: tuple[TensorSpec, ...]
    vectors: tuple[VectorSpec, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied matrix counted once."""
        return sum(t.weights for t in self.tensors) + sum(int(np.prod(v.shape)) for v in self.vectors)

    @property
    def calibration_window(self) -> int:
        """Tokens of a window of calibration text."""
        return min(self.context, LONGEST_CALIBRATION_WINDOW)

    def scope(self, scope: str) -> tuple[TensorSpec, ...]:
        """The matrices that a method quantizes: 'linear' is what isinstance(nn.Linear) finds, 'all' is all.

        What is neither in a block nor embedding nor head (OPT-350M's two projections) is kept as it is.
        """
        return tuple(t for t in self.tensors if t.part != "other" and (scope == "all" or t.linear))


@dataclass(frozen=True, slots=True)
class TokenizedSplit:
    """A split as token ids of one model's tokenizer.

    The texts of the paper's protocol are the concatenation `text_ids`, cut at `text_ends`; `text_lengths` are in
    characters, after strip().
    """

    ids: np.ndarray  # int32 [tokens], the joined split
    text_ids: np.ndarray  # int32 [sum of the texts' tokens]
    text_ends: np.ndarray  # int64 [texts]
    text_lengths: np.ndarray  # int64 [texts]

    def text(self, index: int) -> np.ndarray:
        """Token ids of one text, int32."""
        start = int(self.text_ends[index - 1]) if index else 0
        return self.text_ids[start : int(self.text_ends[index])]


@dataclass(frozen=True, slots=True)
class Candidates:
    """What each piece of a tensor (a player: the whole matrix, or a tile) can buy.

    Options are in rising precision: bytes rise and distortion falls along a row.
    """

    options: np.ndarray  # float64 [options]: a width in bits, or log2 of the step factor, negated
    size: np.ndarray  # float64 [players, options], bytes, side information included
    distortion: np.ndarray  # float64 [players, options], predicted rise in loss, nats per token
    continuous: bool  # whether options between two neighbours exist
    weights: np.ndarray  # int64 [players]
    per_strip: int = 1  # tiles side by side in a strip of rows
    whole: bool = False  # the one player is the matrix, which has one width
    team: str | None = None  # matrices of one team buy one width, together; those must be whole


@dataclass(frozen=True, slots=True)
class Offer:
    """What one tensor brings to the allocator.

    `importance` is the flattened importance map (float32, out * in), for allocators that rank single weights;
    `candidates` are for those that weigh distortion against bytes.
    """

    tensor: TensorSpec
    importance: np.ndarray | None = None
    candidates: Candidates | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What the allocator bought for one tensor: one width, or classes of weights split by importance."""

    bits: int | None = None
    classes: tuple[int, ...] = ()  # bits of each class, in rising importance
    thresholds: tuple[float, ...] = ()  # importance at which the next class begins (len(classes) - 1)
    step: float | None = None  # log2 of the factor on a coded tensor's steps
    size: float | None = None  # bytes expected of a coded tensor's codes
    slope: float | None = None  # bytes more that steps finer by an octave take
    tiles: tuple[str, ...] = ()  # a digit per tile: its width in bits; one string for each strip of rows


@dataclass(frozen=True, slots=True)
class Allocation:
    """The bits of every tensor, and the certificate of the market that bought them (None where there was none)."""

    choices: Mapping[str, Choice]
    histogram: Mapping[int, int]  # bits -> weights
    price: float | None = None  # nats per byte
    largest_deviation_gain: float | None = None  # nats: what the unhappiest player could still win by another option
    duality_gap: float | None = None  # nats: predicted distortion minus the continuous optimum's at the same bytes
    predicted_rise: float | None = None  # nats per token
    asked_bytes: int | None = None  # the budget, for the whole packed model
    bought_bytes: int | None = None  # of the packed files, as written


@dataclass(frozen=True, slots=True)
class Statistics:
    """What calibration says of one matrix W, all averaged over calibration tokens.

    As a projection y = W x: the inputs' second moment and the outputs' Fisher information. As a table whose rows are
    looked up: how often each row is, and the Fisher information of the looked-up values. A tied matrix has both. The
    rise in loss that an error E of W causes, in nats per token, is then

        1/2 sum_r fisher_r (E second_moment E^T)_rr + 1/2 sum_r frequency_r (E lookup_moment E^T)_rr
    """

    second_moment: np.ndarray | None = None  # float32 [in, in], E[x x^T]
    fisher: np.ndarray | None = None  # float32 [out], E[(d loss / d y)^2] in nats^2, labels drawn from the model
    gradient_moment: np.ndarray | None = None  # float32 [out, out], E[g g^T], g = d loss / d y; None for a head
    frequency: np.ndarray | None = None  # float32 [out], lookups of each row per token
    lookup_moment: np.ndarray | None = None  # float32 [in, in], as gradient_moment, of the values looked up

    def arrays(self) -> dict[str, np.ndarray]:
        """Those that there are, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Job:
    """All that a codec may look at to encode one tensor."""

    tensor: TensorSpec
    weight: Tensor  # float32 [out, in]
    choice: Choice
    importance: Tensor | None = None  # float32 [out, in], where the choice has classes
    statistics: Statistics | None = None  # where they were asked for and exist


@dataclass(frozen=True, slots=True)
class Tuning:
    """How all codes of a model are trained together once they are rounded, see `tuning`."""

    steps: int
    tokens: int  # of text, in each step
    rate: float | None  # the largest by which a step may move a code, about, in steps of its grid; None: by the rule


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor as it lies on disk: named arrays of raw numbers and the few scalars that decoding needs.

    The keys of `arrays` are the parts that the report adds up: codes, scales, zeros, map, tables, source.
    """

    codec: str
    shape: tuple[int, int]
    arrays: Mapping[str, np.ndarray]
    scalars: Mapping[str, int] = field(default_factory=dict)
    shared: Mapping[str, np.ndarray] = field(
        default_factory=dict
    )  # arrays that all tensors of the model have in common

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All of it but its shape, as arrays."""
        groups = {"arrays": self.arrays, "scalars": self.scalars, "shared": self.shared}
        named = {f"{group}.{k}": np.asarray(v) for group, items in groups.items() for k, v in items.items()}
        return {**named, "codec": np.frombuffer(self.codec.encode(), np.uint8)}

    @classmethod
    def from_arrays(cls, tensor: TensorSpec, kept: Mapping[str, np.ndarray]) -> Self:
        """Inverse of `to_arrays`."""

        def group(name: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(f"{name}."): v for k, v in kept.items() if k.startswith(f"{name}.")}

        scalars = {k: v.item() for k, v in group("scalars").items()}
        return cls(kept["codec"].tobytes().decode(), tensor.shape, group("arrays"), scalars, group("shared"))

    def expect(self, numbers: Collection[str], /, **arrays: tuple[str, tuple[int | None, ...]]) -> None:
        """Raise InputError unless it holds these integers and arrays, each of this dtype and shape, and no others.

        A length of None may be any. What a codec reads of a shared array is checked as an array of the tensor's own.
        """
        found = {**self.shared, **self.arrays}
        if found.keys() != arrays.keys() or self.scalars.keys() != {*numbers}:
            held, wanted = (", ".join(sorted({*a, *b})) for a, b in ((found, self.scalars), (arrays, numbers)))
            raise InputError(f"codec {self.codec} stores {wanted or 'nothing'}, but here are {held or 'nothing'}")
        for part, (dtype, shape) in arrays.items():
            lengths = found[part].shape
            fits = len(lengths) == len(shape) and all(b in (a, None) for a, b in zip(lengths, shape, strict=True))
            if found[part].dtype != dtype or not fits:
                any_length = ["any" if length is None else length for length in shape]
                raise InputError(f"{part} are {found[part].dtype} {list(lengths)}, expected {dtype} {any_length}")
        for key, value in self.scalars.items():
            if type(value) is not int:
                raise InputError(f"{key} is {value!r}, expected an integer")


@dataclass(frozen=True, slots=True)
class PeerJob:
    """All that another tool may look at to quantize a model."""

    directory: Path  # the original's config, safetensors and tokenizer
    index: ModelIndex
    ids: np.ndarray  # int32 [tokens], the calibration split
    context: int  # tokens per calibration window
    threads: int

    @property
    def inside(self) -> tuple[TensorSpec, ...]:
        """The matrices of the transformer blocks: what most tools quantize, and all that they do."""
        return tuple(t for t in self.index.tensors if t.layer is not None)


@dataclass(frozen=True, slots=True)
class PeerWeights:
    """What another tool made of a model's matrices. What is in neither, it left as it was."""

    matrices: Mapping[str, Tensor]  # parameter's name -> float32 [out, in], decoded from what is stored
    parts: Mapping[str, int]  # bytes stored for these matrices: codes, scales, zeros, ..., headers
    version: str
    notes: tuple[str, ...] = ()  # what a reader of its figures should know
