"""Ours beside other tools: which tracked measurements may be shown together, and what the report says of them.

Peers are measured once, in an environment of their own, and their metrics are tracked. They are shown where the
original model and the texts are those of this run, which the loss of the original and the number of tokens tell; what
was measured on others is left out and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nashswarm.comparison import Rival, rivals
from nashswarm.paper import rise, signed
from nashswarm.rendering import Block, Heading, Items, Picture, Table, Text, aligned

LEAST, MOST = 2.0, 4.5  # true bits per weight between which ours claims to be below every peer
ALIKE = 2e-5  # relative: the original's loss is worked out from figures of six digits, on machines that round otherwise
NONE = "–"
Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shown:
    """Of one model: what can be shown together, and what cannot."""

    peers: Mapping[str, Document]
    ours: Mapping[str, Document]
    not_run: Mapping[str, str] = field(default_factory=dict)  # peer -> reason
    left_out: Mapping[str, str] = field(default_factory=dict)  # name -> why its metrics do not belong here


def shown(
    own: Mapping[str, Document], extra: Mapping[str, Document | None], peers: Mapping[str, Document | None],
    corpora: Sequence[str],
) -> Shown:  # fmt: skip
    """Sort out tracked metrics of one model.

    Arguments: `own`, of the methods of this run; `extra`, of further methods of ours, and `peers`, each None where
    there are no metrics.
    """
    kept: dict[str, Document] = {}
    not_run, left_out = {}, {}
    for name, document in {**extra, **peers}.items():
        if name in own:
            continue
        if document is None:
            left_out[name] = "not measured on this model"
        elif (reason := document.get("peer", {}).get("reason")) is not None:
            not_run[name] = str(reason)
        elif (other := _other(own, document, corpora)) is not None:
            left_out[name] = other
        else:
            kept[name] = document
    ours = {m: d for m, d in own.items() if _is_market(d)} | {m: kept[m] for m in extra if m in kept}
    return Shown({p: kept[p] for p in peers if p in kept}, ours, not_run, left_out)


def _is_market(document: Document) -> bool:
    return document.get("allocation", {}).get("price") is not None


def _other(own: Mapping[str, Document], document: Document, corpora: Sequence[str]) -> str | None:
    """Why a document was not measured on this run's original and texts; None where it was."""
    some = next(iter(own.values()))
    for corpus in corpora:
        if corpus not in document.get("quality", {}):
            return f"not measured on {corpus}"
        ours, theirs = (_origin(of["quality"][corpus]) for of in (some, document))
        if reason := another(corpus, ours, theirs):
            return reason
    return None


def _origin(quality: Mapping[str, Any]) -> tuple[int, float]:
    """Tokens measured on, and the original's loss."""
    return int(quality["tokens"]), float(quality["loss"] - quality["delta_loss"])


def another(corpus: str, ours: tuple[int, float], theirs: tuple[int, float]) -> str | None:
    """Why two measurements on a corpus are not of one text and original; None where they are.

    Arguments: `ours`, of this run, and `theirs`: tokens, and the original's loss in nats.
    """
    if ours[0] != theirs[0]:
        return f"measured on another {corpus}: {theirs[0]:,} tokens, {ours[0]:,} here"
    if abs(ours[1] - theirs[1]) > ALIKE * abs(ours[1]):
        return f"measured on another original, whose loss on {corpus} is {theirs[1]:.4f}; {ours[1]:.4f} here"
    return None


def section(found: Mapping[str, Shown], corpora: Sequence[str], resamples: int, seed: int, dpi: int) -> list[Block]:
    """The report's part on other tools; empty where no peer was asked for.

    Arguments: `found`, of each model; `resamples` and `seed`, those of the evaluation; `dpi`, of the figure.
    """
    blocks: list[Block] = []
    for model, of in found.items():
        for corpus in corpora if of.peers else ():
            rows = rivals(of.ours, of.peers, corpus, resamples, seed)
            blocks += [Text(verdict(rows, model, corpus)), _table(of, rows, model, corpus)]
            blocks.append(_picture(of, model, corpus, dpi))
        blocks += _notes(of, model)
    if not blocks:
        return []
    words = (
        "The same model quantized by other people's tools from the same calibration text, their dequantized weights "
        "measured as ours are, and every byte counted that their own formats store; configuration, vocabulary and "
        "tokenizer aside, as with ours. Matrices that a tool leaves alone are stored in groups of 64 by 4 bits, "
        "vectors as float16, as our own baselines have them. The figures are tracked measurements: this run need not "
        "have made them anew. Beside each peer stands the one of ours whose loss rises least among the files that are "
        "no larger."
    )
    return [Heading("Beside other tools"), Text(words), *blocks]


def verdict(rows: Sequence[Rival], model: str, corpus: str) -> str:
    """Whether ours is below every peer of equal or larger true size between LEAST and MOST bits, and where not."""
    within = [r for r in rows if LEAST <= r.bits <= MOST]
    where = f"from {LEAST:g} to {MOST:g} true bits per weight, {model} on {corpus}"
    if not within:
        return f"No peer lies {where}."
    not_below = [r for r in within if r.verdict != "below"]
    outside = len(rows) - len(within)
    further = f" {outside} more {'lies' if outside == 1 else 'lie'} outside of that range." if outside else ""
    if not not_below:
        return (
            f"Ours is below every peer of equal or larger true size {where}: the loss rises less than with each of the "
            f"{len(within)}, and each paired 95 % interval excludes 0.{further}"
        )
    named = ", ".join(f"{r.peer} ({r.bits:.3f} bits: {r.verdict})" for r in not_below)
    return (
        f"Ours is not below every peer of equal or larger true size {where}: of {len(within)}, not below {named}."
        f"{further}"
    )


COLUMNS = (
    "Peer",
    "Tool and version",
    "True bits",
    "MiB",
    "Rise, nats",
    "Rise %",
    "KL mean",
    "Ours, no more bytes",
    "Its bits",
    "Its rise",
    "Difference",
    "Paired 95 % interval",
    "Ours is",
)


def _table(of: Shown, rows: Sequence[Rival], model: str, corpus: str) -> Table:
    caption = f"Other tools, and ours at equal or smaller true size: {model} on {corpus}"
    return Table(caption, COLUMNS, [_row(of, rival, corpus) for rival in rows], 2)


def _row(of: Shown, rival: Rival, corpus: str) -> Sequence[str]:
    document = of.peers[rival.peer]
    size, quality, tool = document["size"], document["quality"][corpus], document["peer"]
    first = (
        rival.peer,
        f"{tool['tool']} {str(tool['version']).rpartition(' ')[2]}",
        f"{size['bits_per_weight']:.3f}",
        f"{size['file_bytes'] / 2**20:.3f}",
        f"{quality['delta_loss']:+.5f}",
        signed(quality["delta_loss_percent"]),
        f"{quality['kl_mean']:.5f}",
    )
    if rival.ours is None:
        return (*first, "none is that small", *[NONE] * 5)
    ours = of.ours[rival.ours]
    own, interval = ours["quality"][corpus]["delta_loss"], rival.interval
    return (
        *first,
        rival.ours,
        f"{ours['size']['bits_per_weight']:.3f}",
        f"{own:+.5f}",
        f"{own - quality['delta_loss']:+.5f}",
        f"[{interval.low:+.5f}, {interval.high:+.5f}]" if interval else NONE,
        rival.verdict,
    )


def _picture(of: Shown, model: str, corpus: str, dpi: int) -> Picture:
    from nashswarm import figures  # with matplotlib, which the console table can do without

    points = [
        figures.Point(
            name,
            document["size"]["bits_per_weight"],
            document["quality"][corpus]["delta_loss"],
            tuple(document["quality"][corpus]["delta_loss_ci95"]),
            tool=document.get("peer", {}).get("tool"),
        )
        for name, document in {**of.ours, **of.peers}.items()
    ]
    caption = (
        f"Ours and other tools, rise in loss against true size, {model} on {corpus}: lower and further left is better. "
        "Bars are the paired 95 % intervals."
    )
    return Picture(
        f"peers-{model}-{corpus}.png", caption, figures.frontier(points, "rise in loss, nats per token", dpi)
    )


def _notes(of: Shown, model: str) -> list[Block]:
    """What is to be known of each peer, those that were not run, and what could not be shown."""
    blocks: list[Block] = []
    said: dict[str, list[str]] = {}
    for name, document in of.peers.items():
        said.setdefault("; ".join(document["peer"]["notes"]), []).append(name)
    if said:
        items = tuple(f"{', '.join(names)}: {words}." for words, names in said.items() if words)
        blocks += [Heading(f"How they were run: {model}", 3), Items(items)]
    if of.not_run:
        items = tuple(f"{name}: {reason}" for name, reason in of.not_run.items())
        blocks += [Heading(f"Not run: {model}", 3), Items(items)]
    reasons: dict[str, list[str]] = {}
    for name, reason in of.left_out.items():
        reasons.setdefault(reason, []).append(name)
    blocks += [Text(f"Left out for {model}, {reason}: {', '.join(names)}.") for reason, names in reasons.items()]
    return blocks


def console(found: Mapping[str, Shown], corpora: Sequence[str], resamples: int, seed: int) -> str:
    """The short table for a terminal, by falling true size; empty where there is no peer to show."""
    blocks = []
    for model, of in found.items():
        for corpus in corpora if of.peers else ():
            lines = [("peer", "true bits", "loss rise % [95 % interval]", "KL nats", "ours, no more bytes", "is")]
            rows = rivals(of.ours, of.peers, corpus, resamples, seed)
            for r in rows:
                q = of.peers[r.peer]["quality"][corpus]
                ours = NONE
                if r.ours is not None:
                    ours = f"{r.ours} {signed(of.ours[r.ours]['quality'][corpus]['delta_loss_percent'])} %"
                lines.append((r.peer, f"{r.bits:.3f}", rise(q), f"{q['kl_mean']:.5f}", ours, r.verdict))
            blocks.append(f"{model} on {corpus}, other tools\n{aligned(lines, '<>>><<')}")
        if of.not_run:
            blocks.append("\n".join(f"{model}, not run: {n}: {reason}" for n, reason in of.not_run.items()))
    return "\n\n".join(blocks)
