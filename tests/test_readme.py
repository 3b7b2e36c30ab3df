"""The README's numbers are the metrics' numbers."""

from __future__ import annotations

import re
from pathlib import Path

from nashswarm import artifacts, report
from nashswarm.config import load_params

PROJECT = Path(__file__).parents[1]


def committed_table() -> str:
    layout = artifacts.Layout(PROJECT)
    active = load_params(layout.params).active
    pairs = [(model, method) for model in active.models for method in active.methods]
    metrics = {pair: artifacts.read_json(layout.metrics(*pair)) for pair in pairs}
    return report.console_table(metrics, active.models, active.methods, active.corpora)


def readme_table() -> str:
    found = re.search(r"<!-- table:.*?-->\n```text\n(.*?)\n```", (PROJECT / "README.md").read_text(), re.DOTALL)
    assert found, "README.md has lost its result table"
    return found[1]


def test_the_table_is_that_of_the_metrics() -> None:
    assert readme_table().strip() == committed_table().strip()
