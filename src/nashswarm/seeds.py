"""Calibration seeds: one method quantized again from other calibration text, and how far its figures then spread.

`make seeds` measures, its figures are tracked in metrics/seeds, the report shows them. Seed 0 is the run itself. Every
other seed puts the calibration windows in another order, of which `score` and `pack` read the first ones, and draws
other labels for the Fisher information (`scoring.seed` plus the seed).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nashswarm.artifacts import Layout
from nashswarm.beside import another
from nashswarm.intervals import rounded
from nashswarm.paper import signed
from nashswarm.rendering import Block, Heading, Table, Text

FIGURES = ("loss", "delta_loss", "delta_loss_percent", "kl_mean", "bits_per_weight")
# Of seed 0 against the run's own figures: what `make compare` allows between machines, in nats and relative.
SAME_RISE, SAME_BITS = 1e-4, 1e-4
Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of what text each seed took how much."""

    corpus: str
    window: int  # tokens
    windows: int  # that `score` reads
    available: int  # windows in the split


def calibration(corpus: str, ids: np.ndarray, context: int, tokens: int) -> Calibration:
    """Arguments: `ids`, int32, of the calibration split; `context`, of the model; `tokens`, `scoring.tokens`."""
    window = min(context, 1024)  # as blocks.Blocks.prepare cuts them
    available = ids.size // window
    return Calibration(corpus, window, max(1, min(available, tokens // window)), available)


def redrawn(ids: np.ndarray, window: int, seed: int) -> np.ndarray:
    """The same tokens, their whole windows in an order drawn by `seed`; what fills no window stays last.

    int32 [tokens] -> int32 [tokens]. Seed 0 leaves the order as it is.
    """
    if seed == 0:
        return ids
    count = ids.size // window
    order = np.random.default_rng(seed).permutation(count)
    whole = ids[: count * window].reshape(count, window)[order]
    return np.concatenate([whole.reshape(-1), ids[count * window :]])


def path(layout: Layout, model: str, method: str) -> Path:
    """metrics/seeds/<model>/<method>.json: beside the metrics of the run, in none of DVC's outputs."""
    return layout.metrics(f"seeds/{model}", method)


def document(
    measured: Mapping[int, Document], taken: Calibration, texts: Mapping[str, str], original: Mapping[str, str]
) -> dict[str, Any]:
    """What `path` holds.

    Arguments: `measured`, seed -> the method's metrics of it; `texts`, corpus -> SHA-256 of the test tokens;
    `original`, file -> SHA-256 of the original's weights. Needs two seeds or more, of one original and text.
    """
    return {
        "calibration": asdict(taken),
        "original": dict(original),
        "quality": {corpus: _spread(measured, corpus, text) for corpus, text in texts.items()},
    }


def _spread(measured: Mapping[int, Document], corpus: str, text: str) -> dict[str, Any]:
    """Figures by seed, and their mean, least, most and sample standard deviation (over seeds less 1)."""
    found = {seed: _figures(of, corpus) for seed, of in measured.items()}
    columns = {name: [figures[name] for figures in found.values()] for name in FIGURES}
    first = next(iter(measured.values()))["quality"][corpus]
    return {
        "text": text,
        "tokens": first["tokens"],
        "original_loss": rounded(first["loss"] - first["delta_loss"]),
        "seeds": {str(seed): figures for seed, figures in found.items()},
        "mean": {name: rounded(statistics.fmean(values)) for name, values in columns.items()},
        "min": {name: min(values) for name, values in columns.items()},
        "max": {name: max(values) for name, values in columns.items()},
        "standard_deviation": {name: rounded(statistics.stdev(values)) for name, values in columns.items()},
    }


def _figures(of: Document, corpus: str) -> dict[str, float]:
    """One seed's: nats per token, per cent of the original's loss, true bits per weight."""
    own = {**of["quality"][corpus], "bits_per_weight": of["size"]["bits_per_weight"]}
    return {name: float(own[name]) for name in FIGURES}


# --- in the report -------------------------------------------------------------------------------------------------

COLUMNS = (
    "Method",
    "Seeds",
    "True bits",
    "Rise %, the run",
    "Mean",
    "Least",
    "Most",
    "Standard deviation",
    "Half the run's 95 % interval",
    "KL mean",
    "Its standard deviation",
)


def section(
    run: Mapping[str, Mapping[str, Document]], tracked: Mapping[tuple[str, str], Document | None],
    corpora: Sequence[str],
) -> list[Block]:  # fmt: skip
    """The report's part on calibration seeds; empty where nothing was measured.

    Arguments: `run`, model -> method -> metrics; `tracked`, of (model, method), None where there is none.
    """
    blocks: list[Block] = []
    for model, own in run.items():
        asked = {method: found for method in own if (found := tracked.get((model, method)))}
        for corpus in corpora:
            reasons = {method: other(own[method], found, corpus) for method, found in asked.items()}
            kept = {method: found for method, found in asked.items() if reasons[method] is None}
            if kept:
                rows = [_row(method, own[method], found, corpus) for method, found in kept.items()]
                blocks += [Table(f"Calibration seeds: {model} on {corpus}", COLUMNS, rows), _how(kept.values())]
            blocks += [Text(f"Left out for {model}, {m}: {reason}.") for m, reason in reasons.items() if reason]
    if not blocks:
        return []
    words = (
        "Each method quantized again from other calibration windows and other labels for the Fisher information, and "
        "measured on the same test text. The intervals of all other tables cover the choice of test tokens alone; "
        "the sample standard deviation here is of the choice of calibration windows and labels together, and of so "
        "few seeds known only roughly. The figures are tracked measurements (make seeds), shown where the original, "
        "the test text and the method are those of this run."
    )
    return [Heading("Calibration seeds"), Text(words), *blocks]


def other(own: Document, tracked: Document, corpus: str) -> str | None:
    """Why tracked seeds do not belong to the run's metrics of that method; None where they do."""
    theirs = tracked["quality"].get(corpus)
    if theirs is None:
        return f"not measured on {corpus}"
    ours = own["quality"][corpus]
    mine = ours["tokens"], ours["loss"] - ours["delta_loss"]
    if reason := another(corpus, mine, (theirs["tokens"], theirs["original_loss"])):
        return reason
    first = theirs["seeds"]["0"]
    bits = own["size"]["bits_per_weight"]
    rise = abs(first["delta_loss"] - ours["delta_loss"]) <= SAME_RISE
    if rise and abs(first["bits_per_weight"] - bits) <= SAME_BITS * bits:
        return None
    return (
        f"its seed 0 was another run's: {first['delta_loss']:+.5f} nats at {first['bits_per_weight']:.3f} bits, here "
        f"{ours['delta_loss']:+.5f} at {bits:.3f}; make seeds measures again"
    )


def _row(method: str, own: Document, tracked: Document, corpus: str) -> Sequence[str]:
    found, ours = tracked["quality"][corpus], own["quality"][corpus]
    low, high = ours["delta_loss_ci95"]
    percent = 100 / (ours["loss"] - ours["delta_loss"])
    mean, least, most, deviation = (found[key] for key in ("mean", "min", "max", "standard_deviation"))
    return (
        method,
        str(len(found["seeds"])),
        _between(least["bits_per_weight"], most["bits_per_weight"]),
        signed(found["seeds"]["0"]["delta_loss_percent"]),
        signed(mean["delta_loss_percent"]),
        signed(least["delta_loss_percent"]),
        signed(most["delta_loss_percent"]),
        f"{deviation['delta_loss_percent']:.3f}",
        f"{percent * (high - low) / 2:.3f}",
        f"{mean['kl_mean']:.5f}",
        f"{deviation['kl_mean']:.5f}",
    )


def _between(least: float, most: float) -> str:
    low, high = f"{least:.3f}", f"{most:.3f}"
    return low if low == high else f"{low} to {high}"


def _how(kept: Any) -> Text:
    """Of what the seeds were made; one sentence for each way."""
    ways = dict.fromkeys(Calibration(**found["calibration"]) for found in kept)
    return Text(" ".join(map(_sentence, ways)))


def _sentence(taken: Calibration) -> str:
    first = (
        f"Each seed takes {taken.windows:,} of the {taken.available:,} windows of {taken.window:,} tokens in the "
        f"calibration split of {taken.corpus}"
    )
    if taken.windows == taken.available:
        return f"{first}: the same text, so that labels and order alone differ."
    share = 100 * taken.windows / taken.available
    return (
        f"{first}, so two of them share {share:.0f} % of theirs on average; texts that share less may differ by more."
    )
