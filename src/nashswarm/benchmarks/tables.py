"""The tables of docs/scale.md, as Markdown, from metrics/benchmarks/scale.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nashswarm.benchmarks.scale import PLACES

TERMS = {"products": "a", "interaction": "b", "weights": "c", "bytes": "d", "fixed": "fixed, s"}
SHOWN = ("2", "4", "8", "16")
NONE = "–"
AWAITED = {"_encode": "rounding", "correct": "correction", "add": "a batch's sums"}
LARGEST = "gpt2-xl"  # of those that were measured
MODELS = ("reference", "gpt2", "gpt2-medium", "gpt2-xl", "7B", "70B", "1T")
PREDICTED = ("gpt2", "gpt2-xl", "7B", "70B", "1T")


def tables(document: Mapping[str, Any]) -> dict[str, str]:
    """Name -> table."""
    found = {
        "speed-ups": _speed_ups(document),
        "costs": _costs(document),
        "stages": _stages(document),
        "memory": _memory(document),
        "predictions": _predictions(document),
    }
    measured = {"workers": _workers, "crews": _crews}
    return found | {name: table(document) for name, table in measured.items() if name in document}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _speed_ups(document: Mapping[str, Any]) -> str:
    models: Mapping[str, Any] = document["speed_ups"]
    others = [name for name in MODELS if name in models and name != LARGEST]
    keyed = {name: {(r["stage"], r["method"]): r for r in rows} for name, rows in models.items()}
    head = ["stage", "method", "s, one worker", *(f"N = {n}" for n in SHOWN), "GB moved"]
    head += [f"{name}, 16" for name in others]

    def row(place: tuple[str, str]) -> list[str]:
        own = keyed[LARGEST][place]
        moved = f"{own['moved_gb']:g}" if "moved_gb" in own else NONE
        cells = [*place, f"{own['seconds']:.0f}", *(f"{own['speed_up'][n]:.1f}" for n in SHOWN), moved]
        small = (keyed[name].get(place) for name in others)
        return [*cells, *(f"{other['speed_up']['16']:.1f}" if other else NONE for other in small)]

    return _table(head, map(row, keyed[LARGEST]))


def _costs(document: Mapping[str, Any]) -> str:
    rows = []
    for name, cost in document["costs"].items():
        stage, method, label, part = name.split()
        what = f"`{label}`" if part == "seconds" else f"driver, {part} `{label}`"
        cells = [f"{cost['coefficients'][t]:g}" if t in cost["coefficients"] else NONE for t in TERMS]
        spread = [f"{100 * cost[key]:.0f} %" for key in ("residual_median", "residual_largest")]
        rows.append([stage, method, what, *cells, str(cost["measurements"]), *spread])
    return _table(["stage", "method", "call", *TERMS.values(), "n", "residual, median", "largest"], rows)


def _stages(document: Mapping[str, Any]) -> str:
    rows = []
    for name, ratio in document["check"].items():
        stage, method, size = name.split()
        own = document["stages"][name]
        shape = f"{own['layers']} x {size.replace('x', ', ')}"
        said = [f"{ratio[kind]:.2f}" for kind in ("calls", "sums", "others")]
        peaks = f"{own['peak_gib']:.1f}", f"{ratio['preflight_gib']:.1f}"
        rows.append([stage, method, shape, str(own["rounds"]), f"{own['seconds']:g}", *said, *peaks])
    head = ["stage", "method", "blocks x width, words", "rounds", "s", "calls", "sums", "sums of other widths"]
    return _table([*head, "peak, GiB", "preflight"], rows)


def _memory(document: Mapping[str, Any]) -> str:
    needs: Mapping[str, Mapping[str, float]] = document["memory_gib"]
    columns = list(next(iter(needs.values())))
    columns.sort(key=lambda name: (name != "score", name))
    return _table(["GiB", *columns], [[name, *(f"{needs[name][c]:.1f}" for c in columns)] for name in MODELS])


SUMS = {
    "score": ("score all",),
    "pack gptq4-g128": ("pack gptq4-g128",),
    "market-tiles-3_25": ("allocate market-tiles-3_25", "pack market-tiles-3_25"),
    "market-coded-3_0": ("allocate market-coded-3_0", "pack market-coded-3_0"),
    "evaluate": ("evaluate gptq4-g128",),
}


def _predictions(document: Mapping[str, Any]) -> str:
    rows = []
    for model in PREDICTED:
        for place in PLACES:
            found = document["predictions"][model][place]
            rows.append([model, place, *(_hours([found[key] for key in keys]) for keys in SUMS.values())])
    return _table(["model", "machine", *SUMS], rows)


def _hours(parts: Sequence[Mapping[str, Any]]) -> str:
    if any("hours" not in part for part in parts):
        return "does not fit"
    hours, workers = sum(part["hours"] for part in parts), min(part["workers"] for part in parts)
    units = ((24.0, "days"), (1.0, "h"), (1 / 60, "min"), (1 / 3600, "s"))
    size, unit = next((pair for pair in units if hours >= 2 * pair[0]), units[-1])
    said = f"{hours / size:.{0 if hours / size >= 10 else 1}f} {unit}"
    return f"{said} ({workers})"


def _workers(document: Mapping[str, Any]) -> str:
    def spread(found: Mapping[str, float], digits: int) -> str:
        return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"

    def said(stage: str) -> str:
        seconds = document["simulated"].get(stage)
        return NONE if seconds is None else f"{seconds:.1f}"

    rows = [
        [row["stage"], spread(row["local"], 1), spread(row["ray"], 1), spread(row["ratio"], 2), said(row["stage"])]
        for row in document["workers"]["rows"]
    ]
    return _table(["stage", "local, s", "Ray, s", "local / Ray", "Ray simulated, s"], rows)


def _crews(document: Mapping[str, Any]) -> str:
    """Seconds with one thread, and how many times faster more of them are."""
    crews: Mapping[str, Mapping[str, float]] = document["crews"]["seconds"]
    few, *more = sorted(crews, key=int)

    def row(key: str) -> list[str]:
        method, label, _, role = key.split()
        seconds = crews[few][key]
        return [method, AWAITED[label], role, f"{seconds:.2f}", *(f"{seconds / crews[n][key]:.1f}" for n in more)]

    head = ["method", "what", "matrix", f"s, {few} thread", *(f"{n} threads" for n in more)]
    return _table(head, map(row, sorted(crews[few])))
