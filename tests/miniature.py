"""DVC itself on a miniature of the project: the real stages and library, a tiny model, three methods."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from conftest import PROJECT, tiny_text

from nashswarm.config import parse_params

METHODS = ("fp32", "nash", "rtn4-g64")
SPLITS = ("calibration", "validation", "test")

# As src/sitecustomize.py: where LOADED names a folder, a process notes there which of the project's files it loaded.
WITNESS = """
import atexit, json, os, pathlib, sys

def note():
    files = {pathlib.Path(m.__file__).resolve() for m in [*sys.modules.values()] if getattr(m, "__file__", None)}
    here = pathlib.Path.cwd()
    names = sorted(f.relative_to(here).as_posix() for f in files if f.is_relative_to(here))
    (pathlib.Path(os.environ["LOADED"]) / f"{os.getpid()}.json").write_text(json.dumps([sys.argv[0], names]))

if "LOADED" in os.environ:
    atexit.register(note)
"""


@dataclass(frozen=True)
class Project:
    """A project that DVC can run, without a git identity, a home, or a network."""

    root: Path
    home: Path
    first: str = ""  # what the first `dvc repro` printed

    def call(
        self, *words: str, ok: bool = True, timeout: int = 600, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            words,
            cwd=self.root,
            env={**self.environment(), **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0 or not ok, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done

    def environment(self) -> dict[str, str]:
        """Of a process in it: no settings of the user's."""
        own = {
            "HOME": str(self.home),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "DVC_SITE_CACHE_DIR": str(self.home / "site"),
            "DVC_GLOBAL_CONFIG_DIR": str(self.home / "global"),
            "DVC_SYSTEM_CONFIG_DIR": str(self.home / "system"),
            "HF_HOME": str(self.home / "hf"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        dropped = ("PYTHONPATH", "GIT_", "DVC_", "HF_", "XDG_", "EMAIL")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        return {**kept, **own}

    def dvc(self, *words: str) -> str:
        return self.call("dvc", *words).stdout

    def stale(self) -> list[str]:
        """The stages that DVC says it would run, for what has changed since; those that follow from them left out."""
        return sorted(json.loads(self.dvc("status", "--json")))

    def git(self, *words: str) -> str:
        return self.call("git", *words).stdout

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "test")

    def set(self, **blocks: Any) -> None:
        """Change blocks of params.yaml: `scoring={"tokens": 256}` replaces that key and keeps the block's others."""
        path = self.root / "params.yaml"
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        for block, changes in blocks.items():
            raw[block] |= changes
        path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")

    def raw(self) -> dict[str, Any]:
        return yaml.safe_load((self.root / "params.yaml").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def copy(self, target: Path) -> Project:
        shutil.copytree(self.root, target / "project", symlinks=True)
        return dataclasses.replace(self, root=target / "project")

    def files(self) -> dict[str, bytes]:
        """All files' contents; compiled ones, git's and DVC's own left out."""
        found = (p for p in self.root.rglob("*") if p.is_file() and not {".git", ".dvc", "__pycache__"} & {*p.parts})
        return {p.relative_to(self.root).as_posix(): p.read_bytes() for p in found}


def ran(output: str) -> list[str]:
    """The stages that DVC ran, in their order."""
    return re.findall(r"Running stage '([^']+)'", output)


def of_method(method: str) -> list[str]:
    return [f"{stage}@reference-{method}" for stage in ("allocate", "pack", "evaluate")]


def edit(project: Project, file: str) -> None:
    """Append what changes a file and nothing that it does."""
    with (project.root / file).open("a", encoding="utf-8") as opened:
        opened.write("\n\nUNUSED = 0\n")


def copy_code(target: Path) -> None:
    """With what numba has compiled of it, since that takes longer than most of what is run here."""
    for name in ("src", "stages"):
        shutil.copytree(PROJECT / name, target / name, ignore=shutil.ignore_patterns("*.pyc*", "*.tmp.*"))
    (target / ".dvc").mkdir()
    for name in ("dvc.yaml", "constraints.txt", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        if (PROJECT / name).is_file():
            shutil.copyfile(PROJECT / name, target / name)


def make(root: Path, home: Path, model: Path) -> Project:
    """The project in `root`, ready to run, with a model of its own as the embedded one."""
    copy_code(root)
    shutil.copytree(model, root / "data/reference")
    for seed, split in enumerate(SPLITS):
        text = "\n".join(tiny_text(60, 10 + seed))
        (root / f"data/reference/{split}.txt").write_text(f"{text}\n", encoding="utf-8")
    shutil.copyfile(PROJECT / "params.yaml", root / "params.yaml")
    project = Project(root, home)
    raw = project.raw()
    paper = {**raw["evaluation"]["paper"], "length": 16, "texts": [20, 30]}
    project.set(
        active={"models": ["reference"], "calibration": "sampled", "corpora": ["sampled"], "methods": [*METHODS]},
        scoring={"tokens": 512, "batch_tokens": 256},
        evaluation={"paper": paper},
    )
    parse_params(project.raw())
    project.git("init", "--quiet", "--initial-branch=main")
    return project


def make_run(directory: Path, model: Path) -> Project:
    """A project in `directory`, run once before witnesses, whose notes lie in its home's `loaded`, and committed."""
    project = make(directory / "project", directory / "home", model)
    (project.root / "src/sitecustomize.py").write_text(WITNESS, encoding="utf-8")
    (project.home / "loaded").mkdir(parents=True)
    output = project.call("dvc", "repro", LOADED=str(project.home / "loaded")).stdout
    project.commit()
    return dataclasses.replace(project, first=output)
