"""Unclipped integer grids with a step for every column (and row) of the loss model, error feedback, entropy coding.

A grid of step s costs about h - log2 s bits a weight after entropy coding and leaves an error of s^2 / 12. With
feedback the loss is 1/2 sum rows_r (e_rc / U_cc)^2, so at equal slope -dD/dR everywhere

    s_rc = k * U_cc * rho_r,    rho_r = rows_r^-a / sqrt(mean(rows^(1 - 2a)))

with one k for the whole model in the limit of high rates; at low rates the market sets one k per matrix by measured
curves. a = 1/2 would be the theory of high rates for rows that are quantized alone. Measured: a = 0 for projections
(rows of one matrix weigh alike), 1/4 for tables whose rows are tokens, where frequencies span four decades.

Steps lie on a grid of 1/8 octave, rounded before feedback, so that a column's or a row's takes one byte. Codes are
any integers. Contexts of the coder are a scale per row and per column (see `entropy`); its tables are common to all
tensors of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nashswarm import entropy, feedback
from nashswarm.rans import SYMBOLS
from nashswarm.types import Candidates, InputError, Job, PackedTensor, TensorSpec

SELLS = ("candidates",)
WIDTHS: tuple[int, ...] = ()
STEPS_PER_OCTAVE = 8
BASE_UNITS = 1 << 16  # per octave: an integer in the manifest, exact everywhere
GRID = np.arange(-10.0, 3.01, 0.25)  # log2 k / k0: from about 12 bits a weight down to nearly none
LARGEST_CODE = 1 << 24  # float32 counts no further one by one
SAMPLE = 1 << 19  # weights per tensor from which its curves are measured


@dataclass(frozen=True, slots=True)
class Settings:
    """Exponents a of the rows' weights: of projections, and of tables whose rows are tokens."""

    row_exponent: float = 0.0
    token_row_exponent: float = 0.25


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps of one matrix: 2^(base + (rows_r + columns_c) / 8); at k = 1 a step's damage is in units of 1 nat."""

    base: float  # log2
    rows: np.ndarray  # int8 [out]
    columns: np.ndarray  # int8 [in]

    def of_rows(self) -> Tensor:
        """2^(rows / 8), float32 [out]."""
        return torch.from_numpy(np.exp2(self.rows / STEPS_PER_OCTAVE).astype(np.float32))

    def of_columns(self, factor: float) -> Tensor:
        """2^(base + factor + columns / 8), float32 [in]."""
        return torch.from_numpy(np.exp2(self.base + factor + self.columns / STEPS_PER_OCTAVE).astype(np.float32))


# --- what the market sees ------------------------------------------------------------------------------------------


def offer(job: Job, settings: Settings) -> Candidates:
    """Bytes and damage of one matrix at every k, measured on its weights rounded without feedback.

    Feedback moves weights by less than a step, which changes their entropy little and their rounding error not at all.
    """
    curvature, found = _loss_model(job)
    steps = _steps(curvature, found, job.tensor, settings)
    stride = max(1, -(-job.tensor.weights // SAMPLE))
    rows = torch.arange(0, job.tensor.shape[0], stride)
    weight, row_weights = job.weight[rows], curvature.rows[rows]
    scale = float(curvature.rows.sum() / row_weights.sum().clamp(min=1e-300))
    inverse = 1 / found.step
    sizes, damages = [], []
    for k in GRID[::-1]:
        step = steps.of_rows()[rows, None] * steps.of_columns(k)
        codes = (weight / step).round_()
        errors = (weight - codes * step) * inverse
        damages.append(0.5 * scale * float(errors.double().square().sum(1) @ row_weights))
        sizes.append(_entropy_bytes(codes) * job.tensor.shape[0] / len(rows))
    overhead = sum(job.tensor.shape) * 0.5  # a byte per row and column twice, compressed about four to one
    return Candidates(
        options=-GRID[::-1].copy(),
        size=np.maximum.accumulate(np.array(sizes))[None] + overhead,
        distortion=np.minimum.accumulate(np.array(damages))[None],
        continuous=True,
        weights=np.array([job.tensor.weights]),
    )


def _entropy_bytes(codes: Tensor) -> float:
    integers = codes.clamp(-(2.0**30), 2.0**30).to(torch.int32).numpy()
    scales = entropy.fit_scales(integers)
    histogram = entropy.histogram(integers, *scales)
    return entropy.estimate_bytes(histogram, entropy.fit_tables(histogram))


def _loss_model(job: Job) -> tuple[feedback.Curvature, feedback.Factor]:
    if job.statistics is None:
        raise InputError(f"{job.tensor.name}: codec 'coded' needs statistics; run the score stage")
    curvature = feedback.curvature(job.statistics, job.tensor.name)
    return curvature, feedback.factor(curvature.moment, job.tensor.name)


def _steps(curvature: feedback.Curvature, found: feedback.Factor, tensor: TensorSpec, settings: Settings) -> Steps:
    tokens = tensor.part in ("embedding", "head")
    exponent = settings.token_row_exponent if tokens else settings.row_exponent
    mean = float(curvature.rows.mean())
    if mean <= 0:
        raise InputError(f"{tensor.name}: its Fisher information is zero; nothing that it does reaches the loss")
    rows = (curvature.rows / mean).clamp(min=1e-6)
    rho = -exponent * rows.log2() - 0.5 * torch.log2(rows.pow(1 - 2 * exponent).mean() * mean)
    columns = found.step.double().log2()
    row_base, column_base = float(rho.median()), float(columns.median())
    return Steps(
        base=row_base + column_base,
        rows=_eighths(rho - row_base),
        columns=_eighths(columns - column_base),
    )


def _eighths(octaves: Tensor) -> np.ndarray:
    return (octaves * STEPS_PER_OCTAVE).round().clamp(-127, 127).to(torch.int8).numpy()


# --- encoding ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rounded:
    name: str
    shape: tuple[int, int]
    base: int  # of the steps, in 1 / BASE_UNITS octaves
    steps: Steps
    codes: np.ndarray  # int16 or int32 [out, in]
    contexts: tuple[np.ndarray, np.ndarray]  # int8 [out], int8 [in]


def encode_all(jobs: Iterable[Job], settings: Settings) -> Iterator[tuple[str, PackedTensor]]:
    """Round every matrix, fit the common tables, code every matrix."""
    rounded, histogram = [], np.zeros((entropy.CLASSES, SYMBOLS), np.int64)
    for job in jobs:
        rounded.append(_round(job, settings))
        histogram += entropy.histogram(rounded[-1].codes.astype(np.int32), *rounded[-1].contexts)
    tables = entropy.fit_tables(histogram)
    shared = {"tables": _bytes(entropy.tables_to_bytes(tables)), "scales": _pack_scales(rounded)}
    position, total = 0, 2 * sum(sum(item.shape) for item in rounded)
    for item in rounded:
        stream = entropy.encode(item.codes.astype(np.int32), *item.contexts, tables)
        scalars = {"base": item.base, "position": position, "total": total}
        position += 2 * sum(item.shape)
        yield item.name, PackedTensor("coded", item.shape, {"codes": _bytes(stream)}, scalars, shared)


def encode(job: Job, settings: Settings) -> PackedTensor:
    """One matrix by itself, with tables of its own."""
    return next(encode_all([job], settings))[1]


def _round(job: Job, settings: Settings) -> _Rounded:
    assert job.choice.step is not None
    curvature, found = _loss_model(job)
    steps = _steps(curvature, found, job.tensor, settings)
    base = round((steps.base + job.choice.step) * BASE_UNITS)
    steps = Steps(base / BASE_UNITS, steps.rows, steps.columns)
    rows, columns = steps.of_rows(), steps.of_columns(0)
    codes = torch.empty(job.tensor.shape[::-1], dtype=torch.int32)
    inverse = 1 / rows

    def quantize(column: int, values: Tensor) -> Tensor:
        step = float(columns[column])
        found_codes = (values * (inverse / step)).round_()
        largest = float(found_codes.abs().max())
        if not largest < LARGEST_CODE:
            raise InputError(f"{job.tensor.name}: codes reach {largest:.3g}, beyond {LARGEST_CODE}; lower the budget")
        codes[column] = found_codes.to(torch.int32)
        return found_codes * (rows * step)

    feedback.round_with_feedback(job.weight, found, quantize)
    array = codes.T.contiguous().numpy()
    contexts = entropy.fit_scales(array)
    small = array.astype(np.int16) if np.abs(array).max(initial=0) < 2**15 else array
    return _Rounded(job.tensor.name, job.tensor.shape, base, steps, small, contexts)


def _pack_scales(rounded: list[_Rounded]) -> np.ndarray:
    """All int8 side information of the model in one compressed block: contexts and steps, rows then columns each."""
    pieces = [p for r in rounded for p in (r.contexts[0], r.steps.rows, r.contexts[1], r.steps.columns)]
    return _bytes(entropy.scales_to_bytes(np.concatenate(pieces)))


def decode(packed: PackedTensor) -> Tensor:
    """float32 [out, in]."""
    (rows, columns), position = packed.shape, packed.scalars["position"]
    every = entropy.scales_from_bytes(packed.shared["scales"].tobytes(), packed.scalars["total"])
    scales = every[position : position + 2 * (rows + columns)]
    row_context, row_steps, column_context, column_steps = np.split(scales, [rows, 2 * rows, 2 * rows + columns])
    tables = entropy.tables_from_bytes(packed.shared["tables"].tobytes())
    codes = entropy.decode(packed.arrays["codes"].tobytes(), packed.shape, row_context, column_context, tables)
    steps = Steps(packed.scalars["base"] / BASE_UNITS, row_steps, column_steps)
    return torch.from_numpy(codes).float() * (steps.of_rows()[:, None] * steps.of_columns(0))


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)
