"""Gather the original model's statistics over the calibration text: second moments and Fisher information."""

from __future__ import annotations

from functools import partial

from common import LAYOUT, progress, run, set_threads

from nashswarm import artifacts, models, preflight, statistics
from nashswarm.config import Params
from nashswarm.engine import make_engine


def main(params: Params, model: str) -> None:
    """Write data/scores/<model>."""
    set_threads(params)
    download = LAYOUT.download(model)
    index = artifacts.read_index(download)
    record = artifacts.read_source(download)
    ids = artifacts.read_tokens(download, params.active.calibration, "calibration").ids
    directory, facts = record.open(LAYOUT.root), (record.files, artifacts.digest(ids), params.scoring)
    preflight.check([preflight.scoring_need(index, params.scoring)], LAYOUT.root)
    engine, dtype = make_engine(params.compute, "score"), params.scoring.dtype
    where = params.compute.threads, engine.device
    journal = artifacts.Journal.of(LAYOUT.staging / "scores", model, *facts, *where, statistics.code())
    load = partial(models.load_streamed, directory, index, device=engine.device, dtype=dtype)
    with artifacts.fresh_directory(LAYOUT.scores(model)) as target:
        for tensor, found in statistics.gather(load, index, ids, params.scoring, progress, journal, engine):
            artifacts.write_statistics(target, tensor.name, found, journal)
    journal.close()


if __name__ == "__main__":
    run(main)
