"""Run the original model once on the test texts; every method is compared with what it says."""

from __future__ import annotations

from functools import partial

from common import LAYOUT, progress, run, set_threads

from nashswarm import artifacts, evaluation, models
from nashswarm.config import Params
from nashswarm.engine import make_engine


def main(params: Params, model: str) -> None:
    """Write data/baselines/<model>."""
    set_threads(params)
    download = LAYOUT.download(model)
    index = artifacts.read_index(download)
    engine, directory = make_engine(params.compute, "baseline"), artifacts.read_source(download).open(LAYOUT.root)
    load = partial(models.load_streamed, directory, index, device=engine.device)
    context = min(index.context, params.evaluation.context)
    with artifacts.fresh_directory(LAYOUT.baseline(model)) as target:
        for corpus in params.active.corpora:
            split = artifacts.read_tokens(download, corpus, "test")
            outputs = evaluation.original_outputs(load, split, params.evaluation, context, progress, engine)
            artifacts.write_record(target / f"{corpus}.safetensors", outputs)


if __name__ == "__main__":
    run(main)
