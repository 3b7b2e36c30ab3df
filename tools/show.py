"""Print the result table of the active models and methods, and where the report lies."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from nashswarm import artifacts, report
from nashswarm.config import load_params
from nashswarm.types import NashSwarmError


def main() -> None:
    """Read params.yaml and metrics/, print."""
    layout = artifacts.Layout()
    active = load_params(layout.params).active
    pairs = [(model, method) for model in active.models for method in active.methods]
    metrics = {pair: artifacts.read_json(layout.metrics(*pair)) for pair in pairs}
    print(report.console_table(metrics, active.models, active.methods, active.corpora))
    print(f"\nThe report: {layout.report / 'report.html'} (also report.md, tables.tex)")


if __name__ == "__main__":
    try:
        main()
    except NashSwarmError as error:
        sys.exit(f"error: {error}")
