"""The small tools beside the pipeline: `make compare` in a repository of its own, and what `make` offers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[1]
FIGURES: dict[str, Any] = {
    "size": {"file_bytes": 1_000_000, "bits_per_weight": 4.5, "parts": {"codes": 900_000}},
    "quality": {
        "sampled": {
            "loss": 3.25,
            "delta_loss_ci95": [0.01, 0.02],
            "delta_loss_percent": 1.5,
            "kl_mean": 0.015,
            "top1_agreement": 0.95,
            "resolved": True,
        }
    },
    "allocation": {"histogram": {"4": 1_000}, "price": None},
}
COUNT = 12  # leaves of FIGURES


def run(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Run from `make test`, this must not inherit that make's flags, nor the VENV it was told.
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "VENV")
    kept = {k: v for k, v in os.environ.items() if k not in outer}
    quiet = {**kept, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    return subprocess.run(words, cwd=root, env=quiet, capture_output=True, text=True, check=False, timeout=60)


def git(root: Path, *words: str) -> None:
    done = run(root, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", *words)
    assert done.returncode == 0, done.stderr


def compare(root: Path, *words: str) -> tuple[int, list[str]]:
    done = run(root, sys.executable, str(PROJECT / "tools/compare.py"), *words)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def write(root: Path, figures: dict[str, Any], method: str = "nash") -> None:
    path = root / f"metrics/reference/{method}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures), encoding="utf-8")


def changed(*keys: str, value: Any) -> dict[str, Any]:
    """FIGURES with one value replaced, given by the way to it."""
    copy: dict[str, Any] = json.loads(json.dumps(FIGURES))
    place = copy
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return copy


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository in which the figures of two methods are committed."""
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    for method in ("fp32", "nash"):
        write(tmp_path, FIGURES, method)
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "-m", "figures")
    return tmp_path


def test_compare_accepts_equal_figures(repository: Path) -> None:
    assert compare(repository) == (0, [f"{2 * COUNT} figures in 2 files agree with HEAD"])


@pytest.mark.parametrize(
    ("keys", "within", "beyond"),
    [
        (("size", "file_bytes"), 1_000_099, 1_000_101),
        (("size", "bits_per_weight"), 4.504, 4.505),
        (("size", "parts", "codes"), 900_899, 900_901),
        (("quality", "sampled", "loss"), 3.2503, 3.2504),
        (("quality", "sampled", "delta_loss_ci95"), [0.01, 0.02009], [0.01, 0.02011]),
        (("quality", "sampled", "delta_loss_percent"), 1.529, 1.531),
        (("quality", "sampled", "kl_mean"), 0.015149, 0.015151),
        (("quality", "sampled", "top1_agreement"), 0.9509, 0.9511),
        (("allocation", "histogram", "4"), 1_002, 1_003),
    ],
)
def test_compare_holds_figures_to_their_tolerance(
    repository: Path, keys: tuple[str, ...], within: Any, beyond: Any
) -> None:
    write(repository, changed(*keys, value=within))
    assert compare(repository)[0] == 0
    write(repository, changed(*keys, value=beyond))
    code, lines = compare(repository)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"metrics/reference/nash.json: {'.'.join(keys)}")


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("quality", "sampled", "resolved"), False, "quality.sampled.resolved: True became False"),
        (("allocation", "price"), 1e-9, "allocation.price: None became 1e-09"),
        (("size", "more"), 1, "size.more: nothing became 1"),
    ],
)
def test_compare_names_what_is_no_matter_of_tolerance(
    repository: Path, keys: tuple[str, ...], value: Any, says: str
) -> None:
    write(repository, changed(*keys, value=value))
    assert compare(repository) == (1, [f"metrics/reference/nash.json: {says}"])


def test_compare_does_not_pass_over_a_missing_file(repository: Path) -> None:
    (repository / "metrics/reference/nash.json").unlink()
    code, lines = compare(repository)
    assert code == 1
    assert len(lines) == COUNT
    assert all(line.startswith("metrics/reference/nash.json: ") for line in lines)
    assert all(line.endswith("became nothing") for line in lines)


def test_compare_names_a_file_that_the_commit_lacks(repository: Path) -> None:
    write(repository, FIGURES, "newcomer")
    assert compare(repository) == (
        1,
        ["metrics/reference/newcomer.json: not in HEAD, so it was compared with nothing"],
    )


def test_compare_passes_over_times(repository: Path) -> None:
    path = repository / "metrics/benchmarks/kernels.json"
    path.parent.mkdir()
    path.write_text('{"load": 0.5}', encoding="utf-8")
    assert compare(repository)[0] == 0
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", "times")
    path.write_text('{"load": 0.7}', encoding="utf-8")
    assert compare(repository)[0] == 0


@pytest.mark.parametrize(
    ("keys", "within", "beyond"),
    [
        (("size", "file_bytes"), 1_000_900, 1_001_100),
        (("quality", "sampled", "loss"), 3.254, 3.256),
        (("quality", "sampled", "delta_loss_ci95"), [0.01, 0.0219], [0.01, 0.0221]),
        (("quality", "sampled", "kl_mean"), 0.0157, 0.0158),
    ],
)
def test_compare_holds_codes_that_follow_each_other_to_less_where_scores_differ(
    keys: tuple[str, ...], within: Any, beyond: Any, repository: Path
) -> None:
    def lock(inputs: str, scores: str) -> None:
        stage = {"deps": [{"path": "in", "md5": inputs}], "outs": [{"path": "out", "md5": scores}]}
        (repository / "dvc.lock").write_text(yaml.safe_dump({"stages": {"score@reference": stage}}))

    (repository / "params.yaml").write_text(yaml.safe_dump({"methods": {"gptq": {"codec": "gptq"}}}))
    write(repository, FIGURES, "gptq")
    lock("a", "b")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", "with a lock")
    write(repository, changed(*keys, value=within), "gptq")
    assert compare(repository)[0] == 1
    lock("other inputs", "other scores")
    assert compare(repository)[0] == 1
    lock("a", "other scores")
    code, (said, count) = compare(repository)
    assert (code, count) == (0, f"{3 * COUNT} figures in 3 files agree with HEAD")
    assert said == "This machine's scores have other late digits than HEAD's: 1 files are held to less"
    write(repository, changed(*keys, value=within))  # by rounding to nearest
    assert compare(repository)[0] == 1
    write(repository, FIGURES)
    write(repository, changed(*keys, value=beyond), "gptq")
    assert compare(repository)[0] == 1


def test_compare_takes_another_commit(repository: Path) -> None:
    write(repository, changed("quality", "sampled", "loss", value=3.5))
    git(repository, "commit", "--quiet", "--all", "-m", "worse")
    assert compare(repository)[0] == 0
    assert compare(repository, "HEAD~1") == (
        1,
        [
            "metrics/reference/nash.json: quality.sampled.loss: 3.25 became 3.5, "
            "more than 0.0001 relative and 0.0001 absolute"
        ],
    )


def test_compare_is_not_content_with_nothing(repository: Path) -> None:
    git(repository, "rm", "--quiet", "-r", "metrics")
    git(repository, "commit", "--quiet", "-m", "none")
    code, lines = compare(repository)
    assert code == 1
    assert "nothing was compared" in lines[0]


def test_compare_names_an_unknown_commit(repository: Path) -> None:
    done = run(repository, sys.executable, str(PROJECT / "tools/compare.py"), "nowhere")
    assert done.returncode != 0
    assert "nowhere" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def targets() -> set[str]:
    """The Makefile's targets that stand for no file."""
    line = re.search(r"^\.PHONY: (.*)$", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert line
    return set(line[1].split())


@pytest.mark.parametrize("words", [("help",), ()], ids=["help", "no target"])
def test_make_lists_its_targets(words: tuple[str, ...]) -> None:
    done = run(PROJECT, "make", "--no-print-directory", *words)
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert {name for name, _ in rows} == targets()
    assert all(meaning for _, meaning in rows)


def test_make_knows_the_two_commands_of_the_readme() -> None:
    assert {"reproduce", "test"} <= targets()


@pytest.mark.parametrize(
    "target", ["reproduce", "test", "paper", "seeds", "difference", "compare", "lint", "test-scale"]
)
def test_make_prepares_the_environment_first(target: str, tmp_path: Path) -> None:
    done = run(PROJECT, "make", "--no-print-directory", "--dry-run", target, f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 0, done.stderr
    assert "-m venv" in done.stdout.splitlines()[0]
    assert "constraints.txt" in done.stdout
    assert not list(tmp_path.iterdir())


def test_show_names_the_commit_and_the_lock() -> None:
    shown = run(PROJECT, sys.executable, "tools/show.py")
    assert shown.returncode == 0, shown.stderr
    lock = hashlib.sha256((PROJECT / "dvc.lock").read_bytes()).hexdigest()
    commit, _, rest = shown.stdout.strip().split("\n")[-1].partition("; ")
    assert rest == f"dvc.lock sha256 {lock}"
    head = run(PROJECT, "git", "rev-parse", "HEAD").stdout.strip()
    assert commit.startswith(f"commit {head}" if head else "no commit")


def test_show_says_where_there_is_no_commit(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tools'); import pathlib, show; print(show.commit(pathlib.Path(sys.argv[1])))"
    )
    assert run(PROJECT, sys.executable, "-c", code, str(tmp_path)).stdout == "no commit: this is no git repository\n"


# --- the recipe of docs/ci.md --------------------------------------------------------------------------------------

ELSEWHERE = {"gh"}  # programs of the CI's machine


def recipe() -> dict[str, Any]:
    """The workflow in docs/ci.md."""
    found = re.findall(r"```yaml\n(.*?)```", (PROJECT / "docs/ci.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1
    # YAML 1.1 reads the key `on` as true.
    return {"on" if key is True else key: value for key, value in yaml.safe_load(found[0]).items()}


def steps() -> list[dict[str, Any]]:
    (job,) = recipe()["jobs"].values()
    return list(job["steps"])


def test_the_workflow_is_of_pull_requests_and_may_comment() -> None:
    assert list(recipe()["on"]) == ["pull_request"]
    assert recipe()["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert all(("run" in step) != ("uses" in step) for step in steps())
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in steps() if "uses" in step)


def test_the_workflow_runs_what_there_is() -> None:
    """Every line is a command of make, with targets that the Makefile has, or of the CI's machine."""
    commands = [line.split() for step in steps() for line in step.get("run", "").splitlines()]
    assert commands
    for program, *words in commands:
        if program == "make":
            assert {word for word in words if "=" not in word} <= targets()
        else:
            assert program in ELSEWHERE


def test_the_workflow_makes_the_pinned_environment_first_and_reads_what_difference_writes() -> None:
    runs = [step["run"] for step in steps() if "run" in step]
    assert runs[0] == "make install"
    assert "comment.md" in (PROJECT / "tools/difference.sh").read_text(encoding="utf-8")
    assert "--body-file difference/comment.md" in runs[-1]
    (history,) = (step["with"] for step in steps() if step.get("uses", "").startswith("actions/checkout@"))
    assert history == {"fetch-depth": 0}
    (python,) = (step["with"] for step in steps() if step.get("uses", "").startswith("actions/setup-python@"))
    assert python["python-version"] == "3.11"
    assert (PROJECT / python["cache-dependency-path"]).is_file()


def test_make_passes_the_base_on(tmp_path: Path) -> None:
    (tmp_path / ".ready").touch()
    done = run(PROJECT, "make", "--no-print-directory", "--dry-run", "difference", "BASE=origin/x", f"VENV={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "tools/difference.sh origin/x"


@pytest.mark.parametrize("script", sorted((PROJECT / "tools").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse_and_may_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    done = run(PROJECT, "bash", "-n", str(script))
    assert done.returncode == 0, done.stderr


def test_difference_names_a_commit_that_is_not_there(repository: Path) -> None:
    done = run(repository, str(PROJECT / "tools/difference.sh"), "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no commit 'nowhere' here; name another, or fetch it")
    assert not (repository / "difference").exists()
