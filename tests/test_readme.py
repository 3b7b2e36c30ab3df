"""The README's numbers are the metrics' numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nashswarm import artifacts, report
from nashswarm.config import load_params

PROJECT = Path(__file__).parents[1]


def committed_tables() -> dict[str, str]:
    layout = artifacts.Layout(PROJECT)
    params = load_params(layout.params)
    active, shown, settings = params.active, params.report, params.evaluation
    run = report.gather(layout, active, shown.peers, shown.methods, settings.resamples, settings.seed)
    table = report.console_table(run.metrics, active.models, active.methods, active.corpora)
    return {"table": table, "peers": report.peers_table(run)}


def readme_table(name: str) -> str:
    found = re.search(rf"<!-- {name}:.*?-->\n```text\n(.*?)\n```", (PROJECT / "README.md").read_text(), re.DOTALL)
    assert found, f"README.md has lost its table '{name}'"
    return found[1]


@pytest.mark.parametrize("name", ["table", "peers"])
def test_the_table_is_that_of_the_metrics(name: str) -> None:
    assert readme_table(name).strip() == committed_tables()[name].strip()
