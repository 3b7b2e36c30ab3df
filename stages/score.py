"""Gather the original model's statistics over the calibration text: second moments and Fisher information."""

from __future__ import annotations

from common import LAYOUT, progress, run, set_threads

from nashswarm import artifacts, models, statistics
from nashswarm.config import Params


def main(params: Params, model: str) -> None:
    """Write data/scores/<model>."""
    set_threads(params)
    download = LAYOUT.download(model)
    index = artifacts.read_index(download)
    directory = artifacts.read_source(download).open(LAYOUT.root)
    ids = artifacts.read_tokens(download, params.active.calibration, "calibration").ids
    original = models.load_streamed(directory, index)
    with artifacts.fresh_directory(LAYOUT.scores(model)) as target:
        for tensor, found in statistics.gather(original, index, ids, params.scoring, progress):
            artifacts.write_statistics(target, tensor.name, found)


if __name__ == "__main__":
    run(main)
