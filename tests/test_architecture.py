"""Which way imports run, who may write, print and read params, and how long things may get: read from the syntax tree.

A rule is a function of a source tree (a directory that holds src/ and stages/) that lists its violations, each
beginning with the file. It must find none in the project, and must find the one that is planted in a copy of it.
"""

from __future__ import annotations

import ast
import graphlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ROOMS = ("importance", "allocators", "codecs", "peers")
# What lies below the rooms, and what each of these may import of the project. All else in src is the library above.
FOUNDATION: dict[str, set[str]] = {
    "types": set(),
    "bitpack": {"jit"},
    "jit": set(),
    "rans": {"jit"},
    "patches": set(),
    "trellis": {"jit", "patches", "rans"},
    "entropy": {"rans", "trellis"},
    "feedback": {"patches", "threads", "triangular", "types"},
    "kernels": set(),
    "kernels.nvrtc": set(),
    "kernels.viterbi": {"kernels.nvrtc", "rans", "trellis"},
    "rounding": {"entropy", "kernels.nvrtc", "kernels.viterbi", "patches", "threads", "trellis"},
    "clipped": {"jit", "patches"},
    "processes": set(),
    "threads": set(),
    "triangular": {"threads"},
    "tooling": {"bitpack", "processes", "types"},
}
FOR_SCRIPTS = {"processes", "threads", "types"}  # of the foundation; for the rest, the library stands between
COMMAND = "cli"  # the program over the library: it prints, reads a user's method file, and is nobody's import
# Modules that compute with torch. Whatever imports one of them needs torch too; everything else must start without.
TORCH = {
    "benchmarks.decode",
    "benchmarks.kernels",
    "benchmarks.machine",
    "benchmarks.matrices",
    "benchmarks.quantization",
    "blocks",
    "engine",
    "evaluation",
    "feedback",
    "kernels.gpu",
    "kernels.hopper",
    "kernels.matrix",
    "kernels.nvrtc",
    "kernels.serving",
    "kernels.viterbi",
    "kernels.writing",
    "loading",
    "models",
    "peering",
    "preflight",
    "propagation",
    "regression",
    "resident",
    "rounding",
    "sharding",
    "statistics",
    "streams",
    "tooling",
    "threads",
    "triangular",
    "tuning",
}
TORCH_ROOMS = {"codecs", "importance"}
SLOW = ("transformers", "datasets", "huggingface_hub", "numba", "pandas", "matplotlib", "pyarrow", "rich", "typer")
# hub: its staging; engine: scratch files of members; direct, exports: models; llama_cpp: scratch files for programs;
# build: its library, in a cache; quantization: a scratch model
WRITERS = {"artifacts", "packed", "payload", "hub", "engine", "direct", "exports", "kernels.build", "peers.llama_cpp"}
WRITERS |= {"benchmarks.quantization"}
STAGE_LINES = 60
FUNCTION_LINES = 60

Rule = Callable[[Path], list[str]]


# --- what a source tree holds --------------------------------------------------------------------------------------


def library(tree: Path) -> dict[str, Path]:
    """Module, without the package's name -> file; a room's module as 'codecs.uniform', a package as 'codecs'."""
    root = tree / "src/nashswarm"
    files = {p.relative_to(root).with_suffix("").as_posix().replace("/", "."): p for p in sorted(root.rglob("*.py"))}
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in files.items()}


def scripts(tree: Path) -> list[Path]:
    return sorted((tree / "stages").glob("*.py"))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(_parse(path.read_text(encoding="utf-8")))


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, in any scope; `from a import b` is a.b, whatever b is."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def project_imports(path: Path, tree: Path) -> set[str]:
    """The library's modules that a file imports, named as in `library`."""
    known, found = library(tree), set()
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "nashswarm":
            parent = rest.rpartition(".")[0]
            found.add(rest if rest in known else parent)
    return found


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in nodes(path) if isinstance(node, ast.Call))


def where(path: Path, tree: Path) -> str:
    return path.relative_to(tree).as_posix()


def room(module: str) -> str | None:
    first = module.partition(".")[0]
    return first if first in ROOMS else None


# --- the rules -----------------------------------------------------------------------------------------------------


def imports_run_one_way(tree: Path) -> list[str]:
    """stages -> library -> rooms -> foundation. Rooms are found by name: no code names one, but a codec a codec."""
    found = []
    for module, path in library(tree).items():
        for target in project_imports(path, tree) - {""}:
            if room(module):
                allowed = target in FOUNDATION or room(target) == room(module)
            elif module in FOUNDATION:
                allowed = target in FOUNDATION[module]
            else:
                allowed = room(target) is None and module != ""
            if not allowed:
                found.append(f"{where(path, tree)} imports {target}")
    for path in scripts(tree):
        targets = project_imports(path, tree)
        bad = sorted(t for t in targets if room(t) or (t in FOUNDATION.keys() - FOR_SCRIPTS))
        found += [f"{where(path, tree)} imports {target}" for target in bad]
    return found


def imports_make_no_circle(tree: Path) -> list[str]:
    graph = {module: project_imports(path, tree) - {""} for module, path in library(tree).items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"{where(library(tree)[module], tree)} lies on an import circle" for module in error.args[1]]
    return []


def rooms_are_apart(tree: Path) -> list[str]:
    """No room imports another; an allocator or an importance imports none of its room either."""
    found = []
    for module, path in library(tree).items():
        if room(module):
            targets = {t for t in project_imports(path, tree) if room(t)}
            found += [f"{where(path, tree)} imports {t}" for t in targets if not room(t) == room(module) == "codecs"]
    return found


def rooms_need_no_list(tree: Path) -> list[str]:
    """A room's __init__ is a docstring: a new importance, allocator or codec is one new file."""
    found = []
    for name in ROOMS:
        path = library(tree)[name]
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if len(body) != 1 or not isinstance(body[0], ast.Expr) or not isinstance(body[0].value, ast.Constant):
            found.append(f"{where(path, tree)} holds more than a docstring")
    return found


def allocators_need_numpy_only(tree: Path) -> list[str]:
    found = []
    for module, path in library(tree).items():
        if room(module) == "allocators":
            for name in imports(path):
                top = name.partition(".")[0]
                if top not in {*sys.stdlib_module_names, "numpy"} and not name.startswith("nashswarm.types."):
                    found.append(f"{where(path, tree)} imports {name}")
    return found


def nothing_imports_stages(tree: Path) -> list[str]:
    """Stages share `common` and nothing else; the library knows none of them."""
    names = {path.stem for path in scripts(tree)} | {"stages"}
    found = []
    for path in library(tree).values():
        found += [f"{where(path, tree)} imports {n}" for n in imports(path) if n.partition(".")[0] in names]
    for path in scripts(tree):
        tops = {n.partition(".")[0] for n in imports(path)} & names
        found += [f"{where(path, tree)} imports {n}" for n in tops - {"common"}]
    return found


def imports_are_visible(tree: Path) -> list[str]:
    """`closure` reads absolute imports alone, so there are no others.

    Only `config` imports by a computed name, and the package's own `load`, which nothing here uses.
    """
    found = []
    for path in [*library(tree).values(), *scripts(tree)]:
        found += [f"{where(path, tree)} imports {name}" for name in imports(path) if name.startswith(".")]
        dynamic = {"importlib", "runpy", "imp"} & {name.partition(".")[0] for name in imports(path)}
        built_in = any(isinstance(n, ast.Name) and n.id in ("__import__", "exec", "eval") for n in nodes(path))
        if (dynamic or built_in) and path not in (library(tree)["config"], library(tree)[""]):
            found.append(f"{where(path, tree)} imports by a computed name")
        found += [f"{where(path, tree)} imports {name}" for name in imports(path) if name == "nashswarm.load"]
    return found


def config_alone_reads_params(tree: Path) -> list[str]:
    """`artifacts` knows where params.yaml lies, `config` opens it; the rest of the library gets plain values."""
    found = []
    for module, path in library(tree).items():
        if module == "config":
            continue
        parsers = {"ruamel", "dvc"} | ({"yaml"} if module != COMMAND else set())
        parsers &= {name.partition(".")[0] for name in imports(path)}
        found += [f"{where(path, tree)} imports {name}" for name in parsers]
        for node in nodes(path):
            named = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            if named in ("load_params", "parse_params"):
                found.append(f"{where(path, tree)} calls {named}")
            if isinstance(node, ast.Constant) and node.value == "params.yaml" and module != "artifacts":
                found.append(f"{where(path, tree)} names params.yaml")
    return found


def few_write_files(tree: Path) -> list[str]:
    """Only the writers change what lies on disk; scratch space is tempfile's."""
    found = []
    for path in [*(p for module, p in library(tree).items() if module not in WRITERS), *scripts(tree)]:
        writing = (call for call in calls(path) if _writes(call, path))
        found += [f"{where(path, tree)}:{call.lineno} writes: {ast.unparse(call)}" for call in writing]
    return found


def _writes(call: ast.Call, path: Path) -> bool:
    """Whether a call changes files: opening to write, renaming, deleting, making folders, saving."""
    function = call.func
    owner, _, name = ast.unparse(function).rpartition(".")
    if name == "open":
        first = 0 if isinstance(function, ast.Attribute) else 1
        mode = [*call.args[first : first + 1], *(k.value for k in call.keywords if k.arg == "mode")]
        return any(isinstance(m, ast.Constant) and bool(set(str(m.value)) & set("wax+")) for m in mode)
    if name == "savefig":  # into memory is fine
        buffers = {
            ast.unparse(target)
            for node in nodes(path)
            if isinstance(node, ast.Assign) and ast.unparse(node.value) in ("BytesIO()", "io.BytesIO()")
            for target in node.targets
        }
        return not call.args or ast.unparse(call.args[0]) not in buffers
    if name == "to_csv":  # without a path it gives the text
        return bool(call.args) or any(k.arg == "path_or_buf" for k in call.keywords)
    if name in ("replace", "rename"):  # of paths: one argument; str.replace has two, dataclasses.replace keywords
        return owner == "os" or (len(call.args) == 1 and not call.keywords and owner != "dataclasses")
    if name in ("copy", "move"):
        return owner == "shutil"
    if name in ("save", "savez", "savez_compressed", "dump"):
        return owner in ("np", "numpy", "torch", "json", "pickle", "yaml", "joblib")
    if name in ("write_text", "write_bytes"):  # Path's; those of `artifacts` are its business
        return isinstance(function, ast.Attribute) and owner != "artifacts"
    return name in {
        "mkdir", "makedirs", "unlink", "rmdir", "remove_file", "touch", "symlink_to", "hardlink_to", "rmtree",
        "copyfile", "copytree", "copy2", "save_file", "save_pretrained", "tofile", "savetxt", "to_parquet",
        "open_memmap",
    }  # fmt: skip


def library_does_not_print(tree: Path) -> list[str]:
    found = []
    for path in (p for module, p in library(tree).items() if module != COMMAND):
        printing = (c for c in calls(path) if ast.unparse(c.func) in ("print", "sys.stdout.write", "sys.stderr.write"))
        found += [f"{where(path, tree)}:{call.lineno} prints" for call in printing]
    return found


def stages_are_thin(tree: Path) -> list[str]:
    counts = ((path, len(path.read_text(encoding="utf-8").splitlines())) for path in scripts(tree))
    return [f"{where(path, tree)} has {count} lines" for path, count in counts if count > STAGE_LINES]


def functions_fit_a_screen(tree: Path) -> list[str]:
    found = []
    for path in [*library(tree).values(), *scripts(tree)]:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found.append(f"{where(path, tree)}: {node.name} has {lines} lines")
    return found


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        imports_run_one_way,
        imports_make_no_circle,
        rooms_are_apart,
        rooms_need_no_list,
        allocators_need_numpy_only,
        nothing_imports_stages,
        imports_are_visible,
        config_alone_reads_params,
        few_write_files,
        library_does_not_print,
        stages_are_thin,
        functions_fit_a_screen,
    )
}

LIB = "src/nashswarm"
PLANTED = [
    (imports_run_one_way, f"{LIB}/bitpack.py", "from nashswarm import config"),
    (imports_run_one_way, f"{LIB}/types.py", "def late():\n    from nashswarm.bitpack import pack"),
    (imports_run_one_way, f"{LIB}/codecs/new.py", "from nashswarm.config import Method"),
    (imports_run_one_way, f"{LIB}/quantize.py", "import nashswarm.codecs.kept"),
    (imports_run_one_way, f"{LIB}/__init__.py", "from nashswarm.loading import load"),
    (imports_run_one_way, "stages/pack.py", "from nashswarm.codecs import kept"),
    (imports_run_one_way, "stages/pack.py", "from nashswarm import bitpack"),
    (imports_make_no_circle, f"{LIB}/config.py", "def late():\n    from nashswarm import quantize"),
    (rooms_are_apart, f"{LIB}/codecs/new.py", "from nashswarm.importance.magnitude import importance"),
    (rooms_are_apart, f"{LIB}/importance/new.py", "from nashswarm.importance import magnitude"),
    (rooms_need_no_list, f"{LIB}/codecs/__init__.py", "from nashswarm.codecs import uniform"),
    (allocators_need_numpy_only, f"{LIB}/allocators/new.py", "import torch"),
    (allocators_need_numpy_only, f"{LIB}/allocators/new.py", "from nashswarm import entropy"),
    (nothing_imports_stages, f"{LIB}/models.py", "from common import progress"),
    (nothing_imports_stages, "stages/pack.py", "from allocate import main"),
    (imports_are_visible, f"{LIB}/codecs/new.py", "from . import uniform"),
    (imports_are_visible, f"{LIB}/loading.py", "import importlib"),
    (imports_are_visible, "stages/evaluate.py", "from nashswarm import load"),
    (imports_are_visible, f"{LIB}/loading.py", "late = __import__('nashswarm.hub')"),
    (config_alone_reads_params, f"{LIB}/evaluation.py", "import yaml"),
    (config_alone_reads_params, f"{LIB}/evaluation.py", "from nashswarm import config\nconfig.load_params(None)"),
    (config_alone_reads_params, f"{LIB}/evaluation.py", "text = Path('params.yaml').read_text()"),
    (few_write_files, f"{LIB}/evaluation.py", "open('x', 'w').close()"),
    (few_write_files, f"{LIB}/evaluation.py", "Path('x').open('ab').close()"),
    (few_write_files, f"{LIB}/evaluation.py", "Path('x').write_text('')"),
    (few_write_files, f"{LIB}/evaluation.py", "Path('x').replace('y')"),
    (few_write_files, f"{LIB}/evaluation.py", "torch.save({}, 'x')"),
    (few_write_files, f"{LIB}/evaluation.py", "figure.savefig('x.png')"),
    (few_write_files, "stages/pack.py", "Path('x').mkdir()"),
    (library_does_not_print, f"{LIB}/codecs/kept.py", "print('kept')"),
    (stages_are_thin, "stages/pack.py", "\n" * STAGE_LINES),
    (functions_fit_a_screen, f"{LIB}/codecs/new.py", "def long():\n" + "    pass\n" * FUNCTION_LINES),
]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_project_keeps_the_rule(rule: Rule) -> None:
    assert rule(PROJECT) == []


@cache
def standing(rule: Rule) -> frozenset[str]:
    """The project's own violations: what a planted one must come on top of."""
    return frozenset(rule(PROJECT))


@pytest.mark.parametrize(("rule", "file", "code"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_planted_violation_is_caught(rule: Rule, file: str, code: str, tmp_path: Path) -> None:
    tree = copy_source(tmp_path)
    plant(tree / file, code)
    new = set(rule(tree)) - standing(rule)
    assert any(violation.startswith(file) for violation in new)


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule.__name__ for rule, _, _ in PLANTED} == set(RULES)


def test_figures_drawn_into_memory_are_no_files(tmp_path: Path) -> None:
    tree = copy_source(tmp_path)
    plant(tree / LIB / "drawing.py", "import io\nbuffer = io.BytesIO()\nfigure.savefig(buffer)")
    assert few_write_files(tree) == few_write_files(PROJECT)


# --- what importing really loads -----------------------------------------------------------------------------------

# Imports each module named on stdin's first line, and prints those that brought in one of the second line's packages.
# An import of a package from the third line fails as if it were not installed.
PROBE = """
import importlib, sys
modules, watched, absent = (input().split() for _ in range(3))
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
for module in modules:
    before = set(sys.modules)
    importlib.import_module(module)
    for name in watched:
        if name in sys.modules and name not in before:
            print(f"{module} imports {name}")
"""


def probe(tree: Path, modules: list[str], watched: tuple[str, ...] = (), absent: tuple[str, ...] = ()) -> list[str]:
    lines = "\n".join(" ".join(words) for words in (modules, watched, absent))
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=f"{lines}\n",
        capture_output=True,
        text=True,
        cwd=tree,
        env={"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1", "PATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def needing_torch(tree: Path) -> set[str]:
    """Modules that cannot do without torch: those of TORCH and TORCH_ROOMS, and all that import one of them."""
    graph = {module: project_imports(path, tree) for module, path in library(tree).items()}
    needing = {m for m in graph if m in TORCH or (room(m) in TORCH_ROOMS and "." in m)}
    while more := {m for m, targets in graph.items() if m not in needing and targets & needing}:
        needing |= more
    return needing


def dotted(modules: set[str]) -> list[str]:
    return sorted(f"nashswarm.{m}".rstrip(".") for m in modules)


def test_modules_that_compute_nothing_start_without_torch() -> None:
    light = set(library(PROJECT)) - needing_torch(PROJECT) - {COMMAND}
    assert {"config", "types", "artifacts", "closure", "recipes", "hub", "entropy", "allocators.uniform"} <= light
    assert probe(PROJECT, dotted(light), ("torch", *SLOW)) == []


def test_no_module_loads_transformers_at_import() -> None:
    assert probe(PROJECT, dotted(needing_torch(PROJECT) - {COMMAND}), SLOW) == []


def test_library_imports_without_dvc() -> None:
    assert probe(PROJECT, dotted(set(library(PROJECT))), absent=("dvc", "dvclive", "pytest")) == []


def test_planted_import_of_a_slow_package_is_caught(tmp_path: Path) -> None:
    tree = copy_source(tmp_path)
    (tree / "src/torch.py").write_text('"""Stands for torch, and takes no time."""\n')
    plant(tree / LIB / "recipes.py", "import torch")
    assert probe(tree, ["nashswarm.config", "nashswarm.recipes"], ("torch",)) == ["nashswarm.recipes imports torch"]


def test_planted_import_of_dvc_is_caught(tmp_path: Path) -> None:
    tree = copy_source(tmp_path)
    plant(tree / LIB / "recipes.py", "import dvc.api")
    with pytest.raises(AssertionError, match="No module named 'dvc'"):
        probe(tree, ["nashswarm.recipes"], absent=("dvc",))


# --- helpers -------------------------------------------------------------------------------------------------------


def copy_source(target: Path) -> Path:
    for name in ("src", "stages"):
        shutil.copytree(PROJECT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def plant(path: Path, code: str) -> None:
    """Append code to a file, or make the file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{text}\n{code}\n", encoding="utf-8")
