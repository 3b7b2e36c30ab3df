"""Turn the metrics of the active models and methods into the report, with what is tracked of other tools."""

from __future__ import annotations

from dataclasses import replace

from common import LAYOUT, run

from nashswarm import artifacts, distortion, provenance, report
from nashswarm.config import Params


def main(params: Params) -> None:
    """Write report/."""
    tracked, draws = (params.report.peers, params.report.methods), (params.evaluation.resamples, params.evaluation.seed)
    found = report.gather(LAYOUT, params.active, *tracked, *draws)
    allocations = distortion.gather(LAYOUT, params.active)
    origin = provenance.gather(LAYOUT, params.active, params.corpora)
    with artifacts.fresh_directory(LAYOUT.report) as target:
        report.write(target, replace(found, allocations=allocations, origin=origin), params.report.dpi)


if __name__ == "__main__":
    run(main)
