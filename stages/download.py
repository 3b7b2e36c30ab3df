"""Resolve one model and the active corpora: fetch or find the files, check them, tokenise once."""

from __future__ import annotations

from common import LAYOUT, progress, run

from nashswarm import artifacts, corpora, downloads, models
from nashswarm.config import Params


def main(params: Params, model: str) -> None:
    """Write data/downloads/<model>."""
    source = params.models[model]
    with artifacts.fresh_directory(LAYOUT.download(model)) as target:
        texts = {}
        for name in params.corpora_needed:  # before the model: a text is a small download, a checkpoint is not
            hub_directory = downloads.resolve_corpus(params.corpora[name], LAYOUT)
            texts[name] = corpora.read_texts(name, params.corpora[name], LAYOUT.reference, hub_directory)
        directory, recorded = downloads.resolve_model(model, source, LAYOUT, target)
        files = models.checkpoint_files(directory)
        index = models.describe(directory)
        models.check_finite(directory, index, progress)
        hashes = {name: artifacts.sha256_file(directory / name) for name in files}
        record = artifacts.SourceRecord(source.source, str(recorded), source.id, source.revision, hashes)
        artifacts.write_source(target, record, index)
        tokenizer = models.load_tokenizer(directory)
        splits = {
            name: {split: corpora.tokenize(lines, tokenizer) for split, lines in found.items()}
            for name, found in texts.items()
        }
        window = min(index.context, params.evaluation.context)
        corpora.check_run(splits, params.active.calibration, params.active.corpora, window)
        for name, tokenized in splits.items():
            artifacts.write_tokens(target, name, tokenized)


if __name__ == "__main__":
    run(main)
