"""Which files a file needs, at any depth and in any scope; on invented projects and on this one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import PROJECT

from nashswarm.closure import closure, fingerprint, imported_modules
from nashswarm.types import InputError


def project(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def needed(root: Path, file: str) -> set[str]:
    return {p.relative_to(root.resolve()).as_posix() for p in closure([root / file], [root])}


def test_imports_are_followed_at_any_depth(tmp_path: Path) -> None:
    files = {"a.py": "import b", "b.py": "from c import x", "c.py": "x = 1", "d.py": "import a"}
    assert needed(project(tmp_path, files), "a.py") == {"a.py", "b.py", "c.py"}


def test_imports_are_found_in_any_scope(tmp_path: Path) -> None:
    text = "def f():\n  if True:\n    import b\nclass C:\n  from c import y\ntry:\n  import d as e\nfinally:\n  pass\n"
    files = {"a.py": text, "b.py": "", "c.py": "y = 1", "d.py": ""}
    assert needed(project(tmp_path, files), "a.py") == {"a.py", "b.py", "c.py", "d.py"}


def test_imports_for_types_alone_count_too(tmp_path: Path) -> None:
    """A superset is safe: a rerun too many, never one too few."""
    files = {"a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import b", "b.py": ""}
    assert needed(project(tmp_path, files), "a.py") == {"a.py", "b.py"}


def test_packages_above_a_module_belong_to_it(tmp_path: Path) -> None:
    files = {"p/__init__.py": "import top", "p/q/__init__.py": "", "p/q/m.py": "", "p/other.py": "", "top.py": ""}
    root = project(
        tmp_path, files | {"a.py": "import p.q.m", "b.py": "from p.q import m", "c.py": "from p import other"}
    )
    below = {"p/__init__.py", "p/q/__init__.py", "p/q/m.py", "top.py"}
    assert needed(root, "a.py") == below | {"a.py"}
    assert needed(root, "b.py") == below | {"b.py"}
    assert needed(root, "c.py") == {"c.py", "p/__init__.py", "p/other.py", "top.py"}


def test_circles_end(tmp_path: Path) -> None:
    files = {"a.py": "import b", "b.py": "import a\nimport b"}
    assert needed(project(tmp_path, files), "a.py") == {"a.py", "b.py"}


def test_what_others_wrote_is_left_out(tmp_path: Path) -> None:
    assert needed(project(tmp_path, {"a.py": "import os, torch\nfrom numpy import linalg"}), "a.py") == {"a.py"}


@pytest.mark.parametrize("line", ["from . import b", "from .b import x", "from .. import p", "from ..p.b import x"])
def test_relative_imports_are_refused(line: str, tmp_path: Path) -> None:
    """Not lost: a dependency that DVC does not know of would leave results stale."""
    root = project(tmp_path, {"p/__init__.py": "", "p/a.py": f"import os\n{line}", "p/b.py": "x = 1"})
    with pytest.raises(InputError, match=r"p/a\.py:2: a relative import; write it from `nashswarm`"):
        needed(root, "p/a.py")


@pytest.mark.parametrize("text", ["import os\nimport b c\n", "import os\nx = '\xe9'\n".encode("latin-1")])
def test_what_is_no_python_is_refused(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"a\.py:\d: .*; mend it"):
        needed(tmp_path, "a.py")


def test_an_edit_is_seen_by_the_same_process(tmp_path: Path) -> None:
    root = project(tmp_path, {"a.py": "import b", "b.py": "", "c.py": ""})
    assert needed(root, "a.py") == {"a.py", "b.py"}
    (root / "a.py").write_text("import c")
    assert needed(root, "a.py") == {"a.py", "c.py"}


def test_packages_need_no_init(tmp_path: Path) -> None:
    root = project(tmp_path, {"p/q/m.py": "", "a.py": "import p.q.m, p.x.y"})
    assert needed(root, "a.py") == {"a.py", "p/q/m.py"}


def test_several_roots_are_searched(tmp_path: Path) -> None:
    root = project(
        tmp_path,
        {"src/p/__init__.py": "", "src/p/m.py": "", "stages/common.py": "", "stages/s.py": "import common, p.m"},
    )
    found = closure([root / "stages/s.py"], [root / "src", root / "stages"])
    names = {p.relative_to(root.resolve()).as_posix() for p in found}
    assert names == {"stages/s.py", "stages/common.py", "src/p/__init__.py", "src/p/m.py"}


def test_names_of_a_from_import_may_be_modules(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from x.y import z, w as v\nimport m.n as o\nfrom u import *")
    assert imported_modules(tmp_path / "a.py") == {"x.y", "x.y.z", "x.y.w", "m.n", "u", "u.*"}


def test_a_fingerprint_changes_with_a_files_bytes_alone(tmp_path: Path) -> None:
    root = project(tmp_path, {"b/x.py": "1", "a.py": "2"})
    found = fingerprint([root / "b/x.py", root / "a.py"], root)
    assert found == {"a.py": hashlib.sha256(b"2").hexdigest(), "b/x.py": hashlib.sha256(b"1").hexdigest()}
    (root / "a.py").touch()
    assert fingerprint([root / "a.py", root / "b/x.py"], root) == found
    (root / "a.py").write_text("3")
    assert fingerprint([root / "b/x.py", root / "a.py"], root)["a.py"] != found["a.py"]


@pytest.mark.parametrize(
    ("codec", "brings"), [("grouped", {"bitpack"}), ("classes", {"bitpack", "entropy", "rans"}), ("kept", set())]
)
def test_a_codecs_closure_holds_what_it_computes_with(codec: str, brings: set[str]) -> None:
    source = PROJECT / "src"
    found = {p.stem for p in closure([source / f"nashswarm/codecs/{codec}.py"], [source])}
    assert found >= brings | {codec, "types"}
    assert not found & {"config", "models", "quantize", "artifacts", "hub"}
