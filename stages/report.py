"""Turn the metrics of the active models and methods into the report."""

from __future__ import annotations

from common import LAYOUT, run

from nashswarm import artifacts, report
from nashswarm.config import Params


def main(params: Params) -> None:
    """Write report/."""
    metrics = {
        (model, method): artifacts.read_json(LAYOUT.metrics(model, method))
        for model in params.active.models
        for method in params.active.methods
    }
    found = report.Run(
        metrics,
        params.active.models,
        params.active.methods,
        params.active.corpora,
        params.evaluation.resamples,
        params.evaluation.seed,
    )
    with artifacts.fresh_directory(LAYOUT.report) as target:
        report.write(target, found, params.report.dpi)


if __name__ == "__main__":
    run(main)
