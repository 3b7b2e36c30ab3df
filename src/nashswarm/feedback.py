"""Sequential rounding with error feedback (GPTQ, Frantar et al. 2022, arXiv:2210.17323, algorithm 1; LDLQ in QuIP).

For y = W x the damage of an error E of W is 1/2 sum_r rows_r (E H E^T)_rr. With U the upper Cholesky factor of H^-1, in
the order in which columns are rounded, and each column's error handed on to the columns not yet rounded, it becomes
1/2 sum_rc rows_r (e_rc / U_cc)^2, with e_rc the plain rounding error of column c as it was when its turn came. Columns
no longer interact, so each can have its own precision.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nashswarm import triangular
from nashswarm.patches import PATCH, Patch
from nashswarm.threads import all_hands, in_step, team
from nashswarm.types import InputError, Job, Statistics

DAMPING = 0.01  # of the mean of H's diagonal; the original's value
BLOCK = 128  # columns between two matrix products; the original's value
GROUP = 128  # rows between two, at least
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
    undamped: Tensor  # float64 [in], diagonal of U M U^T, M the moment without damping; 1 where there was none

    @property
    def step(self) -> Tensor:
        """U_cc of every column, float32 [in], in the matrix's own order."""
        return self._back(self.upper.diagonal())

    @property
    def damage(self) -> Tensor:
        """(U M U^T)_cc / U_cc^2, float64 [in], in the matrix's own order: of a unit's error, with what feedback adds.

        Without damping M = (U^T U)^-1, and it is 1 / U_cc^2.
        """
        return self._back(self.undamped / self.upper.diagonal().double() ** 2)

    def _back(self, values: Tensor) -> Tensor:
        found = torch.empty_like(values)
        found[self.order] = values
        return found


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
    if not math.isfinite(float(moment.sum())):
        raise InputError(
            f"{name}: the inputs' second moment is not finite; are there huge activations? use float32 weights"
        )
    power = moment.diagonal()
    order = power.argsort(descending=True, stable=True) if act_order else torch.arange(len(power))
    mean = max(float(power.mean()), 1e-30)
    while damping <= 1e6:
        added = damping * mean
        found = triangular.factored(_damped(moment, order, added))
        if found:
            return _inverted(found, order, added)
        logger.warning("%s: Cholesky factorisation failed at damping %g; trying %g", name, damping, damping * 10)
        damping *= 10
    raise InputError(f"{name}: the inputs' second moment cannot be factored at any damping")


def _damped(moment: Tensor, order: Tensor, added: float) -> Tensor:
    """In another order, with something added to the diagonal."""
    found = torch.empty_like(moment)

    def take(rows: slice) -> None:
        found[rows] = moment.index_select(0, order[rows]).index_select(1, order)

    with team(len(order)) as run:
        run(take, triangular.tiles(len(order)))
    found.diagonal().add_(added)
    return found


def _inverted(found: triangular.Factored, order: Tensor, added: float) -> Factor:
    """M + added = R R^T with R upper: its inverse is U^T U with U = R^-1, and U M U^T = 1 - added U U^T."""
    upper, squares = torch.zeros(len(order), len(order)), dict[int, Tensor]()

    def take(columns: slice, values: Tensor) -> None:
        upper[: columns.stop, columns] = values
        squares[columns.start] = values.square_().sum(1)

    found.inverse(take)
    total = torch.zeros(len(order), dtype=torch.float64)
    for _, own in sorted(squares.items()):
        total[: len(own)] += own
    return Factor(order, upper, (1 - added * total).clamp(min=0))


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
        return self.curvature.rows if self.spread is None else self.spread.damage, self.columns.damage


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


@dataclass(frozen=True, slots=True)
class Part:
    """Columns and rows next to each other in rounding order, as the errors of those before left them."""

    columns: np.ndarray  # int64 [C], in the matrix
    rows: np.ndarray  # int64 [R], in the matrix
    place: tuple[int, int]  # of the first column and the first row
    edges: np.ndarray  # int64 [pieces + 1], rows of this part at which pieces begin, and its end
    values: Tensor  # float32 [C, R]; becomes what is handed on to later columns
    handed: Tensor  # float32 [C, R]; becomes what is handed on to later rows
    upper: Tensor  # float32 [C, C]
    spread: Tensor | None  # float32 [R, R], where rows interact

    def round_columns(self, quantize: Callable[[int, Tensor], Tensor]) -> None:
        """Round one column after the other, where rows do not interact.

        Arguments: `quantize(column, values)` gives the rounded values of a column, float32 [R], and keeps its codes.
        """
        pivots = self.upper.diagonal().tolist()
        for i, column in enumerate(self.columns.tolist()):
            error = self.values[i]
            error.sub_(quantize(column, error)).div_(pivots[i])
            self.values[i + 1 :].addr_(self.upper[i, i + 1 :], error, alpha=-1)

    def whole(self) -> Patch:
        """All of it; it becomes what becomes of the patch."""
        near = np.zeros((0, 0), np.float32) if self.spread is None else self.spread.numpy()
        values, handed = self.values.numpy(), self.handed.numpy()
        return Patch(self.columns, self.rows, self.place[1], values, handed, self.upper.numpy(), near)

    def patches(self) -> Iterator[Patch]:
        """In turn, each to be rounded before the next, of PATCH rows."""
        near, count = np.zeros((0, 0), np.float32), len(self.rows)
        for first in range(0, count, PATCH):
            here = slice(first, min(first + PATCH, count))
            own, taken = (whole[:, here].contiguous() for whole in (self.values, self.handed))
            if self.spread is not None:
                near = self.spread[here, here].contiguous().numpy()
            place, upper = self.place[1] + first, self.upper.numpy()
            yield Patch(self.columns, self.rows[here], place, own.numpy(), taken.numpy(), upper, near)
            self.values[:, here], self.handed[:, here] = own, taken
            if self.spread is not None and here.stop < count:
                self.handed[:, here.stop :].addmm_(taken, self.spread[here, here.stop :])


def sweep(
    weight: Tensor,
    columns: Factor,
    rows: Factor | None,
    size: int,
    edges: Sequence[int],
    visit: Callable[[Part], None],
) -> None:
    """Round `weight`, float32 [out, in], part by part: `size` columns, and GROUP rows or few more, cut at `edges`.

    With both sides' factors, 1/2 tr(outputs E inputs E^T) = 1/2 sum_rc (e_rc / (U_rr V_cc))^2, where e_rc is the plain
    rounding error of an element after those before it, in its column and in columns before, have handed theirs on
    (YAQA, Tseng et al. 2025, arXiv:2505.22988). Errors go from part to part as matrix products.

    A part waits for those of the columns before in its rows, and of the rows before in its columns. So while one thread
    goes down the rows of some columns, the next follows it down the next columns: `visit`, which rounds a part in
    place, is called by a crew of threads (see `threads.crew`), and results are the same however many there are.

    Arguments: `rows`, None where rows do not interact; `edges`, places in rounding order, from 0 to all rows.
    """
    order = torch.arange(len(weight)) if rows is None else rows.order
    with all_hands():
        rest = weight[order].T[columns.order].contiguous()  # [in, out]: a column is contiguous
        between, groups = None if rows is None else spread(rows), _groups(edges)

    def descend(start: int, wait: Callable[[], None], done: Callable[[], None]) -> None:
        """Round columns from `start` on, not below the rows that the columns before have reached."""
        stop = min(start + size, len(rest))
        upper, errors = columns.upper[start:stop, start:stop].contiguous(), rest.new_zeros(stop - start, len(weight))
        before = columns.upper[:start, start:stop].T.contiguous()
        for group in groups:
            wait()
            top, bottom = group[0], group[-1]
            values = torch.addmm(rest[start:stop, top:bottom], before, rest[:start, top:bottom], alpha=-1)
            if between is None:
                handed, near = torch.zeros_like(values), None
            else:
                handed = errors[:, :top] @ between[:top, top:bottom]
                near = between[top:bottom, top:bottom].contiguous()
            found = columns.order[start:stop].numpy(), order[top:bottom].numpy()
            visit(Part(*found, (start, top), np.array(group) - top, values, handed, upper, near))
            rest[start:stop, top:bottom], errors[:, top:bottom] = values, handed
            done()

    in_step(descend, range(0, len(rest), size), len(groups))


def _groups(edges: Sequence[int]) -> list[list[int]]:
    """Edges of parts next to each other, GROUP rows together or few more: products of so many rows are fast."""
    found = [[edges[0]]]
    for edge in edges[1:]:
        if found[-1][-1] - found[-1][0] >= GROUP:
            found.append(found[-1][-1:])
        found[-1].append(edge)
    return found


def spread(found: Factor) -> Tensor:
    """What a unit of error in one row takes from the targets of later rows, float32 [out, out], in rounding order."""
    return found.upper / found.upper.diagonal()[:, None]
