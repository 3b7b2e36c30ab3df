"""Which source files a file needs: the static import closure within this project.

DVC must rerun a stage when any code that it runs has changed. The closure says which code that is: `imports` writes it
down for every stage, and a method's recipe carries the hash of what the method alone brings in.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from nashswarm.types import InputError

PACKAGE = "nashswarm"


def closure(files: Iterable[Path], roots: Iterable[Path]) -> set[Path]:
    """`files` and all project files that they import, at any depth and in any scope.

    Arguments: `roots`, directories in which imports are looked up (src, stages); others are not the project's.
    Raises InputError for a file that is no Python, or imports by a relative name.
    """
    roots = list(roots)
    found: set[Path] = set()
    pending = [path.resolve() for path in files]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        for name in imported_modules(path):
            pending.extend(p.resolve() for p in _files_of(name, roots))
    return found


def imported_modules(path: Path) -> frozenset[str]:
    """Dotted names of all modules that a file may import; `from a import b` counts as a and as a.b."""
    return _imported_modules(path, path.read_bytes())


@cache
def _imported_modules(path: Path, code: bytes) -> frozenset[str]:
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno}: {error.msg}; mend it, so that its imports can be followed") from error
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.ImportFrom):
            raise InputError(
                f"{path}:{node.lineno}: a relative import; write it from `{PACKAGE}`, so that it can be followed"
            )
    return frozenset(names)


def fingerprint(files: Iterable[Path], base: Path) -> dict[str, str]:
    """File, relative to `base`, -> SHA-256."""
    base = base.resolve()
    return {str(p.relative_to(base)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def _files_of(module: str, roots: list[Path]) -> list[Path]:
    """The files that importing a module runs: its own, and the packages above it."""
    parts = module.split(".")
    files = []
    for root in roots:
        for depth in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:depth])
            files += [f for f in (place / "__init__.py", place.with_suffix(".py")) if f.is_file()]
            if not place.is_dir():
                break
    return files
