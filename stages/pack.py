"""Quantize and write real bits: one method on one model."""

from __future__ import annotations

from common import LAYOUT, progress, run, set_threads

from nashswarm import artifacts, preflight, quantize
from nashswarm.config import Params
from nashswarm.engine import make_engine
from nashswarm.recipes import read_recipe


def main(params: Params, model: str, method: str) -> None:
    """Write data/packed/<model>/<method>."""
    set_threads(params)
    recipe = read_recipe(LAYOUT.methods / f"{method}.json")
    allocation = artifacts.read_allocation(LAYOUT.allocation(model, method))
    ids = artifacts.read_tokens(LAYOUT.download(model), params.active.calibration, "calibration").ids
    opened = quantize.open_model(LAYOUT, model)
    preflight.check([preflight.packing_need(opened.index, recipe)], LAYOUT.root)
    parent, files = LAYOUT.staging / "packed" / model, opened.record.files
    engine, scores = make_engine(params.compute, "pack"), LAYOUT.scores(model)
    journal = quantize.open_journal(parent, method, recipe, allocation, ids, files, scores, engine.device)
    quantize.pack(opened, recipe, allocation, ids, LAYOUT.packed(model, method), progress, journal, engine)
    journal.close()


if __name__ == "__main__":
    run(main)
