"""Grouped grids with sequential error feedback: the field's reference method (GPTQ, arXiv:2210.17323).

Columns are rounded in falling order of input power (act-order) while groups keep the matrix's own order (static
groups), so that the file needs no column index. Grids are fitted beforehand on the original weights, clipping searched
with squared errors weighted by input power. Embeddings and the head are rounded to nearest, as the field does.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nashswarm import feedback
from nashswarm.codecs import grouped
from nashswarm.codecs.grouped import SELLS, WIDTHS, Settings
from nashswarm.types import Candidates, Job, PackedTensor

__all__ = ["SELLS", "WIDTHS", "Settings", "decode", "encode", "offer"]


def encode(job: Job, settings: Settings) -> PackedTensor:
    """As `grouped.encode`, with feedback. Raises InputError where the matrix has no statistics."""
    if job.tensor.part in ("embedding", "head"):
        return grouped.encode(job, settings)
    assert job.choice.bits is not None
    bits, group = job.choice.bits, settings.group_of(job.tensor)
    moment = grouped.curvature(job).inputs
    scales, zeros = grouped.row_grids(job, bits, group, settings, moment.diagonal().float())
    codes = torch.empty(job.tensor.shape[::-1], dtype=torch.uint8)

    def quantize(column: int, values: Tensor) -> Tensor:
        scale, zero = scales[:, column // group], zeros[:, column // group]
        found = grouped.quantize(values[:, None], scale, zero, 2**bits - 1)[:, 0]
        codes[column] = found.to(torch.uint8)
        return (found - zero) * scale.float()

    factor, edges = feedback.factor(moment, job.tensor.name), [0, len(job.weight)]
    visit = partial(feedback.round_columns, quantize=quantize)
    feedback.sweep(job.weight, factor, None, feedback.BLOCK, edges, visit)
    grids = (scales, None if settings.symmetric else zeros)
    return grouped.packed_groups("gptq", job.tensor, codes.T.contiguous(), *grids, bits, group)


def offer(job: Job, settings: Settings) -> Candidates:
    """As `grouped.offer`, errors priced as feedback leaves them."""
    if job.tensor.part in ("embedding", "head"):
        return grouped.offer(job, settings)
    model = grouped.curvature(job)
    steps = feedback.factor(model.inputs, job.tensor.name).step.double()
    return grouped.priced(job, settings, lambda error: float((error / steps).square().sum(1) @ model.rows))


def decode(packed: PackedTensor) -> Tensor:
    """float32 [out, in]."""
    return grouped.decode(packed)
