"""Measure what another tool made of a model as our own packed models are measured."""

from __future__ import annotations

from common import LAYOUT, progress, run, set_threads

from nashswarm import artifacts, evaluation, metrics, models
from nashswarm.config import Params


def main(params: Params, model: str, peer: str) -> None:
    """Write metrics/<model>/<peer>.json."""
    set_threads(params)
    download = LAYOUT.download(model)
    index, source = artifacts.read_index(download), artifacts.read_source(download)
    directory, record = source.open(LAYOUT.root), artifacts.read_peer(LAYOUT.peer(model, peer))
    losses = {}
    if record.reason is None:
        quantized = models.load_arrays(directory, artifacts.read_peer_weights(LAYOUT.peer(model, peer)))
        head = evaluation.original_head(directory, index)
        context = min(index.context, params.evaluation.context)
        for corpus in params.active.corpora:
            split = artifacts.read_tokens(download, corpus, "test")
            baseline = artifacts.read_record(LAYOUT.baseline(model) / f"{corpus}.safetensors", evaluation.Baseline)
            losses[corpus] = evaluation.measure(quantized, head, baseline, split, params.evaluation, context, progress)
    document = metrics.peer_document(record, source, index, losses, params.evaluation)
    artifacts.write_json(LAYOUT.metrics(model, peer), document)


if __name__ == "__main__":
    run(main)
