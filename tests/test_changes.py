"""What a change makes DVC run again, and what it leaves alone: the real stages on copies of the miniature."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import PROJECT, tiny_text
from miniature import METHODS, SPLITS, Project, edit, of_method, ran


@pytest.fixture(scope="module")
def finer(miniature: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy with an experiment in its workspace, smaller groups for rtn4-g64, and what DVC printed in `first`."""
    project = miniature.copy(tmp_path_factory.mktemp("finer"))
    output = project.dvc("exp", "run", "--name", "finer", "-S", "methods.rtn4-g64.group=32")
    return dataclasses.replace(project, first=output)


@pytest.mark.pipeline
def test_experiment_with_one_setting_touches_one_method(finer: Project, tmp_path: Path) -> None:
    assert ran(finer.first) == ["methods", *of_method("rtn4-g64"), "report"]

    copy = finer.copy(tmp_path)
    shown = json.loads(copy.dvc("exp", "show", "--json"))
    experiments = [e for row in shown for e in row["experiments"] or ()]
    assert [e["name"] for e in experiments] == ["finer"]

    copy.dvc("exp", "branch", "finer", "finer")
    changed = copy.git("diff", "--name-only", "main", "finer").split()
    assert sorted(changed) == ["dvc.lock", "metrics/reference/rtn4-g64.json", "params.yaml"]
    difference = json.loads(copy.dvc("metrics", "diff", "main", "finer", "--json"))
    assert list(difference) == ["metrics/reference/rtn4-g64.json"]
    figures = difference["metrics/reference/rtn4-g64.json"]
    assert figures["size.file_bytes"]["diff"] > 0
    assert "quality.sampled.loss" in figures


@pytest.mark.pipeline
def test_branches_are_compared_as_a_comment_and_as_plots(finer: Project, tmp_path: Path) -> None:
    copy = finer.copy(tmp_path)
    copy.git("switch", "--quiet", "--create", "change")
    copy.commit()
    before = copy.files()
    copy.call(str(PROJECT / "tools/difference.sh"), "main")
    made = {name: data for name, data in copy.files().items() if name not in before}
    assert set(made) == {"difference/comment.md", "difference/index.html"}
    assert before.items() <= copy.files().items()
    assert copy.git("status", "--porcelain") == ""

    table, everything = made["difference/comment.md"].decode().split("<details>")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "| metrics/" in line]
    assert {path for path, *_ in rows} == {"metrics/reference/rtn4-g64.json"}
    names = ("quality.sampled.delta_loss_percent", "quality.sampled.kl_mean", "size.bits_per_weight")
    assert sorted(name for _, name, *_ in rows) == list(names)
    assert all(float(new) - float(old) == pytest.approx(float(by)) and old != new for *_, old, new, by in rows)
    assert "size.file_bytes" in everything
    assert "size.file_bytes" not in table

    page = made["difference/index.html"].decode()
    for revision in ("base", "change"):
        assert page.count(f'"rev": "{revision}"') == 2 * len(METHODS)  # two plots

    copy.call(str(PROJECT / "tools/difference.sh"), "HEAD", "same")
    assert "No figure differs." in (copy.root / "same/comment.md").read_text(encoding="utf-8")


@pytest.mark.pipeline
def test_scoring_touches_neither_download_nor_baseline(copy: Project) -> None:
    copy.set(scoring={"tokens": 256})
    assert ran(copy.dvc("repro", "score@reference", "baseline@reference")) == ["score@reference"]


@pytest.mark.pipeline
def test_codec_touches_only_the_methods_that_use_it(copy: Project) -> None:
    edit(copy, "src/nashswarm/codecs/grouped.py")
    # Figures stay as they are, so the report, which is made of them, stays too.
    assert ran(copy.dvc("repro")) == ["imports", "methods", *of_method("rtn4-g64")]
    assert copy.git("status", "--porcelain", "metrics") == ""


@pytest.mark.pipeline
@pytest.mark.parametrize(
    ("file", "touched"),
    [
        ("src/nashswarm/bitmap.py", {"report"}),
        ("src/nashswarm/kernels/tiles.cpp", set()),
        ("stages/score.py", {"score"}),
    ],
)
def test_code_touches_only_the_stages_that_import_it(file: str, touched: set[str], copy: Project) -> None:
    edit(copy, file)
    found = ran(copy.dvc("repro"))
    expected = {name for name in ran(copy.first) if name.partition("@")[0] in touched}
    assert sorted(found) == sorted({"imports", *expected})
    assert copy.git("status", "--porcelain", "metrics") == ""
    assert copy.stale() == []


@pytest.mark.pipeline
def test_code_of_many_stages_makes_all_of_them_stale(copy: Project) -> None:
    """They take a while, so DVC is only asked."""
    edit(copy, "src/nashswarm/intervals.py")
    assert ran(copy.dvc("repro", "imports")) == ["imports"]
    assert copy.stale() == sorted(["baseline@reference", "report", *(f"evaluate@reference-{m}" for m in METHODS)])


@pytest.mark.pipeline
def test_a_late_import_is_followed_from_then_on(copy: Project) -> None:
    with (copy.root / "stages/report.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef late() -> None:\n    import nashswarm.statistics\n")
    assert ran(copy.dvc("repro")) == ["imports", "report"]
    edit(copy, "src/nashswarm/statistics.py")
    assert ran(copy.dvc("repro", "imports")) == ["imports"]
    assert copy.stale() == ["report", "score@reference"]


@pytest.mark.pipeline
def test_compiled_files_are_no_code(copy: Project) -> None:
    kernels = copy.root / "src/nashswarm/kernels"
    for path in (kernels / "_tiles.cpython-311-x86_64-linux-gnu.so", kernels / "__pycache__/build.pyc"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert ran(copy.dvc("repro")) == []


@pytest.mark.pipeline
def test_code_edited_since_makes_no_result_under_old_hashes(copy: Project) -> None:
    edit(copy, "src/nashswarm/statistics.py")
    before = (copy.root / "dvc.lock").read_bytes()
    done = copy.call("dvc", "repro", "--force", "--single-item", "score@reference", ok=False)
    wanted = "src/nashswarm/statistics.py: changed since data/imports/score.json was written; run `dvc repro imports`"
    assert done.returncode != 0
    assert wanted in done.stderr
    assert (copy.root / "dvc.lock").read_bytes() == before
    assert ran(copy.dvc("repro", "imports", "baseline@reference")) == ["imports"]
    copy.dvc("repro", "--force", "--single-item", "score@reference")


@pytest.mark.pipeline
def test_added_corpus_touches_what_measures(copy: Project) -> None:
    for seed, split in enumerate(SPLITS):
        (copy.root / f"own-{split}.txt").write_text("\n".join(tiny_text(30, 20 + seed)), encoding="utf-8")
    own = {"source": "path", **{split: f"own-{split}.txt" for split in SPLITS}}
    copy.set(corpora={"own": own}, active={"corpora": ["sampled", "own"]})
    output = copy.dvc("repro", "score@reference", "baseline@reference")
    assert ran(output) == ["download@reference", "baseline@reference"]
    assert (copy.root / "data/baselines/reference/own.safetensors").is_file()
    assert copy.stale() == sorted(["report", *(f"evaluate@reference-{m}" for m in METHODS)])


@pytest.mark.pipeline
def test_added_model_touches_no_other(copy: Project) -> None:
    copy.set(models={"own": {"source": "path", "path": "data/reference"}}, active={"models": ["reference", "own"]})
    expected = {"report", *(f"{s}@own" for s in ("download", "score", "baseline"))}
    expected |= {stage.replace("@reference-", "@own-") for m in METHODS for stage in of_method(m)}
    assert copy.stale() == sorted(expected)


@pytest.mark.pipeline
def test_benchmarks_are_run_where_they_are_named_and_shown(copy: Project) -> None:
    small = {"rounds": 1, "cold_mib": 1, "packing": {"widths": [2], "codes": 1000, "coded": 1000}}
    copy.set(active={"benchmarks": ["packing"]}, benchmark=small)
    assert ran(copy.dvc("repro")) == ["benchmark@packing", "report"]
    assert "Codes to bytes and back" in (copy.root / "report/report.md").read_text(encoding="utf-8")
    assert ran(copy.dvc("repro")) == []
    copy.set(active={"benchmarks": []})
    assert ran(copy.dvc("repro")) == ["report"]  # active is among its params; what was measured stays


@pytest.mark.pipeline
def test_plots_show_every_method(copy: Project) -> None:
    copy.dvc("plots", "show", "--out", "plots")
    page = (copy.root / "plots/index.html").read_text(encoding="utf-8")
    assert page.count('"rev": "workspace"') == 2 * len(METHODS)
    assert all(f'"method": "{method}"' in page for method in METHODS)
