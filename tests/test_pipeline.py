"""dvc.yaml against the code that it runs, and DVC itself on a miniature of the project.

The first part reads dvc.yaml and the syntax trees: a stage's `deps` are its list of code, which `imports` writes, and
the artifacts that it reads, its `params` the keys that it reads, its `outs` what it writes; nothing is missing and
nothing is needless. Each check is proven on a planted violation. The second part (marker `pipeline`) looks at
what DVC has run on a miniature of the project with a tiny model, and holds the lists against what each stage's process
had loaded at its end. What changes make DVC run again is in test_changes.py.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT
from miniature import METHODS, Project, copy_code, of_method, ran

from nashswarm.artifacts import Layout
from nashswarm.closure import closure, fingerprint
from nashswarm.config import Params, load_params, room_names
from nashswarm.recipes import method_files

ROOMS = tuple(f"src/nashswarm/{room}" for room in ("importance", "allocators", "codecs", "peers"))
BUILDS = "src/nashswarm/kernels/build.py"  # compiles what lies beside it
RECIPE = "data/methods/${item.method}.json"
FOLDERS = frozenset({"src/nashswarm", "stages"})  # what `imports` depends on
# Threads change speed and late digits: a run on another machine must not make every result stale (config.Compute).
EXEMPT_PARAMS = ("compute",)
# Staging is what a broken download goes on from, in no stage's care; params.yaml is declared key by key; the root
# stands for a model's own files, wherever they lie, which source.json holds with their SHA-256 and `open` compares.
EXEMPT_PATHS = ("data/staging", "params.yaml", ".", "*")
# DESIGN section 6: the report states what ran, so it depends on the whole block.
WHOLE_BLOCKS = {("report", "active")}


# --- what dvc.yaml says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage as it is declared."""

    name: str
    script: str
    words: tuple[str, ...]  # the items that the command line passes, e.g. model, method
    deps: frozenset[str]
    params: frozenset[str]
    outs: frozenset[str]

    @property
    def code(self) -> frozenset[str]:
        return frozenset(d for d in self.deps if d.startswith(("src/", "stages", "data/imports/")))

    @property
    def has_recipe(self) -> bool:
        return bool({"method", "peer"} & {*self.words})

    @property
    def inputs(self) -> frozenset[str]:
        return self.deps - self.code


def stages(tree: Path) -> list[Stage]:
    document = yaml.safe_load((tree / "dvc.yaml").read_text(encoding="utf-8"))
    return [_stage(name, block) for name, block in document["stages"].items()]


def _stage(name: str, block: dict[str, Any]) -> Stage:
    command = re.fullmatch(r"PYTHONPATH=src python (stages/\w+\.py)((?: \$\{item\.\w+\})*)", block["cmd"])
    assert command, f"{name}: {block['cmd']}"
    outs = [next(iter(o)) if isinstance(o, dict) else o for key in ("outs", "metrics") for o in block.get(key, ())]
    return Stage(
        name,
        command[1],
        tuple(re.findall(r"item\.(\w+)", command[2])),
        frozenset(block.get("deps", ())),
        frozenset(block.get("params", ())),
        frozenset(outs),
    )


def covers(declared: str, name: str, separator: str) -> bool:
    return name == declared or name.startswith(declared + separator)


# --- code ----------------------------------------------------------------------------------------------------------


def code_problems(tree: Path) -> Iterator[str]:
    """Each stage depends on its own list of code, and the list holds what the stage runs.

    A module that compiles a source of another language depends on it.
    """
    lists = written(tree)
    for stage in stages(tree):
        if stage.name == "imports":
            deps = FOLDERS
        else:
            listed, needed = lists.get(stage.name, set()), code_needed(tree, stage)
            yield from (f"{stage.name}: the list lacks {path}" for path in sorted(needed - listed))
            yield from (f"{stage.name}: the list need not hold {path}" for path in sorted(listed - needed))
            deps = frozenset({f"data/imports/{stage.name}.json", *_other_languages(tree, needed)})
        yield from (f"{stage.name}: deps lack {path}" for path in sorted(deps - stage.code))
        yield from (f"{stage.name}: deps need not hold {path}" for path in sorted(stage.code - deps))


@cache
def written(tree: Path) -> dict[str, set[str]]:
    """Stage -> the files that `imports` lists for it, run by its own process in a copy."""
    with tempfile.TemporaryDirectory() as scratch:
        copy_code(Path(scratch))
        for name in ("src", "stages"):
            shutil.copytree(tree / name, Path(scratch) / name, dirs_exist_ok=True)
        words, environment = [sys.executable, "stages/imports.py"], {**os.environ, "PYTHONPATH": "src"}
        subprocess.run(words, cwd=scratch, env=environment, check=True)
        return {p.stem: set(json.loads(p.read_bytes())) for p in (Path(scratch) / "data/imports").iterdir()}


def code_needed(tree: Path, stage: Stage) -> set[str]:
    """The import closure of a stage's script, and the rooms that it takes by name.

    `config` loads rooms to check settings, whatever the stage; a stage that runs them depends on them through the
    method's recipe, and the stage that writes recipes on all that a recipe may name, as does one that runs rooms of its
    own choice.
    """
    rooms: tuple[str, ...] = ()
    if "method_files" in _names(tree / stage.script):
        rooms = ROOMS
    elif runs_rooms(tree, stage) and not stage.has_recipe:
        rooms = tuple(room for room in ROOMS if not room.endswith("peers"))
    return _closure(tree, [tree / stage.script, *(path for room in rooms for path in (tree / room).glob("*.py"))])


def _other_languages(tree: Path, code: set[str]) -> set[str]:
    return {p.relative_to(tree).as_posix() for p in (tree / BUILDS).parent.glob("*.cpp")} if BUILDS in code else set()


def runs_rooms(tree: Path, stage: Stage) -> bool:
    """Whether a stage runs what a method names, beyond the check of params.yaml that all stages begin with."""
    library = _closure(tree, [tree / stage.script]) - {"src/nashswarm/config.py"}
    return any("load_room" in _names(tree / path) for path in library)


def _closure(tree: Path, files: list[Path]) -> set[str]:
    base = tree.resolve()
    return {p.relative_to(base).as_posix() for p in closure(files, [tree / "src", tree / "stages"])}


def _names(path: Path) -> set[str]:
    nodes = ast.walk(syntax(path))
    return {n.id if isinstance(n, ast.Name) else n.attr for n in nodes if isinstance(n, ast.Name | ast.Attribute)}


def syntax(path: Path) -> ast.Module:
    return _parse(path.read_text(encoding="utf-8"))


@cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


# --- params --------------------------------------------------------------------------------------------------------


def params_problems(tree: Path) -> Iterator[str]:
    """Declared params against `params.x.y` in the stage's script; a key passed on whole counts whole."""
    for stage in stages(tree):
        main = function(tree / stage.script, "main")
        if [a.arg for a in main.args.args[1:]] != list(stage.words):
            yield f"{stage.name}: the command line passes {stage.words}, main takes {ast.unparse(main.args)}"
        read = {r for r in keys_read(tree, main, stage.words) if not r.startswith(EXEMPT_PARAMS)}
        for key in sorted(read):
            if not any(covers(p, key, ".") for p in stage.params):
                yield f"{stage.name}: params lack {key}"
        for key in sorted(stage.params):
            if not any(covers(key, r, ".") for r in read):
                yield f"{stage.name}: params need not hold {key}"
            elif not _all_of(key, read) and (stage.name, key) not in WHOLE_BLOCKS:
                yield f"{stage.name}: params hold more of {key} than is read"


def keys_read(tree: Path, main: ast.FunctionDef, words: tuple[str, ...] = ()) -> set[str]:
    """Dotted keys of params that a function reads, or has a function of `common` or a property of Params read."""
    own = main.args.args[0].arg if main.args.args else None
    parents = {child: node for node in ast.walk(main) for child in ast.iter_child_nodes(node)}
    found: set[str] = set()
    for node in ast.walk(main):
        if not (isinstance(node, ast.Name) and node.id == own):
            continue
        key, place = "", node
        while isinstance(parent := parents[place], ast.Attribute | ast.Subscript) and parent.value is place:
            if isinstance(parent, ast.Attribute):
                if isinstance(parents[parent], ast.Call) and parents[parent].func is parent:  # type: ignore[attr-defined]
                    break  # a method of the value, e.g. .items()
                key += f".{parent.attr}"
            else:
                index = ast.unparse(parent.slice)
                key += f".${{item.{index}}}" if index in words else ".*"
            place = parent
        if not key:
            assert isinstance(parent, ast.Call), f"params as a whole in {ast.unparse(parent)}"
            found |= keys_read(tree, function(tree / "stages/common.py", ast.unparse(parent.func)))
        elif key[1:] in {n for n, v in vars(Params).items() if isinstance(v, property)}:
            found |= keys_read(tree, function(tree / "src/nashswarm/config.py", key[1:]))
        else:
            found.add(key[1:])
    return found


def _all_of(key: str, read: set[str]) -> bool:
    if key in read or f"{key}.*" in read:
        return True
    block = typing.get_type_hints(Params).get(key)
    return dataclasses.is_dataclass(block) and {f"{key}.{f.name}" for f in dataclasses.fields(block)} <= read


def function(path: Path, name: str) -> ast.FunctionDef:
    found = _functions(path.read_text(encoding="utf-8")).get(name)
    if found is None:
        raise LookupError(f"{path} has no function {name}")
    return found


@cache
def _functions(text: str) -> dict[str, ast.FunctionDef]:
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.walk(_parse(text)):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, node)  # of two, the outer
    return found


# --- artifacts -----------------------------------------------------------------------------------------------------


def artifact_problems(tree: Path) -> Iterator[str]:
    """Deps and outs against the paths of LAYOUT that the script, or a function that it hands LAYOUT to, uses."""
    for stage in stages(tree):
        paths = Paths(tree)
        main = function(tree / stage.script, "main")
        paths.visit(main, {word: f"${{item.{word}}}" for word in stage.words})
        read = {r for r in paths.read if not r.startswith(EXEMPT_PATHS)}
        read -= {r for r in read for out in stage.outs if covers(out, r, "/")}
        if runs_rooms(tree, stage) and stage.has_recipe:
            read.add(RECIPE.replace("item.method", "item.peer") if "peer" in stage.words else RECIPE)
        for path in sorted(read):
            if not any(covers(dep, path, "/") for dep in stage.inputs):
                yield f"{stage.name}: deps lack {path}"
        for dep in sorted(stage.inputs):
            if not any(covers(dep, r, "/") for r in read):
                yield f"{stage.name}: deps need not hold {dep}"
        for path in sorted(paths.written ^ stage.outs):
            yield f"{stage.name}: outs {'lack' if path in paths.written else 'need not hold'} {path}"


@dataclass
class Paths:
    """Follows LAYOUT through a function. What is not known before a run becomes '*'."""

    tree: Path
    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)

    def visit(self, body: ast.FunctionDef, texts: dict[str, str], layout: str = "LAYOUT") -> None:
        """Arguments: `texts`, what the function's arguments stand for; `layout`, the layout's name in it."""
        scope = Scope(texts, layout)
        nodes = list(ast.walk(body))
        for node in nodes:
            if isinstance(node, ast.Assign) and (place := scope.path(node.value)) is not None:
                scope.places[ast.unparse(node.targets[0])] = place
        done: set[ast.AST] = {n.value for n in nodes if isinstance(n, ast.Assign)}
        for call in (n for n in nodes if isinstance(n, ast.Call)):
            func, arguments = call.func, call.args
            if ast.unparse(func) == "partial":  # what it will be called with is known in part
                func, *arguments = arguments
            name = ast.unparse(func).rpartition(".")[2]
            if name.startswith(("write_", "fresh_")) or name == "pack":
                targets = [a for a in arguments if scope.path(a) is not None]
                self.written |= {place for a in targets if (place := scope.path(a)) is not None}
                done |= {*targets}
            elif (reader := self._reader(name)) and (place := scope.path(arguments[0])) is not None:
                inner = dict(zip((a.arg for a in reader.args.args), map(scope.text, arguments), strict=False))
                self.read |= {f"{place}/{file}" for file in files_below(reader, inner)}
                done.add(arguments[0])
            elif any(isinstance(a, ast.Name) and a.id == layout for a in call.args):
                self._follow(call, scope)
        self._rest(body, scope, done)

    def _rest(self, node: ast.AST, scope: Scope, done: set[ast.AST]) -> None:
        """Every other path is read as it stands."""
        if node in done and scope.path(node) is not None:
            return
        place = scope.path(node)
        if place is not None and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            self.read.add(place)
            return
        for child in ast.iter_child_nodes(node):
            self._rest(child, scope, done)

    def _reader(self, name: str) -> ast.FunctionDef | None:
        """The function of `artifacts` that reads files below its argument `directory`, if it is one."""
        try:
            found = function(self.tree / "src/nashswarm/artifacts.py", name)
        except LookupError:
            return None
        return found if name.startswith("read_") and found.args.args[0].arg == "directory" else None

    def _follow(self, call: ast.Call, scope: Scope) -> None:
        module, _, name = ast.unparse(call.func).rpartition(".")
        called = function(self.tree / f"src/nashswarm/{module}.py", name)
        names = [a.arg for a in called.args.args]
        layout = next(n for n, a in zip(names, call.args, strict=False) if ast.unparse(a) == scope.layout)
        self.visit(called, dict(zip(names, map(scope.text, call.args), strict=False)), layout)


@dataclass
class Scope:
    """What expressions stand for inside one function."""

    texts: dict[str, str]
    layout: str
    places: dict[str, str] = field(default_factory=dict)  # variables that hold a path

    def path(self, node: ast.AST) -> str | None:
        """The path that an expression stands for; None if it is no path below the layout."""
        if isinstance(node, ast.Name):
            return self.places.get(node.id)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            left = self.path(node.left)
            return None if left is None else f"{left}/{self.text(node.right)}".removeprefix("./")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "relative_to":
                return self.path(node.func.value)
            if ast.unparse(node.func.value) == self.layout:
                return str(getattr(Layout(), node.func.attr)(*map(self.text, node.args)))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == self.layout:
            value = getattr(Layout(), node.attr)
            return None if callable(value) else str(value)
        return None

    def text(self, node: ast.AST) -> str:
        """The text that an expression stands for."""
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(self.text(v.value if isinstance(v, ast.FormattedValue) else v) for v in node.values)
        written = ast.unparse(node)
        if written.startswith("params."):
            return f"${{{written.removeprefix('params.')}}}"
        return self.texts.get(written, "*")


def files_below(reader: ast.FunctionDef, texts: dict[str, str]) -> set[str]:
    """The files below `directory` that a reader opens: `directory / "tokens" / f"{corpus}.safetensors"`."""
    scope = Scope(texts, "", {"directory": ""})
    places = {scope.path(node) for node in ast.walk(reader) if isinstance(node, ast.BinOp)}
    found = {p[1:] for p in places if p}
    return {f for f in found if not any(other.startswith(f"{f}/") for other in found)}


# --- static tests --------------------------------------------------------------------------------------------------

Check = Callable[[Path], Iterator[str]]
CHECKS: tuple[Check, ...] = (code_problems, params_problems, artifact_problems)


@pytest.mark.parametrize("check", CHECKS)
def test_dvc_yaml_fits_the_code(check: Check) -> None:
    assert sorted(standing(check)) == []


@cache
def standing(check: Check) -> frozenset[str]:
    """The project's own problems: what a planted one must come on top of."""
    return frozenset(check(PROJECT))


# (check, file, what stands there, what is put there, the problem that must be found)
PLANTED = [
    (code_problems, "dvc.yaml", "      - stages\n", "", "imports: deps lack stages"),
    (code_problems, "dvc.yaml", "      - data/imports/pack.json\n", "", "pack: deps lack data/imports/pack.json"),
    (
        code_problems,
        "dvc.yaml",
        "      - data/imports/score.json\n",
        "      - data/imports/pack.json\n",
        "score: deps lack data/imports/score.json",
    ),
    (
        code_problems,
        "dvc.yaml",
        "      - data/imports/score.json\n",
        "      - data/imports/score.json\n      - src/nashswarm/packed.py\n",
        "score: deps need not hold src/nashswarm/packed.py",
    ),
    (
        code_problems,
        "stages/imports.py",
        '"methods": ("allocators", "codecs", ',
        '"methods": ("allocators", ',
        "methods: the list lacks src/nashswarm/codecs/coded.py",
    ),
    (
        code_problems,
        "stages/imports.py",
        '"codecs", "importance"),',
        '"codecs", "importance", "peers"),',
        "benchmark: the list need not hold src/nashswarm/peers/hqq.py",
    ),
    (
        code_problems,
        "stages/imports.py",
        "closure([script, *named]",
        "closure([*named]",
        "pack: the list lacks stages/pack.py",
    ),
    (
        code_problems,
        "src/nashswarm/closure.py",
        "in ast.walk(tree)",
        "in tree.body",
        "download: the list lacks src/nashswarm/hub.py",
    ),
    (
        code_problems,
        "dvc.yaml",
        "      - src/nashswarm/kernels/tiles.cpp\n",
        "",
        "benchmark: deps lack src/nashswarm/kernels/tiles.cpp",
    ),
    (
        code_problems,
        "stages/score.py",
        "def main",
        "from nashswarm.config import load_room\n\nload_room('codecs', 'tiles')\n\n\ndef main",
        "score: the list lacks src/nashswarm/codecs/tiles.py",
    ),
    (params_problems, "dvc.yaml", "      - scoring\n", "", "score: params lack scoring"),
    (params_problems, "dvc.yaml", "    params:\n      - benchmark\n", "", "benchmark: params lack benchmark"),
    (params_problems, "dvc.yaml", "      - evaluation.context\n", "", "download: params lack evaluation.context"),
    (
        params_problems,
        "dvc.yaml",
        "      - evaluation.paper.length\n",
        "",
        "download: params lack evaluation.paper.length",
    ),
    (params_problems, "dvc.yaml", "      - models.${item.model}\n", "", "download: params lack models.${item.model}"),
    (
        params_problems,
        "dvc.yaml",
        "      - evaluation.context\n",
        "      - evaluation\n",
        "download: params hold more of evaluation",
    ),
    (
        params_problems,
        "dvc.yaml",
        "      - scoring\n",
        "      - scoring\n      - report\n",
        "score: params need not hold report",
    ),
    (
        params_problems,
        "stages/pack.py",
        "recipe =",
        "params.scoring.seed\n    recipe =",
        "pack: params lack scoring.seed",
    ),
    (
        params_problems,
        "stages/report.py",
        "params.report.dpi",
        "params.corpora_needed",
        "report: params hold more of report",
    ),
    (artifact_problems, "dvc.yaml", "      - data/downloads/${item.model}/source.json\n", "", "/source.json"),
    (
        artifact_problems,
        "dvc.yaml",
        "      - data/downloads/${item.model}/tokens/${active.calibration}.safetensors\n",
        "",
        "score: deps lack data/downloads/${item.model}/tokens/${active.calibration}.safetensors",
    ),
    (
        artifact_problems,
        "dvc.yaml",
        "      - data/scores/${item.model}\n    outs",
        "    outs",
        "allocate: deps lack data/scores/${item.model}/*.safetensors",
    ),
    (
        artifact_problems,
        "dvc.yaml",
        "      - data/packed/${item.model}/${item.method}\n    params",
        "    params",
        "evaluate: deps lack data/packed/${item.model}/${item.method}",
    ),
    (artifact_problems, "dvc.yaml", f"      - {RECIPE}\n", "", f"allocate: deps lack {RECIPE}"),
    (
        artifact_problems,
        "dvc.yaml",
        "      - data/reference\n",
        "      - data/reference\n      - data/more\n",
        "download: deps need not hold data/more",
    ),
    (artifact_problems, "dvc.yaml", "      - metrics\n", "", "report: deps lack metrics/*/*.json"),
    (
        artifact_problems,
        "dvc.yaml",
        "    outs:\n      - data/scores/${item.model}\n",
        "",
        "score: outs lack data/scores/${item.model}",
    ),
    (
        artifact_problems,
        "stages/score.py",
        "engine, dtype =",
        "artifacts.write_json(LAYOUT.report, {})\n    engine, dtype =",
        "score: outs lack report",
    ),
    (
        artifact_problems,
        "stages/evaluate.py",
        "context =",
        "artifacts.read_allocation(LAYOUT.allocation(model, method))\n    context =",
        "evaluate: deps lack data/allocations/${item.model}/${item.method}/allocation.json",
    ),
]


@pytest.mark.parametrize(("check", "file", "old", "new", "problem"), PLANTED, ids=[row[-1] for row in PLANTED])
def test_planted_problem_is_caught(check: Check, file: str, old: str, new: str, problem: str, tmp_path: Path) -> None:
    copy_code(tmp_path)
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    found = set(check(tmp_path)) - standing(check)
    assert any(problem in line for line in found), found


LOADED = """
import importlib, json, sys
found = {}
for name in input().split():
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "nashswarm"]:
        del sys.modules[loaded]
    importlib.import_module(name)
    found[name] = [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "nashswarm"]
print(json.dumps(found))
"""


def test_lists_hold_all_that_python_loads_at_import() -> None:
    rooms = {
        f"nashswarm.{r}.{n}": f"src/nashswarm/{r}/{n}.py"
        for r in ("importance", "allocators", "codecs", "peers")
        for n in room_names(r)
    }
    scripts = {Path(stage.script).stem: stage for stage in stages(PROJECT) if stage.name not in ("imports", "report")}
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        input=" ".join([*rooms, *scripts]),
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": "src:stages"},
        check=True,
    )
    for name, files in json.loads(done.stdout).items():
        loaded = {Path(f).resolve().relative_to(PROJECT).as_posix() for f in files}
        # Packages above a room's file: docstrings (test_architecture), and the version, which `types` brings along.
        loaded -= {"src/nashswarm/__init__.py", *(f"{room}/__init__.py" for room in ROOMS)}
        own = rooms.get(name)
        assert loaded <= (_closure(PROJECT, [PROJECT / own]) if own else written(PROJECT)[name]), name


def test_recipe_covers_what_a_method_names() -> None:
    source = PROJECT / "src"
    for method in load_params(PROJECT / "params.yaml").methods.values():
        code = fingerprint(closure(method_files(source, method), [source]), PROJECT)
        named = {f"importance/{method.importance}", f"allocators/{method.allocator}", f"codecs/{method.codec}", "types"}
        assert {f"src/nashswarm/{name}.py" for name in named} <= set(code)
        assert (
            code["src/nashswarm/types.py"] == hashlib.sha256((source / "nashswarm/types.py").read_bytes()).hexdigest()
        )


# --- DVC on a miniature --------------------------------------------------------------------------------------------


@pytest.mark.pipeline
def test_first_run_runs_every_stage_once(miniature: Project) -> None:
    expected = {"imports", "methods", "report", *(f"{s}@reference" for s in ("download", "score", "baseline"))}
    expected |= {stage for method in METHODS for stage in of_method(method)}
    assert sorted(ran(miniature.first)) == sorted(expected)


@pytest.mark.pipeline
def test_lists_hold_all_that_a_stage_has_loaded_at_its_end(miniature: Project) -> None:
    """Aside from two that load in every stage and serve none that does not list them: rooms, of which `config` loads
    those that params.yaml names, and the plug-in, which registers itself where transformers is imported.
    """
    aside = [path for room in ROOMS for path in (PROJECT / room).glob("*.py")]
    others = {"src/nashswarm/plugin.py", *_closure(PROJECT, [*aside, PROJECT / "src/nashswarm/packed.py"])}
    notes = [json.loads(path.read_bytes()) for path in (miniature.home / "loaded").iterdir()]
    assert {Path(script).stem for script, _ in notes} == {name.partition("@")[0] for name in ran(miniature.first)}
    for script, files in notes:
        if (stage := Path(script).stem) != "imports":
            listed = json.loads((miniature.root / f"data/imports/{stage}.json").read_bytes())
            loaded = {file for file in files if file.startswith(("src/nashswarm/", "stages/"))}
            assert {"src/nashswarm/config.py", "stages/common.py"} <= loaded, stage
            assert loaded - others <= set(listed), stage


@pytest.mark.pipeline
def test_second_run_runs_nothing_and_leaves_git_clean(copy: Project) -> None:
    assert ran(copy.dvc("repro")) == []
    assert copy.git("status", "--porcelain") == ""


@pytest.mark.pipeline
def test_only_small_files_are_in_git(miniature: Project) -> None:
    names = miniature.git("ls-files").split()
    made = [n for n in names if n.startswith(("data/", "report", "metrics/")) and not n.startswith("data/reference/")]
    assert {n for n in made if not n.endswith(".gitignore")} == {f"metrics/reference/{m}.json" for m in METHODS}


@pytest.mark.pipeline
def test_recipes_name_their_codecs_and_no_others(miniature: Project) -> None:
    codes = {m: json.loads((miniature.root / f"data/methods/{m}.json").read_text())["code"] for m in METHODS}
    codecs = {m: {Path(f).stem for f in code if "/codecs/" in f} - {"__init__"} for m, code in codes.items()}
    assert codecs == {
        "fp32": {"source", "kept"},
        "nash": {"classes", "uniform", "kept"},
        "rtn4-g64": {"grouped", "kept"},
    }
    assert {"src/nashswarm/entropy.py", "src/nashswarm/rans.py"} <= set(codes["nash"])
