"""Paired differences between methods: each against the fixed widths that matter, as a forest plot and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nashswarm import paper
from nashswarm.comparison import between
from nashswarm.intervals import Interval
from nashswarm.rendering import Block, Heading, Picture, Table, Text

FIXED = ("gptq", "rtn", "uniform")  # how the names of methods begin that give every matrix one width
NASH, SWARM, UNIFORM = "nash", "paper-swarm", "uniform4"
# The paper's own comparisons. Its mixes are larger than its uniform 4 bits once every byte counts, so that no rule of
# size would ask for them.
OF_THE_PAPER = ((paper.NASH, paper.UNIFORM), (SWARM, paper.UNIFORM), (NASH, UNIFORM))
MARKET = "market"
BETTER, WORSE, UNRESOLVED = "better", "worse", "not resolved"
Document = Mapping[str, Any]
Documents = Mapping[str, Document]  # method -> its metrics


@dataclass(frozen=True, slots=True)
class Pair:
    """A method beside a baseline, measured on the same tokens."""

    method: str
    bits: float  # true bits per weight of the method
    baseline: str
    baseline_bits: float
    interval: Interval  # of the method's rise in loss minus the baseline's, nats per token

    @property
    def verdict(self) -> str:
        """Whether the method's loss rises less or more, or the interval holds 0."""
        if not self.interval.resolved or self.interval.difference == 0:
            return UNRESOLVED
        return BETTER if self.interval.difference < 0 else WORSE


def pairs(documents: Documents, corpus: str, resamples: int, seed: int) -> list[Pair]:
    """Every method against what matters of each family of fixed widths, in the methods' order.

    Of a family's files that are no smaller than the method's, two matter: the smallest, and the one whose loss rises
    least. A fixed width itself stands against the smallest of each other family alone: that more bits of its own kind
    are better needs no figure. Further, the paper's own comparisons, whatever the sizes. Pairs whose metrics hold no
    sums over the same blocks of windows are left out. Arguments: `resamples` and `seed`, those of the evaluation.
    """
    found = []
    for method in (m for m in documents if m != paper.FP32):
        for baseline in _rivals(documents, method, corpus):
            one, other = (documents[m]["quality"][corpus] for m in (method, baseline))
            if interval := between(one, other, resamples, seed):
                found.append(Pair(method, _bits(documents[method]), baseline, _bits(documents[baseline]), interval))
    return found


def _rivals(documents: Documents, method: str, corpus: str) -> Iterable[str]:
    """The baselines of one method, each once, by true size."""
    found = {theirs for ours, theirs in OF_THE_PAPER if ours == method and theirs in documents}
    for family in (f for f in FIXED if not method.startswith(f)):
        size = _bytes(documents[method])
        larger = {m: d for m, d in documents.items() if m.startswith(family) and _bytes(d) >= size}
        if larger:
            found.add(min(larger, key=lambda m: (_bytes(larger[m]), m)))
        if larger and not method.startswith(FIXED):
            found.add(min(larger, key=lambda m: (larger[m]["quality"][corpus]["delta_loss"], m)))
    return sorted(found, key=lambda m: (_bytes(documents[m]), m))


# --- in the report -------------------------------------------------------------------------------------------------

WORDS = (
    "Each method against the fixed widths that matter: of round to nearest, of GPTQ and of the paper's uniform codec "
    "the smallest file that is no smaller than the method's own, and the one whose loss rises least among those; a "
    "fixed width itself against the smallest of the other kinds. Further the paper's own comparisons, its mixes "
    "against its uniform 4 bits, whose file is the smaller one. Intervals are 95 %, paired: both methods are drawn "
    "from the same blocks of windows. They are not adjusted for their number: where nothing differs, one in twenty "
    "would still seem resolved."
)
COLUMNS = ("Method", "Baseline", "Its bits", "Baseline's bits", "Difference", "Paired 95 % interval", "The method is")


def section(
    models: Mapping[str, Documents], corpora: Sequence[str], resamples: int, seed: int, dpi: int
) -> list[Block]:
    """The report's part on paired differences; empty where metrics hold none.

    Arguments: `models`, model -> method -> metrics; `resamples` and `seed`, those of the evaluation; `dpi`, of figures.
    """
    blocks: list[Block] = []
    for model, documents in models.items():
        for corpus in corpora:
            if found := pairs(documents, corpus, resamples, seed):
                blocks += [*_pictures(found, model, corpus, dpi), _table(found, model, corpus)]
    return [Heading("Paired differences"), Text(WORDS), *blocks] if blocks else []


def _pictures(found: Sequence[Pair], model: str, corpus: str, dpi: int) -> list[Picture]:
    """One of the markets, one of all others: together they would be taller than a page."""
    kinds = {
        "market": ("Markets", [p for p in found if p.method.startswith(MARKET)]),
        "others": ("Fixed widths and the paper's mixes", [p for p in found if not p.method.startswith(MARKET)]),
    }
    return [
        _picture(f"forest-{kind}-{model}-{corpus}.png", title, of, f"{model} on {corpus}", dpi)
        for kind, (title, of) in kinds.items()
        if of
    ]


def _picture(name: str, title: str, found: Sequence[Pair], where: str, dpi: int) -> Picture:
    from nashswarm import figures  # with matplotlib, which the console table can do without

    rows = [
        figures.Row(
            f"{p.method}  ({p.bits:.2f} bits)",
            f"{p.baseline}  ({p.baseline_bits:.2f})",
            p.interval.difference,
            (p.interval.low, p.interval.high),
            p.verdict != UNRESOLVED,
        )
        for p in found
    ]
    doubts = sum(p.verdict == UNRESOLVED for p in found)
    caption = (
        f"{title}, {where}: the rise in loss of the method in bold minus that of the baseline in the row, with the "
        "true bits per weight of both. Left of 0 the method loses less. Bars are the paired 95 % intervals, many "
        f"narrower than their mark; hollow and called not resolved is one that holds 0: {doubts} of {len(found)}. The "
        "axis is linear in the shaded strip and logarithmic on both sides of it."
    )
    return Picture(name, caption, figures.forest(rows, dpi))


def _table(found: Sequence[Pair], model: str, corpus: str) -> Table:
    rows = [
        (
            p.method,
            p.baseline,
            f"{p.bits:.3f}",
            f"{p.baseline_bits:.3f}",
            f"{p.interval.difference:+.5f}",
            f"[{p.interval.low:+.5f}, {p.interval.high:+.5f}]",
            p.verdict,
        )
        for p in found
    ]
    return Table(f"Paired differences in the rise in loss, nats per token: {model} on {corpus}", COLUMNS, rows, 2)


def _bytes(document: Document) -> int:
    return int(document["size"]["file_bytes"])


def _bits(document: Document) -> float:
    return float(document["size"]["bits_per_weight"])
