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
        models.check_finite(directory, progress)  # before transformers is loaded: what is quick to find comes first
        context = models.context_of(directory)
        models.padding_token(models.config_of(directory))
        corpora.check_paper_length(params.evaluation.paper.length, context)
        tokenizer = models.load_tokenizer(directory)
        splits = {
            name: {split: corpora.tokenize(lines, tokenizer) for split, lines in found.items()}
            for name, found in texts.items()
        }
        index = models.describe(directory)
        every = {f"corpora.{name}.{split}": t for name, found in splits.items() for split, t in found.items()}
        corpora.check_vocabulary(every, index.vocabulary)
        windows = index.calibration_window, min(context, params.evaluation.context)
        corpora.check_run(splits, params.active.calibration, params.active.corpora, windows, tokenizer.decode)
        for name, tokenized in splits.items():
            artifacts.write_tokens(target, name, tokenized)
        models.Checkpoint.open(directory, index)  # every parameter is there, in its shape
        hashes = {name: artifacts.sha256_file(directory / name) for name in files}
        record = artifacts.SourceRecord(source.source, str(recorded), source.id, source.revision, hashes)
        artifacts.write_source(target, record, index)


if __name__ == "__main__":
    run(main)
