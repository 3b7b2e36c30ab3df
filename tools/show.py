"""Print the result table of the active models and methods, that of other tools, and what the report belongs to."""

from __future__ import annotations

import subprocess
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


def commit(root: Path) -> str:
    """The commit that the tables and the report belong to, which the report cannot name: its hash is in dvc.lock."""
    asked = [["git", "-C", str(root), *words] for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])]
    ran = [subprocess.run(words, capture_output=True, text=True, check=False) for words in asked]
    if any(r.returncode for r in ran):
        return "no commit: this is no git repository"
    return f"commit {ran[0].stdout.strip()}{', with changes that are not committed' if ran[1].stdout else ''}"


def main() -> None:
    """Read params.yaml and metrics/, print."""
    layout = artifacts.Layout()
    print("\n\n".join(filter(None, tables(layout))))
    print(f"\nThe report: {layout.report / 'report.html'} (also report.md, tables.tex)")
    lock = layout.root / "dvc.lock"
    print(f"{commit(layout.root)}; dvc.lock sha256 {artifacts.sha256_file(lock) if lock.is_file() else 'is missing'}")


if __name__ == "__main__":
    try:
        main()
    except NashSwarmError as error:
        sys.exit(f"error: {error}")
