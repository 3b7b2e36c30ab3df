"""What the paper "Nash-Swarm" (results of 30 Oct 2025) published, and whether its claims hold in given metrics.

The numbers are those of its tables: GPT-2 XL in full; the others' losses and differences as far as they are printed.
MiB are its "MB" of 2^20 bytes. Where it prints a rise in percent alone, no loss was worked out in its name; its
compressions are those that follow from its sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

SOURCE = "Nash-Swarm, results of 30 Oct 2025: tables for GPT-2, Medium, Large and XL; first N texts of WikiText-2 test"
CORPUS = "wikitext"  # how the names of its corpus begin
FP32, UNIFORM, NASH = "fp32", "paper-uniform4", "paper-nash"
HEADLINE_BITS = 3.005  # what rounds to 3.00: the paper's own claim is taken by its printed digits
MARKET_BITS = 3.0  # ours is not: a budget is never exceeded
HEADLINE_PERCENT = 0.18  # rise of GPT-2 XL at N = 20, the paper's headline
NEAR_PERCENT = 1.0  # "near fp32": the paper's two examples, +0.18 % and +0.77 %, rounded up to a whole percent

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be said from this run"


@dataclass(frozen=True, slots=True)
class Published:
    """One row of a table of the paper; None where it prints nothing."""

    loss: float | None = None
    perplexity: float | None = None
    delta_percent: float | None = None
    mib: float | None = None
    compression: float | None = None  # 1 - bits / 32 of the touched weights


def _rows(fp32: Published, uniform: Published, nash: Published) -> dict[str, Published]:
    """One sample count of one model; the compressions follow from widths and sizes."""
    assert uniform.mib is not None
    assert nash.mib is not None
    compression = 1 - nash.mib / (8 * uniform.mib)
    return {FP32: fp32, UNIFORM: replace(uniform, compression=1 - 4 / 32), NASH: replace(nash, compression=compression)}


PUBLISHED: Mapping[tuple[str, int], Mapping[str, Published]] = {
    ("gpt2-xl", 20): _rows(
        Published(4.9006, 134.37, 0.0, 5941.82, 0.0),
        Published(4.8646, 129.61, -0.74, 38.34),
        Published(4.9094, 135.56, 0.18, 28.71),
    ),
    ("gpt2", 20): _rows(
        Published(5.3253, 205.48, 0.0, 474.70, 0.0),
        Published(6.5908, 728.35, 23.76, 18.40),
        Published(5.3661, 214.03, 0.77, 13.76),
    ),
    ("gpt2-medium", 20): _rows(
        Published(5.15, None, 0.0, 1353.54, 0.0), Published(None, None, 4.41, 24.54), Published(None, None, 1.42, 18.4)
    ),
    ("gpt2-large", 20): _rows(
        Published(5.05, None, 0.0, 2952.69, 0.0), Published(None, None, 1.96, 30.67), Published(None, None, 2.03, 23.0)
    ),
    ("gpt2", 50): _rows(
        Published(5.414, None, 0.0, 474.70, 0.0),
        Published(None, None, 23.56, 18.40),
        Published(None, None, 0.12, 13.80),
    ),
    ("gpt2-medium", 50): _rows(
        Published(5.194, None, 0.0, 1353.54, 0.0),
        Published(None, None, 4.91, 24.54),
        Published(None, None, -0.15, 18.35),
    ),
    ("gpt2-large", 50): _rows(
        Published(5.119, None, 0.0, 2952.69, 0.0),
        Published(None, None, 1.83, 30.67),
        Published(None, None, 1.71, 23.24),
    ),
    ("gpt2-xl", 30): _rows(
        Published(5.010, None, 0.0, 5941.82, 0.0),
        Published(None, None, -0.66, 38.34),
        Published(None, None, 0.41, 28.89),
    ),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim, whether it holds for one model on one corpus, and the number that decides."""

    claim: str
    model: str
    corpus: str  # empty where the text does not matter
    verdict: str
    why: str


Documents = Mapping[str, Mapping[str, Any]]  # method -> its metrics


def percent_interval(quality: Mapping[str, Any]) -> tuple[float, float]:
    """The 95 % interval of the rise in loss, in percent of the original's loss."""
    original = quality["loss"] - quality["delta_loss"]
    low, high = quality["delta_loss_ci95"]
    return 100 * low / original, 100 * high / original


def decisive_interval(quality: Mapping[str, Any]) -> tuple[float, float]:
    """The interval in percent that may decide a claim; without bounds where one block of text gave it no width."""
    low, high = percent_interval(quality)
    return (-inf, inf) if low == high and not quality["resolved"] else (low, high)


def signed(percent: float) -> str:
    """A rise in percent with its sign; two decimals, more where it is small."""
    size = abs(percent)
    return f"{percent:+.{2 if size >= 0.1 or size == 0 else 3 if size >= 0.01 else 4}f}"


def rise(quality: Mapping[str, Any]) -> str:
    """The rise in loss with its interval: '+0.18 % [+0.05, +0.31]'."""
    low, high = percent_interval(quality)
    return f"{signed(quality['delta_loss_percent'])} % [{signed(low)}, {signed(high)}]"


def by_count(figures: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """The paper's protocol at every sample count N, ascending; a corpus shorter than the least N has one, all of it."""
    rows = {int(n): row for n, row in figures.get("by_count", {}).items()} or {figures["texts"]: figures}
    return dict(sorted(rows.items()))


def rises_by_count(figures: Mapping[str, Any]) -> dict[int, float]:
    """N -> rise in loss in percent, by the paper's protocol."""
    return {n: row["delta_loss_percent"] for n, row in by_count(figures).items()}


def listed(rises: Mapping[int, float]) -> str:
    """'+1.06 % at N = 20, +1.30 % at 30'."""
    return ", ".join(f"{signed(v)} % at {'N = ' if i == 0 else ''}{n}" for i, (n, v) in enumerate(rises.items()))


def listed_with_intervals(figures: Mapping[str, Any]) -> str:
    """'-0.74 % [-3.10, +1.60] at N = 20 (not resolved), -0.66 % [-1.20, -0.10] at 30': intervals are over texts."""
    words = []
    for i, (n, row) in enumerate(by_count(figures).items()):
        low, high = row["delta_loss_percent_ci95"]
        doubt = "" if row["resolved"] else " (not resolved)"
        place = f"{'N = ' if i == 0 else ''}{n}"
        words.append(f"{signed(row['delta_loss_percent'])} % [{signed(low)}, {signed(high)}] at {place}{doubt}")
    return ", ".join(words)


def agreed(answers: Sequence[bool]) -> str:
    """The protocol has no interval, but several sample counts: they decide where all of them answer alike."""
    return HOLDS if all(answers) else OPEN if any(answers) else FAILS


def bounded(interval: tuple[float, float], limit: float) -> str:
    """Whether a quantity is at most `limit`, given its interval."""
    low, high = interval
    return HOLDS if high <= limit else FAILS if low > limit else OPEN


# --- the claims ----------------------------------------------------------------------------------------------------


def verdicts(metrics: Mapping[tuple[str, str], Mapping[str, Any]], corpora: Sequence[str]) -> list[Verdict]:
    """Every claim of the paper, judged for every model (and corpus, where it matters) of the metrics."""
    documents: dict[str, dict[str, Mapping[str, Any]]] = {}
    for (model, method), document in metrics.items():
        documents.setdefault(model, {})[method] = document
    found: list[Verdict] = []
    for judge in (_three_bits, _near_fp32, _beats_uniform, _regularizes, _made_true):
        for model, methods in documents.items():
            found += judge(model, methods, corpora)
    absent = [m for m in ("gpt2-xl", "gpt2") if m not in documents]
    found += [
        Verdict(NAMED_CLAIMS[m], m, "", OPEN, f"{m} is not among the models of this run; the rows above are of others")
        for m in absent
    ]
    claims = list(dict.fromkeys(v.claim for v in found))
    found.sort(key=lambda v: claims.index(v.claim))  # stable: models and corpora stay in their order
    return [*found, Verdict(TIME_CLAIM, "all", "", OPEN, TIME_REASON)]


NAMED_CLAIMS = {
    "gpt2-xl": "GPT-2 XL: +0.18 % with the mix, and -0.74 % (better than fp32) with uniform 4-bit",
    "gpt2": "GPT-2: +0.77 % with the mix, +23.76 % with uniform 4-bit",
}
TIME_CLAIM = "Inference takes 0.93 times as long"
TIME_REASON = (
    "metrics hold no times, so that they repeat to the byte. The paper timed dense fp32 weights of unchanged shape: "
    "nothing was packed, so there was nothing that could be faster"
)


def _three_bits(model: str, methods: Documents, corpora: Sequence[str]) -> list[Verdict]:
    """3.0 bits per weight, 90.6 % smaller: judged by the file."""
    claim = "The mix takes 3.0 bits per weight, 90.6 % less than fp32"
    name = NASH if NASH in methods else "nash"
    if name not in methods:
        return [Verdict(claim, model, "", OPEN, f"neither {NASH} nor nash was run")]
    found = []
    for name in (m for m in (NASH, "nash") if m in methods):
        size = methods[name]["size"]
        bits = size["bits_per_weight"]
        claimed = size.get("claimed_bits_per_weight")
        counted = f"; the paper's accounting says {claimed:.2f}" if claimed is not None else ""
        why = (
            f"{name}: {bits:.2f} true bits per weight over the whole model ({100 * (1 - bits / 32):.1f} % smaller), "
            f"{size['matrix_bits_per_weight']:.2f} over the matrices it touches{counted}"
        )
        found.append(Verdict(claim, model, "", HOLDS if bits <= HEADLINE_BITS else FAILS, why))
    return found


def _near_fp32(model: str, methods: Documents, corpora: Sequence[str]) -> list[Verdict]:
    """Near fp32's quality, on the matrices that the paper touched and on all."""
    found = []
    for corpus in corpora:
        touched = (
            f"The mix is near fp32 in quality (at most {NEAR_PERCENT:.0f} % more loss), by the paper's own protocol"
        )
        if NASH in methods:
            rises = rises_by_count(methods[NASH]["paper"][corpus])
            standard = rise(methods[NASH]["quality"][corpus])
            why = (
                f"{NASH}: {listed(rises)}{_published_rises(model, corpus, rises)}; by the standard protocol {standard}"
            )
            found.append(Verdict(touched, model, corpus, agreed([v <= NEAR_PERCENT for v in rises.values()]), why))
        else:
            found.append(Verdict(touched, model, corpus, OPEN, f"{NASH} was not run"))
        everywhere = (
            f"The mix is near fp32 in quality (at most {NEAR_PERCENT:.0f} % more loss) if all weights take part"
        )
        if "nash" in methods:
            quality = methods["nash"]["quality"][corpus]
            verdict = bounded(decisive_interval(quality), NEAR_PERCENT)
            found.append(Verdict(everywhere, model, corpus, verdict, f"nash: {rise(quality)}"))
        else:
            found.append(Verdict(everywhere, model, corpus, OPEN, "nash was not run"))
    return found


def _published_rises(model: str, corpus: str, rises: Mapping[int, float]) -> str:
    """What the paper prints for the mix at these sample counts, on its own corpus."""
    if not corpus.startswith(CORPUS):
        return ""
    rows = {n: PUBLISHED.get((model, n), {}).get(NASH, Published()).delta_percent for n in rises}
    printed = {n: value for n, value in rows.items() if value is not None}
    return f"; the paper prints {listed(printed)}" if printed else ""


def _beats_uniform(model: str, methods: Documents, corpora: Sequence[str]) -> list[Verdict]:
    """Better than uniform 4-bit at a smaller size: by the paper's accounting, and in true bytes."""
    by_paper = "The mix is better than uniform 4-bit and smaller, by the paper's protocol and accounting"
    by_bytes = "The mix is better than uniform 4-bit and smaller, in true bytes over all weights"
    found = []
    for corpus in corpora:
        if NASH in methods and UNIFORM in methods:
            found.append(_claimed_smaller_and_better(by_paper, model, corpus, methods[NASH], methods[UNIFORM]))
        else:
            found.append(Verdict(by_paper, model, corpus, OPEN, f"{NASH} and {UNIFORM} were not both run"))
        if "nash" in methods and "uniform4" in methods:
            found.append(_smaller_and_better(by_bytes, model, corpus, methods["nash"], methods["uniform4"]))
        else:
            found.append(Verdict(by_bytes, model, corpus, OPEN, "nash and uniform4 were not both run"))
    return found


def _claimed_smaller_and_better(
    claim: str, model: str, corpus: str, mix: Mapping[str, Any], uniform: Mapping[str, Any]
) -> Verdict:
    """By the paper's sizes and losses, at every sample count that both have."""
    sizes = [d["size"]["claimed_mib"] for d in (mix, uniform)]
    mix_rises, uniform_rises = (rises_by_count(d["paper"][corpus]) for d in (mix, uniform))
    shared = [n for n in mix_rises if n in uniform_rises]
    verdict = agreed([sizes[0] < sizes[1] and mix_rises[n] < uniform_rises[n] for n in shared]) if shared else OPEN
    ours, theirs = ({n: found[n] for n in shared} for found in (mix_rises, uniform_rises))
    why = f"{sizes[0]:.2f} against {sizes[1]:.2f} MiB claimed; {listed(ours)}, against {listed(theirs)}"
    return Verdict(claim, model, corpus, verdict, why)


def _smaller_and_better(
    claim: str, model: str, corpus: str, mix: Mapping[str, Any], uniform: Mapping[str, Any]
) -> Verdict:
    """Both must be true; intervals that overlap leave the quality open."""
    bits = [d["size"]["bits_per_weight"] for d in (mix, uniform)]
    quality = [d["quality"][corpus] for d in (mix, uniform)]
    (mix_low, mix_high), (low, high) = map(decisive_interval, quality)
    better = HOLDS if mix_high < low else FAILS if mix_low > high else OPEN
    verdict = better if bits[0] < bits[1] else FAILS
    why = f"{bits[0]:.2f} against {bits[1]:.2f} true bits per weight; {rise(quality[0])} against {rise(quality[1])}"
    return Verdict(claim, model, corpus, verdict, why)


def _regularizes(model: str, methods: Documents, corpora: Sequence[str]) -> list[Verdict]:
    """Uniform 4-bit as regularization: loss below fp32's, resolved, by the standard protocol, which has an interval."""
    claim = "Uniform 4-bit acts as regularization: loss falls below fp32's (paper: -0.74 % on GPT-2 XL)"
    if UNIFORM not in methods:
        return [Verdict(claim, model, corpus, OPEN, f"{UNIFORM} was not run") for corpus in corpora]
    found = []
    for corpus in corpora:
        quality = methods[UNIFORM]["quality"][corpus]
        rises = rises_by_count(methods[UNIFORM]["paper"][corpus])
        low, high = decisive_interval(quality)
        verdict = HOLDS if high < 0 else FAILS if low >= 0 else OPEN
        alone = verdict == FAILS and max(rises.values()) < 0
        words = "only the paper's protocol shows a fall:" if alone else "by the paper's protocol"
        by_texts = listed_with_intervals(methods[UNIFORM]["paper"][corpus])
        why = f"{UNIFORM}: {rise(quality)} over {quality['tokens']:,} tokens; {words} {by_texts}"
        found.append(Verdict(claim, model, corpus, verdict, why))
    return found


def _made_true(model: str, methods: Documents, corpora: Sequence[str]) -> list[Verdict]:
    """The headline over all weights in true bytes, with this project's market."""
    claim = f"This project's market: 3.00 true bits over all weights at no more than +{HEADLINE_PERCENT} %"
    best = at_three_bits(methods)
    if best is None:
        return [Verdict(claim, model, "", OPEN, "no market of at most 3.00 bits was run")]
    found = []
    for corpus in corpora:
        quality = methods[best]["quality"][corpus]
        why = f"{best}: {rise(quality)} at {methods[best]['size']['bits_per_weight']:.3f} true bits per weight"
        found.append(Verdict(claim, model, corpus, bounded(decisive_interval(quality), HEADLINE_PERCENT), why))
    return found


def at_three_bits(methods: Documents) -> str | None:
    """The market that spends most of 3.00 true bits per weight and no more: a coded one, or else one of tiles.

    None where no market stays below.
    """
    for codec in ("market-coded", "market-tiles"):
        bits = {m: d["size"]["bits_per_weight"] for m, d in methods.items() if m.startswith(codec)}
        fitting = {m: b for m, b in bits.items() if b <= MARKET_BITS}
        if fitting:
            return max(sorted(fitting), key=lambda m: fitting[m])
    return None
