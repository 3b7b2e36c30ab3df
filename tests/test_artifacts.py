"""Files of the pipeline: written whole or not at all, equal bytes for equal content, read back as they were."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Models

from nashswarm import artifacts
from nashswarm.artifacts import Layout, SourceRecord
from nashswarm.corpora import TokenizedSplit
from nashswarm.evaluation import Baseline, Losses
from nashswarm.types import Allocation, Choice, InputError, NashSwarmError, Statistics


def names_of(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def same(one: Any, other: Any) -> bool:
    """Whether two records of arrays are equal, types of arrays included."""
    fields = type(one).__dataclass_fields__
    pairs = [(getattr(one, f), getattr(other, f)) for f in fields]
    return all(
        (a is None and b is None) or (np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype)
        for a, b in pairs
    )


# --- writing -------------------------------------------------------------------------------------------------------


def test_write_makes_folders_and_leaves_one_file(tmp_path: Path) -> None:
    artifacts.write_bytes(tmp_path / "a/b/c.bin", b"one")
    artifacts.write_bytes(tmp_path / "a/b/c.bin", b"two")
    assert (tmp_path / "a/b/c.bin").read_bytes() == b"two"
    assert names_of(tmp_path / "a/b") == ["c.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_refuses_keeps_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.json"
    file.write_bytes(b"old")

    def refuse(*args: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if step == "fsync" else Path, step, refuse)
    with pytest.raises(NashSwarmError, match=r"metrics\.json: cannot be written \(No space left on device\).* is kept"):
        artifacts.write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert names_of(tmp_path) == ["metrics.json"]


def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NashSwarmError, match=r"file/x\.json: cannot be written"):
        artifacts.write_json(tmp_path / "file/x.json", {})


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "a", {"b": 1, "a": {"d": 0.1, "c": None}})
    artifacts.write_json(tmp_path / "b", {"a": {"c": None, "d": 0.1}, "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_text() == '{\n  "a": {\n    "c": null,\n    "d": 0.1\n  },\n  "b": 1\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_has_not_are_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.write_json(tmp_path / "x.json", {"loss": value})
    assert names_of(tmp_path) == []


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json: cannot be read .*run `dvc repro`"):
        artifacts.read_json(tmp_path / "x.json")


def test_a_fresh_directory_takes_the_old_ones_place(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with artifacts.fresh_directory(tmp_path / "sub/out") as target:
            (target / content).write_text(content)
            assert content not in (names_of(tmp_path / "sub/out") if content == "two" else [])
    assert names_of(tmp_path / "sub/out") == ["two"]
    assert names_of(tmp_path / "sub") == ["out"]


@pytest.mark.parametrize("error", [NashSwarmError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_directory(error: type[BaseException], tmp_path: Path) -> None:
    with artifacts.fresh_directory(tmp_path / "out") as target:
        (target / "old").write_text("old")

    def fail() -> None:
        with artifacts.fresh_directory(tmp_path / "out") as target:
            (target / "new").write_text("new")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert names_of(tmp_path / "out") == ["old"]
    assert names_of(tmp_path) == ["out"]


def test_all_paths_lie_below_the_root(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    one = [layout.download("m"), layout.scores("m"), layout.baseline("m")]
    two = [f("m", "x") for f in (layout.allocation, layout.packed, layout.windows, layout.metrics)]
    paths = [*one, *two, layout.params, layout.reference, layout.staging, layout.methods, layout.report]
    assert all(p.is_relative_to(tmp_path) for p in paths)
    assert len(set(paths)) == len(paths)
    assert layout.metrics("m", "x") == tmp_path / "metrics/m/x.json"
    assert Layout().params == Path("params.yaml")


def test_code_is_checked_against_its_list(tmp_path: Path) -> None:
    layout, file = Layout(tmp_path), tmp_path / "a.py"
    artifacts.check_code(layout, "score")  # run by hand, where nothing was listed
    file.write_text("1")
    artifacts.write_json(layout.imports / "score.json", {"a.py": artifacts.sha256_file(file)})
    artifacts.check_code(layout, "score")
    for change in (lambda: file.write_text("2"), file.unlink):
        change()
        with pytest.raises(InputError, match=r"a\.py: changed since .*imports/score\.json was written; run `dvc repro"):
            artifacts.check_code(layout, "score")


# --- records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_source_and_index_come_back(family: str, quantizable: Models, tmp_path: Path) -> None:
    model = quantizable(family)
    record = SourceRecord("hub", "data/x", "a/b", "0" * 40, {"config.json": "ab"})
    artifacts.write_source(tmp_path, record, model.index)
    assert artifacts.read_source(tmp_path) == record
    assert artifacts.read_index(tmp_path) == model.index


def test_a_source_is_opened_relative_to_the_root_or_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    digest = artifacts.sha256_file(tmp_path / "m/config.json")
    assert digest == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256sum of {}
    for directory in ("m", str(tmp_path / "m")):
        record = SourceRecord("path", directory, None, None, {"config.json": digest})
        assert record.open(tmp_path) == tmp_path / "m"
        with pytest.raises(InputError, match=r"weights is gone since it was downloaded; run `dvc repro"):
            SourceRecord("path", directory, None, None, {"weights": digest}).open(tmp_path)
    (tmp_path / "m/config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json changed since it was downloaded"):
        record.open(tmp_path)


def test_tokens_come_back_split_by_split(tmp_path: Path) -> None:
    def split(count: int) -> TokenizedSplit:
        ids = np.arange(count, dtype=np.int32)
        return TokenizedSplit(ids, ids[: count // 2], np.array([1, count // 2]), np.array([30, 4]))

    splits = {"calibration": split(10), "test": split(6)}
    artifacts.write_tokens(tmp_path, "c", splits)
    assert all(same(artifacts.read_tokens(tmp_path, "c", name), expected) for name, expected in splits.items())
    facts = json.loads((tmp_path / "tokens/c.json").read_text())
    assert facts["test"]["tokens"] == 6
    assert facts["test"]["texts"] == 2
    assert len(facts["test"]["sha256"]) == 64
    with pytest.raises(InputError, match=r"corpora\.c\.validation: this corpus has no validation split; name a file"):
        artifacts.read_tokens(tmp_path, "c", "validation")


def test_missing_arrays_are_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"c\.safetensors.*dvc repro"):
        artifacts.read_tokens(tmp_path, "c", "test")
    with pytest.raises(InputError, match=r"w\.safetensors.*dvc repro"):
        artifacts.read_statistics(tmp_path, "w")


@pytest.mark.parametrize(
    "statistics",
    [
        Statistics(np.eye(3, dtype=np.float32), np.ones(2, np.float32)),
        Statistics(frequency=np.ones(4, np.float32), lookup_moment=np.zeros((3, 3), np.float32)),
        Statistics(*(np.full(2, i, np.float32) for i in range(4))),
    ],
)
def test_statistics_come_back_with_what_they_lack(statistics: Statistics, tmp_path: Path) -> None:
    artifacts.write_statistics(tmp_path, "transformer.h.0.w", statistics)
    assert same(artifacts.read_statistics(tmp_path, "transformer.h.0.w"), statistics)


@pytest.mark.parametrize("links", [True, False])
def test_a_step_is_handed_on_with_links_and_without(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    journal, target = artifacts.Journal(tmp_path / "journal"), tmp_path / "found/w.safetensors"
    assert not journal.link("w", target)
    assert not target.exists()
    journal.keep("w", {"fisher": np.ones(3, np.float32)})
    assert journal.link("w", target)
    assert (target.stat().st_nlink == 2) == links
    journal.close()
    assert same(artifacts.read_statistics(target.parent, "w"), Statistics(fisher=np.ones(3, np.float32)))


def test_records_of_arrays_come_back(tmp_path: Path) -> None:
    baseline = Baseline(np.ones((4, 3), np.float32), np.array([1.5]))
    artifacts.write_record(tmp_path / "b", baseline)
    assert same(artifacts.read_record(tmp_path / "b", Baseline), baseline)
    losses = Losses(np.ones(2), np.array([3, 4]), np.ones(2), np.zeros(7, np.float32), 0.75, np.ones(1), np.ones(1))
    artifacts.write_record(tmp_path / "l", losses)
    assert same(artifacts.read_record(tmp_path / "l", Losses), losses)


def test_arrays_that_are_not_contiguous_come_back_as_they_look(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3).T
    artifacts.write_record(tmp_path / "b", Baseline(matrix, np.arange(6.0)[::2]))
    assert same(artifacts.read_record(tmp_path / "b", Baseline), Baseline(matrix, np.array([0.0, 2, 4])))


def test_allocations_come_back(tmp_path: Path) -> None:
    allocation = Allocation(
        {
            "a": Choice(bits=4),
            "b": Choice(classes=(2, 4, 8), thresholds=(0.1, 1 / 3)),
            "c": Choice(step=-6.123456789012345),
            "d": Choice(tiles=("234", "800")),
        },
        {8: 3, 2: 10},
        price=1.25e-9,
        largest_deviation_gain=0.0,
        duality_gap=1e-7,
        predicted_rise=0.01,
        asked_bytes=1000,
        bought_bytes=999,
    )
    artifacts.write_allocation(tmp_path, allocation)
    assert artifacts.read_allocation(tmp_path) == allocation
    document = artifacts.allocation_document(allocation)
    assert document["histogram"] == {"2": 10, "8": 3}
    assert document["bought_bytes"] == 999
