"""The report: the same bytes every time, the metrics' own numbers, and verdicts that follow from them."""

from __future__ import annotations

import copy
import io
import math
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nashswarm import artifacts, figures, paper, provenance, rendering, report
from nashswarm.bitmap import BitMap
from nashswarm.config import CorpusSource

PARAMETERS = 8_000_000
# method -> true bits over the model, bits over its matrices, rise in loss (nats), bits that the paper would claim
METHODS: dict[str, tuple[float, float, float, float | None]] = {
    "fp32": (32.0, 32.0, 0.0, None),
    "paper-uniform4": (13.3, 4.0, 0.8, 4.0),
    "paper-nash": (13.4, 4.17, 0.2, 2.99),
    "uniform4": (4.02, 4.0, 2.0, None),
    "nash": (4.19, 4.17, 0.13, None),
    "rtn4-g64": (4.52, 4.5, 0.0088, None),
    "gptq4-g128": (4.27, 4.25, 0.0076, None),
    "market-coded-2_0": (1.999, 1.98, 0.05, None),
    "market-coded-3_0": (2.999, 2.98, 0.0071, None),
    "market-tiles-3_25": (3.249, 3.23, 0.016, None),
    "my_own": (5.0, 5.0, -0.0001, None),
}
LOSS = 4.0


def quality(rise: float, spread: float = 0.0005) -> dict[str, Any]:
    low, high = (rise - spread, rise + spread) if rise else (0.0, 0.0)
    return {
        "loss": LOSS + rise,
        "perplexity": math.exp(LOSS + rise),
        "tokens": 59_800,
        "delta_loss": rise,
        "delta_loss_ci95": [low, high],
        "delta_loss_percent": 100 * rise / LOSS,
        "resolved": low > 0 or high < 0 or rise == 0,
        "kl_mean": abs(rise) * 1.1,
        "kl_p99": abs(rise) * 9,
        "top1_agreement": 1 - abs(rise) / 4,
    }


def paper_row(rise: float, count: int) -> dict[str, Any]:
    loss = 5.0 + rise
    interval = {"delta_loss_percent_ci95": [20 * rise - 0.5, 20 * rise + 0.5], "resolved": abs(20 * rise) > 0.5}
    return {"loss": loss, "perplexity": math.exp(loss), "delta_loss_percent": 20 * rise, "texts": count, **interval}


def document(method: str, corpora: Sequence[str]) -> dict[str, Any]:
    bits, matrix_bits, rise, claimed = METHODS[method]
    size = round(PARAMETERS * bits / 8)
    parts = {"codes": size * 9 // 10, "scales": size // 20, "headers": size - size * 9 // 10 - size // 20}
    found: dict[str, Any] = {
        "size": {
            "file_bytes": size,
            "bits_per_weight": bits,
            "matrix_bits_per_weight": matrix_bits,
            "compression": 1 - bits / 32,
            "parts": parts,
        },
        "quality": {c: quality(rise) for c in corpora},
        "paper": {
            c: {**paper_row(rise, 20), "by_count": {str(n): paper_row(rise, n) for n in (20, 50)}} for c in corpora
        },
        "allocation": {"price": None, "histogram": {"4": PARAMETERS}},
    }
    if claimed:
        claims = {"claimed_mib": claimed, "claimed_bits_per_weight": claimed, "claimed_compression": 1 - claimed / 32}
        found["size"] |= claims
    if method.startswith("market"):
        found["allocation"] = {
            "price": 3.1e-9,
            "largest_deviation_gain": 0.0,
            "duality_gap": 2e-8,
            "predicted_rise": 1.1 * rise,
            "asked_bytes": size + 1000,
            "bought_bytes": size,
            "histogram": {"2": 1_000_000, "10": 3_000_000},
        }
    return found


def fake(
    models: Sequence[str] = ("reference",),
    methods: Sequence[str] = tuple(METHODS),
    corpora: Sequence[str] = ("sampled",),
) -> dict[tuple[str, str], dict[str, Any]]:
    return {(model, method): document(method, corpora) for model in models for method in methods}


def write(
    target: Path,
    metrics: Mapping[tuple[str, str], Mapping[str, Any]],
    corpora: Sequence[str] = ("sampled",),
) -> dict[str, bytes]:
    models = list(dict.fromkeys(model for model, _ in metrics))
    methods = list(dict.fromkeys(method for _, method in metrics))
    report.write(target, report.Run(metrics, models, methods, corpora), 40)
    return {p.name: p.read_bytes() for p in target.iterdir()}


Found = dict[tuple[str, str], dict[str, Any]]
GPT2_KINDS = {"attn.c_attn": "attention", "attn.c_proj": "attention", "mlp.c_fc": "mlp", "mlp.c_proj": "mlp"}
LLAMA_KINDS = {f"self_attn.{x}_proj": "attention" for x in "qkvo"} | {
    f"mlp.{x}_proj": "mlp" for x in ("gate", "up", "down")
}


def with_blocks(metrics: Found) -> Found:
    """As evaluation leaves them: sums over 30 blocks, the same swing of the text in all methods."""
    for document_ in metrics.values():
        for q in document_["quality"].values():
            rises = [1989 * q["delta_loss"] * (1 + (i % 5 - 2) / 20) for i in range(30)]
            q["window_blocks"] = {"rises": rises, "targets": [1989] * 30}
    return metrics


def with_tensors(metrics: Found, kinds: Mapping[str, str] = GPT2_KINDS, llama: bool = False) -> Found:
    """True bits of each matrix of three layers, rising from layer to layer."""
    stem, outside = ("model.layers", ("model.embed_tokens", "lm_head")) if llama else ("transformer.h", ("wte", "wpe"))
    for (_, method), document_ in metrics.items():
        bits = METHODS[method][0]
        rows: list[list[Any]] = [[f"{name}.weight", "embedding", None, 4096, bits + 1] for name in outside]
        for layer in range(3):
            rows += [[f"{stem}.{layer}.{k}.weight", p, layer, 256, bits + layer / 4] for k, p in kinds.items()]
        if method != "fp32":
            document_["allocation"]["tensors"] = rows
    return metrics


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return write(tmp_path_factory.mktemp("report"), fake())


def tables(markdown: str) -> dict[str, list[dict[str, str]]]:
    """Caption -> rows -> column -> cell."""
    found = {}
    for caption, body in re.findall(r"^\*\*(.+)\*\*\n\n((?:\|.*\n?)+)", markdown, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in body.strip().split("\n")]
        found[caption] = [dict(zip(lines[0], row, strict=True)) for row in lines[2:]]
    return found


# --- the files -----------------------------------------------------------------------------------------------------


def test_equal_metrics_give_equal_bytes(written: dict[str, bytes], tmp_path: Path) -> None:
    shuffled = dict(reversed(fake().items()))
    report.write(tmp_path, report.Run(shuffled, ["reference"], list(METHODS), ["sampled"]), 40)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == written


def test_the_order_of_the_metrics_does_not_matter(tmp_path: Path) -> None:
    metrics = fake(["reference", "gpt2"], ["fp32", "paper-nash", "market-coded-3_0"])
    orders = [metrics, dict(reversed(metrics.items()))]
    found = []
    for name, order in zip("ab", orders, strict=True):
        run = report.Run(order, ["reference", "gpt2"], ["fp32", "paper-nash"], ["sampled"])
        report.write(tmp_path / name, run, 40)
        found.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert found[0] == found[1]


def test_files_are_all_there_and_metrics_are_left_as_they_were(tmp_path: Path) -> None:
    metrics = fake()
    before = copy.deepcopy(metrics)
    names = set(write(tmp_path, metrics))
    pictures = {"frontier-reference-sampled.png", "kl-reference-sampled.png", "bytes-reference.png"}
    pictures.add("demand-reference.png")
    assert names == {"report.md", "report.html", "tables.tex", "results.csv"} | pictures
    assert metrics == before


def test_pictures_are_png_without_dates_or_versions(written: dict[str, bytes]) -> None:
    for name in (n for n in written if n.endswith(".png")):
        data = written[name]
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        kinds, at = [], 8
        while at < len(data):
            (length,) = struct.unpack(">I", data[at : at + 4])
            kinds.append(data[at + 4 : at + 8])
            at += 12 + length
        assert not {b"tEXt", b"iTXt", b"zTXt", b"tIME"} & set(kinds)


class Loads(HTMLParser):
    """Every address that a browser would fetch, every tag, and every link's target."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attrs}
        self.tags.add(tag)
        self.ids.add(found.get("id", ""))
        self.loads += [found[k] for k in ("src", "srcset", "poster", "data") if k in found]
        (self.links if tag == "a" else self.loads).extend([found["href"]] if "href" in found else [])


def test_html_loads_nothing(written: dict[str, bytes]) -> None:
    page = written["report.html"].decode()
    found = Loads(page)
    assert len(found.loads) > 3
    assert all(address.startswith("data:") for address in found.loads)
    assert not {"script", "iframe", "object"} & found.tags
    assert not re.search(r"https?://|@import|url\(", page)
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)


def test_names_are_escaped(tmp_path: Path) -> None:
    metrics = {
        (model.replace("reference", "a_b<i>&c"), method): d
        for (model, method), d in fake(methods=["fp32", "my_own"]).items()
    }
    run = report.Run(metrics, ["a_b<i>&c"], ["fp32", "my_own"], ["sampled"])
    blocks = report._size_section(run)
    assert r"my\_own" in (tex := rendering.latex("50 % & more", blocks))
    assert r"a\_b\textless{}i\textgreater{}\&c" in tex
    assert r"50 \% \& more" in tex
    assert not re.search(r"(?<!\\)[_#]|(?<!\\)%", tex.split("\n", 1)[1])  # after the comment on the first line
    page = rendering.web_page("x", blocks)
    assert "a_b&lt;i&gt;&amp;c" in page
    assert "<i>" not in page
    assert r"a_b\<i\>&c" in rendering.markdown("x", blocks)


def test_latex_is_whole(tmp_path: Path) -> None:
    """Balanced, every row as long as its table is wide, nothing but ASCII: what can be known without an engine."""
    run = report.Run(with_blocks(fake()), ["reference"], list(METHODS), ["sampled"], origin=hub_origin())
    report.write(tmp_path, run, 40)
    tex = (tmp_path / "tables.tex").read_text(encoding="utf-8")
    opened, closed = (re.findall(rf"\\{word}{{(\w+)}}", tex) for word in ("begin", "end"))
    assert sorted(opened) == sorted(closed)
    assert tex.split("\n")[1].startswith(r"\documentclass")
    assert tex.rstrip().endswith(r"\end{document}")
    for body in re.findall(r"\\begin{longtable}{([lr]+)}(.*?)\\end{longtable}", tex, re.DOTALL):
        rows = re.findall(r"^(.*) \\\\$", body[1], re.MULTILINE)
        assert rows
        assert all(len(re.findall(r"(?<!\\)&", row)) == len(body[0]) - 1 for row in rows)
    assert tex.isascii()


# Any of them will do; all but tectonic run three times, as the preamble asks.
ENGINES = {
    "pdflatex": ("pdflatex", "-halt-on-error", "-interaction=nonstopmode"),
    "xelatex": ("xelatex", "-halt-on-error", "-interaction=nonstopmode"),
    "lualatex": ("lualatex", "-halt-on-error", "-interaction=nonstopmode"),
    "tectonic": ("tectonic", "--print", "--keep-logs"),
}
ENGINE = next(filter(shutil.which, ENGINES), None)


@pytest.mark.skipif(ENGINE is None, reason="no LaTeX engine here")
def test_latex_compiles_without_overfull_lines(tmp_path: Path) -> None:
    metrics = with_blocks(fake(["gpt2", "opt-1_3b"], corpora=["my_text", "wikitext2"]))
    metrics["gpt2", "market-tiles-3_25"]["allocation"]["acceptance"] = {"uniform": "gptq3-g128", "accepted": True}
    run = report.Run(metrics, ["gpt2", "opt-1_3b"], list(METHODS), ["my_text", "wikitext2"], origin=hub_origin())
    report.write(tmp_path, run, 40)
    assert "Paired differences" in (tex := (tmp_path / "tables.tex").read_text())
    assert f"commit {'b' * 40}" in tex
    command = [*ENGINES[str(ENGINE)], "tables.tex"]
    for _ in range(1 if ENGINE == "tectonic" else 3):
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
        assert ran.returncode == 0, ran.stdout[-2000:]
    assert not re.search(r"Overfull|LaTeX Warning|undefined|Missing", ran.stdout), ran.stdout


def hub_origin() -> provenance.Origin:
    """A model and a text of the hub, with the longest hashes and places that they may have."""
    source = CorpusSource("hub", id="Salesforce/wikitext", config="wikitext-2-raw-v1", revision="b" * 40)
    record = artifacts.SourceRecord(
        "hub", "data/staging/gpt2", "openai-community/gpt2-medium", "a" * 40, {"model.safetensors": "c" * 64}
    )
    splits = {"test": {"sha256": "d" * 64, "tokens": 283_287, "texts": 2891}}
    corpus = provenance.Corpus(source, splits)
    pins = {"torch": "2.13.0"}
    return provenance.Origin(f"{'e' * 32}.dir", 99, {"gpt2": record}, {("gpt2", "wikitext2"): corpus}, "f" * 64, pins)


# --- the numbers ---------------------------------------------------------------------------------------------------


def test_markdown_holds_the_numbers_of_the_metrics(written: dict[str, bytes]) -> None:
    found = tables(written["report.md"].decode())
    sizes = {row["Method"]: row for row in found["Size: reference"]}
    qualities = {row["Method"]: row for row in found["Quality: reference on sampled"]}
    assert list(sizes) == list(qualities) == list(METHODS)
    for method, (bits, matrix_bits, rise, claimed) in METHODS.items():
        size = sizes[method]
        assert float(size["File MiB"]) == pytest.approx(PARAMETERS * bits / 8 / 2**20, abs=5e-4)
        assert float(size["Bits per weight"]) == pytest.approx(bits, abs=5e-4)
        assert float(size["Matrix bits"]) == pytest.approx(matrix_bits, abs=5e-4)
        assert size["Claimed bits"] == ("–" if claimed is None else f"{claimed:.3f}")
        row, metrics = qualities[method], quality(rise)
        assert float(row["Loss"]) == pytest.approx(metrics["loss"], abs=5e-5)
        assert float(row["Rise, nats"]) == pytest.approx(rise, abs=5e-6)
        assert float(row["Rise %"]) == pytest.approx(metrics["delta_loss_percent"], abs=5e-3)
        assert [float(v) for v in row["95 % interval"].strip("[]").split(", ")] == pytest.approx(
            metrics["delta_loss_ci95"], abs=5e-6
        )
        assert float(row["KL mean"]) == pytest.approx(metrics["kl_mean"], abs=5e-6)
        assert float(row["Same top token %"]) == pytest.approx(100 * metrics["top1_agreement"], abs=5e-3)
    assert qualities["fp32"]["Resolved?"] == "the same"
    assert qualities["my_own"]["Resolved?"] == "not resolved"
    assert qualities["nash"]["Resolved?"] == "resolved"


def test_parts_sum_to_the_true_bits(written: dict[str, bytes]) -> None:
    rows = tables(written["report.md"].decode())["Bits per weight by part of the file: reference"]
    assert "fp32" not in {row["Method"] for row in rows}
    for row in rows:
        total = sum(float(row[part]) for part in ("codes", "scales", "headers"))
        assert total == pytest.approx(METHODS[row["Method"]][0], abs=1e-3)


def test_paper_stands_beside_ours_with_the_difference(tmp_path: Path) -> None:
    metrics = fake(["gpt2", "reference"], ["fp32", "paper-uniform4", "paper-nash", "nash"], ["wikitext2"])
    found = tables(write(tmp_path, metrics, ["wikitext2"])["report.md"].decode())
    rows = {(r["N"], r["Method"]): r for r in found["Paper's protocol: gpt2 on wikitext2"]}
    assert {method for _, method in rows} == {"fp32", "paper-uniform4", "paper-nash"}
    row = rows["20", "paper-nash"]
    assert (row["Loss, paper"], row["Loss, ours"], row["Difference"]) == ("5.3661", "5.2000", "-0.1661")
    assert (row["Change %, paper"], row["Change %, ours"], row["Difference, points"]) == ("+0.77", "+4.00", "+3.23")
    assert (row["MiB claimed, paper"], row["MiB claimed, ours"], row["Smaller %, paper"]) == ("13.76", "2.99", "90.7")
    assert rows["50", "paper-uniform4"]["Loss, paper"] == "–"
    assert rows["50", "paper-uniform4"]["Change %, paper"] == "+23.56"
    own = found["Paper's protocol: reference on wikitext2"]
    assert {row[c] for row in own for c in row if c.endswith("paper") or c.startswith("Difference")} == {"–"}


@pytest.mark.parametrize(("model", "uniform", "bits"), [("gpt2-xl", 38.34, 2.995), ("gpt2", 18.40, 2.991)])
def test_published_numbers_agree_with_each_other(model: str, uniform: float, bits: float) -> None:
    rows = paper.PUBLISHED[model, 20]
    assert rows[paper.UNIFORM].mib == uniform
    assert rows[paper.NASH].compression == pytest.approx(1 - bits / 32, abs=1e-4)
    for row in rows.values():
        assert row.loss is not None
        assert math.exp(row.loss) == pytest.approx(row.perplexity, rel=2e-3)
        assert 100 * (row.loss / rows[paper.FP32].loss - 1) == pytest.approx(row.delta_percent, abs=0.02)


def test_the_papers_protocol_shows_the_metrics_at_every_count(written: dict[str, bytes]) -> None:
    rows = tables(written["report.md"].decode())["Paper's protocol: reference on sampled"]
    methods = ["fp32", "paper-uniform4", "paper-nash"]
    assert [(r["N"], r["Method"]) for r in rows] == [(n, m) for n in ("20", "50") for m in methods]
    for row in rows:
        metrics = document(row["Method"], ["sampled"])
        of_count = metrics["paper"]["sampled"]["by_count"][row["N"]]
        assert float(row["Loss, ours"]) == pytest.approx(of_count["loss"], abs=5e-5)
        assert float(row["Perplexity, ours"]) == pytest.approx(of_count["perplexity"], abs=5e-3)
        assert float(row["Change %, ours"]) == pytest.approx(of_count["delta_loss_percent"], abs=5e-3)
        claimed = metrics["size"].get("claimed_mib")
        assert row["MiB claimed, ours"] == ("–" if claimed is None else f"{claimed:.2f}")


def test_a_corpus_shorter_than_the_least_count_is_shown_whole(tmp_path: Path) -> None:
    metrics = fake(methods=["fp32", "paper-nash"])
    for of_pair in metrics.values():
        of_pair["paper"]["sampled"] |= {"texts": 12, "by_count": {}}
    rows = tables(write(tmp_path, metrics)["report.md"].decode())["Paper's protocol: reference on sampled"]
    assert [row["N"] for row in rows] == ["12", "12"]


@pytest.mark.parametrize(("loss", "warned"), [(5.0, False), (16.4, True)])
def test_a_protocol_of_pads_is_called_one(loss: float, warned: bool, tmp_path: Path) -> None:
    metrics = fake(methods=["fp32", "paper-nash"])
    metrics["reference", "fp32"]["paper"]["sampled"]["loss"] = loss
    metrics["reference", "paper-nash"]["paper"]["sampled"]["by_count"]["50"]["delta_loss_percent"] = -59.07
    text = write(tmp_path, metrics)["report.md"].decode()
    assert ("a loss of 16.40 nats per token on sampled, the standard one 4.00" in text) is warned
    assert ("finds paper-nash better than fp32 by up to 59.07 %" in text) is warned


def test_market_shows_its_certificate(written: dict[str, bytes]) -> None:
    found = tables(written["report.md"].decode())
    rows = {r["Method"]: r for r in found["Certificates of equilibrium: reference"]}
    assert set(rows) == {m for m in METHODS if m.startswith("market")}
    bought = round(PARAMETERS * 2.999 / 8)
    assert rows["market-coded-3_0"]["Bytes bought"] == f"{bought:,}"
    assert rows["market-coded-3_0"]["Unspent %"] == f"{100_000 / (bought + 1000):.3f}"
    row = found["Prediction and measurement, nats per token: reference on sampled"][1]
    assert row["Bits: share of weights"] == "2: 25.0 %, 10: 75.0 %"
    assert row["Rise predicted"] == "+0.00781"
    peers = {r["Method"]: r for r in found["The smallest market file that is as good: reference on sampled"]}
    assert peers["gptq4-g128"]["Market at no more loss"] == "market-coded-3_0"
    assert peers["nash"]["Market at no more loss"] == "market-coded-2_0"
    assert peers["gptq4-g128"]["Bits saved"] == "+1.271"
    assert peers["my_own"]["Market at no more loss"] == "none of this run"


def test_the_market_against_the_field(tmp_path: Path) -> None:
    text = write(tmp_path, with_blocks(fake()))["report.md"].decode()
    rows = {
        (r["Baseline"], r["Best market of no more bytes"]): r
        for r in tables(text)["The market against the field at equal or smaller true size: reference on sampled"]
    }
    assert set(rows) == {
        (baseline, market)
        for baseline in ("rtn4-g64", "gptq4-g128")
        for market in ("market-coded-3_0", "market-tiles-3_25")
    }
    row = rows["gptq4-g128", "market-coded-3_0"]
    assert (row["Bits"], row["Its bits"]) == ("4.270", "2.999")
    assert (row["Rise, nats"], row["Its rise"], row["Difference"]) == ("+0.00760", "+0.00710", "-0.00050")
    assert (row["Ratio of rises"], row["The market is"]) == ("0.934", "better")
    low, high = (float(v) for v in row["Paired 95 % interval"].strip("[]").split(", "))
    assert low <= -0.0005 <= high < 0
    assert rows["gptq4-g128", "market-tiles-3_25"]["The market is"] == "worse"
    assert "in place of an interval" not in text


def test_a_difference_within_its_interval_is_not_resolved(tmp_path: Path) -> None:
    metrics = with_blocks(fake(methods=["rtn4-g64", "market-coded-3_0"]))
    blocks = metrics["reference", "rtn4-g64"]["quality"]["sampled"]["window_blocks"]
    blocks["rises"] = [v + (90 if i % 2 else -90) for i, v in enumerate(blocks["rises"])]
    (row,) = field_rows(write(tmp_path, metrics))
    assert row["The market is"] == "not resolved"


def test_equal_blocks_are_equal(tmp_path: Path) -> None:
    metrics = with_blocks(fake(methods=["rtn4-g64", "market-coded-3_0"]))
    one, two = (metrics["reference", m]["quality"]["sampled"] for m in ("rtn4-g64", "market-coded-3_0"))
    one.update(copy.deepcopy(two))
    assert field_rows(write(tmp_path, metrics))[0]["The market is"] == "equal"


def test_the_field_without_blocks_has_no_intervals(written: dict[str, bytes]) -> None:
    rows = field_rows(written)
    assert len(rows) == 4
    assert {(row["Paired 95 % interval"], row["The market is"]) for row in rows} == {("–", "–")}
    assert "in place of an interval: the metrics of one of the two lack sums" in written["report.md"].decode()


def test_the_field_is_left_out_without_a_market(tmp_path: Path) -> None:
    text = write(tmp_path, with_blocks(fake(methods=["fp32", "rtn4-g64", "gptq4-g128"])))["report.md"].decode()
    assert "against the field" not in text
    metrics = fake(methods=["rtn4-g64", "market-tiles-3_25"])
    metrics["reference", "market-tiles-3_25"]["size"]["file_bytes"] *= 2
    (row,) = field_rows(write(tmp_path, metrics))
    assert (row["Best market of no more bytes"], row["Its bits"], row["The market is"]) == (
        "none of market-tiles",
        "–",
        "–",
    )


def field_rows(found: Mapping[str, bytes]) -> list[dict[str, str]]:
    captions = tables(found["report.md"].decode())
    return captions["The market against the field at equal or smaller true size: reference on sampled"]


def test_acceptance_is_shown_where_there_is_one(tmp_path: Path, written: dict[str, bytes]) -> None:
    caption = "Mixed widths against uniform ones on the validation text, nats per token: reference"
    assert caption not in tables(written["report.md"].decode())
    metrics = fake()
    metrics["reference", "market-tiles-3_25"]["allocation"]["acceptance"] = {
        "uniform": "gptq3-g128",
        "validation_rise": 0.095,
        "uniform_validation_rise": 0.13,
        "accepted": True,
    }
    metrics["reference", "market-coded-3_0"]["allocation"]["acceptance"] = {"accepted": False}
    rows = tables(write(tmp_path, metrics)["report.md"].decode())[caption]
    assert [list(row.values()) for row in rows] == [
        ["market-coded-3_0", "–", "–", "–", "no"],
        ["market-tiles-3_25", "gptq3-g128", "+0.09500", "+0.13000", "yes"],
    ]


def test_a_market_that_fell_back_to_uniform_widths_has_no_price_but_all_the_rest(tmp_path: Path) -> None:
    metrics = with_tensors(with_blocks(fake(methods=["rtn4-g64", "market-tiles-3_25"])))
    allocation = metrics["reference", "market-tiles-3_25"]["allocation"]
    allocation |= {"price": None, "acceptance": {"uniform": "3", "accepted": False}}
    found = write(tmp_path, metrics)
    captions = tables(found["report.md"].decode())
    assert [row["The market is"] for row in field_rows(found)] == ["worse"]
    assert [row["Accepted?"] for caption, rows in captions.items() if "Mixed widths" in caption for row in rows] == [
        "no"
    ]
    assert not [caption for caption in captions if caption.startswith("Certificates")]
    assert "bits-reference-market-tiles-3_25.png" in found


# --- maps of bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("llama", [False, True])
def test_every_market_has_a_map_of_its_bits(llama: bool, tmp_path: Path) -> None:
    kinds = LLAMA_KINDS if llama else GPT2_KINDS
    found = write(tmp_path, with_tensors(fake(), kinds, llama))
    markets = [m for m in METHODS if m.startswith("market")]
    assert {name for name in found if name.startswith("bits-")} == {f"bits-reference-{m}.png" for m in markets}
    assert all(found[f"bits-reference-{m}.png"].startswith(b"\x89PNG") for m in markets)
    text = found["report.md"].decode()
    first = "q" if llama else "q, k, v"
    assert (
        "What market-coded-3_0 bought for each matrix of reference, in true bits per weight: embeddings and head "
        f"above, layers below, one colour scale for all methods. Within the layers from 3.00 ({first} of "
        f"layer 0) to 3.50 ({first} of layer 2)."
    ) in text


def test_maps_are_left_out_where_metrics_lack_them(tmp_path: Path, written: dict[str, bytes]) -> None:
    assert not [name for name in written if name.startswith("bits-")]
    metrics = with_tensors(fake())
    metrics["reference", "market-coded-2_0"]["allocation"]["tensors"] = []
    del metrics["reference", "market-coded-3_0"]["allocation"]["tensors"]
    found = write(tmp_path, metrics)
    assert [name for name in found if name.startswith("bits-")] == ["bits-reference-market-tiles-3_25.png"]


def test_no_market_no_map(tmp_path: Path) -> None:
    found = write(tmp_path, with_tensors(fake(methods=["fp32", "rtn4-g64"])))
    assert not [name for name in found if name.startswith("bits-")]


@pytest.mark.parametrize(
    "rows",
    [
        [["wte.weight", "embedding", None, 4, 3.0]],
        [["h.0.mlp.c_fc.weight", "mlp", 0, 4, 32.0], ["h.3.attn.c_attn.weight", "attention", 3, 4, 2.0]],
        [[f"h.{i}.mlp.c_fc.weight", "mlp", i, 4, 2.0] for i in range(60)],
    ],
)
def test_odd_maps(rows: list[list[Any]], tmp_path: Path) -> None:
    """No layers; kept matrices, holes in the grid and missing layers; many layers of equal bits, none outside."""
    metrics = fake(methods=["market-coded-3_0"])
    metrics["reference", "market-coded-3_0"]["allocation"]["tensors"] = rows
    assert "bits-reference-market-coded-3_0.png" in write(tmp_path, metrics)


def test_a_map_shows_every_number_in_its_place() -> None:
    cells = {(0, "q"): 2.0, (2, "q"): 3.456, (2, "MLP up"): 9.0}
    figure = drawn(figures.bit_map, BitMap((0, 2), ("q", "MLP up"), cells, {"wte": 4.5}), "a title", (2.0, 8.0), 60)
    strip, grid, bar = figure.axes
    assert [text.get_text() for text in strip.texts] == ["wte  4.50"]
    places = {text.get_position(): text.get_text() for text in grid.texts}
    assert places == {(0.5, 0.5): "2.00", (0.5, 1.5): "3.46", (1.5, 1.5): "9.00"}
    assert [text.get_text() for text in grid.get_xticklabels()] == ["q", "MLP up"]
    assert [text.get_text() for text in grid.get_yticklabels()] == ["0", "2"]
    assert grid.get_ylim() == (2, 0), "the first layer is on top"
    assert bar.get_xlabel() == "true bits per weight"
    assert figure.get_suptitle() == "a title"


def test_layers_set_one_scale_for_all_maps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the least of market-coded-2_0 to the most of market-tiles-3_25; embeddings, one bit above, do not count."""
    limits, draw = [], figures.bit_map
    monkeypatch.setattr(
        figures, "bit_map", lambda of, name, ends, dpi: limits.append(ends) or draw(of, name, ends, dpi)
    )
    metrics = with_tensors(fake())
    write(tmp_path / "a", metrics)
    assert set(limits) == {(1.999, 3.749)}
    assert len(limits) == 3
    metrics["reference", "market-tiles-3_25"]["allocation"]["tensors"][2][4] = 32.0
    write(tmp_path / "b", metrics)
    assert limits[-1] == (1.999, report.DEEPEST)


def drawn(draw: Callable[..., bytes], *arguments: Any) -> Any:
    """The figure that a drawing function makes, before it becomes a PNG."""
    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_png", lambda canvas, dpi: kept.append(canvas.figure) or b"")
        draw(*arguments)
    return kept[0]


@pytest.mark.parametrize("luminance", [0.0, figures.EVEN, 1.0])
def test_letters_can_be_read_on_every_ground(luminance: float) -> None:
    """The chosen ink has a contrast of at least 3.9 to 1 (WCAG 2), whatever the ground."""
    ink = [int(figures.INK[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    dark = (luminance + 0.05) / (figures._luminance(ink) + 0.05)
    assert (dark if luminance > figures.EVEN else 1.05 / (luminance + 0.05)) > 3.9


# --- the headline --------------------------------------------------------------------------------------------------


def test_first_line_is_the_market_at_three_bits(written: dict[str, bytes]) -> None:
    first = written["report.md"].decode().split("\n")[0]
    assert first == (
        "# Over all weights at 3.00 true bits per weight (90.6 % smaller than fp32), "
        "the loss rises by 0.18 % [+0.17, +0.19] on sampled"
    )


def test_first_line_without_a_market_is_the_papers_true_cost(tmp_path: Path) -> None:
    first, more = report.headline(
        report.Run(fake(methods=["fp32", "paper-nash"]), ["reference"], ["paper-nash"], ["sampled"])
    )
    assert first.startswith("The paper's mix claims 2.99 bits per weight and really takes 13.40 over the whole model")
    assert "the loss rises by 5.00 % [+4.99, +5.01] on sampled" in first
    assert "4.17 bits per weight" in more


def test_a_market_above_three_bits_is_no_headline() -> None:
    metrics = fake(methods=["market-coded-3_0"])
    metrics["reference", "market-coded-3_0"]["size"]["bits_per_weight"] = 3.0001
    assert paper.at_three_bits({"market-coded-3_0": metrics["reference", "market-coded-3_0"]}) is None


@pytest.mark.parametrize(
    ("bits", "best"),
    [
        ({"market-coded-2_0": 2.0, "market-coded-3_0": 2.99, "market-coded-2_5": 2.5}, "market-coded-3_0"),
        ({"market-coded-3_25": 3.25, "market-coded-2_0": 2.0, "market-coded-2_5": 2.5}, "market-coded-2_5"),
        ({"market-coded-2_0": 2.0, "market-tiles-3_0": 2.99}, "market-coded-2_0"),  # the headline is the coded format's
        ({"market-coded-3_25": 3.25, "market-tiles-2_25": 2.25, "market-tiles-3_0": 2.99}, "market-tiles-3_0"),
        ({"market-coded-b": 3.0, "market-coded-a": 3.0}, "market-coded-a"),
        ({"market-tiles-3_25": 3.25, "rtn2-g64": 2.6}, None),
    ],
)
def test_the_headline_is_the_market_nearest_below_three_bits(bits: Mapping[str, float], best: str | None) -> None:
    assert paper.at_three_bits({m: {"size": {"bits_per_weight": b}} for m, b in bits.items()}) == best


def test_a_falling_loss_falls() -> None:
    metrics = fake(methods=["market-coded-3_0"])
    metrics["reference", "market-coded-3_0"]["quality"]["sampled"] = quality(-0.004)
    first, _ = report.headline(report.Run(metrics, ["reference"], ["market-coded-3_0"], ["sampled"]))
    assert "the loss falls by 0.10 % [-0.11, -0.088]" in first


# --- the verdicts --------------------------------------------------------------------------------------------------


def judged(metrics: Mapping[tuple[str, str], Mapping[str, Any]], words: str) -> list[str]:
    found = [v.verdict for v in paper.verdicts(metrics, ["sampled"]) if words in v.claim]
    assert found, words
    return found


@pytest.mark.parametrize(("bits", "verdict"), [(2.99, paper.HOLDS), (3.0, paper.HOLDS), (3.01, paper.FAILS)])
def test_three_bits_are_judged_by_the_file(bits: float, verdict: str) -> None:
    metrics = fake(methods=["nash"])
    metrics["reference", "nash"]["size"]["bits_per_weight"] = bits
    assert judged(metrics, "3.0 bits per weight, 90.6") == [verdict]


@pytest.mark.parametrize(
    ("rise", "spread", "verdict"),
    [(0.02, 0.001, paper.HOLDS), (0.08, 0.001, paper.FAILS), (0.04, 0.01, paper.OPEN), (-0.01, 0.001, paper.HOLDS)],
)
def test_nearness_over_all_weights_needs_the_whole_interval(rise: float, spread: float, verdict: str) -> None:
    metrics = fake(methods=["nash"])
    metrics["reference", "nash"]["quality"]["sampled"] = quality(rise, spread)
    assert judged(metrics, "if all weights take part") == [verdict]


@pytest.mark.parametrize(
    ("mix_bits", "mix_rise", "spread", "verdict"),
    [
        (3.9, 0.1, 0.01, paper.HOLDS),
        (4.19, 0.1, 0.01, paper.FAILS),  # better, but larger
        (3.9, 3.0, 0.01, paper.FAILS),  # smaller, but worse
        (3.9, 1.9, 0.5, paper.OPEN),  # smaller, intervals overlap
    ],
)
def test_better_than_uniform_means_smaller_too(mix_bits: float, mix_rise: float, spread: float, verdict: str) -> None:
    metrics = fake(methods=["uniform4", "nash"])
    metrics["reference", "nash"]["size"]["bits_per_weight"] = mix_bits
    metrics["reference", "nash"]["quality"]["sampled"] = quality(mix_rise, spread)
    assert judged(metrics, "in true bytes over all weights") == [verdict]


def test_better_than_uniform_by_the_papers_accounting() -> None:
    metrics = fake(methods=["paper-uniform4", "paper-nash"])
    assert judged(metrics, "protocol and accounting") == [paper.HOLDS]
    counts = metrics["reference", "paper-nash"]["paper"]["sampled"]["by_count"]
    counts["20"]["delta_loss_percent"] = 99.0
    assert judged(metrics, "protocol and accounting") == [paper.OPEN]  # the sample counts disagree
    counts["50"]["delta_loss_percent"] = 99.0
    assert judged(metrics, "protocol and accounting") == [paper.FAILS]


@pytest.mark.parametrize(
    ("rises", "verdict"), [((0.18, 0.41), paper.HOLDS), ((0.77, 1.3), paper.OPEN), ((1.06, 1.57), paper.FAILS)]
)
def test_nearness_by_the_papers_protocol_needs_all_counts(rises: Sequence[float], verdict: str) -> None:
    metrics = fake(methods=["paper-nash"])
    counts = metrics["reference", "paper-nash"]["paper"]["sampled"]["by_count"]
    for row, value in zip(counts.values(), rises, strict=True):
        row["delta_loss_percent"] = value
    assert judged(metrics, "by the paper's own protocol") == [verdict]


def test_the_papers_few_texts_are_said_to_resolve_nothing() -> None:
    metrics = fake(methods=["paper-uniform4"])
    rows = metrics["reference", "paper-uniform4"]["paper"]["sampled"]["by_count"]
    rows["20"] |= {"delta_loss_percent": -0.74, "delta_loss_percent_ci95": [-3.1, 1.62], "resolved": False}
    rows["50"] |= {"delta_loss_percent": -0.66, "delta_loss_percent_ci95": [-1.2, -0.12], "resolved": True}
    (found,) = [v for v in paper.verdicts(metrics, ["sampled"]) if "regularization" in v.claim]
    assert "-0.74 % [-3.10, +1.62] at N = 20 (not resolved), -0.66 % [-1.20, -0.12] at 50" in found.why


@pytest.mark.parametrize(
    ("method", "words"),
    [("nash", "if all weights take part"), ("paper-uniform4", "regularization"), ("market-coded-3_0", "market")],
)
def test_a_single_block_decides_nothing(method: str, words: str) -> None:
    metrics = fake(methods=[method])
    metrics["reference", method]["quality"]["sampled"] = quality(-0.03, 0.0) | {"resolved": False}
    assert judged(metrics, words) == [paper.OPEN]


def test_the_papers_numbers_are_quoted_on_its_own_corpus() -> None:
    found = paper.verdicts(fake(["gpt2"], ["paper-nash"], ["wikitext2", "mine"]), ["wikitext2", "mine"])
    quoting = [v.corpus for v in found if "the paper prints +0.77 % at N = 20, +0.12 % at 50" in v.why]
    assert quoting == ["wikitext2"]


@pytest.mark.parametrize(("rise", "verdict"), [(-0.03, paper.HOLDS), (0.03, paper.FAILS), (-0.0003, paper.OPEN)])
def test_regularization_must_be_resolved(rise: float, verdict: str) -> None:
    metrics = fake(methods=["paper-uniform4"])
    metrics["reference", "paper-uniform4"]["quality"]["sampled"] = quality(rise)
    assert judged(metrics, "regularization") == [verdict]


@pytest.mark.parametrize(("rise", "verdict"), [(0.005, paper.HOLDS), (0.0072, paper.OPEN), (0.01, paper.FAILS)])
def test_the_headline_made_true(rise: float, verdict: str) -> None:
    metrics = fake(methods=["market-coded-3_0"])
    metrics["reference", "market-coded-3_0"]["quality"]["sampled"] = quality(rise)
    assert judged(metrics, "This project's market") == [verdict]


def test_what_was_not_run_is_not_judged() -> None:
    found = paper.verdicts(fake(methods=["rtn4-g64"]), ["sampled"])
    assert {v.verdict for v in found} == {paper.OPEN}
    assert {v.model for v in found} == {"reference", "gpt2-xl", "gpt2", "all"}
    assert judged(fake(), "0.93 times") == [paper.OPEN]
    assert not [v for v in paper.verdicts(fake(["gpt2", "gpt2-xl"]), ["sampled"]) if "not among" in v.why]


# --- what may be missing or many -----------------------------------------------------------------------------------


def test_fp32_may_be_missing(tmp_path: Path) -> None:
    found = write(tmp_path, fake(methods=[m for m in METHODS if m != "fp32"]))
    rows = tables(found["report.md"].decode())["Size: reference"]
    assert [row["Method"] for row in rows] == [m for m in METHODS if m != "fp32"]


@pytest.mark.parametrize("methods", [["fp32"], ["my_own"], ["fp32", "rtn4-g64"]])
def test_few_methods_make_a_report(methods: list[str], tmp_path: Path) -> None:
    assert b"How to read it" in write(tmp_path, fake(methods=methods))["report.md"]


def test_two_corpora_and_two_models(tmp_path: Path) -> None:
    corpora = ["sampled", "wikitext2"]
    found = write(tmp_path, fake(["reference", "gpt2"], ["fp32", "paper-nash", "market-coded-3_0"], corpora), corpora)
    captions = tables(found["report.md"].decode())
    for model in ("reference", "gpt2"):
        assert f"bytes-{model}.png" in found
        for corpus in corpora:
            assert f"Quality: {model} on {corpus}" in captions
            assert f"frontier-{model}-{corpus}.png" in found


def test_console_table() -> None:
    text = report.console_table(fake(corpora=["a", "b"]), ["reference"], list(METHODS), ["a", "b"])
    assert text.startswith("Over all weights at 3.00 true bits")
    assert "reference on a" in text
    assert "reference on b" in text
    line = next(x for x in text.split("\n") if x.startswith("market-coded-3_0"))
    assert re.sub(r" +", " ", line) == "market-coded-3_0 2.999 2.860 +0.18 % [+0.17, +0.19] resolved 0.00781"
    assert text.isascii()
    assert max(map(len, text.split("\n"))) <= 120


@pytest.mark.parametrize(
    ("method", "prefix"),
    [
        ("paper-nash", "paper-"),
        ("nash", "uniform"),
        ("rtn2-g64", "rtn"),
        ("gptq4-g128", "gptq"),
        ("market-coded-3_0", "market-coded"),
        ("market-tiles-2_5", "market-tiles"),
        ("market-else", ""),
        ("my_own", ""),
    ],
)
def test_families(method: str, prefix: str) -> None:
    assert figures.family(method) == prefix


@pytest.mark.parametrize("rises", [[], [0.0], [-0.1, -0.2], [1e-9, 10.0]])
def test_figures_of_odd_values(rises: list[float]) -> None:
    points = [figures.Point(f"m{i}", 2.0 + i, v, (v - 0.1, v + 0.1)) for i, v in enumerate(rises)]
    assert figures.frontier(points, "rise", 40).startswith(b"\x89PNG")


def test_the_flat_table_holds_the_metrics(written: dict[str, bytes]) -> None:
    import pandas as pd

    frame = pd.read_csv(io.BytesIO(written["results.csv"])).set_index("method")
    assert set(frame.index) == set(METHODS)
    for method, (bits, _, rise, _) in METHODS.items():
        assert frame.loc[method, "size.bits_per_weight"] == pytest.approx(bits, rel=1e-4)
        column = next(c for c in frame.columns if c.startswith("quality.") and c.endswith(".delta_loss"))
        assert frame.loc[method, column] == pytest.approx(rise)


def test_the_flat_table_has_one_number_in_a_cell(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.read_csv(io.BytesIO(write(tmp_path, with_tensors(with_blocks(fake())))["results.csv"]))
    assert not [c for c in frame.columns if "tensors" in c or "window_blocks" in c]


def test_crowded_points_are_all_named() -> None:
    """Seventeen methods as the embedded model has them: every name stands in the figure, none over another."""
    crowd = {
        **{
            "paper-uniform4": (14.3, 0.157),
            "paper-nash": (14.34, 0.107),
            "uniform4": (4.06, 0.8),
            "nash": (4.22, 0.31),
        },
        **{"rtn4-g64": (4.37, 0.07), "rtn3-g64": (3.51, 0.247), "rtn2-g64": (2.62, 2.3), "gptq4-g128": (4.24, 0.0485)},
        **{"gptq3-g128": (3.39, 0.134), "gptq2-g64": (2.66, 0.72), "market-coded-2_0": (2.0, 0.383)},
        **{"market-coded-2_5": (2.5, 0.143), "market-coded-3_0": (2.999, 0.058), "market-tiles-2_25": (2.25, 0.65)},
        **{"market-tiles-3_25": (3.25, 0.093)},
    }
    points = [
        figures.Point(m, b, v, (0.9 * v, 1.1 * v), 3.0 if m == "paper-nash" else None) for m, (b, v) in crowd.items()
    ]
    figure = drawn(figures.frontier, points, "rise", 100)
    (axes,) = figure.axes
    boxes = {text.get_text(): figures._extent(text, figure.canvas) for text in axes.texts}
    assert boxes.keys() == {m.removeprefix("market-") for m in crowd}
    pairs = [(a, b) for a in boxes for b in boxes if a < b]
    assert not [(a, b) for a, b in pairs if boxes[a].overlaps(boxes[b])]
    joined = {line.get_label() for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1}
    assert joined == {figures.FAMILIES[f][0] for f in ("rtn", "gptq", "market-coded", "market-tiles")}
    assert axes.get_yscale() == "log"
