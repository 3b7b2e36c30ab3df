"""Load one packed model from its files and measure it by both protocols, beside the original."""

from __future__ import annotations

from functools import partial

from common import LAYOUT, progress, run, set_threads

from nashswarm import artifacts, evaluation, loading, metrics, packed
from nashswarm.config import Params
from nashswarm.engine import make_engine


def main(params: Params, model: str, method: str) -> None:
    """Write metrics/<model>/<method>.json and data/evaluations/<model>/<method>."""
    set_threads(params)
    download = LAYOUT.download(model)
    index, record = artifacts.read_index(download), artifacts.read_source(download)
    directory = record.open(LAYOUT.root)
    path, engine = LAYOUT.packed(model, method), make_engine(params.compute, "evaluate")
    load = partial(loading.open_for_evaluation, path, directory, index, engine.device)
    context = min(index.context, params.evaluation.context)
    losses = {}
    with artifacts.fresh_directory(LAYOUT.windows(model, method)) as target:
        for corpus in params.active.corpora:
            split = artifacts.read_tokens(download, corpus, "test")
            said = partial(artifacts.read_record, LAYOUT.baseline(model) / f"{corpus}.safetensors", evaluation.Baseline)
            original = partial(evaluation.open_original, directory, index, said, engine.device)
            losses[corpus] = evaluation.measure(load, original, split, params.evaluation, context, progress, engine)
            artifacts.write_record(target / f"{corpus}.safetensors", losses[corpus])
        document = metrics.document(packed.open_packed(path), index, losses, params.evaluation)
        artifacts.write_json(LAYOUT.metrics(model, method), document)


if __name__ == "__main__":
    run(main)
