"""What a report says of its inputs: DVC's own hash of the metrics, revisions in full, every file's hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nashswarm import artifacts, provenance
from nashswarm.config import Active, CorpusSource
from nashswarm.rendering import Table, Text
from nashswarm.types import ModelIndex

PROJECT = Path(__file__).parents[1]
REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


def test_the_hash_of_the_metrics_is_that_of_dvc() -> None:
    lock = yaml.safe_load((PROJECT / "dvc.lock").read_text())["stages"]["report"]["deps"]
    (expected,) = [dep for dep in lock if dep["path"] == "metrics"]
    files = [p for p in (PROJECT / "metrics").rglob("*") if p.is_file()]
    assert provenance.folder_md5(PROJECT / "metrics", files) == expected["md5"]
    assert len(files) == expected["nfiles"]


def test_pins_are_read_from_constraints() -> None:
    found = provenance.pinned("# torch==9\nnumpy==2.4.6\ntorch==2.13.0\ntorchvision==1.0\nanyio==4.16.0\n")
    assert found == {"torch": "2.13.0", "numpy": "2.4.6"}
    assert set(provenance.pinned((PROJECT / "constraints.txt").read_text())) == set(provenance.PACKAGES)


@pytest.fixture
def project(tmp_path: Path) -> artifacts.Layout:
    layout = artifacts.Layout(tmp_path)
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    artifacts.write_json(layout.metrics("gpt2", "fp32"), {"size": {}})
    index = ModelIndex("GPT2LMHeadModel", 1024, 50257, "wte.weight", 12, (), ())
    record = artifacts.SourceRecord("hub", "cache/gpt2", "openai-community/gpt2", REVISION, {"config.json": "ab" * 32})
    artifacts.write_source(layout.download("gpt2"), record, index)
    facts = {"test": {"sha256": "cd" * 32, "tokens": 59_670, "texts": 2000}}
    for name in ("mine", "wikitext2"):
        artifacts.write_json(layout.download("gpt2") / "tokens" / f"{name}.json", facts)
    return layout


def test_revisions_and_hashes_are_told_in_full(project: artifacts.Layout) -> None:
    active = Active(models=("gpt2",), methods=("fp32",), calibration="mine", corpora=("wikitext2",))
    sources = {
        "mine": CorpusSource("path", test="/somewhere/test.txt"),
        "wikitext2": CorpusSource("hub", id="Salesforce/wikitext", config="raw", revision="b0" * 20),
        "other": CorpusSource("embedded"),
    }
    origin = provenance.gather(project, active, sources)
    blocks = provenance.section(origin)
    (table,) = [b for b in blocks if isinstance(b, Table)]
    assert ("model gpt2", "openai-community/gpt2", f"commit {REVISION}") in table.rows
    assert ("", "config.json", f"sha256 {'ab' * 32}") in table.rows
    assert ("text mine for gpt2", "path", "") in table.rows
    assert ("text wikitext2 for gpt2", "Salesforce/wikitext, raw", f"commit {'b0' * 20}") in table.rows
    assert ("", "test, 59,670 tokens in 2,000 texts", f"sha256 {'cd' * 32}") in table.rows
    assert ("metrics", "1 files", f"md5 {origin.metrics}") in table.rows
    words = " ".join(b.text for b in blocks if isinstance(b, Text))
    assert f"-S{origin.metrics.removesuffix('.dir')} -- dvc.lock" in words
    assert "torch 2.13.0" in words


def test_another_figure_gives_another_hash(project: artifacts.Layout) -> None:
    active = Active(models=("gpt2",), methods=("fp32",), calibration="mine", corpora=("mine",))
    before = provenance.gather(project, active, {"mine": CorpusSource("embedded")})
    artifacts.write_json(project.metrics("gpt2", "fp32"), {"size": {"file_bytes": 1}})
    after = provenance.gather(project, active, {"mine": CorpusSource("embedded")})
    assert before.metrics != after.metrics
    assert before.constraints == after.constraints
