"""From a model's directory and a text to a packed one, and back: the pipeline's steps without DVC."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

import torch

from nashswarm import artifacts, corpora, models, preflight, quantize, statistics
from nashswarm.config import Method, ModelSource, Scoring
from nashswarm.engine import Local
from nashswarm.loading import load
from nashswarm.types import Progress

logger = logging.getLogger(__name__)


def quantize_directory(
    source: Path,
    text: Path,
    method: Method,
    name: str,
    scoring: Scoring,
    output: Path,
    progress: Progress,
    origin: ModelSource | None = None,
) -> None:
    """Pack the model in `source`, calibrated on `text`.

    Gives the bytes that the pipeline gives for a model of source `origin` (else `path`) under that name, a corpus with
    that calibration text, the same method and scoring. Raises NashSwarmError, and then leaves what was at `output`.
    What an interrupted run had finished of scoring and packing lies beside `output` until the same run comes to an end.
    """
    models.checkpoint_files(source)  # no pickles, no remote code: before transformers sees the directory
    index = models.describe(source)
    checkpoint = models.Checkpoint.open(source, index)
    needs = preflight.needs(index, method, scoring, preflight.token_seconds(index))
    preflight.check(needs, output)
    logger.info("%s", "; ".join(map(str, needs)))
    tokens = corpora.tokenize(corpora.read_text_file(text), models.load_tokenizer(source))
    corpora.check_vocabulary({str(text): tokens}, index.vocabulary)
    ids = tokens.ids
    origin = origin or ModelSource("path", path=str(source))
    record = artifacts.SourceRecord(origin.source, str(source), origin.id, origin.revision, {})
    with artifacts.fresh_directory(output) as target:
        scores, packed = target / "scores", target / "packed"
        files = {name: artifacts.sha256_file(source / name) for name in models.checkpoint_files(source)}
        facts = (files, artifacts.digest(ids), scoring, torch.get_num_threads(), statistics.code())
        journal = artifacts.Journal.of(output.absolute().parent, f".{output.name}.score", *facts)
        load = partial(models.load_streamed, source, index)
        for tensor, found in statistics.gather(load, index, ids, scoring, progress, journal):
            artifacts.write_statistics(scores, tensor.name, found, journal)
        model = quantize.Model(name, index, record, checkpoint, partial(artifacts.read_statistics, scores))
        engine = Local(torch.get_num_threads())
        allocation = quantize.allocate(model, method, progress, engine)
        place = output.absolute().parent, f".{output.name}.pack"
        finished = quantize.open_journal(*place, method, allocation, ids, files, scores)
        quantize.pack(model, method, allocation, ids, packed, progress, finished, engine)
        for file in packed.iterdir():
            file.rename(target / file.name)
        packed.rmdir()
        artifacts.remove_directory(scores)
    journal.close()
    finished.close()


def unpack_directory(directory: Path, output: Path, dtype: str) -> None:
    """Write a packed model as plain safetensors of `dtype`, torch's name, with config and tokenizer."""
    model = load(directory).to(getattr(torch, dtype))
    with artifacts.fresh_directory(output) as target:
        model.save_pretrained(target)
        for name in artifacts.COMPANIONS:
            if (directory / name).is_file() and not (target / name).is_file():
                shutil.copyfile(directory / name, target / name)
