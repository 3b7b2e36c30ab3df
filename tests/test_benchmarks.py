"""Benchmarks: what their rows hold, who is left out and why, what params are refused, and what the report shows.

No times are held against anything: rounds are few, shapes small, machines busy.
"""

from __future__ import annotations

import builtins
import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import PROJECT
from test_report import fake

from nashswarm import report, speed
from nashswarm.artifacts import Layout
from nashswarm.benchmarks import apart, decode, kernels, matmul_nbits, matrices, packing, quantization, timing
from nashswarm.benchmarks.machine import Readers
from nashswarm.config import (
    BENCHMARKS,
    Benchmark,
    ConfigError,
    DecodeBenchmark,
    PackingBenchmark,
    Params,
    QuantizationBenchmark,
    load_params,
    parse_params,
)
from nashswarm.console import quiet
from nashswarm.kernels.matrix import Matrix
from nashswarm.kernels.serving import accelerate
from nashswarm.rendering import Block, Heading, Picture, Table, Text
from nashswarm.types import InputError

SMALL = Benchmark(
    rounds=3,
    cold_mib=1,
    shapes=("64x256", "100x200"),
    batches=(1,),
    decode=DecodeBenchmark(layers=2, width=128, heads=2, vocabulary=300, prompt=12, tokens=3),
    packing=PackingBenchmark(widths=(2, 3, 12), codes=10_000, coded=20_000),
    quantization=QuantizationBenchmark(models=("1x64",), vocabulary=256, tokens=1024, budget=4.0),
)
THREADS = 1
SPREADS = ("seconds", "ratio")


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    """Metrics of every kind, as they come back from the file."""
    kinds = {"kernels": kernels, "decode": decode, "packing": packing, "quantization": quantization}
    found = {name: kind.measure(SMALL, THREADS, quiet) for name, kind in kinds.items()}
    return {name: json.loads(json.dumps(document)) for name, document in found.items()}


def rows(document: Mapping[str, Any], what: str) -> dict[str, dict[str, Any]]:
    """Contestant -> its row."""
    return {row["contestant"]: row for row in document["rows"] if row["what"] == what}


# --- rounds and their spread ---------------------------------------------------------------------------------------


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert timing.Spread.of(np.arange(9.0)) == timing.Spread(4.0, 2.0, 6.0)
    assert timing.Spread.of(np.array([1.23456])).median == 1.235


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    seen: list[tuple[str, int]] = []
    found = timing.interleaved({n: lambda i, n=n: seen.append((n, i)) for n in "ab"}, 2)  # type: ignore[misc]
    assert seen == [(n, i) for i in range(3) for n in "ab"]
    assert {name: times.shape for name, times in found.items()} == {"a": (2,), "b": (2,)}


def test_users_of_the_same_copies_take_turns() -> None:
    seen: list[int] = []
    turns = [timing.in_turn([0, 1, 2, 3, 4], seen.append, place, 2) for place in range(2)]
    for i in range(5):
        for turn in turns:
            turn(i)
    assert seen == [0, 1, 2, 3, 4] * 2


def test_ratios_are_of_one_round_and_shares_of_its_reading() -> None:
    times = {"ref": np.array([1.0, 2.0, 4.0]), "own": np.array([0.5, 0.5, 0.5])}
    reader = timing.Reader(np.array([1.0, 2.0, 4.0]), 50)
    ref, own = timing.rows("w", times, "ref", {"own": 100}, reader, 7)
    assert ref.ratio == timing.Spread(1, 1, 1)
    assert ref.share is None
    assert own.ratio == timing.Spread(4, 3, 6)
    assert own.rate == 200
    assert own.share == timing.Spread(8, 6, 12)  # 200 bytes a second; the reader made 50, 25, 12.5
    assert own.items == 7


def test_readers_read_different_copies_of_the_same_bytes() -> None:
    made = Readers.make(1 << 16, 4)
    assert made.bytes == 1 << 16
    times = {name: np.array([2.0, 3.0]) for name in made.turns} | {"other": np.zeros(2)}
    times["reading 1"] = np.array([1.0, 4.0])
    assert made.best(times).seconds.tolist() == [1.0, 3.0]
    assert list(times) == ["other"]


# --- what each kind measures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_metrics_name_the_machine_and_what_was_asked(kind: str, measured: dict[str, Any]) -> None:
    found = measured[kind]["machine"]
    assert found["threads"] == THREADS
    assert found["cores"] >= 1
    assert found["processor"]
    assert found["reading"]["low"] <= found["reading"]["median"] <= found["reading"]["high"]
    assert found["packages"]["torch"] == torch.__version__
    assert measured[kind]["settings"]["decode"]["width"] == 128
    assert not {"host", "date", "time"} & {*found}


@pytest.mark.parametrize("kind", ["kernels", "decode", "packing"])
def test_timed_rows_have_a_spread_and_a_ratio(kind: str, measured: dict[str, Any]) -> None:
    timed = [row for row in measured[kind]["rows"] if "note" not in row]
    assert timed
    for row in timed:
        assert all(0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"] for key in SPREADS), row
        if "bytes" in row:
            assert row["rate"] == pytest.approx(row["bytes"] / row["seconds"]["median"], rel=2e-3)


def test_every_rival_multiplies_every_shape(measured: dict[str, Any]) -> None:
    own = {"packed, float32", "packed, int8"}
    for what in ("64 x 256, 1 row", "100 x 200, 1 row"):
        found = rows(measured["kernels"], what)
        assert {"dense float32", "dense bfloat16", "torch int4", timing.READING, *own} <= {*found}
        assert {f"MatMulNBits, blocks of {b}" for b in (32, 128)} <= {*found}
        assert found["dense float32"]["ratio"]["median"] == 1
        assert found[timing.READING]["share"]["median"] == pytest.approx(1)
        assert found["dense bfloat16"]["bytes"] == found["dense float32"]["bytes"] // 2
    assert rows(measured["kernels"], "64 x 256, 1 row")["torch int4"]["bytes"] == 64 * 256 // 2 + 64 * 2 * 4


def test_a_product_that_refuses_a_shape_says_why(measured: dict[str, Any]) -> None:
    refused = rows(measured["kernels"], "100 x 200, 1 row")["torch int4"]
    assert refused["note"].startswith("not for this shape: ")
    assert "seconds" not in refused


def test_a_rival_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("onnx", "onnxruntime"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    found = kernels.case((32, 256), 1, SMALL, THREADS)
    missing = {row.contestant: row.note for row in found if row.seconds is None}
    assert missing == {f"MatMulNBits, blocks of {b}": matmul_nbits.MISSING for b in kernels.BLOCKS}
    assert {"dense float32", "packed, int8"} <= {row.contestant for row in found}


def test_matmul_nbits_is_the_product_of_its_codes() -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from onnx import load_model_from_string, numpy_helper

    x = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)
    made = matmul_nbits._model(np.random.default_rng(0), 16, x.shape, 32)
    arrays = {a.name: numpy_helper.to_array(a) for a in load_model_from_string(made).graph.initializer}
    codes = np.stack([arrays["codes"] & 15, arrays["codes"] >> 4], -1).reshape(16, 2, 32).astype(np.float32) - 8
    weight = (codes * arrays["scales"].reshape(16, 2, 1)).reshape(16, 64)
    (y,) = runtime.InferenceSession(made, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    # Activations have 8 bits: half a step of 1/127 of the largest, at worst at every weight.
    assert np.abs(y - x @ weight.T).max() <= np.abs(weight).sum(1).max() * np.abs(x).max() / 254
    assert matmul_nbits.products(x, 16, 32, 2, 1).bytes == arrays["codes"].nbytes + arrays["scales"].nbytes


def test_random_tiles_are_of_about_the_bits_they_say() -> None:
    shape = (512, 1024)
    made = matrices.packed(shape, np.random.default_rng(0))
    bits = 8 * sum(array.nbytes for array in made.arrays.values()) / (shape[0] * shape[1])
    assert bits == pytest.approx(3.25, abs=0.15)  # 256 tiles of random widths
    assert Matrix(made).matmul(torch.ones(1, 1024)).isfinite().all()


def test_random_models_write_finite_numbers() -> None:
    made = matrices.packed_model(SMALL.decode)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        decoded = made(ids).logits
        assert accelerate(made) == 4 * SMALL.decode.layers + 3  # and the head, and two embeddings
        multiplied = made(ids).logits
        assert decoded.isfinite().all()
        assert torch.allclose(multiplied, decoded, rtol=1e-3, atol=1e-3 * float(decoded.abs().max()))
        dense = matrices.dense_model(SMALL.decode, torch.bfloat16)
        assert dense(ids).logits.isfinite().all()
    assert made.lm_head.packed_weight is made.transformer.wte.packed_weight
    assert sum(p.numel() for p in made.parameters()) < 10_000  # vectors alone


def test_every_contestant_writes_and_is_weighed(measured: dict[str, Any]) -> None:
    for what in ("2 x 128, a token", "2 x 128, first token behind 12"):
        assert {*decode.CONTESTANTS} <= {*rows(measured["decode"], what)}
    held = {of["contestant"]: of for of in measured["decode"]["memory"]}
    assert {*held} == {*decode.CONTESTANTS}
    counted = [held[name]["counted"] for name in decode.CONTESTANTS]
    assert counted[1] == counted[0] // 2
    assert counted[2] < counted[0] / 6
    token = rows(measured["decode"], "2 x 128, a token")
    assert token["packed, int8"]["bytes"] == held["packed, int8"]["counted"]
    assert "share" in token["packed, int8"]


def test_models_that_memory_cannot_hold_are_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"benchmark\.decode: .* GiB, .* are free; give it fewer layers"):
        decode.check_memory(DecodeBenchmark(layers=10**6))


def test_a_contestant_that_dies_is_named() -> None:
    worker = apart.Worker("packed, int8", 1, decode.contestant, "dense such", SMALL.decode)
    with worker, pytest.raises(InputError, match="packed, int8: the process was killed"):
        worker.said()


def test_bytes_are_compared_with_a_copy_of_the_unpacked_ones(measured: dict[str, Any]) -> None:
    found = measured["packing"]
    for width, each in ((2, 1), (3, 1), (12, 2)):
        own = rows(found, f"bitpack, {width} bits")
        assert {*own} == {"copy", "pack", "unpack"}
        assert {row["bytes"] for row in own.values()} == {each * 10_000}
        assert own["copy"]["ratio"]["median"] == 1
    assert {"copy", "decode"} == {*rows(found, "tiles, 3.25 bits")}
    coded = [row for row in found["rows"] if row["what"].startswith("entropy coder")]
    assert [row["contestant"] for row in coded] == ["copy", "encode", "copy", "decode"]
    bits = float(coded[0]["what"].split()[-2])
    assert bits == pytest.approx(3, abs=0.2)  # a small matrix: its blocks' overhead counts


def test_quantization_is_told_step_by_step(measured: dict[str, Any]) -> None:
    steps = [(row["method"], row["step"]) for row in measured["quantization"]["rows"]]
    methods = ("rtn4-g64", "market-tiles", "market-coded")
    assert steps == [("all", "score"), *((m, s) for m in methods for s in ("allocate", "pack"))]
    packed = {row["method"]: row for row in measured["quantization"]["rows"] if row["step"] == "pack"}
    assert all(row["bits_per_weight"] <= 4.0 for m, row in packed.items() if m.startswith("market"))
    assert all(row["peak_bytes"] > 2**26 and row["seconds"] > 0 for row in packed.values())
    (nearest,) = measured["quantization"]["nearest"]
    assert nearest["items"] == 12 * 64**2


ORPHAN = """
import os, time
from nashswarm.benchmarks.apart import Worker

def make(pid):
    return os.getpid, os.getpid()

if __name__ == "__main__":
    with Worker("w", 1, make, 0) as worker:
        print(worker.said(), flush=True)
        time.sleep(60)
"""


def test_processes_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "orphan.py").write_text(ORPHAN, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    words = [sys.executable, str(tmp_path / "orphan.py")]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.kill()
    _, alive = psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=20)
    assert not alive


def test_memory_of_a_process_is_its_own() -> None:
    room = np.ones(1 << 27)  # 1 GiB, which a child must not be charged for
    assert apart.alone(1, apart.peak_bytes) < room.nbytes < apart.peak_bytes()


# --- params --------------------------------------------------------------------------------------------------------


def raw(**changes: Any) -> dict[str, Any]:
    return {
        "active": {"models": ["m"], "calibration": "c", "corpora": ["c"], "methods": ["u"]},
        "models": {"m": {"source": "embedded"}, "benchmarks": {"source": "embedded"}},
        "corpora": {"c": {"source": "embedded"}},
        "methods": {"u": {"codec": "uniform", "bits": 4}},
        **changes,
    }


def test_nothing_is_measured_unless_asked_for() -> None:
    params = load_params(PROJECT / "params.yaml")
    assert params.active.benchmarks == ()
    assert params.benchmark == Benchmark()  # params.yaml shows the defaults
    assert isinstance(parse_params(raw()), Params)
    assert parse_params(raw()).benchmark == Benchmark()


@pytest.mark.parametrize(
    ("block", "settings", "says"),
    [
        ("active", {"benchmarks": ["kernel"]}, "active.benchmarks: 'kernel' is unknown; did you mean 'kernels'?"),
        ("active", {"benchmarks": ["decode"] * 2}, "active.benchmarks: a name stands twice"),
        (
            "active",
            {"benchmarks": ["decode"], "models": ["benchmarks"]},
            "active.models: 'benchmarks' is where the benchmarks' metrics lie; rename the model",
        ),
        ("benchmark", {"round": 3}, "benchmark.round: unknown key; did you mean 'rounds'?"),
        ("benchmark", {"rounds": 0}, "benchmark.rounds: 0 is too small; at least 1"),
        ("benchmark", {"shapes": ["4096"]}, "benchmark.shapes: '4096' is no size; write it as OUTxIN"),
        ("benchmark", {"shapes": []}, "benchmark.shapes: the list is empty; name at least one as OUTxIN"),
        ("benchmark", {"batches": [0]}, "benchmark.batches: 0 is too small; at least 1"),
        ("benchmark", {"batches": []}, "benchmark.batches: the list is empty"),
        ("benchmark", {"decode": {"heads": 7}}, "benchmark.decode.heads: 7 do not divide a width of 1600"),
        ("benchmark", {"decode": {"tokens": 0}}, "benchmark.decode.tokens: 0 is too small; at least 1"),
        ("benchmark", {"packing": {"widths": [0]}}, "benchmark.packing.widths: [0]; give one or more from 1 to 16"),
        (
            "benchmark",
            {"quantization": {"models": ["2x100"]}},
            "benchmark.quantization.models: 2x100 is no whole number of heads of 64 wide; change the width",
        ),
        ("benchmark", {"quantization": {"budget": 0}}, "benchmark.quantization.budget: 0.0 bits per weight; give more"),
    ],
)
def test_settings_that_cannot_be_are_named_with_their_fix(block: str, settings: dict[str, Any], says: str) -> None:
    document = raw()
    document[block] = document.get(block, {}) | settings
    with pytest.raises(ConfigError) as caught:
        parse_params(document)
    assert str(caught.value).startswith(says)


def test_the_stage_names_a_kind_that_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes((PROJECT / "params.yaml").read_bytes())
    words = [sys.executable, str(PROJECT / "stages/benchmark.py"), "kernel"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: kernel: no such benchmark; choose kernels, decode, packing, quantization")


# --- in the report -------------------------------------------------------------------------------------------------


def texts(blocks: list[Block]) -> str:
    return " ".join(block.text for block in blocks if isinstance(block, Text))


def test_no_section_where_nothing_was_measured() -> None:
    assert speed.section({}, 40) == []
    assert speed.section(dict.fromkeys(BENCHMARKS), 40) == []


def test_the_section_tells_machine_tables_and_figures(measured: dict[str, Any]) -> None:
    blocks = speed.section(measured, 40)
    assert [b.text for b in blocks if isinstance(b, Heading)] == ["Speed"]
    assert [b.name for b in blocks if isinstance(b, Picture)] == ["speed.png", "growth.png"]
    tables = [b for b in blocks if isinstance(b, Table)]
    assert len(tables) == 5
    for table in tables:
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows), table.caption
    said = texts(blocks)
    assert measured["kernels"]["machine"]["processor"] in said
    assert "No figures for torch int4 (100 x 200, 1 row): not for this shape" in said
    assert "at that rate GPT-2 XL's 1,557,611,200 take" in said


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_each_kind_can_be_shown_alone(kind: str, measured: dict[str, Any]) -> None:
    blocks = speed.section({k: measured[k] if k == kind else None for k in BENCHMARKS}, 40)
    assert sum(isinstance(b, Picture) for b in blocks) == (kind != "packing")
    assert any(isinstance(b, Table) for b in blocks)


def test_tables_hold_the_metrics_own_numbers() -> None:
    spread = {"median": 0.002, "low": 0.001, "high": 0.003}
    row = {
        "what": "8 x 8, 1 row",
        "contestant": "packed, int8",
        "seconds": spread,
        "ratio": {"median": 2.5, "low": 2.0, "high": 3.0},
        "bytes": 3 * 2**20,
        "rate": 1.573e9,
        "share": {"median": 0.5, "low": 0.4, "high": 0.6},
        "items": 64,
    }
    facts = {"processor": "P", "cores": 2, "threads": 1, "instructions": "avx2", "memory_bytes": 2**33, "load": 0.25}
    facts |= {"packages": {"torch": "2"}, "reading": {"median": 2e10, "low": 1e10, "high": 3e10}}
    document = {"machine": facts, "settings": {"rounds": 5, "batches": [1]}, "rows": [row]}
    blocks = speed.section({"kernels": document}, 40)
    (table,) = (b for b in blocks if isinstance(b, Table))
    figures = ("2 (1 to 3)", "2.5 (2 to 3)", "3.0", "1.57", "0.5 (0.4 to 0.6)")
    assert table.rows == [("8 x 8, 1 row", "packed, int8", *figures)]
    assert "5 rounds on P, 2 cores, 1 threads, 8 GiB, kernels on avx2" in texts(blocks)
    assert "read at 20.0 (10.0 to 30.0) GB/s; the system's load before the first round was 0.25" in texts(blocks)


def test_the_report_shows_speed_where_it_is_tracked(measured: dict[str, Any], tmp_path: Path) -> None:
    metrics = fake()
    plain = report.Run(metrics, ["reference"], [m for _, m in metrics], ["sampled"])
    absent = {"speed": dict.fromkeys(BENCHMARKS)}
    for name, speeds in (("plain", {}), ("absent", absent), ("shown", {"speed": copy.deepcopy(measured)})):
        run = report.Run(plain.metrics, plain.models, plain.methods, plain.corpora, **speeds)
        report.write(tmp_path / name, run, 40)
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("plain", "absent")}
    assert files["plain"] == files["absent"]
    assert "No times are given" in files["plain"]["report.md"].decode()
    page, text = ((tmp_path / "shown" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert '<a href="#speed">Speed</a>' in page
    assert "Products with one matrix, weights cold" in text
    assert "No times are given" not in text
    assert (tmp_path / "shown/speed.png").is_file()
    assert "Codes to bytes and back" in (tmp_path / "shown/tables.tex").read_text(encoding="utf-8")


def test_metrics_lie_where_no_model_does() -> None:
    assert {speed.path(Layout(), kind).as_posix() for kind in BENCHMARKS} == {
        f"metrics/benchmarks/{kind}.json" for kind in BENCHMARKS
    }
    assert {*speed.PARTS} == {*BENCHMARKS}
