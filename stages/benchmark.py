"""Measure times and memory on this machine: one kind of benchmark."""

from __future__ import annotations

from common import LAYOUT, progress, run, set_threads

from nashswarm import artifacts
from nashswarm.benchmarks import decode, kernels, packing, quantization
from nashswarm.config import Params
from nashswarm.types import InputError

KINDS = {
    "kernels": kernels.measure,
    "decode": decode.measure,
    "packing": packing.measure,
    "quantization": quantization.measure,
}


def main(params: Params, kind: str) -> None:
    """Write metrics/benchmarks/<kind>.json."""
    if kind not in KINDS:
        raise InputError(f"{kind}: no such benchmark; choose {', '.join(KINDS)}")
    set_threads(params)
    document = KINDS[kind](params.benchmark, params.compute.threads, progress)
    artifacts.write_json(LAYOUT.metrics("benchmarks", kind), document)


if __name__ == "__main__":
    run(main)
