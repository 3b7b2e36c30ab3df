"""Decide the bits of every tensor: one method on one model."""

from __future__ import annotations

from common import LAYOUT, progress, run, set_threads

from nashswarm import artifacts, quantize
from nashswarm.config import Params
from nashswarm.engine import make_engine
from nashswarm.recipes import read_recipe


def main(params: Params, model: str, method: str) -> None:
    """Write data/allocations/<model>/<method>."""
    set_threads(params)
    recipe = read_recipe(LAYOUT.methods / f"{method}.json")
    opened, engine = quantize.open_model(LAYOUT, model), make_engine(params.compute, "allocate")
    allocation = quantize.allocate(opened, recipe, progress, engine)
    with artifacts.fresh_directory(LAYOUT.allocation(model, method)) as target:
        artifacts.write_allocation(target, allocation)


if __name__ == "__main__":
    run(main)
