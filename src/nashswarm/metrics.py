"""The figures of one packed model, in the schema that others script against (DESIGN, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nashswarm.config import Evaluation
from nashswarm.evaluation import Losses, paper_figures, quality_figures, rounded
from nashswarm.packed import FP32_BYTES, PackedModel
from nashswarm.types import ModelIndex

MIB = 2**20


def document(
    packed: PackedModel, index: ModelIndex, losses: Mapping[str, Losses], settings: Evaluation
) -> dict[str, Any]:
    """Everything that metrics/<model>/<method>.json holds."""
    return {
        "size": size_figures(packed, index),
        "quality": {corpus: quality_figures(found, settings) for corpus, found in losses.items()},
        "paper": {corpus: paper_figures(found, settings.paper) for corpus, found in losses.items()},
        "allocation": dict(packed.provenance.certificate),
    }


def size_figures(packed: PackedModel, index: ModelIndex) -> dict[str, Any]:
    """True sizes; for the paper's methods and the baseline also the sizes that the paper would claim."""
    method, size = packed.provenance.method, packed.size
    histogram = {int(bits): count for bits, count in packed.provenance.certificate["histogram"].items()}
    weights = sum(histogram.values())
    figures: dict[str, Any] = {
        "file_bytes": size.file_bytes,
        "bits_per_weight": rounded(8 * size.file_bytes / index.parameters),
        "matrix_bits_per_weight": rounded(8 * size.matrix_bytes / weights),
        "compression": rounded(1 - size.file_bytes / (FP32_BYTES * index.parameters)),
        "parts": dict(size.parts),
    }
    if method["codec"] == "source":
        baseline = {
            "matrix_bits_per_weight": 32.0,
            "claimed_mib": rounded(size.file_bytes / MIB),
            "claimed_compression": 0.0,
        }
        return figures | baseline
    return figures | claimed_figures(histogram) if method["accounting"] == "paper" else figures


def claimed_figures(histogram: Mapping[int, int]) -> dict[str, float]:
    """The paper's accounting: bits of the codes of the touched weights, nothing else; MiB are 2^20 bytes.

    Arguments: `histogram`, bits -> weights.
    """
    bits, weights = sum(b * n for b, n in histogram.items()), sum(histogram.values())
    return {
        "claimed_mib": rounded(bits / 8 / MIB),
        "claimed_bits_per_weight": rounded(bits / weights),
        "claimed_compression": rounded(1 - bits / weights / 32),
    }
