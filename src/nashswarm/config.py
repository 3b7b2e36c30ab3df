"""params.yaml -> frozen dataclasses. Every mistake is an error that names the key, what came, and the fix.

This module alone knows how params are spelt; no library function opens params.yaml. A method's settings belong to the
allocator and the codec that it names: each of these files declares a frozen dataclass `Settings`, and the method's
keys are handed to the one that knows them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml

from nashswarm.types import NashSwarmError

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
METHOD_KEYS = ("codec", "scope", "accounting", "importance", "allocator")
BENCHMARKS = ("kernels", "decode", "packing", "quantization")
ENGINES = ("local", "ray")
DEVICES = ("auto", "cpu", "cuda", "mps")
ON_DEVICES = ("score", "baseline", "pack", "evaluate")  # the stages that run models
DTYPES = ("float32", "bfloat16")
HEAD = 64  # width of the heads of models that are benchmarked by LAYERSxWIDTH
BENCHMARK_FOLDER = "benchmarks"  # in metrics, beside those of the models


class ConfigError(NashSwarmError):
    """params.yaml asks for something that cannot be; the message names the key."""


# --- the blocks of params.yaml -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from: `embedded` (data/reference), `hub` (id, revision) or `path` (a local directory)."""

    source: str
    id: str | None = None
    revision: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        _check_source(self.source, {"hub": ("id", "revision"), "path": ("path",), "embedded": ()}, self)


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """Where a corpus comes from: `embedded`, `hub` (id, config, revision) or `path` (a text file for each split)."""

    source: str
    id: str | None = None
    config: str | None = None
    revision: str | None = None
    calibration: str | None = None
    validation: str | None = None
    test: str | None = None

    def __post_init__(self) -> None:
        needs = {"hub": ("id", "config", "revision"), "path": (), "embedded": ()}
        _check_source(self.source, needs, self, ("calibration", "validation", "test"))


@dataclass(frozen=True, slots=True)
class Scoring:
    """How the statistics of the original model are gathered."""

    tokens: int = 16384  # calibration tokens, taken from the start of the calibration split
    batch_tokens: int = 2048  # tokens per forward pass; bounds memory
    seed: int = 0  # of the labels that the model samples for its Fisher information
    dtype: str = "float32"  # of DTYPES, in which the model runs; sums are float32 and wider

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: '{self.dtype}' is unknown{_suggest(self.dtype, DTYPES)}")
        _at_least("tokens", self.tokens, 64)
        _at_least("batch_tokens", self.batch_tokens, 1)
        _at_least("seed", self.seed, 0)


@dataclass(frozen=True, slots=True)
class PaperProtocol:
    """The paper's evaluation: single padded texts."""

    texts: tuple[int, ...] = (20, 30, 50, 100)  # sample counts N; the first is the headline
    all_texts: bool = False  # all texts of the split as one more count
    length: int = 64  # tokens; longer texts are cut, shorter ones padded with EOS
    longer_than: int = 20  # characters of a text after strip(), exclusive

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("texts: at least one sample count is needed")
        _at_least("texts", min(self.texts), 1)
        _at_least("length", self.length, 2)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a quantized model is compared with the original."""

    context: int = 1024  # tokens per window at most; the model's own context if that is shorter
    batch_tokens: int = 2048  # tokens per forward pass; does not change results beyond rounding
    resamples: int = 2000  # of the paired block bootstrap
    block: int = 8  # contiguous windows per bootstrap block
    seed: int = 0
    paper: PaperProtocol = field(default_factory=PaperProtocol)

    def __post_init__(self) -> None:
        _at_least("context", self.context, 2)
        _at_least("batch_tokens", self.batch_tokens, 1)
        _at_least("resamples", self.resamples, 2000)
        _at_least("block", self.block, 1)
        _at_least("seed", self.seed, 0)


@dataclass(frozen=True, slots=True)
class Report:
    """How the report looks, and what it shows that this run need not have made: tracked metrics by name."""

    dpi: int = 120
    peers: tuple[str, ...] = ()  # measured once, shown wherever the original and the texts are the same
    methods: tuple[str, ...] = ()  # of ours, shown beside the peers alone

    def __post_init__(self) -> None:
        _at_least("dpi", self.dpi, 30)
        for key in ("peers", "methods"):
            _unique(key, getattr(self, key))


@dataclass(frozen=True, slots=True)
class DecodeBenchmark:
    """A model of GPT-2's make with random weights, and how much it writes. The defaults are GPT-2 XL."""

    layers: int = 48
    width: int = 1600
    heads: int = 25
    vocabulary: int = 50257
    prompt: int = 128  # tokens before the first one that is written
    tokens: int = 16  # written behind the first one, in each round

    def __post_init__(self) -> None:
        for key in ("layers", "width", "heads", "prompt", "tokens"):
            _at_least(key, getattr(self, key), 1)
        _at_least("vocabulary", self.vocabulary, 2)
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide a width of {self.width}; change one of them")


@dataclass(frozen=True, slots=True)
class PackingBenchmark:
    """How many codes are packed, by width in bits, and how many are entropy-coded. The latter are GPT-2 124M's."""

    widths: tuple[int, ...] = (2, 3, 4, 8)
    codes: int = 16_777_216
    coded: int = 124_000_000

    def __post_init__(self) -> None:
        if not self.widths or not {*self.widths} <= {*range(1, 17)}:
            raise ValueError(f"widths: {list(self.widths)}; give one or more from 1 to 16 bits")
        _unique("widths", self.widths)
        _at_least("codes", self.codes, 1)
        _at_least("coded", self.coded, 1)


@dataclass(frozen=True, slots=True)
class QuantizationBenchmark:
    """Models of GPT-2's make with random weights, as LAYERSxWIDTH, and what they are quantized to."""

    models: tuple[str, ...] = ("2x256", "4x384", "6x512")
    vocabulary: int = 50257
    tokens: int = 16384  # of calibration; random, too
    budget: float = 3.25  # true bits per weight, of the markets

    def __post_init__(self) -> None:
        _sizes("models", self.models, "LAYERSxWIDTH, e.g. 12x768")
        for text in self.models:
            if sizes(text)[1] % HEAD:
                raise ValueError(f"models: {text} is no whole number of heads of {HEAD} wide; change the width")
        _at_least("vocabulary", self.vocabulary, 2)
        _at_least("tokens", self.tokens, 1024)
        if not self.budget > 0:
            raise ValueError(f"budget: {self.budget} bits per weight; give more than 0")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What the benchmarks in active.benchmarks measure, and for how long."""

    rounds: int = 20  # in each, every contestant has its turn; times of one round are compared
    cold_mib: int = 256  # of weights that products go through in turn, so that they come from memory; above any cache
    shapes: tuple[str, ...] = ("4800x1600", "6400x1600", "1600x6400", "4096x4096", "11008x4096", "4096x11008")
    batches: tuple[int, ...] = (1, 8)  # rows of activations; the report's figure shows the first
    decode: DecodeBenchmark = field(default_factory=DecodeBenchmark)
    packing: PackingBenchmark = field(default_factory=PackingBenchmark)
    quantization: QuantizationBenchmark = field(default_factory=QuantizationBenchmark)

    def __post_init__(self) -> None:
        _at_least("rounds", self.rounds, 1)
        _at_least("cold_mib", self.cold_mib, 1)
        _sizes("shapes", self.shapes, "OUTxIN, e.g. 4096x11008")
        if not self.batches:
            raise ValueError("batches: the list is empty; name at least one number of rows")
        _unique("batches", self.batches)
        _at_least("batches", min(self.batches), 1)


@dataclass(frozen=True, slots=True)
class Compute:
    """Where it runs. Not part of what makes results stale, but late digits follow the number of threads."""

    threads: int = 2  # of each task
    engine: str = "local"  # of ENGINES
    address: str | None = None  # of a Ray cluster, "auto" for the one of this machine; None starts one
    device: Any = "cpu"  # of DEVICES: one for all, or stage -> its own; late digits follow it, too

    def __post_init__(self) -> None:
        _at_least("threads", self.threads, 1)
        if self.engine not in ENGINES:
            raise ValueError(f"engine: '{self.engine}' is unknown{_suggest(self.engine, ENGINES)}")
        if self.address is not None and self.engine != "ray":
            raise ValueError(f"address: only engine 'ray' has one, and engine is '{self.engine}'; remove it, or change")
        named = self.device if isinstance(self.device, dict) else {"": self.device}
        for stage, device in named.items():
            where = f"device.{stage}" if stage else "device"
            if stage and stage not in ON_DEVICES:
                raise ValueError(f"{where}: no stage of that name computes on devices{_suggest(stage, ON_DEVICES)}")
            if device not in DEVICES:
                raise ValueError(f"{where}: '{device}' is unknown{_suggest(str(device), DEVICES)}")

    def device_of(self, stage: str) -> str:
        """Of DEVICES; a stage that is not named computes on the processor."""
        return str(self.device.get(stage, "cpu") if isinstance(self.device, dict) else self.device)


@dataclass(frozen=True, slots=True)
class Active:
    """What a run covers: names defined in the blocks below."""

    models: tuple[str, ...]
    calibration: str
    corpora: tuple[str, ...]
    methods: tuple[str, ...]
    peers: tuple[str, ...] = ()  # other tools; none unless named: they need an environment of their own
    benchmarks: tuple[str, ...] = ()  # of BENCHMARKS; none unless named: they want a quiet machine

    def __post_init__(self) -> None:
        for key in ("models", "corpora", "methods"):
            if not getattr(self, key):
                raise ValueError(f"{key}: the list is empty; name at least one")
        for key in ("models", "corpora", "methods", "peers", "benchmarks"):
            _unique(key, getattr(self, key))
        for name in self.benchmarks:
            if name not in BENCHMARKS:
                raise ValueError(f"benchmarks: '{name}' is unknown{_suggest(name, BENCHMARKS)}")
        if self.benchmarks and BENCHMARK_FOLDER in self.models:
            raise ValueError(f"models: '{BENCHMARK_FOLDER}' is where the benchmarks' metrics lie; rename the model")


@dataclass(frozen=True, slots=True)
class Method:
    """A way to quantize: scope, importance, allocator, codec, and the settings of the latter two."""

    name: str
    codec: str
    scope: str = "all"  # linear: what isinstance(nn.Linear) finds; all: every matrix
    accounting: str = "true"  # true: bytes on disk; paper: code bits of the touched weights, beside the true ones
    importance: str = "magnitude"
    allocator: str = "uniform"
    allocator_settings: Any = None
    codec_settings: Any = None


@dataclass(frozen=True, slots=True)
class Peer:
    """Another tool to be held against, and its settings."""

    name: str
    tool: str
    settings: Any = None


@dataclass(frozen=True, slots=True)
class Params:
    """All of params.yaml."""

    active: Active
    models: Mapping[str, ModelSource]
    corpora: Mapping[str, CorpusSource]
    methods: Mapping[str, Method]
    peers: Mapping[str, Peer]
    scoring: Scoring
    evaluation: Evaluation
    report: Report
    compute: Compute
    benchmark: Benchmark = field(default_factory=Benchmark)

    @property
    def corpora_needed(self) -> tuple[str, ...]:
        """The active corpora and the one for calibration, each once."""
        return tuple(dict.fromkeys((self.active.calibration, *self.active.corpora)))


# --- reading -------------------------------------------------------------------------------------------------------


def load_params(path: Path) -> Params:
    """Read and check the whole of params.yaml. Raises ConfigError at the first thing that cannot be."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; run from the project's root, or pass the file to use")
    return parse_params(_read_yaml(path))


def parse_params(raw: object) -> Params:
    """As `load_params`, from the parsed document."""
    blocks = _mapping(raw, "params.yaml")
    _known_keys(blocks, [f.name for f in dataclasses.fields(Params)], "")
    for key in ("active", "models", "corpora", "methods"):
        if key not in blocks:
            raise ConfigError(f"{key}: this block is missing from params.yaml")
    params = Params(
        active=build(Active, blocks["active"], "active"),
        models={n: build(ModelSource, v, f"models.{n}") for n, v in _named(blocks["models"], "models")},
        corpora={n: build(CorpusSource, v, f"corpora.{n}") for n, v in _named(blocks["corpora"], "corpora")},
        methods={n: parse_method(n, v) for n, v in _named(blocks["methods"], "methods")},
        peers={n: parse_peer(n, v) for n, v in _named(blocks.get("peers", {}), "peers")},
        scoring=build(Scoring, blocks.get("scoring", {}), "scoring"),
        evaluation=build(Evaluation, blocks.get("evaluation", {}), "evaluation"),
        report=build(Report, blocks.get("report", {}), "report"),
        compute=build(Compute, blocks.get("compute", {}), "compute"),
        benchmark=build(Benchmark, blocks.get("benchmark", {}), "benchmark"),
    )
    _check_names(params)
    return params


def _check_names(params: Params) -> None:
    """What is active or shown is defined, and no peer has a method's name: their metrics lie side by side."""
    for key in ("models", "corpora", "methods", "peers"):
        for name in getattr(params.active, key):
            _check_defined(name, getattr(params, key), f"active.{key}", key)
    for key in ("methods", "peers"):
        for name in getattr(params.report, key):
            _check_defined(name, getattr(params, key), f"report.{key}", key)
    _check_defined(params.active.calibration, params.corpora, "active.calibration", "corpora")
    for name in params.peers:
        if name in params.methods:
            raise ConfigError(
                f"peers.{name}: a method has this name, too; their metrics would be one file, so rename it"
            )


def parse_method(name: str, raw: object) -> Method:
    """One entry of `methods`: its own keys, and the settings that its allocator and its codec declare."""
    where = f"methods.{name}"
    block = dict(_mapping(raw, where))
    if "codec" not in block:
        raise ConfigError(f"{where}.codec: missing; one of {', '.join(room_names('codecs'))}")
    own = {key: block.pop(key) for key in METHOD_KEYS if key in block}
    method = build(Method, {"name": name, **own}, where)
    _one_of(method.scope, ("linear", "all"), f"{where}.scope")
    _one_of(method.accounting, ("true", "paper"), f"{where}.accounting")
    importance = load_room("importance", method.importance, f"{where}.importance")
    allocator = load_room("allocators", method.allocator, f"{where}.allocator")
    codec = load_room("codecs", method.codec, f"{where}.codec")
    del importance  # loaded to check its name
    allocator_keys, codec_keys = _field_names(allocator.Settings), _field_names(codec.Settings)
    _known_keys(block, [*allocator_keys, *codec_keys, *METHOD_KEYS], f"{where}.")
    if allocator.BUYS not in codec.SELLS:
        raise ConfigError(
            f"{where}.allocator: '{method.allocator}' chooses {allocator.BUYS}, but codec '{method.codec}' offers "
            f"{' or '.join(codec.SELLS)}; name another allocator or codec"
        )
    method = dataclasses.replace(
        method,
        allocator_settings=build(allocator.Settings, {k: block[k] for k in allocator_keys if k in block}, where),
        codec_settings=build(codec.Settings, {k: block[k] for k in codec_keys if k in block}, where),
    )
    for bits in allocator.widths(method.allocator_settings):
        if bits not in codec.WIDTHS:
            offered = ", ".join(map(str, codec.WIDTHS)) or "no widths of its own to choose"
            raise ConfigError(f"{where}.bits: {bits} bits, but codec '{method.codec}' offers {offered}")
    return method


def parse_peer(name: str, raw: object) -> Peer:
    """One entry of `peers`: its tool, and the settings that the tool's file declares."""
    where = f"peers.{name}"
    block = dict(_mapping(raw, where))
    if "tool" not in block:
        raise ConfigError(f"{where}.tool: missing; one of {', '.join(room_names('peers'))}")
    tool = build(Peer, {"name": name, "tool": block.pop("tool")}, where).tool
    room = load_room("peers", tool, f"{where}.tool")
    return Peer(name, tool, build(room.Settings, block, where))


def load_room(room: str, name: str, where: str = "") -> ModuleType:
    """The module `nashswarm.<room>.<name>`. Raises ConfigError with the nearest name when there is none."""
    _one_of(name, room_names(room), where or room)
    return importlib.import_module(f"nashswarm.{room}.{name}")


def room_names(room: str) -> tuple[str, ...]:
    """The names that may stand in params: one for each file in the room."""
    package = importlib.import_module(f"nashswarm.{room}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__)))


def build(cls: type[T], raw: object, where: str) -> T:
    """A dataclass from a mapping: unknown keys, wrong types and broken promises are ConfigErrors with their key."""
    block = _mapping(raw, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    _known_keys(block, list(fields), f"{where}.")
    hints = typing.get_type_hints(cls)
    values = {key: _coerce(value, hints[key], f"{where}.{key}") for key, value in block.items()}
    missing = [
        n for n, f in fields.items() if n not in values and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}.{missing[0]}: missing; it has no default")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from error


# --- types, names, suggestions -------------------------------------------------------------------------------------


def _coerce(value: object, hint: Any, where: str) -> Any:
    """The value as the type that the field declares; '1e-06' counts as a float, since DVC writes it so."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _coerce(value, next(a for a in arguments if a is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _type_error(where, value, f"a list of {arguments[0].__name__}")
        return tuple(_coerce(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, where)
    if hint is Any:
        return value
    return _coerce_scalar(value, hint, where)


def _coerce_scalar(value: object, hint: Any, where: str) -> Any:
    if hint is float and not isinstance(value, bool):
        try:
            number = float(typing.cast(Any, value))
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise _type_error(where, value, "a finite number")
        return number
    if hint is int and (type(value) is int or (isinstance(value, float) and value.is_integer())):
        return int(typing.cast(Any, value))
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}[hint]
        raise _type_error(where, value, kind)
    return value


def _type_error(where: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{where}: {value!r} is {type(value).__name__}, expected {expected}")


def _mapping(raw: object, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected a block of keys, got {raw!r}")
    return raw


def _named(raw: object, where: str) -> list[tuple[str, Any]]:
    block = _mapping(raw, where)
    for name in block:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(
                f"{where}: {name!r} is no name; use letters, digits, '-' and '_' (DVC splits keys on dots)"
            )
    return list(block.items())


def _known_keys(block: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    for key in block:
        if key not in known:
            raise ConfigError(f"{prefix}{key}: unknown key{_suggest(str(key), known)}")


def _check_defined(name: str, defined: Mapping[str, object], where: str, block: str) -> None:
    if name not in defined:
        raise ConfigError(f"{where}: '{name}' is not defined under `{block}`{_suggest(name, list(defined))}")


def _one_of(value: str, allowed: Sequence[str], where: str) -> None:
    if value not in allowed:
        raise ConfigError(f"{where}: '{value}' is unknown{_suggest(value, allowed)}")


def _suggest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(known)}"


def _field_names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _check_source(
    source: str, needs: Mapping[str, tuple[str, ...]], block: Any, optional: tuple[str, ...] = ()
) -> None:
    if source not in needs:
        raise ValueError(f"source: '{source}' is unknown{_suggest(source, list(needs))}")
    for key in needs[source]:
        if getattr(block, key) is None:
            raise ValueError(f"{key}: missing; source '{source}' needs it")
    allowed = {"source", *needs[source], *(optional if source == "path" else ())}
    for key in _field_names(block):
        if key not in allowed and getattr(block, key) is not None:
            raise ValueError(f"{key}: source '{source}' has no such key; remove it")
    if source == "hub" and not re.fullmatch(r"[0-9a-f]{40}", block.revision):
        raise ValueError(f"revision: '{block.revision}' is no full commit; give all 40 hexadecimal digits")


def sizes(text: str) -> tuple[int, int]:
    """'4096x11008' -> (4096, 11008); of a text that `_sizes` has let pass."""
    first, _, second = text.partition("x")
    return int(first), int(second)


def _sizes(key: str, texts: Sequence[str], form: str) -> None:
    if not texts:
        raise ValueError(f"{key}: the list is empty; name at least one as {form}")
    for text in texts:
        if not re.fullmatch(r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}", text):
            raise ValueError(f"{key}: '{text}' is no size; write it as {form}")
    _unique(key, texts)


def _unique(key: str, names: Sequence[object]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"{key}: a name stands twice in {list(names)}")


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{key}: {value} is too small; at least {least}")


# --- YAML, strictly ------------------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """PyYAML, refusing what PyYAML and DVC's ruamel read differently: doubled keys and numbers with leading zeros."""


def _strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"line {line}: a key is a word here; write out what `<<` or a list would stand for")
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConfigError(f"{key}: stands twice (line {line}); keep one")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _strict_int(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    if re.match(r"[-+]?0[0-9_]+$", node.value):
        line = node.start_mark.line + 1
        raise ConfigError(f"{node.value}: a leading zero (line {line}) is read as octal by some; write it without")
    return int(loader.construct_yaml_int(node))


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _strict_mapping)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _strict_int)


def _read_yaml(path: Path) -> object:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
