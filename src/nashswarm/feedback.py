"""Sequential rounding with error feedback (GPTQ, Frantar et al. 2022, arXiv:2210.17323; LDLQ in QuIP, Chee et al. 2023,
arXiv:2307.13304, which it equals).

For y = W x the damage of an error E of W is 1/2 sum_r rows_r (E H E^T)_rr. With H = U D^2 U^T, U upper triangular with
a diagonal of ones, in the order in which columns are rounded, it is 1/2 sum_rc rows_r D_c^2 (E U)_rc^2. A column's
target is the weights and what errors before it hand on, E_rj U_jc of each; then (E U)_rc is its plain rounding error,
columns no longer interact, and each can have its own precision. H^-1, which GPTQ factors, is not needed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nashswarm import triangular
from nashswarm.patches import Patch
from nashswarm.threads import in_step, team
from nashswarm.types import InputError, Job, Statistics

DAMPING = 0.01  # of the mean of H's diagonal; the original's value
BLOCK = 128  # columns between two matrix products; the original's value
GROUP = 64  # rows between two, at least
STEPS = 48  # in which all rows, or columns, are rounded, or fewer: more would cost threads more than they gain
FAR = 1024  # rows for which what is handed on by those far above is added up at once
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

    inputs: Tensor  # float32 or float64 [in, in]
    rows: Tensor  # float64 [out], the diagonal of `outputs`
    outputs: Tensor | None = None  # float32 [out, out]


@dataclass(frozen=True, slots=True)
class Factor:
    """Columns in rounding order, and R of the moment and some damping, in that order: R R^T, R = U D."""

    order: Tensor  # int64 [in]
    found: triangular.Factored  # float64 [in, in]
    added: float  # to the moment's diagonal

    @property
    def pivot(self) -> Tensor:
        """D_c of every column, float64 [in], in rounding order."""
        return self.found.upper.diagonal()

    @property
    def step(self) -> Tensor:
        """1 / D_c of every column, float32 [in], in the matrix's own order: steps for which all cost the same."""
        return self._back(self.pivot.reciprocal().float())

    def damage(self) -> Tensor:
        """(U^-1 M U^-T)_cc, float64 [in], in the matrix's own order: of a unit's error, with what feedback adds.

        M is the moment without damping: with R R^T = M + added, R^-1 M R^-T = 1 - added R^-1 R^-T. Where nothing was
        added, it is D_c^2.
        """
        squares = dict[int, Tensor]()

        def take(columns: slice, values: Tensor) -> None:
            squares[columns.start] = values.square_().sum(1)

        self.found.inverse(take)
        total = torch.zeros_like(self.pivot)
        for _, own in sorted(squares.items()):
            total[: len(own)] += own
        return self._back((1 - self.added * total).clamp(min=0) * self.pivot.square())

    def unit(self, columns: slice) -> Tensor:
        """U's columns, down to their last diagonal: float32 [columns.stop, columns]; below it there is anything."""
        return (self.found.upper[: columns.stop, columns] / self.pivot[columns]).float()

    def spread(self) -> Tensor:
        """U, float32 [in, in]; below the diagonal there is anything."""
        found = torch.empty(self.found.upper.shape)

        def take(columns: slice) -> None:
            found[: columns.stop, columns] = self.unit(columns)

        with team(len(found)) as run:
            run(take, triangular.tiles(len(found)))
        return found

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
        return Curvature(torch.from_numpy(lookup), _floored(_double(frequency)))
    inputs, rows = torch.from_numpy(statistics.second_moment), _double(statistics.fisher)
    if lookup is not None and frequency is not None:
        ratio = float(frequency.sum(dtype="float64")) / max(float(rows.sum()), 1e-300)
        inputs = inputs.double() + ratio * _double(lookup)
    if statistics.gradient_moment is None:
        return Curvature(inputs, _floored(rows))
    return Curvature(inputs, rows, torch.from_numpy(statistics.gradient_moment))


def _floored(rows: Tensor) -> Tensor:
    return torch.lerp(rows, rows.mean(), TOKEN_FLOOR)


def _double(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).double()


def factor(moment: Tensor, name: str, damping: float = DAMPING, together: int = 1) -> Factor:
    """Order the columns by falling input power (act-order) and factor the moment, in float64.

    Arguments: `together`, how many that are next to each other stay so; 0: all, as they are.
    Where the Cholesky factorisation fails, damping is raised tenfold, and that is logged. Raises InputError for a
    moment that is not finite.
    """
    if not math.isfinite(float(moment.sum())):
        raise InputError(
            f"{name}: the inputs' second moment is not finite; are there huge activations? use float32 weights"
        )
    power = moment.diagonal().double()
    order = _falling(power, together or len(power))
    mean = max(float(power.mean()), 1e-30)
    while damping <= 1e6:
        added = damping * mean
        found = triangular.factored(_damped(moment, order, added))
        if found:
            return Factor(order, found, added)
        logger.warning("%s: Cholesky factorisation failed at damping %g; trying %g", name, damping, damping * 10)
        damping *= 10
    raise InputError(f"{name}: the inputs' second moment cannot be factored at any damping")


def _falling(power: Tensor, together: int) -> Tensor:
    """An order by falling power of parts of so many, the last one of what is left."""
    parts = triangular.tiles(len(power), together)
    mean = torch.stack([power[own].mean() for own in parts])
    order = mean.argsort(descending=True, stable=True).tolist()
    return torch.cat([torch.arange(parts[i].start, parts[i].stop) for i in order])


def _damped(moment: Tensor, order: Tensor, added: float) -> Tensor:
    """In another order, with something added to the diagonal; float64."""
    found = torch.empty(moment.shape, dtype=torch.float64)

    def take(rows: slice) -> None:
        found[rows] = moment.index_select(0, order[rows]).index_select(1, order)

    with team(len(order)) as run:
        run(take, triangular.tiles(len(order)))
    found.diagonal().add_(added)
    return found


@dataclass(frozen=True, slots=True)
class LossModel:
    """What rounding errors e of one matrix do, each taken as it is when its turn comes.

    Rounding goes by damped moments, since errors along directions without curvature would leave the range in which the
    loss is quadratic: it keeps 1/2 sum_rc rows_r (e_rc D_c)^2 small. What the errors then cost is another matter: it
    is the model without damping whose predictions measurements confirm.
    """

    curvature: Curvature
    columns: Factor
    spread: Factor | None  # how errors act on later rows, where rows interact
    rows: Tensor  # float64 [out]

    def damage(self) -> tuple[Tensor, Tensor]:
        """a, float64 [out], and b, float64 [in]: errors cost 1/2 sum_rc a_r b_c e_rc^2, nats per token."""
        return self.curvature.rows if self.spread is None else self.spread.damage(), self.columns.damage()


def loss_model(job: Job, codec: str, input_damping: float, output_damping: float, together: int) -> LossModel:
    """The loss around a matrix. Arguments: `together`, of its rows: see `factor`.

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
    spread = factor(found.outputs, name, output_damping, together)
    return LossModel(found, columns, spread, spread.step.double() ** -2)


def round_columns(patch: Patch, quantize: Callable[[int, Tensor], Tensor]) -> None:
    """Round a patch column by column, where rows do not interact.

    Arguments: `quantize(column, values)` gives the rounded values of a column, float32 [R], and keeps its codes.
    """
    weights, values, between = map(torch.from_numpy, (patch.weights, patch.values, patch.between))
    for i, column in enumerate(patch.columns.tolist()):
        weights[i].sub_(quantize(column, values[i]))
        values[i + 1 :].addr_(between[i, i + 1 :], weights[i])


def sweep(
    weight: Tensor,
    columns: Factor,
    rows: Factor | None,
    size: int,
    edges: Sequence[int],
    visit: Callable[[Patch], None],
) -> None:
    """Round `weight`, float32 [out, in], patch by patch: `size` columns, GROUP rows or more, cut at `edges`.

    With both sides' factors, 1/2 tr(outputs E inputs E^T) = 1/2 sum_rc (S_r D_c G_rc)^2, where G = V^T E U and the
    outputs' moment is V S^2 V^T. G_rc is an element's plain rounding error if its target is the weight, what E before
    it in its row hands on by U, and what F = E U before it in its column hands on by V (YAQA, Tseng et al. 2025,
    arXiv:2505.22988).

    A patch waits for those of the columns before in its rows, and of the rows before in its columns. So while one
    thread goes down the rows of some columns, the next follows it down the next columns: `visit`, which rounds a patch
    in place, is called by a crew of threads (see `threads.crew`), and results are the same however many there are.

    Arguments: `rows`, None where rows do not interact; `edges`, places in rounding order, from 0 to all rows.
    """
    order = row_order(weight, rows)
    rest = _ordered(weight, order, columns.order)  # becomes E^T
    spread, groups = None if rows is None else rows.spread(), _groups(edges, max(GROUP, len(weight) // STEPS))

    def descend(start: int, wait: Callable[[], None], done: Callable[[], None]) -> None:
        """Round columns from `start` on, not below the rows that the columns before have reached."""
        here = slice(start, min(start + size, len(rest)))
        unit = columns.unit(here)
        before, between, above = unit[:start].T.contiguous(), unit[start:].contiguous().numpy(), _Above(spread)
        left = rest.new_empty(len(between), len(weight))  # becomes F^T
        for group in groups:
            wait()
            own = slice(group[0], group[-1])
            weights, values = _part(rest, here, own), _part(left, slice(None), own)
            torch.addmm(weights, before, _part(rest, slice(start), own), out=values)
            handed, near = above.handed(left, own)
            place, cuts = (start, own.start), np.array(group) - own.start
            arrays = weights.numpy(), values.numpy(), handed.numpy(), between, near
            visit(Patch(columns.order[here].numpy(), order[own].numpy(), place, cuts, *arrays))
            done()

    in_step(descend, range(0, len(rest), size), len(groups))


@dataclass
class _Above:
    """What rows hand on to later rows of the same columns; of those far above, for FAR rows at once."""

    spread: Tensor | None  # [out, out]
    base: int = 0
    far: Tensor | None = None  # [C, FAR], of the rows above `base`

    def handed(self, left: Tensor, own: slice) -> tuple[Tensor, np.ndarray]:
        """Arguments: `left`, F^T of all rows, [C, out]. Returns: what is handed to rows `own`, [C, R], and their part
        of `spread`, [R, R], or [0, 0]."""
        if self.spread is None:
            return left.new_zeros(len(left), own.stop - own.start), np.zeros((0, 0), np.float32)
        if self.far is None or own.stop > self.base + self.far.shape[1]:
            self.base, there = own.start, slice(own.start, max(own.stop, own.start + FAR))
            every, handed_on = slice(None), _part(self.spread, slice(own.start), there)
            self.far = left.new_empty(len(left), handed_on.shape[1])
            _products(_part(left, every, slice(own.start)), handed_on, self.far)
        found = _part(self.far, slice(None), slice(own.start - self.base, own.stop - self.base))
        above = slice(self.base, own.start)
        torch.addmm(found, _part(left, slice(None), above), _part(self.spread, above, own), out=found)
        return found, self.spread.numpy()[own, own]


def row_order(weight: Tensor, rows: Factor | None) -> Tensor:
    """In which rows are rounded, int64 [out]."""
    return torch.arange(len(weight)) if rows is None else rows.order


def _ordered(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows and columns of a matrix, [in, out]: a column is contiguous."""
    found = weight.new_empty(weight.shape[::-1])

    def take(own: slice) -> None:
        found[:, own] = weight.index_select(0, rows[own]).index_select(1, columns).T

    with team(len(weight)) as run:
        run(take, triangular.tiles(len(weight)))
    return found


def restored(codes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Codes in rounding order, [in, out], in the matrix's own: [out, in]. Arguments: both sides' orders."""
    found, places = codes.new_empty(codes.shape[::-1]), columns.argsort()

    def take(own: slice) -> None:
        found[rows[own]] = codes[:, own].T.contiguous().index_select(1, places)

    with team(len(found)) as run:
        run(take, triangular.tiles(len(found)))
    return found


def _part(whole: Tensor, rows: slice, columns: slice) -> Tensor:
    """A view, by numpy: torch lets go of Python's lock for each, and sixteen threads would wait for it."""
    return torch.from_numpy(whole.numpy()[rows, columns])


def _products(left: Tensor, right: Tensor, found: Tensor) -> Tensor:
    """left [n, k] right [k, m], columns of it beside each other."""

    def take(own: slice) -> None:
        torch.mm(left, _part(right, slice(None), own), out=_part(found, slice(None), own))

    with team(found.shape[1]) as run:
        run(take, triangular.tiles(found.shape[1]))
    return found


def _groups(edges: Sequence[int], least: int) -> list[list[int]]:
    """Edges of parts next to each other, `least` rows together or few more: products of so many rows are fast."""
    found = [[edges[0]]]
    for edge in edges[1:]:
        if found[-1][-1] - found[-1][0] >= least:
            found.append(found[-1][-1:])
        found[-1].append(edge)
    return found
