"""params.yaml: what is accepted, and that each mistake is an error which names the key and the fix."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT

from nashswarm.config import (
    ConfigError,
    CorpusSource,
    ModelSource,
    Params,
    build,
    load_params,
    load_room,
    parse_method,
    parse_params,
    room_names,
)

REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
VALID: dict[str, Any] = {
    "active": {"models": ["m"], "calibration": "c", "corpora": ["c"], "methods": ["fp32", "u"]},
    "models": {"m": {"source": "embedded"}, "h": {"source": "hub", "id": "a/b", "revision": REVISION}},
    "corpora": {"c": {"source": "embedded"}, "files": {"source": "path", "test": "t.txt"}},
    "methods": {"fp32": {"codec": "source", "bits": 32}, "u": {"codec": "uniform", "bits": 4}},
    "scoring": {"tokens": 128},
    "evaluation": {"paper": {"texts": [20, 50]}},
}


@dataclass(frozen=True)
class Shared:
    share: float
    count: int = 1


def changed(path: str, value: Any) -> dict[str, Any]:
    """VALID with one value set, or removed where it is None."""
    document = copy.deepcopy(VALID)
    *blocks, key = path.split("/")
    place = document
    for block in blocks:
        place = place.setdefault(block, {})
    if value is None:
        del place[key]
    else:
        place[key] = value
    return document


def refusal(path: str, value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_params(changed(path, value))
    return str(caught.value)


def method_refusal(block: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_method("mine", block)
    return str(caught.value)


# --- what is accepted ----------------------------------------------------------------------------------------------


def test_params_yaml_of_the_project_is_valid() -> None:
    params = load_params(PROJECT / "params.yaml")
    assert params.active.models == ("reference",)
    assert {"fp32", "paper-uniform4", "paper-nash", "paper-swarm", "uniform4", "nash", "rtn4-g64", "rtn3-g64"} <= set(
        params.methods
    )
    assert params.methods["paper-nash"].scope == "linear"
    assert params.methods["rtn3-g64"].allocator_settings.embedding_bits == 4
    assert params.evaluation.paper.texts == (20, 30, 50, 100)


def test_defaults_fill_what_is_left_out() -> None:
    params = parse_params(VALID)
    assert isinstance(params, Params)
    assert params.scoring.tokens == 128
    assert params.scoring.batch_tokens == 2048
    assert params.evaluation.paper.length == 64
    assert params.compute.threads == 2
    assert params.methods["u"].scope == "all"


def test_a_device_is_of_all_stages_or_of_those_that_are_named() -> None:
    assert parse_params(changed("compute/device", "cuda")).compute.device_of("pack") == "cuda"
    one = parse_params(changed("compute/device", {"score": "cuda"})).compute
    assert (one.device_of("score"), one.device_of("pack")) == ("cuda", "cpu")


def test_needed_corpora_hold_the_calibration_once() -> None:
    assert parse_params(changed("active/calibration", "files")).corpora_needed == ("files", "c")
    assert parse_params(VALID).corpora_needed == ("c",)


def test_numbers_that_dvc_writes_as_text_are_floats() -> None:
    shares = parse_method("mine", {"allocator": "percentile", "codec": "classes", "shares": ["7e-01", "2e-01", 0.1]})
    assert shares.allocator_settings.shares == (0.7, 0.2, 0.1)
    assert build(Shared, {"share": "1e-06"}, "x").share == 1e-6
    assert build(Shared, {"share": 1, "count": 2.0}, "x") == Shared(1.0, 2)


def test_settings_go_to_the_allocator_and_the_codec_that_know_them() -> None:
    method = parse_method("mine", {"codec": "grouped", "bits": 3, "embedding_bits": 4, "group": 128})
    assert method.allocator_settings.bits == 3
    assert method.allocator_settings.embedding_bits == 4
    assert method.codec_settings.group == 128


def test_every_file_of_a_room_can_be_named() -> None:
    for room in ("importance", "allocators", "codecs"):
        files = {p.stem for p in (PROJECT / "src/nashswarm" / room).glob("*.py")} - {"__init__"}
        assert set(room_names(room)) == files
        for name in files:
            assert load_room(room, name).__name__ == f"nashswarm.{room}.{name}"


# --- unknown keys and names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "where", "nearest"),
    [
        ("activ", "activ", "active"),
        ("scoring/token", "scoring.token", "tokens"),
        ("evaluation/paper/lenght", "evaluation.paper.lenght", "length"),
        ("methods/u/bit", "methods.u.bit", "bits"),
        ("methods/u/scop", "methods.u.scop", "scope"),
        ("models/m/sorce", "models.m.sorce", "source"),
        ("active/model", "active.model", "models"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(path: str, where: str, nearest: str) -> None:
    message = refusal(path, "x")
    assert message.startswith(f"{where}: unknown key")
    assert f"did you mean '{nearest}'?" in message


def test_a_key_of_another_codec_is_unknown() -> None:
    assert "methods.mine.group: unknown key" in method_refusal({"codec": "uniform", "group": 64})


@pytest.mark.parametrize("key", ["name", "allocator_settings", "codec_settings"])
def test_fields_that_are_no_keys_are_unknown(key: str) -> None:
    assert f"methods.mine.{key}: unknown key" in method_refusal({"codec": "uniform", key: "x"})


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("codec", "unifrom", "uniform"),
        ("allocator", "percentil", "percentile"),
        ("importance", "magnitute", "magnitude"),
        ("scope", "linaer", "linear"),
        ("accounting", "papr", "paper"),
    ],
)
def test_unknown_names_of_a_method_are_named_with_the_nearest(key: str, value: str, nearest: str) -> None:
    message = method_refusal({"codec": "uniform", key: value})
    assert message == f"methods.mine.{key}: '{value}' is unknown; did you mean '{nearest}'?"


def test_a_name_near_nothing_lists_what_is_known() -> None:
    message = method_refusal({"codec": "zzz"})
    assert all(name in message for name in room_names("codecs"))


def test_a_method_without_codec_lists_the_codecs() -> None:
    message = method_refusal({"bits": 4})
    assert message.startswith("methods.mine.codec: missing")
    assert "grouped" in message


@pytest.mark.parametrize("key", ["models", "corpora", "methods"])
def test_active_names_must_be_defined(key: str) -> None:
    assert refusal(f"active/{key}", ["uu"]).startswith(f"active.{key}: 'uu' is not defined under `{key}`")


def test_active_calibration_must_be_defined() -> None:
    assert refusal("active/calibration", "file") == (
        "active.calibration: 'file' is not defined under `corpora`; did you mean 'files'?"
    )


@pytest.mark.parametrize("key", ["models", "corpora", "methods"])
def test_active_lists_are_neither_empty_nor_doubled(key: str) -> None:
    assert refusal(f"active/{key}", []).startswith(f"active.{key}: the list is empty")
    assert refusal(f"active/{key}", ["x", "x"]).startswith(f"active.{key}: a name stands twice")


@pytest.mark.parametrize("block", ["models", "corpora", "methods"])
@pytest.mark.parametrize("name", ["opt-1.3b", "a b", "../x", "-x", "", 7])
def test_names_bear_no_dots(block: str, name: object) -> None:
    document = copy.deepcopy(VALID)
    document[block][name] = {"source": "embedded"}
    with pytest.raises(ConfigError, match=f"^{block}: .* is no name.*DVC splits keys on dots"):
        parse_params(document)


@pytest.mark.parametrize("block", ["active", "models", "corpora", "methods"])
def test_missing_blocks_are_named(block: str) -> None:
    assert refusal(block, None).startswith(f"{block}: this block is missing")


# --- types and values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("methods/u/bits", "four", "methods.u.bits: 'four' is str, expected a whole number"),
        ("methods/u/bits", 4.5, "methods.u.bits: 4.5 is float, expected a whole number"),
        ("methods/u/bits", True, "methods.u.bits: True is bool, expected a whole number"),
        ("methods/u/bits", [4], "methods.u.bits: [4] is list, expected a whole number"),
        ("methods/u/scope", 3, "methods.u.scope: 3 is int, expected text"),
        ("models/m/source", 1, "models.m.source: 1 is int, expected text"),
        ("active/models", "m", "active.models: 'm' is str, expected a list of str"),
        ("active/models", [1], "active.models[0]: 1 is int, expected text"),
        ("evaluation/paper", 5, "evaluation.paper: expected a block of keys, got 5"),
        ("scoring", [1], "scoring: expected a block of keys, got [1]"),
        ("methods/u", "uniform", "methods.u: expected a block of keys, got 'uniform'"),
        ("models", ["m"], "models: expected a block of keys, got ['m']"),
    ],
)
def test_wrong_types_name_key_value_and_type(path: str, value: object, message: str) -> None:
    assert refusal(path, value) == message


def test_a_share_that_is_no_number_is_refused() -> None:
    block = {"allocator": "percentile", "codec": "classes", "bits": [2, 4, 8]}
    for share, kind in (("x", "str"), (True, "bool"), (None, "NoneType"), ([1], "list")):
        message = method_refusal(block | {"shares": [0.7, share, 0.1]})
        assert message == f"methods.mine.shares[1]: {share!r} is {kind}, expected a finite number"


def test_shares_that_are_nan_are_refused() -> None:
    block = {"allocator": "percentile", "codec": "classes", "bits": [2, 4, 8]}
    for share in (float("nan"), float("inf"), "nan"):
        message = method_refusal(block | {"shares": [share, 0.2, 0.1]})
        assert message.startswith(f"methods.mine.shares[0]: {share!r} is ")
        assert message.endswith("expected a finite number")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": [0.7, 0.2, 0.2]}, "methods.mine.shares: [0.7, 0.2, 0.2] sum to 1.1, not to 1"),
        ({"shares": [0.5, 0.5]}, "methods.mine.shares: 2 shares for 3 widths"),
        ({"shares": [1.2, -0.3, 0.1]}, "methods.mine.shares: [1.2, -0.3, 0.1] holds a negative share"),
        ({"sample": 0}, "methods.mine.sample: 0 is too small"),
        ({"seed": -1}, "methods.mine.seed: -1 is too small; at least 0"),
    ],
)
def test_impossible_shares_are_refused(settings: dict[str, object], message: str) -> None:
    assert message in method_refusal({"allocator": "percentile", "codec": "classes", "bits": [2, 4, 8], **settings})


@pytest.mark.parametrize("codec", ["uniform", "grouped", "gptq", "classes", "source"])
def test_bits_that_a_codec_does_not_offer_are_refused(codec: str) -> None:
    bits = [2, 5, 8] if codec == "classes" else 5
    allocator = "percentile" if codec == "classes" else "uniform"
    message = method_refusal({"allocator": allocator, "codec": codec, "bits": bits})
    widths = load_room("codecs", codec).WIDTHS
    assert message.startswith("methods.mine.bits: 5 bits, but")
    assert f"codec '{codec}' offers" in message
    assert all(str(width) in message for width in widths)


@pytest.mark.parametrize(
    ("allocator", "codec", "settings"),
    [
        ("percentile", "uniform", {}),
        ("percentile", "grouped", {}),
        ("uniform", "classes", {"bits": 4}),
        ("uniform", "coded", {"bits": 5}),
        ("uniform", "kept", {}),
        ("market", "uniform", {"budget": 4.0}),
        ("market", "classes", {"budget": 4.0}),
    ],
)
def test_an_allocator_whose_choice_a_codec_cannot_encode_is_refused(
    allocator: str, codec: str, settings: dict[str, object]
) -> None:
    message = method_refusal({"allocator": allocator, "codec": codec, **settings})
    chosen = load_room("allocators", allocator).BUYS
    assert message.startswith(f"methods.mine.allocator: '{allocator}' chooses {chosen}, but codec '{codec}' offers ")
    assert "name another allocator or codec" in message


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("scoring/tokens", 10, "scoring.tokens: 10 is too small"),
        ("evaluation/resamples", 100, "evaluation.resamples: 100 is too small; at least 2000"),
        ("evaluation/block", 0, "evaluation.block: 0"),
        ("evaluation/context", 1, "evaluation.context: 1"),
        ("evaluation/paper/texts", [], "evaluation.paper.texts: at least one"),
        ("evaluation/paper/texts", [0], "evaluation.paper.texts: 0"),
        ("evaluation/paper/length", 1, "evaluation.paper.length: 1"),
        ("compute/threads", 0, "compute.threads: 0"),
        ("compute/engine", "rai", "compute.engine: 'rai' is unknown"),
        ("compute/address", "auto", "compute.address: only engine 'ray' has one"),
        ("compute/device", "gpu", "compute.device: 'gpu' is unknown"),
        ("compute/device", {"scoring": "cuda"}, "compute.device.scoring: no stage of that name computes on devices"),
        ("compute/device", {"score": "coda"}, "compute.device.score: 'coda' is unknown"),
        ("scoring/dtype", "float16", "scoring.dtype: 'float16' is unknown"),
        ("report/dpi", 1, "report.dpi: 1"),
        ("scoring/seed", -1, "scoring.seed: -1 is too small; at least 0"),
        ("evaluation/seed", -1, "evaluation.seed: -1"),
    ],
)
def test_values_that_cannot_be_are_refused(path: str, value: object, key: str) -> None:
    assert refusal(path, value).startswith(key)


def test_a_group_of_no_weights_is_refused() -> None:
    assert method_refusal({"codec": "grouped", "group": 0}).startswith("methods.mine.group: 0 is too small")


# --- sources -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "block", "message"),
    [
        (ModelSource, {}, "x.source: missing"),
        (ModelSource, {"source": "hup"}, "x.source: 'hup' is unknown; did you mean 'hub'?"),
        (ModelSource, {"source": "hub", "revision": REVISION}, "x.id: missing; source 'hub' needs it"),
        (ModelSource, {"source": "hub", "id": "a/b"}, "x.revision: missing; source 'hub' needs it"),
        (ModelSource, {"source": "path"}, "x.path: missing; source 'path' needs it"),
        (ModelSource, {"source": "embedded", "path": "p"}, "x.path: source 'embedded' has no such key; remove it"),
        (ModelSource, {"source": "path", "path": "p", "id": "a/b"}, "x.id: source 'path' has no such key"),
        (ModelSource, {"source": "hub", "id": "a/b", "revision": "main"}, "x.revision: 'main' is no full commit"),
        (ModelSource, {"source": "hub", "id": "a/b", "revision": REVISION[:12]}, "give all 40 hexadecimal digits"),
        (
            CorpusSource,
            {"source": "hub", "id": "a/b", "revision": REVISION},
            "x.config: missing; source 'hub' needs it",
        ),
        (CorpusSource, {"source": "embedded", "test": "t"}, "x.test: source 'embedded' has no such key"),
        (CorpusSource, {"source": "path", "test": "t", "config": "c"}, "x.config: source 'path' has no such key"),
    ],
)
def test_source_blocks_have_the_keys_they_need_and_no_others(cls: type, block: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(cls, block, "x")
    assert message in str(caught.value)


# --- YAML ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Params]:
    def parse(text: str) -> Params:
        (tmp_path / "params.yaml").write_text(text)
        return load_params(tmp_path / "params.yaml")

    return parse


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("active: {}\nmodels: {}\nactive: {}\n", r"^active: stands twice \(line 3\)"),
        ("scoring:\n  seed: 1\n  seed: 2\n", r"^seed: stands twice \(line 3\)"),
        ("scoring:\n  seed: 010\n", r"^010: a leading zero \(line 2\)"),
        ("scoring:\n  tokens: -0512\n", r"^-0512: a leading zero"),
        ("scoring: [1\n", "params.yaml: not valid YAML"),
        ("scoring: &a\n  seed: 1\nevaluation:\n  <<: *a\n", r"^line 4: a key is a word here; write out what `<<`"),
        ("scoring:\n  {seed: 1}: 2\n", r"^line 2: a key is a word here"),
        ("- a\n", "params.yaml: expected a block of keys"),
        ("", "params.yaml: expected a block of keys"),
    ],
)
def test_yaml_that_is_read_in_two_ways_is_refused(load: Callable[[str], Params], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; run from the project's root"):
        load_params(tmp_path / "params.yaml")


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"active: \xff\n")
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        load_params(tmp_path / "params.yaml")
