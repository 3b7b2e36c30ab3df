"""Sequential rounding with error feedback (GPTQ, Frantar et al. 2022, arXiv:2210.17323, algorithm 1; LDLQ in QuIP).

For y = W x the damage of an error E of W is 1/2 sum_r rows_r (E H E^T)_rr. With U the upper Cholesky factor of H^-1, in
the order in which columns are rounded, and each column's error handed on to the columns not yet rounded, it becomes
1/2 sum_rc rows_r (e_rc / U_cc)^2, with e_rc the plain rounding error of column c as it was when its turn came. Columns
no longer interact, so each can have its own precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from nashswarm import jit
from nashswarm.types import InputError, Job, Statistics

DAMPING = 0.01  # of the mean of H's diagonal; the original's value
BLOCK = 128  # columns between two matrix products; the original's value
# Share of a row's weight that all tokens have alike. Without it, tokens that calibration hardly saw lose nearly all
# their bits: KL of the reference model at 3.0 bits on its own text and on WikiText-2 is 0.033 and 0.156, with it 0.033
# and 0.065. From 0.03 on its own text pays: at 2.5 bits 0.0749 in place of 0.0727.
TOKEN_FLOOR = 0.01

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Curvature:
    """The quadratic model of the loss around one matrix, nats per token: 1/2 tr(outputs E inputs E^T).

    Where only the diagonal of `outputs` is known (a vocabulary is too large for more), `outputs` is None.
    """

    inputs: Tensor  # float64 [in, in]
    rows: Tensor  # float64 [out], the diagonal of `outputs`
    outputs: Tensor | None = None  # float64 [out, out]


@dataclass(frozen=True, slots=True)
class Factor:
    """Columns in rounding order, and the upper Cholesky factor of the inverse moment in that order."""

    order: Tensor  # int64 [in]
    upper: Tensor  # float32 [in, in]

    @property
    def step(self) -> Tensor:
        """U_cc of every column, float32 [in], in the matrix's own order."""
        diagonal = torch.empty(len(self.order))
        diagonal[self.order] = self.upper.diagonal()
        return diagonal


def curvature(statistics: Statistics, name: str) -> Curvature:
    """One quadratic model for all uses of a matrix.

    A tied matrix is projected with and looked up: 1/2 sum_r fisher_r E_r H E_r^T + 1/2 sum_r frequency_r E_r L E_r^T.
    Head and text agree on which tokens are frequent, so frequency_r is nearly proportional to fisher_r; with the mean
    ratio in its place both uses share the rows' weights, and their moments add up.

    Rows that stand for tokens are weighted by how the calibration text uses them, and a little (TOKEN_FLOOR) all alike:
    other texts have other rare tokens.
    """
    lookup, frequency = statistics.lookup_moment, statistics.frequency
    if statistics.second_moment is None or statistics.fisher is None:
        if lookup is None or frequency is None:
            raise InputError(f"{name}: no statistics; run the score stage, or use a codec that needs none")
        return Curvature(_double(lookup), _floored(_double(frequency)))
    inputs, rows = _double(statistics.second_moment), _double(statistics.fisher)
    if lookup is not None and frequency is not None:
        ratio = float(frequency.sum(dtype="float64")) / max(float(rows.sum()), 1e-300)
        inputs = inputs + ratio * _double(lookup)
    if statistics.gradient_moment is None:
        return Curvature(inputs, _floored(rows))
    return Curvature(inputs, rows, _double(statistics.gradient_moment))


def _floored(rows: Tensor) -> Tensor:
    return torch.lerp(rows, rows.mean(), TOKEN_FLOOR)


def _double(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).double()


def factor(moment: Tensor, name: str, damping: float = DAMPING, act_order: bool = True) -> Factor:
    """Order the columns by falling input power (act-order; else as they are) and factor the inverse moment, in float64.

    Where the Cholesky factorisation fails, damping is raised tenfold, and that is logged. Raises InputError for a
    moment that is not finite.
    """
    if not bool(moment.isfinite().all()):
        raise InputError(
            f"{name}: the inputs' second moment is not finite; are there huge activations? use float32 weights"
        )
    power = moment.diagonal()
    order = power.argsort(descending=True, stable=True) if act_order else torch.arange(len(power))
    permuted = moment[order][:, order]
    mean = max(float(power.mean()), 1e-30)
    while damping <= 1e6:
        damped = permuted + torch.eye(len(power), dtype=torch.float64) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return Factor(order, upper.float())
        logger.warning("%s: Cholesky factorisation failed at damping %g; trying %g", name, damping, damping * 10)
        damping *= 10
    raise InputError(f"{name}: the inputs' second moment cannot be factored at any damping")


@dataclass(frozen=True, slots=True)
class LossModel:
    """What rounding errors e of one matrix do, each taken as it is when its turn comes.

    Rounding goes by damped moments, since errors along directions without curvature would leave the range in which the
    loss is quadratic: it keeps 1/2 sum_rc rows_r (e_rc / U_cc)^2 small. What the errors then cost is another matter: it
    is the model without damping whose predictions measurements confirm.
    """

    curvature: Curvature
    columns: Factor
    spread: Factor | None  # how errors act on later rows, where rows interact
    rows: Tensor  # float64 [out]

    def damage(self) -> tuple[Tensor, Tensor]:
        """a, float64 [out], and b, float64 [in]: errors cost 1/2 sum_rc a_r b_c e_rc^2, nats per token."""
        columns = _damage(self.columns, self.curvature.inputs)
        if self.spread is None or self.curvature.outputs is None:
            return self.curvature.rows, columns
        return _damage(self.spread, self.curvature.outputs), columns


def loss_model(job: Job, codec: str, input_damping: float, output_damping: float, act_order: bool) -> LossModel:
    """The loss around a matrix. Arguments: `act_order`, whether rows, too, are rounded by falling power.

    Raises InputError, naming the matrix, where there are no statistics or where nothing it does reaches the loss.
    """
    name = job.tensor.name
    if job.statistics is None:
        raise InputError(f"{name}: codec '{codec}' needs statistics; run the score stage")
    found = curvature(job.statistics, name)
    if not float(found.rows.mean()) > 0:
        raise InputError(f"{name}: its Fisher information is zero; nothing that it does reaches the loss")
    columns = factor(found.inputs, name, input_damping)
    if found.outputs is None:
        return LossModel(found, columns, None, found.rows)
    spread = factor(found.outputs, name, output_damping, act_order)
    return LossModel(found, columns, spread, spread.step.double() ** -2)


def _damage(found: Factor, moment: Tensor) -> Tensor:
    """(U M U^T)_cc / U_cc^2, float64 [in], in the moment's own order: of a unit's error, with what feedback by U adds.

    Without damping M = (U^T U)^-1, and it is 1 / U_cc^2.
    """
    upper = found.upper.double()
    damage = torch.empty(len(moment), dtype=torch.float64)
    power = ((upper @ moment[found.order][:, found.order]) * upper).sum(1)
    damage[found.order] = power.clamp(min=0) / upper.diagonal() ** 2
    return damage


def round_with_feedback(weight: Tensor, found: Factor, quantize: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Round the columns of `weight`, float32 [out, in], one after the other, handing each one's error on.

    Arguments: `quantize(column, values)` gives the rounded values of a column, float32 [out], and keeps its codes.
    Returns: e_rc / U_cc, float32 [out, in], in the matrix's own column order: its weighted square is the damage.
    """
    columns = len(found.order)
    rest = weight.T[found.order].contiguous()  # [in, out]: a column is contiguous
    errors = torch.empty_like(rest)
    places = found.order.tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        upper = found.upper[start:stop, start:stop]
        diagonal = upper.diagonal().tolist()
        for i in range(start, stop):
            error = errors[i]
            torch.sub(rest[i], quantize(places[i], rest[i]), out=error)
            error.div_(diagonal[i - start])
            if i + 1 < stop:
                rest[i + 1 : stop].addr_(upper[i - start, i - start + 1 :], error, alpha=-1)
        if stop < columns:
            rest[stop:].addmm_(found.upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    result = torch.empty_like(errors)
    result[found.order] = errors
    return result.T.contiguous()


def spread(found: Factor) -> np.ndarray:
    """What a unit of error in one row takes from the targets of later rows, float32 [out, out], in rounding order.

    With both sides' factors, 1/2 tr(outputs E inputs E^T) = 1/2 sum_rc (e_rc / (U_rr V_cc))^2, where e_rc is the plain
    rounding error of an element after those before it, in its column and in columns before, have handed theirs on
    (YAQA, Tseng et al. 2025, arXiv:2505.22988). Towards later columns a column acts by its values minus its rounded
    values, as it does without interaction of rows; so this slots into `round_with_feedback`.
    """
    return np.ascontiguousarray((found.upper / found.upper.diagonal()[:, None]).numpy())


def round_groups_with_feedback(
    weight: Tensor,
    found: Factor,
    size: int,
    begin: Callable[[int, Tensor], None],
    quantize: Callable[[int, Tensor], Tensor],
) -> None:
    """As `round_with_feedback`, by groups of `size` columns in rounding order, each announced before it is rounded.

    Arguments: `begin(group, columns)` sees a group's columns, float32 [size or fewer, out], as the errors of earlier
    groups left them, and may fit grids to them; `quantize(place, values)` rounds the column at a place of the rounding
    order. Nothing is kept beside the weights themselves.
    """
    columns = len(found.order)
    rest = weight.T[found.order].contiguous()  # [in, out]: a column is contiguous
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        upper = found.upper[start:stop, start:stop]
        diagonal = upper.diagonal().tolist()
        begin(start // size, rest[start:stop])
        errors = torch.empty_like(rest[start:stop])
        for i in range(start, stop):
            error = errors[i - start]
            torch.sub(rest[i], quantize(i, rest[i]), out=error)
            error.div_(diagonal[i - start])
            if i + 1 < stop:
                rest[i + 1 : stop].addr_(upper[i - start, i - start + 1 :], error, alpha=-1)
        if stop < columns:
            rest[stop:].addmm_(found.upper[start:stop, stop:].T, errors, alpha=-1)


def clipped_rounding(found: Factor | None) -> Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Rounding of one column to finite grids: (values, steps, halves, middles) -> codes q, all float32 [out].

    Row r has the values (q + middles_r) steps_r with -halves_r <= q < halves_r, or zero alone where its step is zero.
    Rows interact as `spread` says where `found`, the outputs' factor, is given.
    """
    if found is None:
        return _nearest
    order, interaction = found.order.numpy(), spread(found)
    kernel = _clipped_kernel()

    def snap(values: np.ndarray, steps: np.ndarray, halves: np.ndarray, middles: np.ndarray) -> np.ndarray:
        codes = np.empty_like(values)
        codes[order] = kernel(values[order], steps[order], halves[order], middles[order], interaction)
        return codes

    return snap


def _nearest(values: np.ndarray, steps: np.ndarray, halves: np.ndarray, middles: np.ndarray) -> np.ndarray:
    scaled = np.divide(values, steps, out=np.zeros_like(values), where=steps > 0)
    return np.asarray(np.clip(np.floor(scaled + (np.float32(0.5) - middles)), -halves, halves - 1))


@cache
def _clipped_kernel() -> Callable[..., np.ndarray]:
    numbers = "float32[::1]"
    return jit.compiled(_round_clipped, f"{numbers}({numbers}, {numbers}, {numbers}, {numbers}, float32[:, ::1])")


def _round_clipped(
    values: np.ndarray, steps: np.ndarray, halves: np.ndarray, middles: np.ndarray, spread: np.ndarray
) -> np.ndarray:
    """Plain Python until numba compiles it. Uses up `values`."""
    codes = np.empty_like(values)
    for r in range(len(values)):
        code, error = -halves[r], values[r]
        if steps[r] > 0:
            code = np.floor(values[r] / steps[r] + (np.float32(0.5) - middles[r]))
            code = min(max(code, -halves[r]), halves[r] - np.float32(1))
            error = values[r] - (code + middles[r]) * steps[r]
        codes[r] = code
        for later in range(r + 1, len(values)):
            values[later] -= error * spread[r, later]
    return codes
