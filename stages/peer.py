"""Have another tool quantize one model, in its own environment, and count what it stores."""

from __future__ import annotations

from common import LAYOUT, run, set_threads

from nashswarm import artifacts, peering
from nashswarm.config import Params
from nashswarm.recipes import read_peer_recipe
from nashswarm.types import PeerJob


def main(params: Params, model: str, peer: str) -> None:
    """Write data/peers/<model>/<peer>."""
    set_threads(params)
    recipe = read_peer_recipe(LAYOUT.methods / f"{peer}.json")
    download = LAYOUT.download(model)
    index, ids = (
        artifacts.read_index(download),
        artifacts.read_tokens(download, params.active.calibration, "calibration").ids,
    )
    directory = artifacts.read_source(download).open(LAYOUT.root)
    job = PeerJob(directory, index, ids, min(index.context, params.evaluation.context), params.compute.threads)
    record, weights = peering.run(
        recipe, job, LAYOUT.root, lambda name: artifacts.read_statistics(LAYOUT.scores(model), name)
    )
    with artifacts.fresh_directory(LAYOUT.peer(model, peer)) as target:
        artifacts.write_peer(target, record, weights)


if __name__ == "__main__":
    run(main)
