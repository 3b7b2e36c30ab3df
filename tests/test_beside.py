"""Other tools in the report: which measurements may stand together, what is said of them, and the same bytes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_report import fake, tables, with_blocks

from nashswarm import beside, figures, report
from nashswarm.comparison import Rival, rivals

OURS = ("fp32", "rtn4-g64", "market-coded-2_0", "market-coded-3_0")


def peer(bits: float, rise: float, tool: str = "hqq", **changes: Any) -> dict[str, Any]:
    """Metrics as evaluate_peer writes them, on the same texts as `fake`'s."""
    made = copy.deepcopy(with_blocks(fake(methods=["rtn4-g64"]))["reference", "rtn4-g64"])
    size = round(8_000_000 * bits / 8)
    made["size"] |= {"file_bytes": size, "bits_per_weight": bits}
    quality = made["quality"]["sampled"]
    base = quality["loss"] - quality["delta_loss"]
    quality |= {"loss": base + rise, "delta_loss": rise, "delta_loss_ci95": [rise - 0.001, rise + 0.001]}
    quality |= {"delta_loss_percent": 100 * rise / base, "resolved": True, "kl_mean": rise}
    quality["window_blocks"] = {
        "rises": [1989 * rise * (1 + (i % 5 - 2) / 20) for i in range(30)],
        "targets": [1989] * 30,
    }
    made["allocation"] = {}
    made["peer"] = {"tool": tool, "settings": {}, "version": "1.2", "notes": ["turned"], "reason": None, "original": {}}
    quality |= changes
    return made


def not_run(reason: str) -> dict[str, Any]:
    return {"peer": {"tool": "hqq", "settings": {}, "version": None, "notes": [], "reason": reason, "original": {}}}


def own() -> dict[str, Mapping[str, Any]]:
    return {method: d for (_, method), d in with_blocks(fake(methods=OURS)).items()}


def shown(**peers: Any) -> beside.Shown:
    return beside.shown(own(), {}, peers, ["sampled"])


def run(**peers: Any) -> report.Run:
    metrics = with_blocks(fake(methods=OURS))
    tracked = {("reference", name): document for name, document in peers.items()}
    return report.Run(metrics, ["reference"], list(OURS), ["sampled"], peers=tracked)


def test_only_what_was_measured_alike_is_shown() -> None:
    found = shown(
        good=peer(3.5, 0.2),
        absent=None,
        failed=not_run("no luck"),
        original=peer(3.5, 0.2, loss=9.0),
        text=peer(3.5, 0.2, tokens=7),
    )
    assert list(found.peers) == ["good"]
    assert list(found.ours) == ["market-coded-2_0", "market-coded-3_0"]
    assert found.not_run == {"failed": "no luck"}
    assert found.left_out["absent"] == "not measured on this model"
    assert found.left_out["original"].startswith("measured on another original, whose loss on sampled is 8.8000; 4.0")
    assert found.left_out["text"] == "measured on another sampled: 7 tokens, 59,800 here"
    other = beside.shown(own(), {}, {"good": peer(3.5, 0.2)}, ["sampled", "wikitext2"])
    assert other.left_out == {"good": "not measured on wikitext2"}


def test_late_digits_are_no_other_original() -> None:
    quality = peer(3.5, 0.2)["quality"]["sampled"]
    assert list(shown(good=peer(3.5, 0.2, loss=quality["loss"] * (1 + 5e-6))).peers) == ["good"]


def test_further_methods_of_ours_stand_beside() -> None:
    extra = peer(2.5, 0.01)
    del extra["peer"]
    found = beside.shown(
        own(), {"market-coded-2_5": extra, "market-coded-9_0": None}, {"good": peer(3.5, 0.2)}, ["sampled"]
    )
    assert list(found.ours) == ["market-coded-2_0", "market-coded-3_0", "market-coded-2_5"]
    assert found.left_out == {"market-coded-9_0": "not measured on this model"}


def test_a_rival_is_the_best_of_no_more_bytes() -> None:
    ours = {m: d for m, d in own().items() if m.startswith("market")}
    peers = {"small": peer(1.5, 0.9), "large": peer(3.5, 0.2), "good": peer(2.5, 0.001), "same": peer(1.999, 0.05)}
    found = {r.peer: r for r in rivals(ours, peers, "sampled", 2000, 0)}
    assert list(found) == ["large", "good", "same", "small"]
    assert (found["small"].ours, found["small"].verdict) == (None, "none is that small")
    assert (found["large"].ours, found["large"].verdict) == ("market-coded-3_0", "below")
    assert (found["good"].ours, found["good"].verdict) == ("market-coded-2_0", "above")
    assert found["same"].verdict == "equal"
    assert Rival("x", 3.0, "market").verdict == "not resolved"


def test_the_verdict_names_where_not() -> None:
    ours = shown(a=peer(3.5, 0.2)).ours

    def said(**peers: Any) -> str:
        return beside.verdict(rivals(ours, peers, "sampled", 2000, 0), "reference", "sampled")

    good, outside = peer(3.5, 0.2), peer(6.0, 0.0001)
    assert said(a=good, b=outside).startswith("Ours is below every peer of equal or larger true size from 2 to 4.5")
    assert "each of the 1, and each paired 95 % interval excludes 0. 1 more lies outside" in said(a=good, b=outside)
    assert "of 2, not below b (2.500 bits: above)." in said(a=good, b=peer(2.5, 0.001))
    assert said(b=outside) == "No peer lies from 2 to 4.5 true bits per weight, reference on sampled."


def test_the_report_has_table_figure_and_reasons(tmp_path: Path) -> None:
    report.write(tmp_path, run(first=peer(3.5, 0.2), second=not_run("no luck"), third=None), 40)
    text = (tmp_path / "report.md").read_text()
    (row,) = tables(text)["Other tools, and ours at equal or smaller true size: reference on sampled"]
    assert (row["Peer"], row["Tool and version"], row["True bits"]) == ("first", "hqq 1.2", "3.500")
    assert (row["Rise, nats"], row["Ours, no more bytes"], row["Ours is"]) == ("+0.20000", "market-coded-3_0", "below")
    assert "- first: turned." in text
    assert "- second: no luck" in text
    assert "Left out for reference, not measured on this model: third." in text
    assert (tmp_path / "peers-reference-sampled.png").read_bytes().startswith(b"\x89PNG")
    assert "Other tools, and ours" in (tmp_path / "tables.tex").read_text()
    assert "first" in (tmp_path / "results.csv").read_text()
    report.write(tmp_path / "again", run(first=peer(3.5, 0.2), second=not_run("no luck"), third=None), 40)
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_without_peers_nothing_is_said(tmp_path: Path) -> None:
    report.write(tmp_path, run(), 40)
    assert "Beside other tools" not in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("peers-*"))
    assert report.peers_table(run()) == ""


def test_the_console_has_peers_and_reasons() -> None:
    table = report.peers_table(run(first=peer(3.5, 0.2), second=not_run("no luck")))
    assert ["first", "3.500", "+5.00"] in [line.split()[:3] for line in table.splitlines()]
    assert "market-coded-3_0" in table
    assert table.endswith("reference, not run: second: no luck")


@pytest.mark.parametrize("tool", ["hqq", "quanto", "auto_round", "gptqmodel", "llama_cpp", "another"])
def test_every_tool_has_a_style(tool: str) -> None:
    title, colour, marker = figures.style(figures.Point("gptqmodel-4", 3.0, 0.1, tool=tool))
    assert title
    assert colour.startswith("#")
    assert marker
    assert figures.style(figures.Point("gptq4", 3.0, 0.1)) == figures.FAMILIES["gptq"]
