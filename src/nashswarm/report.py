"""What the report says: tables and figures from the metrics alone, as one list of blocks that `rendering` writes out.

Equal metrics give equal bytes: no dates, no hosts, no versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nashswarm import beside, demand, distortion, forest, paper, provenance, rendering, seeds, speed
from nashswarm.artifacts import Layout, read_json, read_tracked, write_bytes
from nashswarm.bitmap import BitMap, bit_map
from nashswarm.comparison import Match, matches
from nashswarm.config import BENCHMARKS, Active
from nashswarm.paper import rise, signed
from nashswarm.rendering import Block, Heading, Items, Picture, Table, Text

MIB = 2**20
NONE = "–"
Metrics = Mapping[tuple[str, str], Mapping[str, Any]]
Tracked = Mapping[tuple[str, str], Mapping[str, Any] | None]  # None where there are no metrics


@dataclass(frozen=True, slots=True)
class Run:
    """What there is to report."""

    metrics: Metrics  # of (model, method)
    models: Sequence[str]
    methods: Sequence[str]
    corpora: Sequence[str]
    resamples: int = 2000  # of the bootstrap between two methods
    seed: int = 0
    peers: Tracked = field(default_factory=dict)  # of (model, peer)
    extra: Tracked = field(default_factory=dict)  # of (model, method): further ones of ours, to stand beside the peers
    seeds: Tracked = field(default_factory=dict)  # of (model, method): measured with several calibration seeds
    speed: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)  # of a kind of benchmark
    allocations: distortion.Allocations = field(default_factory=dict)  # of (model, method)
    origin: provenance.Origin | None = None

    def of(self, model: str) -> dict[str, Mapping[str, Any]]:
        """Method -> metrics of one model, in the order of the methods."""
        return {m: self.metrics[model, m] for m in self.methods if (model, m) in self.metrics}

    def beside(self) -> dict[str, beside.Shown]:
        """Model -> what of other tools can be shown with it."""
        return {
            model: beside.shown(self.of(model), _tracked(self.extra, model), _tracked(self.peers, model), self.corpora)
            for model in self.models
        }


def _tracked(found: Tracked, model: str) -> dict[str, Mapping[str, Any] | None]:
    return {name: document for (of, name), document in found.items() if of == model}


def gather(
    layout: Layout, active: Active, peers: Sequence[str], methods: Sequence[str], resamples: int, seed: int
) -> Run:
    """All metrics that the report is made of.

    Arguments: `peers` and `methods`, whose tracked metrics are shown beside those of the active ones, where they are.
    """
    metrics = {
        (model, method): read_json(layout.metrics(model, method))
        for model in active.models
        for method in active.methods
    }
    names = dict.fromkeys((*active.peers, *peers))
    others = {(model, name): read_tracked(layout.metrics(model, name)) for model in active.models for name in names}
    extra = {(model, name): read_tracked(layout.metrics(model, name)) for model in active.models for name in methods}
    spreads = {pair: read_tracked(seeds.path(layout, *pair)) for pair in metrics}
    times = {kind: read_tracked(speed.path(layout, kind)) for kind in BENCHMARKS}
    return Run(metrics, active.models, active.methods, active.corpora, resamples, seed, others, extra, spreads, times)


def write(directory: Path, run: Run, dpi: int) -> None:
    """Write report.md, report.html, tables.tex, results.csv and the figures into `directory`.

    Arguments: `dpi`, of the figures.
    """
    first, more = headline(run)
    found = run.beside()
    draws = run.corpora, run.resamples, run.seed, dpi
    blocks: list[Block] = [Text(more), *_verdict_section(run), *_paper_section(run), *_size_section(run)]
    blocks += [*_figure_section(run, dpi), *forest.section({m: run.of(m) for m in run.models}, *draws)]
    blocks += _market_section(run, found, dpi)
    blocks += seeds.section({model: run.of(model) for model in run.models}, run.seeds, run.corpora)
    blocks += [*beside.section(found, *draws), *speed.section(run.speed, dpi)]
    blocks += [*_reading_section(), *_limits_section(run), *(provenance.section(run.origin) if run.origin else [])]
    for picture in (b for b in blocks if isinstance(b, Picture)):
        write_bytes(directory / picture.name, picture.png)
    files = {"report.md": rendering.markdown, "report.html": rendering.web_page, "tables.tex": rendering.latex}
    for name, render in files.items():
        write_bytes(directory / name, render(first, blocks).encode())
    pairs = {(model, method): document for model in run.models for method, document in run.of(model).items()}
    pairs |= {(model, name): d for model, of in found.items() for name, d in {**of.ours, **of.peers}.items()}
    write_bytes(directory / "results.csv", rendering.flat_table(pairs).encode())


def console_table(metrics: Metrics, models: Sequence[str], methods: Sequence[str], corpora: Sequence[str]) -> str:
    """The short table for a terminal: true size, rise in loss, and KL, for each model and corpus."""
    run = Run(metrics, models, methods, corpora)
    columns = ("method", "true bits", "file MiB", "loss rise % [95 % interval]", "", "KL nats")
    blocks = []
    for model in models:
        for corpus in corpora:
            rows = [columns]
            for method, document in run.of(model).items():
                quality = document["quality"][corpus]
                rows.append((method, *_size(document), rise(quality), _resolved(quality), _kl(quality["kl_mean"])))
            blocks.append(f"{model} on {corpus}\n{rendering.aligned(rows, '<>>><>')}")
    return "\n\n".join([headline(run)[0], *blocks])


def peers_table(run: Run) -> str:
    """The short table of other tools for a terminal; empty where there is none to show."""
    return beside.console(run.beside(), run.corpora, run.resamples, run.seed)


# --- the headline --------------------------------------------------------------------------------------------------


def headline(run: Run) -> tuple[str, str]:
    """The first line, and what belongs to it."""
    model, corpus = run.models[0], run.corpora[0]
    documents = run.of(model)
    best = paper.at_three_bits(documents)
    if best is not None:
        return _market_headline(model, corpus, best, documents[best])
    if paper.NASH in documents:
        return _paper_headline(model, corpus, documents[paper.NASH])
    smallest = min(documents, key=lambda m: documents[m]["size"]["bits_per_weight"])
    bits, quality = documents[smallest]["size"]["bits_per_weight"], documents[smallest]["quality"][corpus]
    first = f"At {bits:.2f} true bits per weight, {_moves(quality)} on {corpus}"
    return first, f"Model {model}, method {smallest}, the smallest file of this run."


def _market_headline(model: str, corpus: str, best: str, document: Mapping[str, Any]) -> tuple[str, str]:
    bits, quality = document["size"]["bits_per_weight"], document["quality"][corpus]
    first = (
        f"Over all weights at {bits:.2f} true bits per weight ({_smaller(document):.1f} % smaller than fp32), "
        f"{_moves(quality)} on {corpus}"
    )
    certain = "The interval excludes 0." if quality["resolved"] else "The rise is not resolved."
    more = (
        f"Model {model}, method {best}: loss {quality['loss']:.4f} nats per token, file {_mib(document)} MiB, "
        "everything counted that is needed to rebuild the model. In brackets the paired 95 % interval over "
        f"{quality['tokens']:,} tokens. {certain} The paper reports 90.6 % and +{paper.HEADLINE_PERCENT} % on GPT-2 "
        "XL, with 5 % of the weights quantized and only their codes counted."
    )
    return first, more


def _paper_headline(model: str, corpus: str, document: Mapping[str, Any]) -> tuple[str, str]:
    size, quality = document["size"], document["quality"][corpus]
    first = (
        f"The paper's mix claims {size['claimed_bits_per_weight']:.2f} bits per weight and really takes "
        f"{size['bits_per_weight']:.2f} over the whole model; {_moves(quality)} on {corpus}"
    )
    more = (
        f"Model {model}, method {paper.NASH}. Claimed: {size['claimed_mib']:.2f} MiB, "
        f"{100 * size['claimed_compression']:.1f} % smaller. True: {_mib(document)} MiB on disk, "
        f"{_smaller(document):.1f} % smaller than fp32; the matrices it touches take "
        f"{size['matrix_bits_per_weight']:.2f} bits per weight, because a decoder has to know each weight's class. "
        "The rest of the model is left as it is."
    )
    return first, more


def _moves(quality: Mapping[str, Any]) -> str:
    low, high = paper.percent_interval(quality)
    if quality["delta_loss_percent"] >= 0:
        return f"the loss rises by {signed(quality['delta_loss_percent'])[1:]} % [{signed(low)}, {signed(high)}]"
    return f"the loss falls by {signed(quality['delta_loss_percent'])[1:]} % [{signed(low)}, {signed(high)}]"


# --- numbers -------------------------------------------------------------------------------------------------------


def _smaller(document: Mapping[str, Any]) -> float:
    """How much smaller than fp32, in percent."""
    return float(100 * document["size"].get("compression", 1 - document["size"]["bits_per_weight"] / 32))


def _mib(document: Mapping[str, Any]) -> str:
    return f"{document['size']['file_bytes'] / MIB:.3f}"


def _size(document: Mapping[str, Any]) -> tuple[str, str]:
    return f"{document['size']['bits_per_weight']:.3f}", _mib(document)


def _resolved(quality: Mapping[str, Any]) -> str:
    if list(quality["delta_loss_ci95"]) == [0, 0]:
        return "the same"
    return "resolved" if quality["resolved"] else "not resolved"


def _kl(value: float) -> str:
    return f"{value:.5f}"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _perplexity(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}" if value < 1e6 else f"{value:.3g}"


def _interval(values: Sequence[float], form: str) -> str:
    return f"[{values[0]:{form}}, {values[1]:{form}}]"


def _difference(ours: float | None, theirs: float | None, form: str) -> str:
    return NONE if ours is None or theirs is None else format(ours - theirs, form)


# --- claims and verdicts -------------------------------------------------------------------------------------------


def _verdict_section(run: Run) -> list[Block]:
    ordered = {(model, method): document for model in run.models for method, document in run.of(model).items()}
    found = paper.verdicts(ordered, run.corpora)
    count = {verdict: sum(v.verdict == verdict for v in found) for verdict in (paper.HOLDS, paper.FAILS, paper.OPEN)}
    rows = [(v.claim, " on ".join(filter(None, (v.model, v.corpus))), v.verdict, v.why) for v in found]
    return [
        Heading("Claims and verdicts"),
        Text(
            f"Of {len(found)} rows, {count[paper.HOLDS]} hold, {count[paper.FAILS]} do not hold, and "
            f"{count[paper.OPEN]} cannot be decided by this run. Percentages are rises in loss against fp32; brackets "
            "hold the paired 95 % interval. Where the interval reaches across the limit, or the paper's sample counts "
            "N disagree, the run cannot say."
        ),
        Table("The paper's claims, and ours", ("Claim", "Where", "Verdict", "The number that decides"), rows, 4, True),
    ]


# --- the paper, side by side ---------------------------------------------------------------------------------------

PAPER_COLUMNS = (
    "Method",
    "N",
    "Loss, paper",
    "Loss, ours",
    "Difference",
    "Perplexity, paper",
    "Perplexity, ours",
    "Change %, paper",
    "Change %, ours",
    "Difference, points",
    "MiB claimed, paper",
    "MiB claimed, ours",
    "Smaller %, paper",
    "Smaller %, ours",
)


def _paper_section(run: Run) -> list[Block]:
    blocks: list[Block] = [
        Heading("The paper, by its own protocol and its own accounting"),
        Text(
            "The first N texts, cut or padded to 64 tokens, pads scored too; sizes are the bits of the codes of the "
            f"touched weights alone. Paper: {paper.SOURCE}; its percentages of size are worked out from its sizes. "
            f"{NONE} means that it prints no such number."
        ),
    ]
    for corpus in run.corpora:
        for model in run.models:
            rows = _paper_rows(run, model, corpus)
            if not rows:
                continue
            blocks.append(Table(f"Paper's protocol: {model} on {corpus}", PAPER_COLUMNS, rows, 2))
            blocks += _pads_warning(run, model, corpus)
        if not corpus.startswith(paper.CORPUS):
            blocks.append(
                Text(f"The paper measured on WikiText-2. Differences in loss on {corpus} are differences of texts too.")
            )
    return blocks


# GPT-2's two losses are a factor of 1.6 apart (5.33 and 3.40), reference's 5.3: 63 % of its targets are pads.
FAR_APART = 2.0


def _pads_warning(run: Run, model: str, corpus: str) -> list[Block]:
    """Said where the paper's protocol scores something other than text: it and the standard protocol are far apart."""
    documents = run.of(model)
    if paper.FP32 not in documents:
        return []
    ours, standard = documents[paper.FP32]["paper"][corpus], documents[paper.FP32]["quality"][corpus]["loss"]
    if ours["loss"] < FAR_APART * standard:
        return []
    falls = {m: min(paper.rises_by_count(d["paper"][corpus]).values()) for m, d in documents.items()}
    best = min(falls, key=lambda m: falls[m])
    seeming = ""
    if falls[best] < 0:
        real = documents[best]["quality"][corpus]
        seeming = (
            f" So it finds {best} better than fp32 by up to {signed(-falls[best])[1:]} %, where the standard protocol "
            f"has {rise(real)}."
        )
    return [
        Text(
            f"Not to be judged by: this protocol gives fp32 a loss of {ours['loss']:.2f} nats per token on {corpus}, "
            f"the standard one {standard:.2f}. Pads count as targets, and a model that saw none in training finds them "
            f"very unlikely; a method that makes them a little likelier gains more than it loses on the text.{seeming}"
        )
    ]


def _paper_rows(run: Run, model: str, corpus: str) -> list[Sequence[str]]:
    documents = {m: d for m, d in run.of(model).items() if m == paper.FP32 or m.startswith("paper-")}
    found = {method: paper.by_count(d["paper"][corpus]) for method, d in documents.items()}
    rows = []
    for count in sorted({n for of_method in found.values() for n in of_method}):
        for method in (m for m in documents if count in found[m]):
            theirs = paper.PUBLISHED.get((model, count), {}).get(method, paper.Published())
            rows.append(_paper_row(count, method, found[method][count], documents[method]["size"], theirs))
    return rows


def _paper_row(
    count: int, method: str, ours: Mapping[str, Any], size: Mapping[str, Any], theirs: paper.Published
) -> Sequence[str]:
    saved = size.get("claimed_compression")
    return (
        method,
        str(count),
        _number(theirs.loss, ".6g"),
        f"{ours['loss']:.4f}",
        _difference(ours["loss"], theirs.loss, "+.4f"),
        _perplexity(theirs.perplexity),
        _perplexity(ours["perplexity"]),
        _number(theirs.delta_percent, "+.2f"),
        f"{ours['delta_loss_percent']:+.2f}",
        _difference(ours["delta_loss_percent"], theirs.delta_percent, "+.2f"),
        _number(theirs.mib, ".2f"),
        _number(size.get("claimed_mib"), ".2f"),
        _number(None if theirs.compression is None else 100 * theirs.compression, ".1f"),
        _number(None if saved is None else 100 * saved, ".1f"),
    )


# --- all methods in true bytes -------------------------------------------------------------------------------------


def _size_section(run: Run) -> list[Block]:
    blocks: list[Block] = [
        Heading("All methods, in true bytes"),
        Text(
            "Sizes are those of the files on disk: codes, scales, zeros, class maps, tables, norms and biases, "
            "headers. Quality is the standard protocol's: every token of the test split but each window's first, "
            "paired with fp32."
        ),
    ]
    for model in run.models:
        columns = ("Method", "File MiB", "Bits per weight", "Matrix bits", "Claimed bits", "Smaller than fp32 %")
        rows = [
            (
                method,
                _mib(d),
                f"{d['size']['bits_per_weight']:.3f}",
                _number(d["size"]["matrix_bits_per_weight"], ".3f"),
                _number(d["size"].get("claimed_bits_per_weight"), ".3f"),
                f"{_smaller(d):.1f}",
            )
            for method, d in run.of(model).items()
        ]
        blocks.append(Table(f"Size: {model}", columns, rows))
        blocks += [_quality_table(run, model, corpus) for corpus in run.corpora]
        blocks.append(_parts_table(run, model))
    return blocks


def _quality_table(run: Run, model: str, corpus: str) -> Table:
    columns = (
        "Method",
        "Bits per weight",
        "Loss",
        "Perplexity",
        "Rise, nats",
        "95 % interval",
        "Rise %",
        "Resolved?",
        "KL mean",
        "KL p99",
        "Same top token %",
    )
    rows = []
    for method, document in run.of(model).items():
        q = document["quality"][corpus]
        rows.append(
            (
                method,
                f"{document['size']['bits_per_weight']:.3f}",
                f"{q['loss']:.4f}",
                _perplexity(q["perplexity"]),
                f"{q['delta_loss']:+.5f}",
                _interval(q["delta_loss_ci95"], "+.5f"),
                signed(q["delta_loss_percent"]),
                _resolved(q),
                _kl(q["kl_mean"]),
                _kl(q["kl_p99"]),
                f"{100 * q['top1_agreement']:.2f}",
            )
        )
    return Table(f"Quality: {model} on {corpus}", columns, rows)


def _parts(run: Run, model: str) -> dict[str, dict[str, float]]:
    """Method -> part -> bits per weight of the whole model; fp32 aside."""
    found = {}
    for method, document in run.of(model).items():
        size = document["size"]
        if method != paper.FP32 and size.get("parts"):
            scale = size["bits_per_weight"] / size["file_bytes"]
            found[method] = {part: count * scale for part, count in size["parts"].items()}
    return found


def _parts_table(run: Run, model: str) -> Table:
    parts = _parts(run, model)
    names = sorted({name for of_method in parts.values() for name in of_method})
    rows = [
        (m, *(f"{p[n]:.4f}" if n in p else NONE for n in names), f"{sum(p.values()):.3f}") for m, p in parts.items()
    ]
    return Table(f"Bits per weight by part of the file: {model}", ("Method", *names, "sum"), rows)


# --- figures -------------------------------------------------------------------------------------------------------


def _figure_section(run: Run, dpi: int) -> list[Block]:
    from nashswarm import figures  # with matplotlib, which the console table can do without

    blocks: list[Block] = []
    for model in run.models:
        documents = {m: d for m, d in run.of(model).items() if m != paper.FP32}
        if not documents:
            continue
        blocks.append(Heading(f"Loss against size: {model}", 3))
        for corpus in run.corpora:
            bits = {m: d["size"]["bits_per_weight"] for m, d in documents.items()}
            found = {m: d["quality"][corpus] for m, d in documents.items()}
            claims = {m: d["size"].get("claimed_bits_per_weight") for m, d in documents.items()}
            rises = [
                figures.Point(m, bits[m], q["delta_loss"], tuple(q["delta_loss_ci95"]), claims[m])
                for m, q in found.items()
            ]
            kls = [figures.Point(m, bits[m], q["kl_mean"]) for m, q in found.items()]
            blocks += [
                Picture(
                    f"frontier-{model}-{corpus}.png",
                    f"Rise in loss against true size, {model} on {corpus}: lower and further left is better. Bars "
                    "are the paired 95 % intervals; a bar that reaches the lower edge includes 0, an open triangle "
                    "is not above 0. Where dotted, the paper's accounting claims the size at the hollow end.",
                    figures.frontier(rises, "rise in loss, nats per token", dpi),
                ),
                Picture(
                    f"kl-{model}-{corpus}.png",
                    f"KL divergence from the original against true size, {model} on {corpus}: lower is better.",
                    figures.frontier(kls, "KL divergence, nats per token", dpi),
                ),
            ]
        caption = (
            f"What the bytes are for, {model}: bits per weight by part of the file. "
            "Matrices that a method leaves alone count as codes; fp32 is left out."
        )
        blocks.append(Heading(f"Where the bytes go: {model}", 3))
        blocks.append(Picture(f"bytes-{model}.png", caption, figures.stacked(_parts(run, model), dpi)))
        blocks += _bit_maps(run, model, dpi)
        if maps := distortion.pictures(model, documents, run.allocations, dpi):
            blocks += [Heading(f"Where the loss is predicted to come from: {model}", 3), *maps]
    return [Heading("Figures"), *blocks] if blocks else []


DEEPEST = 8.0  # bits at the dark end of the maps' scale at most: one kept matrix would wash out all others


def _bit_maps(run: Run, model: str, dpi: int) -> list[Block]:
    """A map for every market whose metrics have the bits of single matrices; one colour scale for all of them.

    The layers set the scale: position embeddings, which are few and bought dear, would pale the rest.
    """
    from nashswarm import figures

    markets = {m: d for m, d in run.of(model).items() if m.startswith("market")} | _markets(run.of(model))
    rows = {m: d.get("allocation", {}).get("tensors") or [] for m, d in markets.items()}
    maps = {method: found for method, of_method in rows.items() if (found := bit_map(of_method))}
    if not maps:
        return []
    values = [v for found in maps.values() for v in found.cells.values() or found.values()]
    least = min(values)
    limits = least, max(min(max(values), DEEPEST), least + 0.5)
    blocks: list[Block] = []
    for method, found in maps.items():
        title = f"{method}: {markets[method]['size']['bits_per_weight']:.2f} true bits per weight in all"
        picture = figures.bit_map(found, title, limits, dpi)
        blocks.append(Picture(f"bits-{model}-{method}.png", _map_caption(method, model, found), picture))
    return blocks


def _map_caption(method: str, model: str, found: BitMap) -> str:
    ends = ""
    if found.cells:
        least, most = (pick(found.cells, key=lambda cell: found.cells[cell]) for pick in (min, max))
        ends = (
            f" Within the layers from {found.cells[least]:.2f} ({least[1]} of layer {least[0]}) to "
            f"{found.cells[most]:.2f} ({most[1]} of layer {most[0]})."
        )
    return (
        f"What {method} bought for each matrix of {model}, in true bits per weight: embeddings and head above, layers "
        f"below, one colour scale for all methods.{ends} Tables and scales that all matrices share are not in it."
    )


# --- the market ----------------------------------------------------------------------------------------------------


def _market_section(run: Run, shown: Mapping[str, beside.Shown], dpi: int) -> list[Block]:
    """Arguments: `shown`, model -> what of ours stands beside the peers: budgets that this run need not have made."""
    blocks: list[Block] = []
    for model in run.models:
        bought = _markets(run.of(model))
        blocks += demand.pictures(model, bought | _markets(shown[model].ours), dpi)
        blocks += [block for corpus in run.corpora for block in _field_tables(run, model, corpus)]
        if bought:
            blocks += [_certificate_table(model, bought), *(_prediction_table(model, c, bought) for c in run.corpora)]
        blocks += _acceptance_table(model, run.of(model))
        if bought:
            blocks += [_peers_table(run, model, corpus) for corpus in run.corpora]
    if not blocks:
        return []
    return [
        Heading("The market"),
        Text(
            "Every piece of the model buys bytes at one price. At an equilibrium nobody gains by buying otherwise, "
            "so the largest gain by deviating is 0 up to rounding and to the last bytes; the gap is how far the "
            "bought distortion can be from the best one possible at these bytes. Bytes bought are those of the file. "
            "Against the field: for each baseline and each codec, the market whose loss rises least among the files "
            "that are no larger. A ratio below 1 and a difference below 0 are in the market's favour; the intervals "
            "are paired, drawn from blocks of windows for both methods at once."
        ),
        *blocks,
    ]


def _markets(documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The methods that bought at a price."""
    return {m: d for m, d in documents.items() if d.get("allocation", {}).get("price") is not None}


FIELD_COLUMNS = (
    "Baseline",
    "Bits",
    "Rise, nats",
    "Best market of no more bytes",
    "Its bits",
    "Its rise",
    "Ratio of rises",
    "Difference",
    "Paired 95 % interval",
    "The market is",
)


def _field_tables(run: Run, model: str, corpus: str) -> list[Block]:
    """Every baseline of the field against the best market of each codec that is no larger; none without both."""
    documents = run.of(model)
    found = matches(documents, corpus, run.resamples, run.seed)
    rows = [_field_row(match, documents, corpus) for match in found]
    caption = f"The market against the field at equal or smaller true size: {model} on {corpus}"
    blocks: list[Block] = [Table(caption, FIELD_COLUMNS, rows)] if found else []
    if any(match.market and not match.interval for match in found):
        words = "lack sums over the same blocks of windows, from which the interval is drawn: evaluate again."
        blocks.append(Text(f"{NONE} in place of an interval: the metrics of one of the two {words}"))
    return blocks


def _field_row(match: Match, documents: Mapping[str, Mapping[str, Any]], corpus: str) -> Sequence[str]:
    theirs = documents[match.baseline]
    bits, rise_ = f"{theirs['size']['bits_per_weight']:.3f}", f"{theirs['quality'][corpus]['delta_loss']:+.5f}"
    if match.market is None:
        return match.baseline, bits, rise_, f"none of {match.codec}", *[NONE] * (len(FIELD_COLUMNS) - 4)
    ours, interval = documents[match.market], match.interval
    own = ours["quality"][corpus]["delta_loss"]
    verdict = NONE
    if interval:
        verdict = "not resolved" if not interval.resolved else "better" if interval.difference < 0 else "worse"
        verdict = "equal" if interval.resolved and interval.difference == 0 else verdict
    return (
        match.baseline,
        bits,
        rise_,
        match.market,
        f"{ours['size']['bits_per_weight']:.3f}",
        f"{own:+.5f}",
        _number(match.ratio, ".3f"),
        f"{own - theirs['quality'][corpus]['delta_loss']:+.5f}",
        _interval((interval.low, interval.high), "+.5f") if interval else NONE,
        verdict,
    )


def _acceptance_table(model: str, documents: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """How mixed widths did against uniform ones on the validation text, where the allocation asked."""
    asked = {m: a for m, d in documents.items() if (a := d.get("allocation", {}).get("acceptance"))}
    if not asked:
        return []
    rows = [
        (
            method,
            str(a.get("uniform") or NONE),
            _number(a.get("validation_rise"), "+.5f"),
            _number(a.get("uniform_validation_rise"), "+.5f"),
            NONE if a.get("accepted") is None else "yes" if a["accepted"] else "no",
        )
        for method, a in asked.items()
    ]
    columns = ("Method", "Uniform widths", "Rise on validation", "Uniform's rise", "Accepted?")
    return [
        Table(f"Mixed widths against uniform ones on the validation text, nats per token: {model}", columns, rows, 2)
    ]


def _certificate_table(model: str, bought: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = ("Method", "Price, nats/byte", "Bytes asked", "Bytes bought", "Unspent %", "Largest gain", "Duality gap")
    rows = []
    for method, document in bought.items():
        a = document["allocation"]
        asked, spent = a.get("asked_bytes"), a.get("bought_bytes")
        unspent = None if not asked or spent is None else 100 * (asked - spent) / asked
        rows.append(
            (
                method,
                f"{a['price']:.3e}",
                _number(asked, ",d"),
                _number(spent, ",d"),
                _number(unspent, ".3f"),
                _number(a.get("largest_deviation_gain"), ".2e"),
                _number(a.get("duality_gap"), ".2e"),
            )
        )
    return Table(f"Certificates of equilibrium: {model}", columns, rows)


def _prediction_table(model: str, corpus: str, bought: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = ("Method", "Rise predicted", "Rise measured", "95 % interval", "Bits: share of weights")
    rows = []
    for method, document in bought.items():
        a, q = document["allocation"], document["quality"][corpus]
        rows.append(
            (
                method,
                _number(a.get("predicted_rise"), "+.5f"),
                f"{q['delta_loss']:+.5f}",
                _interval(q["delta_loss_ci95"], "+.5f"),
                _histogram(a.get("histogram") or {}),
            )
        )
    return Table(f"Prediction and measurement, nats per token: {model} on {corpus}", columns, rows)


def _histogram(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: float(item[0]))
    return ", ".join(f"{bits}: {100 * count / total:.1f} %" for bits, count in ordered if count) or NONE


def _peers_table(run: Run, model: str, corpus: str) -> Table:
    """For every other method: the smallest market file whose loss rises no more."""
    documents = {m: d for m, d in run.of(model).items() if m != paper.FP32}
    market = _markets(documents)
    rows = []
    for method in (m for m in documents if m not in market):
        rise_ = documents[method]["quality"][corpus]["delta_loss"]
        bits = documents[method]["size"]["bits_per_weight"]
        equal = {m: d for m, d in market.items() if d["quality"][corpus]["delta_loss"] <= rise_}
        best = min(equal, key=lambda m: equal[m]["size"]["bits_per_weight"], default=None)
        if best is None:
            rows.append((method, f"{bits:.3f}", f"{rise_:+.5f}", "none of this run", NONE, NONE, NONE))
            continue
        own = equal[best]["size"]["bits_per_weight"]
        own_rise = equal[best]["quality"][corpus]["delta_loss"]
        rows.append(
            (method, f"{bits:.3f}", f"{rise_:+.5f}", best, f"{own:.3f}", f"{own_rise:+.5f}", f"{bits - own:+.3f}")
        )
    columns = ("Method", "Bits", "Rise, nats", "Market at no more loss", "Its bits", "Its rise", "Bits saved")
    return Table(f"The smallest market file that is as good: {model} on {corpus}", columns, rows)


# --- how to read it ------------------------------------------------------------------------------------------------


def _reading_section() -> list[Block]:
    return [
        Heading("How to read it"),
        Items(
            (
                "True bits per weight: 8 times the bytes on disk needed to rebuild the model (config and tokenizer "
                "aside), divided by all parameters, a tied matrix counted once. Matrix bits: the same for the "
                "quantized matrices alone.",
                "Claimed bits and MiB: the paper's accounting, which counts the codes of the touched weights and "
                "nothing else. It touches what isinstance(module, nn.Linear) finds: in GPT-2 the head alone, tied to "
                "the embedding. Which class a weight is in is not counted, though no decoder can do without it.",
                "MiB are 2^20 bytes. Loss is in nats per token; perplexity is exp(loss). Rises are against the "
                "original model on the same tokens; percentages are of its loss.",
                "Standard protocol: the test split joined and tokenised once, non-overlapping windows of at most "
                "1024 tokens, every token but a window's first a target, all targets weighted alike.",
                "Paper's protocol: the first N texts longer than 20 characters, each cut or padded with EOS to 64 "
                "tokens, pads scored too; the mean over texts of the mean of each. It has few tokens and many pads: "
                "of the two, the standard protocol is the one to judge by.",
                "Intervals: 95 %, paired, by a bootstrap over blocks of neighbouring windows. Not resolved: the "
                "interval includes 0, or the text is a single block and gives none, so that the run cannot tell the "
                "model from the original.",
                "KL: divergence of the quantized model's next-token distribution from the original's, in nats, mean "
                "over all targets and 99th percentile. Same top token: how often both find the same token most "
                "likely.",
            )
        ),
    ]


NO_TIMES = "No times are given: metrics hold none, so that they repeat to the byte."


def _limits_section(run: Run) -> list[Block]:
    missing = [m for m in dict.fromkeys(model for model, _ in paper.PUBLISHED) if m not in run.models]
    items = [
        "One calibration text and one seed for each method: intervals cover the choice of test tokens, not that of the "
        'calibration (under "Calibration seeds", where that was measured). Many are shown, and none is adjusted for '
        "their number.",
        "On text that a model wrote itself (corpus sampled) the rise in loss estimates the KL divergence; it says "
        "little about other texts.",
        "Predicted rises, of whole models and of single matrices, are those of a quadratic model of the loss around "
        "the original; how far it carries is seen where predictions stand beside measurements.",
        speed.LIMITS if any(run.speed.values()) else NO_TIMES,
        "What holds for small models need not hold for large ones.",
    ]
    if missing:
        names = ", ".join(missing)
        items.insert(
            0, f"Not measured here, of the paper's models: {names}. Verdicts are on its method, not on its runs."
        )
    return [Heading("Limitations"), Items(items)]
