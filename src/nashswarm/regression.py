"""Which weights, given the inputs that a matrix gets now, make up for what was lost before it.

Sums over the calibration text of the inputs x' behind everything quantized so far, of the original's x and of their
products lead to the ridge regression W' = W + E[t x'^T] (E[x' x'^T] + ridge I)^-1; `propagation` says of what. Its
ridge is chosen by two-fold cross-validation. Sums are float64, and parts of them may be added up anywhere, in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nashswarm import triangular
from nashswarm.devices import wide
from nashswarm.threads import all_hands, team

RIDGES = (0.03, 0.2, 1.0, 5.0, math.inf)  # of the inputs' mean power; the last one corrects nothing
JUDGED = 64  # outputs by which a ridge is chosen
TRACE = 1e-8  # of the inputs' mean power, where taking off the mean leaves nothing but rounding
ALONE = 2048  # inputs up to which one of several ridges that are tried is left to a library, with one thread
EDGE = 256  # rows of a moment that are formed together
CHUNK = 1 << 20  # numbers that a thread adds at a time
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Aim:
    """What a matrix should be rounded to, and the second moment of the inputs that it will get."""

    weight: Tensor  # float32 [out, in]
    second_moment: np.ndarray | None = None  # float32 [in, in], about the mean where a bias can follow; None: as before


Products = dict[str, Tensor]  # sums over tokens of x', of x - x' or the target t, and of their products with x'
Compared = tuple[int, Products]  # of windows of one fold, and which


def products(now: Tensor, original: Tensor, lacking: Tensor | None, weight: Tensor) -> Products:
    """x' [windows, context, in], x, what the stream lacks [windows, context, width], W [out, in] -> float32.

    A writer's product with its target is formed at once, [in, out]; others may share x - x', [in, in]. The moment of x'
    is what `lower` makes of it.
    """
    x = now.reshape(-1, now.shape[-1])
    gone = (original - now).reshape(x.shape)
    found = {"count": torch.tensor(float(len(x))), "x": x.sum(0), "xx": lower(x)}
    if lacking is None:
        return found | {"gone": gone.sum(0), "x gone": x.T @ gone}
    target = torch.addmm(lacking.reshape(len(x), -1), gone, weight.T)
    return found | {"target": target.sum(0), "x target": x.T @ target}


def lower(x: Tensor) -> Tensor:
    """x^T x, which is symmetric, without most of what is above its diagonal: [tokens, in] -> [about in^2 / 2].

    Half the work and half the bytes of a square. Rows come EDGE at a time, all of them up to the last one's diagonal.
    """
    found = x.new_empty(lower_size(x.shape[1]))
    for rows, values in _strips(found, x.shape[1]):
        torch.mm(x[:, rows].T, x[:, : rows.stop], out=values)
    return found


def lower_size(size: int) -> int:
    """How many numbers `lower` makes of `size` columns."""
    return sum(rows.stop * (rows.stop - rows.start) for rows in triangular.tiles(size, EDGE))


def square(flat: Tensor, count: float, mean: Tensor, centered: bool, dtype: torch.dtype) -> Tensor:
    """E[x x^T] by what `lower` made over so many tokens, float64; about the mean, [in], if centered: [in, in].

    Memory is what this takes time for, so all is done in one go.
    """
    found = flat.new_empty(len(mean), len(mean), dtype=dtype)

    def unfold(part: tuple[slice, Tensor]) -> None:
        rows, values = part
        own = values / count
        if centered:
            own.addr_(mean[rows], mean[: rows.stop], alpha=-1)
        found[rows, : rows.stop] = own
        found[: rows.start, rows] = own[:, : rows.start].T

    parts = [*_strips(flat, len(mean))]
    with team(len(parts) if flat.device == CPU else 1) as run:
        run(unfold, reversed(parts))  # the longest come first
    return found


def _strips(flat: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Views of rows, [EDGE or fewer, up to their last diagonal], next to each other in `flat`."""
    first = 0
    for rows in triangular.tiles(size, EDGE):
        count = rows.stop - rows.start
        yield rows, flat[first : first + count * rows.stop].view(count, rows.stop)
        first += count * rows.stop


@dataclass(frozen=True, slots=True)
class Correction:
    """An aim, what it adds to the bias, float32 [out], and the mean of the inputs, float32 [in]."""

    aim: Aim
    shift: Tensor
    mean: Tensor

    def moved(self, weight: Tensor) -> Tensor:
        """What the bias takes up, float32 [out], where the matrix was rounded to `weight`."""
        return self.shift + (self.aim.weight - weight) @ self.mean


@dataclass
class Sums:
    """Products of two folds of windows, added up in float64."""

    folds: list[Products] = field(default_factory=lambda: [{}, {}])

    def add(self, found: Compared) -> None:
        """What some windows gave."""
        fold, products = found
        sums, pieces = self.folds[fold], list[tuple[np.ndarray, np.ndarray]]()
        for key, value in products.items():
            own = value.to(wide(value.device))
            if key not in sums:
                sums[key] = torch.zeros_like(own, dtype=torch.float64)
            if own.device == CPU:
                total, added = sums[key].view(-1).numpy(), own.reshape(-1).numpy()
                pieces += [(total[part], added[part]) for part in triangular.tiles(len(total), CHUNK)]
            else:
                sums[key] += own
        with team(len(pieces)) as run:  # one for all of them, since it takes time to begin
            run(_accumulate, pieces)

    def correction(self, weight: Tensor, centered: bool, device: torch.device = CPU) -> Correction:
        """Where to round a matrix to, on the processor.

        Arguments: `weight`, the original's; `centered`, whether a bias can follow; `device`, where the sums are.
        """
        with all_hands():
            ridge, total = self.ridge(weight, centered, device), self.total()
            system = _System.of(total, weight.to(device).double(), centered, torch.float64)
            del total
            added, shift = system.solve(ridge)
            aim = Aim(weight + added.float().cpu(), system.inputs().cpu().numpy())
            return Correction(aim, shift.float().cpu(), system.mean.float().cpu())

    def total(self) -> Products:
        """Of both folds."""
        first, second = self.folds
        return {key: first[key] + second[key] for key in first} if second else first

    def ridge(self, weight: Tensor, centered: bool, device: torch.device = CPU) -> float:
        """That which serves best where the one fold's regression is held against the other fold."""
        if not self.folds[1]:
            return RIDGES[2]
        rows = np.random.default_rng(0).permutation(len(weight))[:JUDGED]
        judged = weight[torch.from_numpy(rows)].to(device).double()
        systems = [_System.of(sums, judged, centered, torch.float32, rows) for sums in self.folds]  # will do to choose

        def judge(trial: tuple[float, int]) -> float:
            ridge, fold = trial
            return systems[1 - fold].error(systems[fold].regress(ridge, beside=True))

        trials = [(ridge, fold) for ridge in RIDGES for fold in (0, 1)]
        solved = sum(ridge < math.inf for ridge, _ in trials)  # the others come last and take little time
        # A GPU's libraries are not to be called first by several threads.
        with team(solved if device == CPU else 1) as run:
            errors = run(judge, trials)
        return RIDGES[int(np.argmin(np.reshape(errors, (-1, 2)).sum(1)))]


@dataclass(frozen=True, slots=True)
class _System:
    """E[x' x'^T] and E[x' t^T], about the means, if centered; float64, or float32."""

    moment: Tensor  # [in, in]
    product: Tensor  # [in, out]
    mean: Tensor  # of x', [in]
    target: Tensor  # mean of t, [out]
    centered: bool

    @classmethod
    def of(
        cls, sums: Products, weight: Tensor, centered: bool, dtype: torch.dtype, rows: np.ndarray | None = None
    ) -> _System:
        """Arguments: `weight`, float64 [out, in]; `rows`, the outputs in question, if `weight` has them alone."""
        count, own = sums["count"], slice(None) if rows is None else torch.from_numpy(rows)
        if "target" in sums:
            product, target = sums["x target"][:, own] / count, sums["target"][own] / count
        else:
            product, target = _product(sums["x gone"], weight.T / count), weight @ sums["gone"] / count
        mean = sums["x"] / count
        moment = square(sums["xx"], float(count), mean, centered, dtype)
        if centered:
            product.addr_(mean, target, alpha=-1)
        return cls(moment, product.to(dtype), mean, target, centered)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """What to add to the weights, float64 [out, in], and to the bias, float64 [out]."""
        found = self.regress(ridge)
        return found.T, self.target - self.mean @ found if self.centered else torch.zeros_like(self.target)

    def inputs(self) -> Tensor:
        """The inputs' second moment, float32 [in, in]; about the mean, a constant input keeps a trace of its power."""
        found = self.moment.float()
        if self.centered:
            power = self.moment.diagonal() + self.mean.square()
            found.diagonal().clamp_(min=TRACE * float(power.mean()))
        return found

    def regress(self, ridge: float, beside: bool = False) -> Tensor:
        """(moment + ridge)^-1 product, [in, out]; none where that cannot be factored.

        Arguments: `beside`, whether others of the kind are solved beside it.
        """
        if ridge == math.inf:
            return torch.zeros_like(self.product)
        moment = self.moment.clone()
        moment.diagonal().add_(ridge * max(float(moment.diagonal().mean()), 1e-30))
        if moment.device == CPU and not (beside and len(moment) <= ALONE):
            found = triangular.factored(moment, triangular.coarse(len(moment)) if beside else triangular.TILE)
            return torch.zeros_like(self.product) if found is None else found.solve(self.product)
        lower, failed = torch.linalg.cholesky_ex(moment)
        return torch.zeros_like(self.product) if int(failed) else torch.cholesky_solve(self.product, lower)

    def error(self, found: Tensor) -> float:
        """Mean squared error of a regression's result, up to a constant."""
        return float((found * (self.moment @ found)).sum() - 2 * (found * self.product).sum())


def _product(left: Tensor, right: Tensor) -> Tensor:
    return triangular.product(left, right) if left.device == CPU else left @ right


def _accumulate(piece: tuple[np.ndarray, np.ndarray]) -> None:
    """Add the second to the first; by views of numpy's, which cost no turn of Python's lock."""
    total, added = map(torch.from_numpy, piece)
    total.add_(added)
