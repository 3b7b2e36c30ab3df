"""The README's numbers are the metrics' numbers."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nashswarm import artifacts, paper, report
from nashswarm.config import load_params

PROJECT = Path(__file__).parents[1]


def committed_run() -> tuple[report.Run, int]:
    """What metrics/ and params.yaml hold, and the resolution of figures."""
    layout = artifacts.Layout(PROJECT)
    params = load_params(layout.params)
    shown, settings = params.report, params.evaluation
    run = report.gather(layout, params.active, shown.peers, shown.methods, settings.resamples, settings.seed)
    return run, shown.dpi


def committed_tables() -> dict[str, str]:
    run, _ = committed_run()
    table = report.console_table(run.metrics, run.models, run.methods, run.corpora)
    return {"table": table, "peers": report.peers_table(run)}


def readme_table(name: str) -> str:
    found = re.search(rf"<!-- {name}:.*?-->\n```text\n(.*?)\n```", (PROJECT / "README.md").read_text(), re.DOTALL)
    assert found, f"README.md has lost its table '{name}'"
    return found[1]


@pytest.mark.parametrize("name", ["table", "peers"])
def test_the_table_is_that_of_the_metrics(name: str) -> None:
    assert readme_table(name).strip() == committed_tables()[name].strip()


def said(pattern: str) -> list[float]:
    """The numbers that README's prose gives in the place of a pattern's groups, whatever its lines."""
    found = re.search(pattern, re.sub(r"\s+", " ", (PROJECT / "README.md").read_text()))
    assert found, f"README.md no longer says '{pattern}': take it out here, or say it again"
    return [float(number) for number in found.groups()]


def figures(method: str) -> dict[str, Any]:
    return dict(artifacts.read_json(artifacts.Layout(PROJECT).metrics("reference", method)))


def test_prose_gives_the_size_of_the_original() -> None:
    millions, mib = said(r"reference model: ([\d.]+) M parameters, (\d+) MiB as fp32")
    size = figures("fp32")["size"]
    assert round(size["file_bytes"] / 2**20) == mib
    assert round(8e-6 * size["file_bytes"] / size["bits_per_weight"], 1) == millions
    again, smaller = said(r"claims for GPT-2 XL, on a model of ([\d.]+) M parameters"), said(r"\(([\d.]+) % smaller")
    assert again == [millions]
    assert smaller == [round(100 * figures("market-coded-3_0")["size"]["compression"], 1)]


def test_prose_gives_what_the_papers_methods_claim() -> None:
    mixed, uniform = said(r"they claim ([\d.]+) or ([\d.]+) bits per weight, for these weights alone")
    claims = {m: figures(m)["size"]["claimed_bits_per_weight"] for m in ("paper-nash", "paper-swarm", "paper-uniform4")}
    assert {round(claims[m], 1) for m in ("paper-nash", "paper-swarm")} == {mixed}
    assert claims["paper-uniform4"] == uniform


def test_prose_gives_how_far_the_market_is_from_the_papers_headline() -> None:
    bits, claimed = said(r"at ([\d.]+) bits `market-coded` loses six times the \+([\d.]+) % that the paper claims")
    found = figures("market-coded-3_0")
    assert round(found["size"]["bits_per_weight"], 1) == bits
    assert claimed == paper.HEADLINE_PERCENT
    assert round(found["quality"]["sampled"]["delta_loss_percent"] / claimed) == 6


def test_prose_gives_what_training_all_codes_leaves() -> None:
    three, two = said(r"Packed on an H100, these rise by ([\d.]+) % at 3\.0 bits and ([\d.]+) % at 2\.5")
    found = [figures(f"market-coded-{budget}-tuned") for budget in ("3_0", "2_5")]
    assert [round(f["quality"]["sampled"]["delta_loss_percent"], 2) for f in found] == [three, two]
    assert [f["size"]["bits_per_weight"] <= budget for f, budget in zip(found, (3.0, 2.5), strict=True)] == [True, True]


def test_prose_gives_the_baselines_true_bits() -> None:
    four, three = said(r"GPTQ's [\d.]+ at ([\d.]+) and [\d.]+ at 2\.5 beside [\d.]+ at ([\d.]+), but")
    assert [round(figures(m)["size"]["bits_per_weight"], 2) for m in ("gptq4-g128", "gptq3-g128")] == [four, three]


@pytest.mark.parametrize(
    ("image", "name"), [("frontier", "frontier-reference-sampled"), ("peers", "peers-reference-sampled")]
)
def test_the_picture_is_that_of_the_metrics(image: str, name: str, pictures: dict[str, bytes]) -> None:
    """Pixel by pixel, but for the edges of letters, which another build of the font renderer may draw otherwise."""
    ours, shown = (
        np.asarray(Image.open(source).convert("L"), float)
        for source in (io.BytesIO(pictures[f"{name}.png"]), PROJECT / f"docs/{image}.png")
    )
    assert ours.shape == shown.shape
    assert np.abs(ours - shown).mean() < 0.1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    run, dpi = committed_run()
    target = tmp_path_factory.mktemp("report")
    report.write(target, run, dpi)
    return {path.name: path.read_bytes() for path in target.glob("*.png")}
