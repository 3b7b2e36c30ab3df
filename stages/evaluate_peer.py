"""Measure what another tool made of a model as our own packed models are measured."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common import LAYOUT, progress, run, set_threads

from nashswarm import artifacts, evaluation, metrics, models
from nashswarm.config import Params
from nashswarm.engine import make_engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def main(params: Params, model: str, peer: str) -> None:
    """Write metrics/<model>/<peer>.json."""
    set_threads(params)
    download = LAYOUT.download(model)
    index, source = artifacts.read_index(download), artifacts.read_source(download)
    directory, record = source.open(LAYOUT.root), artifacts.read_peer(LAYOUT.peer(model, peer))
    losses = {}
    if record.reason is None:
        load, engine = partial(_load, directory, LAYOUT.peer(model, peer)), make_engine(params.compute, "evaluate")
        context = min(index.context, params.evaluation.context)
        for corpus in params.active.corpora:
            split = artifacts.read_tokens(download, corpus, "test")
            said = partial(artifacts.read_record, LAYOUT.baseline(model) / f"{corpus}.safetensors", evaluation.Baseline)
            original = partial(evaluation.open_original, directory, index, said)
            losses[corpus] = evaluation.measure(load, original, split, params.evaluation, context, progress, engine)
    document = metrics.peer_document(record, source, index, losses, params.evaluation)
    artifacts.write_json(LAYOUT.metrics(model, peer), document)


def _load(directory: Path, peer: Path) -> PreTrainedModel:
    return models.load_arrays(directory, artifacts.read_peer_weights(peer))


if __name__ == "__main__":
    run(main)
