"""Times and memory in the report: what `stages/benchmark.py` measured, where metrics/benchmarks has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nashswarm.artifacts import Layout
from nashswarm.benchmarks.timing import READING
from nashswarm.config import BENCHMARK_FOLDER
from nashswarm.rendering import Block, Heading, Picture, Table, Text

Document = Mapping[str, Any]
NONE = "–"
MIB = 2**20
INSTANT = 0.01  # seconds; to allocate one width for all is no work
XL = 1_557_611_200  # parameters of GPT-2 XL
LIMITS = (
    'Times (under "Speed") are of one machine, do not repeat to the byte, and are tracked measurements, which none of '
    "the other figures follows."
)


def path(layout: Layout, kind: str) -> Path:
    """metrics/benchmarks/<kind>.json."""
    return layout.metrics(BENCHMARK_FOLDER, kind)


def section(found: Mapping[str, Document | None], dpi: int) -> list[Block]:
    """The report's part on speed; empty where nothing was measured. Arguments: `found`, kind -> metrics or None."""
    measured = {kind: document for kind, document in found.items() if document is not None}
    if not measured:
        return []
    words = (
        "Every contestant has its turn in every round, and ratios are of times of one round: the reference's over the "
        "contestant's, so above 1 is faster. Shown are medians over the rounds and, in brackets, the quartiles. MiB "
        "are the bytes of the weights as the contestant stores them, GB/s those over the median time, and the last "
        "column that rate over the one at which the same machine only reads memory in the same rounds."
    )
    blocks: list[Block] = [Heading("Speed"), Text(words)]
    for kind, document in measured.items():
        blocks += [Text(_machine(kind, document)), *PARTS[kind](document)]
    return [*blocks, *_pictures(measured, dpi)]


def _machine(kind: str, document: Document) -> str:
    machine, rounds = document["machine"], document["settings"]["rounds"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{kind}: {rounds} rounds on {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, kernels on {machine['instructions']}. Memory is read at "
        f"{_spread(machine['reading'], 1e-9, '.1f')} GB/s; the system's load before the first round was "
        f"{machine['load']:.2f}. {packages}."
    )


# --- a kind's tables -----------------------------------------------------------------------------------------------


def _kernels(document: Document) -> list[Block]:
    columns = ("Matrix, activations", "Contestant", "ms", "Over dense float32", "MiB", "GB/s", "Of reading")
    rows = [(r["what"], r["contestant"], *_figures(r, 1e3)) for r in _timed(document)]
    return [Table("Products with one matrix, weights cold", columns, rows, 2), *_missing(document)]


def _decode(document: Document) -> list[Block]:
    columns = ("Model", "Contestant", "ms", "Over dense float32", "MiB", "GB/s", "Of reading", "Tokens/s")
    rows = [(r["what"], r["contestant"], *_figures(r, 1e3), _tokens(r)) for r in _timed(document)]
    memory = [
        (of["contestant"], f"{of['counted'] / MIB:,.1f}", f"{of['resident'] / MIB:,.1f}") for of in document["memory"]
    ]
    grown = ("Contestant", "MiB of weights, counted", "MiB by which the process grew")
    return [
        Table("A model that writes token by token, one text, random weights", columns, rows, 2),
        Table("Resident memory of the same models, once they have written", grown, memory),
    ]


def _packing(document: Document) -> list[Block]:
    columns = ("Bytes", "Step", "ms", "Over a copy", "MiB unpacked", "GB/s", "Codes/s, millions", "GPT-2 XL at that, s")
    rows = [
        (r["what"], r["contestant"], *_figures(r, 1e3)[:-1], f"{_items(r) / 1e6:,.1f}", f"{XL / _items(r):.1f}")
        for r in _timed(document)
    ]
    words = (
        "Unpacked is one byte a code for bitpack, 4 for tiles (float32) and for the entropy coder (int32); a copy is "
        "numpy's, of as many bytes, on one thread. The last column is the time of GPT-2 XL's number of weights at that "
        "rate, not a measurement."
    )
    return [Text(words), Table("Codes to bytes and back", columns, rows, 2)]


def _quantization(document: Document) -> list[Block]:
    columns = ("Model", "Parameters", "Method", "Step", "Seconds", "Forward passes", "Peak MiB", "True bits")
    rows = [
        (
            step["model"],
            f"{step['weights']:,}",
            step["method"],
            step["step"],
            f"{step['seconds']:.3g}",
            f"{step['forward_passes']:.3g}",
            f"{step['peak_bytes'] / MIB:,.0f}",
            f"{step['bits_per_weight']:.3f}" if "bits_per_weight" in step else NONE,
        )
        for step in document["rows"]
    ]
    words = [
        f"Round to nearest ({r['contestant']}) of {r['what']}, without reading and writing: "
        f"{_spread(r['seconds'], 1e3, '.1f')} ms, {_items(r) / 1e6:,.1f} million weights a second; at that rate GPT-2 "
        f"XL's {XL:,} take {XL / _items(r):,.0f} s."
        for r in document["nearest"]
    ]
    caption = "Time and memory of quantizing models of layers x width with random weights"
    peaks = (
        "Peaks are of a process' resident memory, Python and its libraries included; that of pack has run allocate "
        "before. Forward passes are seconds over those of one pass of the original over the same calibration tokens."
    )
    return [Text(peaks), Table(caption, columns, rows, 1), *map(Text, words)]


PARTS: Mapping[str, Callable[[Document], list[Block]]] = {
    "kernels": _kernels,
    "decode": _decode,
    "packing": _packing,
    "quantization": _quantization,
}


def _timed(document: Document) -> list[Mapping[str, Any]]:
    return [row for row in document["rows"] if "seconds" in row]


def _figures(row: Mapping[str, Any], unit: float) -> tuple[str, ...]:
    """Seconds (in units of 1 / `unit`), ratio, MiB, GB/s, share of reading."""
    return (
        _spread(row["seconds"], unit, ".4g"),
        _spread(row["ratio"], 1, ".3g"),
        f"{row['bytes'] / MIB:,.1f}" if "bytes" in row else NONE,
        f"{row['rate'] / 1e9:.3g}" if "rate" in row else NONE,
        _spread(row["share"], 1, ".3g") if "share" in row else NONE,
    )


def _spread(of: Mapping[str, float], unit: float, form: str) -> str:
    median, low, high = (f"{of[key] * unit:{form}}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _items(row: Mapping[str, Any]) -> float:
    """Weights or codes a second."""
    return float(row["items"] / row["seconds"]["median"])


def _tokens(row: Mapping[str, Any]) -> str:
    """Written a second; the first token has to wait for the whole prompt."""
    return f"{1 / row['seconds']['median']:.2f}" if row["items"] == 1 else NONE


def _missing(document: Document) -> list[Block]:
    """Who had no turn and why, once for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in document["rows"]:
        if "note" in row:
            reasons.setdefault((row["contestant"], row["note"]), []).append(row["what"])
    return [Text(f"No figures for {name} ({'; '.join(what)}): {why}.") for (name, why), what in reasons.items()]


# --- the figures ---------------------------------------------------------------------------------------------------


def _pictures(measured: Mapping[str, Document], dpi: int) -> list[Block]:
    found = [*_paces(measured, dpi)]
    return [*found, _growth(measured["quantization"], dpi)] if "quantization" in measured else found


def _paces(measured: Mapping[str, Document], dpi: int) -> list[Block]:
    """Products with the first number of rows, and tokens; a group for each matrix and model."""
    from nashswarm import figures

    groups = [row for kind in ("kernels", "decode") if kind in measured for row in _shown(kind, measured[kind])]
    paces = [
        figures.Pace(
            row["what"],
            row["contestant"],
            row["ratio"]["median"],
            (row["ratio"]["low"], row["ratio"]["high"]),
            row["contestant"] == READING,
        )
        for row in groups
    ]
    if not paces:
        return []
    caption = (
        "How many times as fast as dense float32: products with one matrix, and tokens of a whole model. Medians with "
        "quartiles over interleaved rounds; further right is faster. The dashed line is where a contestant would be "
        "that only reads the packed bytes, at the machine's speed."
    )
    return [Picture("speed.png", caption, figures.paces(paces, dpi))]


def _growth(document: Document, dpi: int) -> Block:
    """What each step of quantizing takes, against the model's size."""
    from nashswarm import figures

    panels: dict[str, dict[str, list[tuple[float, float]]]] = {"seconds": {}, "peak, GiB": {}}
    for step in sorted(document["rows"], key=lambda s: int(s["weights"])):
        if step["seconds"] < INSTANT:
            continue
        name = step["step"] if step["step"] == "score" else f"{step['method']}, {step['step']}"
        for label, amount in (("seconds", step["seconds"]), ("peak, GiB", step["peak_bytes"] / 2**30)):
            panels[label].setdefault(name, []).append((step["weights"], amount))
    caption = (
        "Time and memory of quantizing against the size of the model: score once for all methods, then allocate and "
        "pack by each. Models of GPT-2's make with random weights."
    )
    return Picture("growth.png", caption, figures.growth(panels, dpi))


def _shown(kind: str, document: Document) -> Sequence[Mapping[str, Any]]:
    """The rows of a figure that can be read: no reference, whose ratio is 1, and no smaller instruction sets."""
    rows = [r for r in _timed(document) if not r["contestant"].endswith(("dense float32", "AVX2"))]
    if kind == "decode":
        return [r for r in rows if r["items"] == 1]
    first = document["settings"]["batches"][0]
    return [r for r in rows if r["what"].endswith(f", {first} {'row' if first == 1 else 'rows'}")]
