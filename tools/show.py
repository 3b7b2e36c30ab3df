"""Print the result table of the active models and methods, that of other tools, and where the report lies."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from nashswarm import artifacts, report
from nashswarm.config import load_params
from nashswarm.types import NashSwarmError


def tables(layout: artifacts.Layout) -> tuple[str, str]:
    """The table of the active methods, and that of other tools (empty where none is shown)."""
    params = load_params(layout.params)
    active, shown, settings = params.active, params.report, params.evaluation
    run = report.gather(layout, active, shown.peers, shown.methods, settings.resamples, settings.seed)
    table = report.console_table(run.metrics, active.models, active.methods, active.corpora)
    return table, report.peers_table(run)


def main() -> None:
    """Read params.yaml and metrics/, print."""
    layout = artifacts.Layout()
    print("\n\n".join(filter(None, tables(layout))))
    print(f"\nThe report: {layout.report / 'report.html'} (also report.md, tables.tex)")


if __name__ == "__main__":
    try:
        main()
    except NashSwarmError as error:
        sys.exit(f"error: {error}")
