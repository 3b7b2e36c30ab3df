"""The figures of one packed model, in the schema that others script against (DESIGN, section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nashswarm.artifacts import PeerRecord, SourceRecord
from nashswarm.config import Evaluation
from nashswarm.evaluation import Losses, paper_figures, quality_figures
from nashswarm.intervals import rounded
from nashswarm.packed import FP32_BYTES, MANIFEST, PackedError, PackedModel
from nashswarm.types import ModelIndex, PackedTensor

MIB = 2**20


def document(
    packed: PackedModel, index: ModelIndex, losses: Mapping[str, Losses], settings: Evaluation
) -> dict[str, Any]:
    """Everything that metrics/<model>/<method>.json holds.

    Tables and series are lists: DVC shows and compares numbers and texts, and passes over lists.
    """
    allocation = dict(packed.provenance.certificate)
    if allocation.get("price") is not None:
        allocation["bought_bytes"] = packed.size.file_bytes
    if tensors := tensor_rows(packed, index):
        allocation["tensors"] = tensors
    return {
        "size": size_figures(packed, index),
        "quality": {corpus: quality_figures(found, settings) for corpus, found in losses.items()},
        "paper": {corpus: paper_figures(found, settings) for corpus, found in losses.items()},
        "allocation": allocation,
    }


BESIDE = ("vectors", "headers")  # parts of a file that are no quantized matrix


def peer_document(
    peer: PeerRecord, source: SourceRecord, index: ModelIndex, losses: Mapping[str, Losses], settings: Evaluation
) -> dict[str, Any]:
    """Everything that metrics/<model>/<peer>.json holds: as `document`, and what was run, on which original.

    A peer that was not run has the reason, and no figures.
    """
    found: dict[str, Any] = {
        "peer": {
            "tool": peer.tool,
            "settings": dict(peer.settings),
            "version": peer.version,
            "notes": list(peer.notes),
            "reason": peer.reason,
            "original": {name: digest for name, digest in source.files.items() if name.endswith(".safetensors")},
        }
    }
    if peer.reason is not None:
        return found
    total, weights = sum(peer.parts.values()), sum(tensor.weights for tensor in index.tensors)
    matrix_bytes = total - sum(peer.parts.get(part, 0) for part in BESIDE)
    return found | {
        "size": {
            "file_bytes": total,
            "bits_per_weight": rounded(8 * total / index.parameters),
            "matrix_bits_per_weight": rounded(8 * matrix_bytes / weights),
            "compression": rounded(1 - total / (FP32_BYTES * index.parameters)),
            "parts": dict(peer.parts),
        },
        "quality": {corpus: quality_figures(each, settings) for corpus, each in losses.items()},
        "paper": {corpus: paper_figures(each, settings) for corpus, each in losses.items()},
        "allocation": {},
    }


def tensor_rows(packed: PackedModel, index: ModelIndex) -> list[list[Any]]:
    """[name, part, layer, weights, true bits per weight] of each matrix, in the model's order; none of the baseline.

    Bits are 8 times the bytes of the arrays stored for that matrix, over its weights. What all matrices share (the
    coded format's tables and scales) is in no row, nor are headers: the rows sum to less than the file.
    """
    found = ((spec, packed.tensors.get(spec.name)) for spec in index.tensors)
    return [
        [spec.name, spec.part, spec.layer, spec.weights, rounded(8 * _stored_bytes(tensor) / spec.weights)]
        for spec, tensor in found
        if tensor is not None and tensor.codec != "source"
    ]


def _stored_bytes(tensor: PackedTensor) -> int:
    return sum(array.nbytes for array in tensor.arrays.values())


def size_figures(packed: PackedModel, index: ModelIndex) -> dict[str, Any]:
    """True sizes; for the paper's methods and the baseline also the sizes that the paper would claim.

    Raises PackedError where the paper's accounting is asked for and the certificate has no histogram to count by.
    """
    method, size = packed.provenance.method, packed.size
    weights = sum(math.prod(tensor.shape) for tensor in packed.tensors.values() if tensor.codec != "kept")
    figures: dict[str, Any] = {
        "file_bytes": size.file_bytes,
        "bits_per_weight": rounded(8 * size.file_bytes / index.parameters),
        "matrix_bits_per_weight": rounded(8 * size.matrix_bytes / weights) if weights else None,
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
    return figures | claimed_figures(_histogram(packed)) if method.get("accounting") == "paper" else figures


def _histogram(packed: PackedModel) -> dict[int, int]:
    """Bits -> weights, as the certificate has it."""
    counts = packed.provenance.certificate.get("histogram")
    if not counts:
        raise PackedError(
            f"{packed.directory / MANIFEST}: provenance.certificate has no histogram (bits -> weights), by which the "
            "paper's accounting counts; pack the model again, or take accounting out of provenance.method"
        )
    return {int(bits): count for bits, count in counts.items()}


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
