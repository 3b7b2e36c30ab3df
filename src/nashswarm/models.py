"""Checkpoints on disk: what may be loaded, which tensors a model has, and their weights in canonical orientation.

Only safetensors are read. Weights are taken one tensor at a time; a whole model is built only where it must run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nashswarm.artifacts import COMPANIONS, PICKLES, REMOTE_CODE, asking_for_code
from nashswarm.devices import resolve
from nashswarm.types import InputError, Kind, ModelIndex, Part, Progress, TensorSpec, VectorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FLOATS = {"F64", "F32", "F16", "BF16"}
INDEX = "model.safetensors.index.json"


# --- what lies in a model directory --------------------------------------------------------------------------------


def checkpoint_files(directory: Path) -> tuple[str, ...]:
    """The files of a model directory that the project uses, sorted: weights and companions.

    Raises InputError where the directory, its config.json or its safetensors are missing, where shards or links leave
    the directory, and where a config asks for remote code.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such model directory; check `path` under `models` in params.yaml")
    companions = [name for name in COMPANIONS if (directory / name).is_file()]
    for name in (*companions, INDEX):
        if _leaves(directory, name):
            raise InputError(
                f"{directory / name}: a link that leaves the directory; that is refused, copy what it points to"
            )
    _read_json(directory / "config.json")
    if asking := asking_for_code(directory):
        raise InputError(f"{asking}: `{REMOTE_CODE}` asks to run code from the checkpoint; that is refused")
    weights = _weight_files(directory)
    for name in weights:
        _confined(directory, name)
    return tuple(sorted({*weights, *companions}))


def _weight_files(directory: Path) -> list[str]:
    index = directory / INDEX
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(v, str) for v in shards.values()):
            raise InputError(f"{index}: no `weight_map`; download the checkpoint again")
        return [index.name, *sorted(set(shards.values()))]
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{directory}: only pickled weights ({pickles[0]}), which can run code when opened and are refused; "
            "save the model with `save_pretrained(directory, safe_serialization=True)`"
        )
    raise InputError(f"{directory}: neither model.safetensors nor model.safetensors.index.json is there")


def _confined(directory: Path, name: str) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or len(pure.parts) != 1 or "\\" in name or pure.parts[0] == ".." or _leaves(directory, name):
        raise InputError(f"{directory}: shard name {name!r} leaves the directory; that is refused")
    if not (directory / name).is_file():
        raise InputError(f"{directory / name}: this shard is named by the index but missing; download it again")


def _leaves(directory: Path, name: str) -> bool:
    """Whether a file of the directory is a link to somewhere else."""
    path = directory / name
    return path.is_symlink() and not path.resolve().is_relative_to(directory.resolve())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; a model directory needs it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object")
    return document


# --- which tensors a model has -------------------------------------------------------------------------------------


def skeleton(directory: Path) -> PreTrainedModel:
    """The model's modules without memory for weights (on the meta device), heads tied as the config says."""
    from transformers import AutoModelForCausalLM

    config = config_of(directory)
    with _building(directory), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def config_of(directory: Path) -> Any:
    """The model's configuration, as transformers understands it."""
    from transformers import AutoConfig

    with _building(directory):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def context_of(directory: Path) -> int:
    """The model's longest window in tokens, from its config alone."""
    config = config_of(directory)
    with _building(directory):
        return int(config.max_position_embeddings)


def padding_token(config: Any) -> int:
    """The token that the paper's protocol pads with: the end of a text.

    Raises InputError where the config names none, or one that is not in its vocabulary.
    """
    value = config.eos_token_id
    if value is None or value == []:
        raise InputError("config.json: no eos_token_id; the paper's protocol pads with it, so name one")
    token = int(value if isinstance(value, int) else value[0])
    if not 0 <= token < config.vocab_size:
        raise InputError(
            f"config.json: eos_token_id {token} is not in the vocabulary of {config.vocab_size}; name the tokenizer's, "
            "with which the paper's protocol pads"
        )
    return token


@contextmanager
def _building(directory: Path) -> Iterator[None]:
    """What transformers raises at a config that it cannot use, as an InputError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (AttributeError, ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise InputError(f"{directory / 'config.json'}: transformers cannot build this model: {error}") from error


def describe(directory: Path) -> ModelIndex:
    """List every parameter in the model's own order; a tied matrix once, under its first name.

    Raises InputError for an architecture that would be measured or packed wrongly.
    """
    model = skeleton(directory)
    _check_supported(model)
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    blocks = block_path(model)
    tensors, vectors = [], []
    for first, *others in names.values():
        shape = tuple(parameters[first].shape)
        if len(shape) == 2:
            tensors.append(_tensor_spec(model, first, others, shape, blocks))
        else:
            vectors.append(VectorSpec(first, shape))
    config = model.config
    return ModelIndex(
        architecture=type(model).__name__,
        context=int(config.max_position_embeddings),
        vocabulary=int(config.vocab_size),
        head=_head_name(model, names),
        layers=len(model.get_submodule(blocks)),
        tensors=tuple(tensors),
        vectors=tuple(vectors),
    )


def _check_supported(model: PreTrainedModel) -> None:
    """Raise InputError where blocks are called with other things than the first, logits are more than head times
    states, or weights are in other places than modules that multiply or look up."""
    config, name = model.config, type(model).__name__
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if len(kinds) > 1:
        raise InputError(f"{name}: blocks of several kinds ({', '.join(kinds)}) are not supported")
    for key in ("logits_scaling", "logit_scale", "final_logit_softcapping"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise InputError(f"{name}: {key} {getattr(config, key)} changes what the head gives; that is not supported")
    for parameter, value in model.named_parameters():
        owner = model.get_submodule(parameter.rpartition(".")[0])
        multiplies = isinstance(owner, nn.Embedding | nn.Linear) or type(owner).__name__ == "Conv1D"
        if value.dim() > 2 or (value.dim() == 2 and not multiplies):
            raise InputError(
                f"{name}: {parameter} of shape {list(value.shape)} belongs to no Embedding, Linear or Conv1D (routed "
                "experts are stored so); that is not supported"
            )


def _head_name(model: PreTrainedModel, names: dict[int, list[str]]) -> str:
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise InputError(f"{type(model).__name__}: a head that is one matrix without bias is needed")
    return names[id(head.weight)][0]


def block_path(model: nn.Module) -> str:
    """The name of the list of transformer blocks, e.g. transformer.h. Raises InputError where there is none."""
    lists = [(len(m), n) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise InputError(
            f"{type(model).__name__}: no list of transformer blocks found; this architecture is not supported"
        )
    longest: tuple[int, str] = max(lists, key=lambda pair: (pair[0], -len(pair[1])))
    return longest[1]


def _tensor_spec(model: nn.Module, name: str, others: list[str], shape: tuple[int, ...], blocks: str) -> TensorSpec:
    owner = model.get_submodule(name.rpartition(".")[0])
    kind = _kind(owner)
    inside = re.match(re.escape(blocks) + r"\.(\d+)\.", name)
    owners = [owner, *(model.get_submodule(n.rpartition(".")[0]) for n in others)]
    return TensorSpec(
        name=name,
        shape=(shape[1], shape[0]) if kind == "conv1d" else (shape[0], shape[1]),
        kind=kind,
        part=_part(name, kind, bool(inside)),
        layer=int(inside[1]) if inside else None,
        tied=tuple(others),
        linear=any(isinstance(m, nn.Linear) for m in owners),
    )


def _kind(owner: nn.Module) -> Kind:
    if isinstance(owner, nn.Embedding):
        return "embedding"
    return "conv1d" if type(owner).__name__ == "Conv1D" else "linear"


def _part(name: str, kind: Kind, inside: bool) -> Part:
    if kind == "embedding":
        return "embedding"
    if not inside:
        return "head" if "lm_head" in name else "other"
    return "attention" if re.search(r"attn|attention", name) else "mlp"


# --- weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """Reads single tensors of a model directory."""

    directory: Path
    keys: dict[str, tuple[str, str]]  # parameter's name -> (file, key in the file)

    @classmethod
    def open(cls, directory: Path, index: ModelIndex) -> Checkpoint:
        """Find every parameter of `index` in the files. Raises InputError for one that is missing or misshapen."""
        found: dict[str, tuple[str, str]] = {}
        stored: dict[str, Any] = {}
        for name in _safetensors(directory):
            with _safe_open(directory / name) as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    found[key], stored[key] = (name, key), file.get_slice(key)
        matrices = [((t.name, *t.tied), t.shape[::-1] if t.kind == "conv1d" else t.shape) for t in index.tensors]
        keys = {}
        for names, shape in [*matrices, *(((v.name,), v.shape) for v in index.vectors)]:
            key = _find_key(names, found, directory)
            check_shape(directory, key, tuple(stored[key].get_shape()), shape)
            if stored[key].get_dtype() not in FLOATS:
                raise InputError(f"{directory / found[key][0]}: {key} is {stored[key].get_dtype()}, no float")
            keys[names[0]] = found[key]
        return cls(directory, keys)

    def tensor(self, spec: TensorSpec) -> Tensor:
        """The matrix in canonical orientation, float32 [out, in], contiguous."""
        weight = self.read(spec.name)
        return weight.T.contiguous() if spec.kind == "conv1d" else weight

    def vector(self, spec: VectorSpec) -> Tensor:
        """The parameter, float32."""
        return self.read(spec.name)

    def read(self, name: str) -> Tensor:
        """A parameter as it is stored, float32. Raises InputError for values that are not finite."""
        file_name, key = self.keys[name]
        with _safe_open(self.directory / file_name) as file:
            return _finite(self.directory / file_name, key, file.get_tensor(key))


def check_finite(directory: Path, progress: Progress) -> None:
    """Read every vector and matrix once. Raises InputError for the first that holds a NaN or an infinity.

    What has another number of dimensions is no parameter but a mask, or its -inf; `Checkpoint.read` checks all that
    is used.
    """
    for name in _safetensors(directory):
        with _safe_open(directory / name) as file:
            for key in progress(list(file.keys()), f"check {name}"):
                piece = file.get_slice(key)
                if piece.get_dtype() in FLOATS and len(piece.get_shape()) in (1, 2):
                    _finite(directory / name, key, file.get_tensor(key))


def _finite(path: Path, key: str, stored: Tensor) -> Tensor:
    value = stored.float()
    if not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise InputError(f"{path}: {key} holds {bad} NaN or infinite values; save or download the checkpoint again")
    return value


def _safetensors(directory: Path) -> list[str]:
    return [name for name in checkpoint_files(directory) if name.endswith(".safetensors")]


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); download or save it again") from error


def _find_key(names: tuple[str, ...], found: dict[str, Any], directory: Path) -> str:
    """A checkpoint may leave out the name of the inner model ('transformer.', 'model.') or have one more of it."""
    for name in names:
        inner = name.partition(".")[2]
        for candidate in (name, inner, f"model.{name}"):
            if candidate in found:
                return candidate
    raise InputError(f"{directory}: the checkpoint has no weights for {names[0]}; is it for this config.json?")


def check_shape(directory: Path, key: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise InputError for a parameter of another shape than the model's."""
    if got != expected:
        raise InputError(f"{directory}: {key} has shape {list(got)}, but config.json says {list(expected)}")


def build_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that config.json describes, heads tied, with memory for weights that nothing was written to."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with _building(directory):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # what comes of it holds plain weights, and is saved as such
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


def fill(model: PreTrainedModel, directory: Path, weights: Iterator[tuple[str, Tensor]]) -> PreTrainedModel:
    """Give a model these weights: (parameter's name, canonical tensor), each exactly once; they take its dtype.

    Raises InputError where a parameter got no weights (nothing is ever left at random), or such as do not fit it.
    """
    missing = {id(p): n for n, p in model.named_parameters()}
    for name, value in weights:
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            raise InputError(f"{directory}: config.json describes a model that has no parameter {name}") from None
        stored = value.T if value.dim() == 2 and is_transposed(model, name) else value
        check_shape(directory, name, tuple(stored.shape), tuple(parameter.shape))
        parameter.data.copy_(stored)
        if missing.pop(id(parameter), None) is None:
            raise InputError(f"{directory}: weights for {name} came twice")
    if missing:
        raise InputError(f"{directory}: no weights came for {', '.join(sorted(missing.values())[:3])}")
    return model.requires_grad_(False)


def is_transposed(model: nn.Module, name: str) -> bool:
    """Whether the module that owns a matrix stores it (in, out)."""
    return _kind(model.get_submodule(name.rpartition(".")[0])) == "conv1d"


def load_model(
    directory: Path, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model in evaluation mode with these weights, as `fill` takes them."""
    return fill(build_model(directory, dtype), directory, weights)


def load_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> PreTrainedModel:
    """As `load_model`, from named arrays."""
    return load_model(directory, ((name, torch.from_numpy(array)) for name, array in arrays.items()))


def load_original(directory: Path, index: ModelIndex) -> PreTrainedModel:
    """The checkpoint's own model, float32."""
    checkpoint = Checkpoint.open(directory, index)
    tensors = ((t.name, checkpoint.tensor(t)) for t in index.tensors)
    vectors = ((v.name, checkpoint.vector(v)) for v in index.vectors)
    return load_model(directory, (pair for group in (tensors, vectors) for pair in group))


class BlockWeights:
    """The matrices of a transformer block, read when it runs or is held, and forgotten when neither is the case."""

    def __init__(
        self,
        block: nn.Module,
        matrices: Mapping[str, nn.Parameter],
        read: Callable[[str], Tensor],
        device: torch.device,
    ) -> None:
        self.matrices, self.read, self.users, self.device = matrices, read, 0, device
        self._forget()
        block.register_forward_pre_hook(lambda *_: self.hold())
        block.register_forward_hook(lambda *_: self.drop(), always_call=True)

    def hold(self) -> None:
        """Keep them in memory until as many calls of `drop`; what was written to them lasts as long."""
        if not self.users:
            for name, parameter in self.matrices.items():
                parameter.data = self.read(name)
        self.users += 1

    def drop(self) -> None:
        """The opposite of `hold`."""
        self.users -= 1
        if not self.users:
            self._forget()

    def _forget(self) -> None:
        for parameter in self.matrices.values():  # NaN, of the right shape, without memory: use would show
            one = torch.full((1, 1), torch.nan, dtype=parameter.dtype, device=self.device)
            parameter.data = one.expand(parameter.shape)


def load_streamed(
    directory: Path,
    index: ModelIndex,
    read: Callable[[str], Tensor] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> PreTrainedModel:
    """As `load_original`, fused, but with a block's matrices in memory only while it runs or its `streamed` holds them.

    Arguments: `read`, a parameter's name -> float32, contiguous, as the model stores it; else the checkpoint's;
    `device`, as params name it, and `dtype`, torch's name, of what it computes with.
    """
    stored, model = read or Checkpoint.open(directory, index).read, fuse(build_model(directory, getattr(torch, dtype)))
    place = resolve(device)

    def placed(name: str) -> Tensor:
        return stored(name).to(place, model.dtype)

    for buffer in model.buffers():
        buffer.data = buffer.data.to(place)
    blocks: list[dict[str, nn.Parameter]] = [{} for _ in range(index.layers)]
    for tensor in index.tensors:
        if tensor.layer is not None:
            blocks[tensor.layer][tensor.name] = model.get_parameter(tensor.name)
    for name in (*(t.name for t in index.tensors if t.layer is None), *(v.name for v in index.vectors)):
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(place).copy_(placed(name))
    for block, matrices in zip(model.get_submodule(block_path(model)).children(), blocks, strict=True):
        block.streamed = BlockWeights(block, matrices, placed, place)
    return model.requires_grad_(False)


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Let tanh's approximation of GELU be one step, where transformers takes eight: a third of a GPT-2 block's time."""
    from transformers.activations import FastGELUActivation, NewGELUActivation

    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation | FastGELUActivation):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.GELU("tanh"))
    return model


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, from local files alone."""
    from transformers import AutoTokenizer

    # transformers makes an empty tokenizer, in silence, for some architectures whose files are missing.
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise InputError(f"{directory}: no tokenizer.json, vocab.json or tokenizer.model; save the tokenizer there too")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{directory}: transformers cannot load a tokenizer from here: {error}") from error
