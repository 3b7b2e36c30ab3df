"""Other people's tools: the room's contract, the process between two environments, what is counted, what is recorded.

No tool is installed here: a stub of `hqq` stands for all of them. Tests that need the real ones are skipped without
the environment that `make peers` builds.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, PROJECT, Checkpoints, Models
from miniature import Project, edit, ran

from nashswarm import artifacts, bitpack, metrics, models, peering, tooling
from nashswarm.config import ConfigError, Evaluation, load_params, load_room, parse_params, parse_peer, room_names
from nashswarm.peering import PeerError
from nashswarm.recipes import peer_document, peer_files
from nashswarm.types import InputError, PeerJob, PeerWeights

TOOLS = room_names("peers")
LEAST: dict[str, dict[str, Any]] = {"llama_cpp": {"kind": "Q4_K_M"}}  # settings that have no default
REAL = PROJECT / peering.DEFAULT

# Stands for the package hqq: rounds to multiples of 1/16, and stores one byte a weight and a float16 scale a row.
STUB = """
import torch
class HQQLinear:
    def __init__(self, linear, config, compute_dtype, device):
        {mishap}
        self.codes = (linear.weight.data.float() * 16).round().clamp(-127, 127)
    def dequantize(self):
        return self.codes / 16{after}
    def state_dict(self):
        rows = len(self.codes)
        return {{"W_q": self.codes.to(torch.int8), "scale": torch.ones(rows, dtype=torch.float16),
                "nbits": torch.tensor(8), "bias": torch.zeros(rows)}}
class Quantizer:  # transformers looks for it where hqq is installed
    pass
def BaseQuantizeConfig(**settings):
    print("a tool may print what it likes")
    return settings
"""


@pytest.fixture
def job(checkpoint: Checkpoints) -> PeerJob:
    directory = checkpoint("gpt2")
    ids = np.arange(5 * CONTEXT + 3, dtype=np.int32) % 300
    return PeerJob(directory, models.describe(directory), ids, CONTEXT, 1)


@pytest.fixture
def statistics(quantizable: Models) -> Callable[[str], Any]:
    return quantizable("gpt2").statistics


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """(mishap="pass", after="") -> an interpreter that has the stub: what goes wrong, and what is added to weights."""

    def install(mishap: str = "pass", after: str = "") -> None:
        (tmp_path / "stubs/hqq/core").mkdir(parents=True)
        (tmp_path / "stubs/hqq/__init__.py").write_text("__version__ = '1.2.3'\n")
        (tmp_path / "stubs/hqq/core/quantize.py").write_text(STUB.format(mishap=mishap, after=after))
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{tmp_path}/stubs" exec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        monkeypatch.setenv(peering.PYTHON, str(python))

    return install


PEER = parse_peer("mine", {"tool": "hqq", "bits": 4})


# --- the contract --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_keeps_the_contract(tool: str) -> None:
    room = load_room("peers", tool)
    assert dataclasses.is_dataclass(room.Settings)
    assert room.Settings.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert list(inspect.signature(room.quantize).parameters) == ["job", "settings"]
    peer = parse_peer("mine", {"tool": tool, **LEAST.get(tool, {"bits": 4})})
    assert parse_peer("mine", peer_document(peer)) == peer
    (own, codec) = peer_files(PROJECT / "src", peer)
    assert own.is_file()
    assert codec.is_file()


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_refuses_what_it_cannot_do(tool: str) -> None:
    key, wrong = ("kind", "Q4_0; rm") if tool == "llama_cpp" else ("bits", 5)
    with pytest.raises(ConfigError, match=rf"peers\.mine\.{key}: "):
        parse_peer("mine", {"tool": tool, key: wrong})
    with pytest.raises(ConfigError, match=r"peers\.mine\.bist: unknown key"):
        parse_peer("mine", {"tool": tool, **LEAST.get(tool, {"bits": 4}), "bist": 4})


def test_an_unknown_tool_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"peers\.mine\.tool: 'quant' is unknown; did you mean 'quanto'"):
        parse_peer("mine", {"tool": "quant"})
    with pytest.raises(ConfigError, match=r"peers\.mine\.tool: missing"):
        parse_peer("mine", {"bits": 4})


def test_names_of_peers_are_checked() -> None:
    import yaml

    raw = yaml.safe_load((PROJECT / "params.yaml").read_text())
    for block, key, name, message in (
        ("active", "peers", "hqq-5", r"active\.peers: 'hqq-5' is not defined under `peers`"),
        ("report", "peers", "hqq-5", r"report\.peers: 'hqq-5' is not defined under `peers`"),
        ("report", "methods", "market", r"report\.methods: 'market' is not defined under `methods`"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_params({**raw, block: {**raw[block], key: [name]}})
    with pytest.raises(ConfigError, match=r"active\.peers: a name stands twice"):
        parse_params({**raw, "active": {**raw["active"], "peers": ["hqq-4", "hqq-4"]}})
    with pytest.raises(ConfigError, match=r"peers\.rtn4-g64: a method has this name, too"):
        parse_params({**raw, "peers": {**raw["peers"], "rtn4-g64": {"tool": "hqq", "bits": 4}}})


def test_no_peer_is_run_unless_asked_for() -> None:
    assert load_params(PROJECT / "params.yaml").active.peers == ()


# --- two processes -------------------------------------------------------------------------------------------------


def test_a_tool_is_run_and_counted(job: PeerJob, stub: Callable[..., None], statistics: Callable[[str], Any]) -> None:
    stub()
    record, weights = peering.run(PEER, job, PROJECT, statistics)
    assert record.reason is None
    assert (record.tool, record.version) == ("hqq", "1.2.3")
    assert record.settings == {"bits": 4, "group": 64, "axis": 1}
    assert set(weights) == {p.name for p in (*job.index.tensors, *job.index.vectors)}
    original = models.Checkpoint.open(job.directory, job.index)
    for tensor in job.inside:
        expected = (original.tensor(tensor).half().float() * 16).round().clamp(-127, 127) / 16
        assert torch.equal(torch.from_numpy(weights[tensor.name]), expected)
    tables = [t for t in job.index.tensors if t.layer is None]
    assert tables
    codec = load_room("codecs", "grouped")
    bytes_ = 0
    for tensor in tables:
        task = peering.Job(tensor, original.tensor(tensor), peering.Choice(4), None, statistics(tensor.name))
        packed = codec.encode(task, codec.Settings(group=64))
        assert np.array_equal(weights[tensor.name], codec.decode(packed).numpy())
        bytes_ += packed.arrays["codes"].nbytes
        assert any(tensor.name in note for note in record.notes)
    for vector in job.index.vectors:
        half = original.vector(vector).numpy().astype(np.float16)
        assert np.array_equal(weights[vector.name], half.astype(np.float32))
    assert record.parts["codes"] == bytes_ + sum(t.weights for t in job.inside)
    assert record.parts["vectors"] == 2 * sum(int(np.prod(v.shape)) for v in job.index.vectors)
    assert record.parts["headers"] > 8 * len(job.inside)


def fails(job: PeerJob, statistics: Callable[[str], Any]) -> str:
    record, weights = peering.run(PEER, job, PROJECT, statistics)
    assert weights == {}
    assert record.parts == {}
    assert record.reason is not None
    return record.reason


@pytest.mark.parametrize(
    ("mishap", "after", "reason"),
    [
        ("raise RuntimeError('out of luck')", "", "RuntimeError: out of luck"),
        ("import os; os.kill(os.getpid(), 9)", "", "hqq was ended by signal 9"),
        ("pass", " * float('nan')", "transformer.h.0.attn.c_attn.weight: the tool made weights that are not finite"),
        ("import absent", "", "ModuleNotFoundError: No module named 'absent'; `make peers` builds the environment"),
    ],
)
def test_a_failure_is_recorded(
    mishap: str, after: str, reason: str, job: PeerJob, stub: Callable[..., None], statistics: Callable[[str], Any]
) -> None:
    stub(mishap, after)
    assert fails(job, statistics) == reason


def test_a_long_reason_is_cut(job: PeerJob, stub: Callable[..., None], statistics: Callable[[str], Any]) -> None:
    stub("raise RuntimeError('x' * 5000)")
    assert len(fails(job, statistics)) < 400


def test_an_absent_environment_is_recorded(
    job: PeerJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistics: Callable[[str], Any]
) -> None:
    monkeypatch.delenv(peering.PYTHON, raising=False)
    record, _ = peering.run(PEER, job, tmp_path, statistics)
    assert record.reason is not None
    assert record.reason.startswith(".venv-peers/bin/python is not there; `make peers` builds the environment, or set ")
    monkeypatch.setenv(peering.PYTHON, "/no/such/python")
    assert "/no/such/python is not there" in fails(job, statistics)


@pytest.mark.skipif("hqq" in sys.modules, reason="hqq is installed here")
def test_an_absent_package_is_recorded(
    job: PeerJob, monkeypatch: pytest.MonkeyPatch, statistics: Callable[[str], Any]
) -> None:
    monkeypatch.setenv(peering.PYTHON, sys.executable)
    assert fails(job, statistics) == "ModuleNotFoundError: No module named 'hqq'; `make peers` builds the environment"


def test_matrices_must_be_the_models(job: PeerJob, statistics: Callable[[str], Any]) -> None:
    name = job.inside[0].name
    for matrices, message in (
        ({"other": torch.zeros(2, 2)}, "other: the tool made a matrix that the model has not"),
        ({name: torch.zeros(2, 2)}, rf"{name}: the tool made \[2, 2\], expected"),
    ):
        with pytest.raises(PeerError, match=message):
            peering.complete(job, PeerWeights(matrices, {}, "1"), statistics)


@pytest.mark.skipif(not REAL.is_file(), reason="no environment of other tools here; `make peers` builds it")
def test_the_real_hqq_is_close(job: PeerJob, monkeypatch: pytest.MonkeyPatch, statistics: Callable[[str], Any]) -> None:
    monkeypatch.delenv(peering.PYTHON, raising=False)
    record, weights = peering.run(parse_peer("mine", {"tool": "hqq", "bits": 8, "group": 8}), job, PROJECT, statistics)
    assert record.reason is None
    original = models.Checkpoint.open(job.directory, job.index)
    for tensor in job.inside:
        error = np.abs(weights[tensor.name] - original.tensor(tensor).numpy()).max()
        assert error < 0.02 * np.abs(weights[tensor.name]).max()


# --- what tools share ----------------------------------------------------------------------------------------------


def test_windows_are_whole_and_in_order(job: PeerJob) -> None:
    windows = tooling.calibration_windows(job)
    assert windows.shape == (5, CONTEXT)
    assert np.array_equal(windows.flatten().numpy(), job.ids[: 5 * CONTEXT])
    with pytest.raises(InputError, match="10 calibration tokens are less than a window"):
        tooling.calibration_windows(dataclasses.replace(job, ids=job.ids[:10]))


def test_conv1d_turned_linear_computes_the_same(job: PeerJob) -> None:
    model = tooling.load_original(job, torch.float32)
    ids = torch.from_numpy(job.ids[None, :CONTEXT].astype(np.int64))
    with torch.inference_mode():
        before = model(ids).logits
        tooling.conv1d_to_linear(model)
        assert not [m for m in model.modules() if type(m).__name__ == "Conv1D"]
        torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)  # sums in another order


def test_parts_sum_to_the_file() -> None:
    from safetensors.torch import save

    arrays = {"a.W_q": torch.zeros(3, 4, dtype=torch.uint8), "a.scale": torch.zeros(3, dtype=torch.float16)}
    arrays["a.nbits"] = torch.tensor(4)
    parts = tooling.stored_parts(arrays, {".W_q": "codes", ".scale": "scales"})
    assert (parts["codes"], parts["scales"]) == (12, 6)
    assert sum(parts.values()) == len(save(arrays))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_gptqs_packing_is_read(bits: int, ordered: bool, offset: int) -> None:
    rng = np.random.default_rng(bits)
    inputs, outputs, groups = 64, 32, 4
    codes = rng.integers(0, 2**bits, (outputs, inputs))
    zeros = rng.integers(1, 2**bits, (groups, outputs))
    scales = rng.uniform(0.5, 1, (groups, outputs)).astype(np.float16)
    group = rng.permutation(np.arange(inputs) % groups) if ordered else np.arange(inputs) // (inputs // groups)

    def words(values: np.ndarray) -> torch.Tensor:
        rows = [bitpack.pack(row, bits).view("<i4") for row in values]
        return torch.from_numpy(np.stack(rows).astype(np.int32))

    packed = tooling.Packed(
        words(codes).T.contiguous(),
        words(zeros - offset),
        torch.from_numpy(scales),
        torch.from_numpy(group.astype(np.int32)) if ordered else None,
    )
    expected = scales.astype(np.float32)[group].T * (codes - zeros[group].T)
    assert np.array_equal(tooling.gptq_weight(packed, bits, offset).numpy(), expected.astype(np.float32))


def test_a_saved_model_is_read_and_counted(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    arrays = {
        "h.0.qweight": torch.zeros(8, 4, dtype=torch.int32),
        "h.0.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "h.0.scales": torch.ones(1, 8, dtype=torch.float16),
        "h.0.bias": torch.zeros(4),
        "wte.weight": torch.zeros(100, 4),
    }
    arrays["h.0.qweight"] = torch.zeros(8, 8, dtype=torch.int32)
    save_file(arrays, tmp_path / "model.safetensors")
    matrices, parts = tooling.read_gptq(tmp_path, ["h.0.weight"], 4, 0)
    assert matrices["h.0.weight"].shape == (8, 64)
    assert (parts["codes"], parts["scales"], parts["zeros"], parts["map"]) == (256, 16, 4, 0)
    with pytest.raises(InputError, match=r"h\.1\.weight: the tool did not quantize this matrix"):
        tooling.read_gptq(tmp_path, ["h.1.weight"], 4, 0)


def test_a_program_that_fails_says_its_last_words() -> None:
    assert "hello" in tooling.call(sys.executable, "-c", "print('hello')")
    with pytest.raises(InputError, match=r"ended with 3: .*no luck"):
        tooling.call(sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)")


# --- records and metrics -------------------------------------------------------------------------------------------


def test_records_come_back(tmp_path: Path) -> None:
    record = artifacts.PeerRecord("hqq", {"bits": 4}, "1", ("a", "b"), None, {"codes": 3})
    artifacts.write_peer(tmp_path, record, {"a": np.ones((2, 2), np.float32)})
    assert artifacts.read_peer(tmp_path) == record
    assert np.array_equal(artifacts.read_peer_weights(tmp_path)["a"], np.ones((2, 2)))


def test_metrics_hold_every_byte_or_the_reason(job: PeerJob) -> None:
    source = artifacts.SourceRecord("path", "x", None, None, {"model.safetensors": "ab", "config.json": "cd"})
    parts = {"codes": 1000, "scales": 100, "vectors": 50, "headers": 7}
    record = artifacts.PeerRecord("hqq", {"bits": 4}, "1", ("said",), None, parts)
    document = metrics.peer_document(record, source, job.index, {}, Evaluation())
    assert document["size"]["file_bytes"] == 1157
    assert document["size"]["bits_per_weight"] == pytest.approx(8 * 1157 / job.index.parameters, rel=1e-5)
    weights = sum(t.weights for t in job.index.tensors)
    assert document["size"]["matrix_bits_per_weight"] == pytest.approx(8 * 1100 / weights, rel=1e-5)
    assert document["peer"]["original"] == {"model.safetensors": "ab"}
    json.dumps(document)
    none = artifacts.PeerRecord("hqq", {"bits": 4}, reason="no luck")
    assert set(metrics.peer_document(none, source, job.index, {}, Evaluation())) == {"peer"}


# --- DVC -----------------------------------------------------------------------------------------------------------


@pytest.mark.pipeline
def test_the_pipeline_lists_and_runs_peers(copy: Project, stub: Callable[..., None]) -> None:
    stub()
    own = {"mine": {"tool": "hqq", "bits": 4}, "other": {"tool": "quanto", "bits": 4}}
    copy.set(active={"methods": ["fp32"], "peers": ["mine", "other"]}, peers=own)
    stages = {f"{s}@reference-{p}" for s in ("peer", "evaluate_peer") for p in own}
    assert set(ran(copy.dvc("repro"))) == {"methods", *stages, "report"}
    documents = {p: json.loads((copy.root / f"metrics/reference/{p}.json").read_text()) for p in own}
    assert documents["mine"]["peer"]["version"] == "1.2.3"
    assert documents["mine"]["quality"]["sampled"]["delta_loss"] != 0
    assert "No module named 'optimum'" in documents["other"]["peer"]["reason"]
    page = (copy.root / "report/report.md").read_text()
    assert "other: ModuleNotFoundError" in page
    assert (copy.root / "report/peers-reference-sampled.png").is_file()
    assert ran(copy.dvc("repro")) == []
    edit(copy, "src/nashswarm/peers/quanto.py")
    assert ran(copy.dvc("repro", "imports", "methods")) == ["imports", "methods"]
    assert copy.stale() == ["peer@reference-other"]
