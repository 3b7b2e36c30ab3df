"""Where a matrix aims, once those before it are quantized: at what the original would have made of its own inputs.

Errors of quantized layers reach the layers behind them. So matrices are rounded in the order in which the model runs
them, and before one is rounded, its inputs x' behind everything quantized so far are compared, over the calibration
text, with the original's inputs x. Its weights become the ridge regression

    W' = W + E[t x'^T] (E[x' x'^T] + ridge I)^-1,    t = W (x - x') + (the residual stream's error),

the last term where it writes to the residual stream: what the stream lacks there, it adds. Its curvature is measured
anew on x'. Biases follow the means of t and of the rounding error. The ridge is chosen for each matrix by two-fold
cross-validation over windows, so that little text corrects little. The first term is GPTAQ's (Li et al., 2025,
arXiv:2504.02692), the second that of QEP (Arai and Ichikawa, 2025, arXiv:2504.09629) carried to the stream.

All of it is forward passes and linear algebra; no gradient is taken. One copy of the model is held: each block's
original outputs are computed just before it is changed.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nashswarm import triangular
from nashswarm.blocks import Blocks, called_with, is_projection, replaced_blocks
from nashswarm.devices import wide
from nashswarm.threads import all_hands, team
from nashswarm.types import NashSwarmError, TensorSpec

RIDGES = (0.03, 0.2, 1.0, 5.0, math.inf)  # of the inputs' mean power; the last one corrects nothing
JUDGED = 64  # outputs by which a ridge is chosen
LARGE = 2048  # inputs from which on one regression keeps a crew of threads busy
TRACE = 1e-8  # of the inputs' mean power, where taking off the mean leaves nothing but rounding
CPU = torch.device("cpu")
RESIDUAL_TOLERANCE = 1e-3  # relative; how well a block's output must be the sum of what is said to write to it

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Aim:
    """What a matrix should be rounded to, and the second moment of the inputs that it will get."""

    weight: Tensor  # float32 [out, in]
    second_moment: np.ndarray | None = None  # float32 [in, in], about the mean where a bias can follow; None: as before


@dataclass
class Propagation(Blocks):
    """Two streams of hidden states through one model: the original's, and the one behind what was quantized."""

    first: int = 0  # number of the first batch, where these windows are a part of more
    probe: Tensor | None = None  # int64 [1, context], by which the order of matrices is seen; None: the first window
    original: list[Tensor] = field(default_factory=list)  # for each batch, float32 [windows, context, width]
    quantized: list[Tensor] = field(default_factory=list)
    sequence: list[str] = field(default_factory=list)  # the matrices that multiply, as the model runs them
    _layer: int | None = None
    _once: set[str] = field(default_factory=set)  # those of them that run once in a pass
    _inputs: dict[str, list[Tensor]] = field(default_factory=dict)  # the original's, of the present block
    _streams: dict[str, list[Tensor]] = field(default_factory=dict)  # the original's, to which a writer adds
    _outputs: list[Tensor] = field(default_factory=list)  # the original's, of the present block
    _sums: tuple[str, Sums] | None = None  # of those matrices that share their inputs, and the first of them
    _corrections: dict[str, Correction] = field(default_factory=dict)  # of matrices that were not settled since
    _settled: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # of this block: batch -> a matrix' outputs

    @torch.no_grad()
    def start(self) -> None:
        """Run the original up to its first block, and once through, to see in which order matrices are used."""
        self.original = self.embedded()
        with ExitStack() as hooks:
            for module in filter(is_projection, self.model.modules()):
                name = self.name_of(module)
                hooks.enter_context(_before(module, partial(lambda at, _: self.sequence.append(at), name)))
            self.model(self.windows[:1] if self.probe is None else self.probe, use_cache=False)
        self._once = {name for name, calls in Counter(self.sequence).items() if calls == 1}
        self.sequence = list(dict.fromkeys(self.sequence))

    def order(self) -> list[TensorSpec]:
        """All matrices as they are to be quantized: embeddings, blocks as they run, an untied head."""
        known = {t.name: t for t in self.index.tensors}
        inside = [known[n] for n in self.sequence if known[n].layer is not None]
        idle = [t for t in self.index.tensors if t.layer is not None and t not in inside]
        head = [t for t in self.index.tensors if self._is_own_head(t)]
        first = [t for t in self.index.tensors if t.layer is None and t not in head]
        return [*first, *sorted([*inside, *idle], key=lambda t: t.layer or 0), *head]

    @torch.no_grad()
    def aim(self, tensor: TensorSpec, weight: Tensor) -> Aim:
        """Where to round a matrix to. Arguments: `weight`, the original's, float32 [out, in]."""
        if not self.reaches(tensor):
            return Aim(weight)
        source = self.source(tensor)
        if self._sums and self._sums[0] == source:
            sums = self._sums[1]
        else:
            sums = Sums()
            for found in self.compare(tensor):
                if found is None:
                    return Aim(weight)
                sums.add([found])
            self._sums = source or tensor.name, sums
        correction = sums.correction(weight, self.has_bias(tensor), wide(self.model.device))
        self._corrections[tensor.name] = correction
        return correction.aim

    def reaches(self, tensor: TensorSpec) -> bool:
        """Whether a matrix multiplies what matrices before it made."""
        return tensor.name in self.sequence and (tensor.layer is not None or self._is_own_head(tensor))

    @torch.no_grad()
    def source(self, tensor: TensorSpec) -> str | None:
        """The first matrix that has its inputs, and hence its sums: queries, keys and values. None for a writer."""
        self._enter_at(tensor)
        own = self._inputs[tensor.name][:1]
        if tensor.name in self._streams or not own:
            return None
        return next(name for name, inputs in self._inputs.items() if inputs and inputs[0] is own[0])

    def has_bias(self, tensor: TensorSpec) -> bool:
        """Whether a bias can follow the matrix."""
        return self._bias(tensor.name) is not None

    @torch.no_grad()
    def settle(self, tensor: TensorSpec, weight: Tensor, bias: np.ndarray | None = None) -> np.ndarray | None:
        """Put the rounded matrix, float32 [out, in], in the model; its bias takes up the mean of the rounding error.

        Arguments: `bias`, float32 [out], what this returned in a run that was interrupted; such a matrix needs no aim.
        Returns: the bias as it is now, None where there is none.
        """
        correction = self._corrections.pop(tensor.name, None)
        return self.put(tensor, weight, None if correction is None else correction.moved(weight), bias)

    @torch.no_grad()
    def put(
        self, tensor: TensorSpec, weight: Tensor, moved: Tensor | None = None, bias: np.ndarray | None = None
    ) -> np.ndarray | None:
        """As `settle`. Arguments: `moved`, float32 [out], what is added to the bias, if there is one."""
        if self.reaches(tensor):
            self._enter_at(tensor)  # what the original makes of the block is seen before anything in it changes
        elif tensor.layer is not None:
            self._enter(tensor.layer)
        parameter = self.model.get_parameter(tensor.name)
        parameter.copy_(_stored(tensor, weight))
        if tensor.layer is not None and tensor.name in self._once:
            self._settled[tensor.name] = {}
        own = self._bias(tensor.name)
        if own is not None and moved is not None:
            own += moved.to(own.device)
        if own is not None and bias is not None:
            own.copy_(torch.from_numpy(bias))
        return None if own is None else own.cpu().numpy().copy()

    def vector(self, name: str) -> np.ndarray:
        """A vector of the model as it is now, float32. Raises NashSwarmError where a correction left all bounds."""
        value: Tensor = self.model.get_parameter(name).detach()
        if not bool(value.isfinite().all()):
            raise NashSwarmError(
                f"{name}: its correction is not finite; set prefix_tokens: 0, or calibrate on more text"
            )
        return value.cpu().numpy()

    def _is_own_head(self, tensor: TensorSpec) -> bool:
        return tensor.name == self.index.head and tensor.kind != "embedding"

    # --- streams ---------------------------------------------------------------------------------------------------

    def _enter_at(self, tensor: TensorSpec) -> None:
        """Bring both streams to the block of a matrix that `reaches`, or behind all blocks."""
        self._enter(tensor.layer if tensor.layer is not None else len(self.blocks))

    def _enter(self, layer: int) -> None:
        """Bring both streams to a block's input, and keep what the original makes of it."""
        if layer == self._layer:
            return
        if self._layer is None:
            self.quantized, self._layer = self.embedded(), -1
        while self._layer < layer:
            if self._layer >= 0:
                if not self._outputs:
                    self._keep(self._layer)
                for number, hidden in enumerate(self.quantized):
                    with self._remembering(number):
                        self.quantized[number] = self.run(self._layer, number, hidden)
                self.original, self._outputs = self._outputs, []
                self._settled = {}
                self.drop(self._layer)
            self._layer += 1
            if self._layer < len(self.blocks):
                self.hold(self._layer)  # what is rounded is kept until the stream has passed
        self._sums = None
        self._keep(layer)

    def _keep(self, layer: int) -> None:
        """The original's inputs of every matrix of a block, streams and outputs."""
        self._inputs, self._streams, self._outputs = {}, {}, []
        if layer == len(self.blocks):
            head = self.model.get_output_embeddings()
            self._inputs[self.name_of(head)] = [self._head_input(head, hidden) for hidden in self.original]
            return
        modules = self.projections(layer)
        self._inputs = {name: [] for name in modules}
        writers = self._writers(layer)
        self._streams = {name: [] for name in writers}
        for number, hidden in enumerate(self.original):
            written: dict[str, Tensor] = {}  # in the writers' order, which is that in which the model runs them
            with ExitStack() as hooks:
                for name, module in modules.items():
                    see = partial(lambda kept, like, x: kept.append(_by_token(x, like)), self._inputs[name], hidden)
                    hooks.enter_context(_before(module, see))
                for name in writers:
                    hooks.enter_context(_after(modules[name], partial(written.__setitem__, name)))
                output = self.run(layer, number, hidden)
            self._outputs.append(output)
            stream = hidden
            for name, values in written.items():
                self._streams[name].append(stream)
                stream = stream + _by_token(values, hidden) if values.numel() == hidden.numel() else stream
            if number == 0 and writers and not _close(stream, output):
                logger.info("block %d is not the sum of its parts; its residual stream is not corrected", layer)
                writers, self._streams = [], {}

    def _writers(self, layer: int) -> list[str]:
        """Matrices that should add to the residual stream: in each part, the last one, if as wide as the stream."""
        known = {t.name: t for t in self.index.tensors}
        last = {known[n].part: n for n in self.sequence if known[n].layer == layer}
        width = self.original[0].shape[-1]
        return [n for n in self.sequence if n in last.values() and known[n].shape[0] == width]

    @torch.no_grad()
    def compare(self, tensor: TensorSpec) -> Iterator[tuple[int, Products] | None]:
        """Fold and products of both streams' inputs of a matrix, batch by batch.

        None, and nothing more, where they are not the same tokens (routed experts).
        """
        self._enter_at(tensor)
        name, originals = tensor.name, self._inputs[tensor.name]
        weight = _stored(tensor, self.model.get_parameter(name)).float()  # the original's, until it is settled
        if len(originals) != len(self.quantized):
            yield None
            return
        for number, original in enumerate(originals):
            now, stream = self._reach(tensor, number)
            if now is None or now.shape != original.shape or original.shape[:2] != self.quantized[number].shape[:2]:
                yield None
                return
            lacking = self._streams[name][number] - stream if stream is not None else None
            for fold in (0, 1):
                own = slice((fold - (self.first + number) * self.batch) % 2, None, 2)  # windows in turn
                found = products(now[own], original[own], None if lacking is None else lacking[own], weight)
                if found:
                    yield fold, found

    def _reach(self, tensor: TensorSpec, number: int) -> tuple[Tensor | None, Tensor | None]:
        """The inputs that a matrix gets now, if it is run, and the stream that it adds to, if it does."""
        hidden = self.quantized[number]
        if tensor.layer is None:
            return self._head_input(self.model.get_output_embeddings(), hidden), None
        modules, streams = self.projections(tensor.layer), list[Tensor]()
        with ExitStack() as hooks:
            for name in self._streams:
                if name == tensor.name:
                    break
                hooks.enter_context(_after(modules[name], streams.append))
            hooks.enter_context(self._remembering(number))
            call = called_with(modules[tensor.name], partial(self.run, tensor.layer, number, hidden))
        if call is None:
            return None, None
        stream = sum((_by_token(s, hidden) for s in streams), hidden) if tensor.name in self._streams else None
        return _by_token(call[0][0], hidden), stream

    @contextmanager
    def _remembering(self, number: int) -> Iterator[None]:
        """Within, settled matrices of the block do not multiply batch `number` again: nothing before them changed."""
        modules = self.projections(self._layer) if self._layer is not None and self._settled else {}
        settled = [(modules[name], modules[name].forward, outputs) for name, outputs in self._settled.items()]
        for module, own, outputs in settled:
            module.forward = partial(_first_time, own, outputs, number)
        try:
            yield
        finally:
            for module, own, _ in settled:
                module.forward = own

    def _head_input(self, head: nn.Module, hidden: Tensor) -> Tensor:
        with replaced_blocks(self.model, self.blocks, hidden):
            call = called_with(head, partial(self.model, self.windows[: len(hidden)], use_cache=False))
        assert call is not None
        reached: Tensor = call[0][0]
        return reached

    def _bias(self, name: str) -> Tensor | None:
        owner = self.model.get_submodule(name.rpartition(".")[0])
        bias = getattr(owner, "bias", None)
        return bias.data if isinstance(bias, Tensor) else None


Products = dict[str, Tensor]  # sums over tokens of x', of x - x' or the target t, and of their products with x'


def products(now: Tensor, original: Tensor, lacking: Tensor | None, weight: Tensor) -> Products:
    """x' [windows, context, in], x, what the stream lacks [windows, context, width], W [out, in] -> float32.

    A writer's product with its target is formed at once, [in, out]; others may share x - x', [in, in].
    """
    x = now.reshape(-1, now.shape[-1])
    if not len(x):
        return {}
    gone = (original - now).reshape(x.shape)
    found = {"count": torch.tensor(float(len(x))), "x": x.sum(0), "xx": x.T @ x}
    if lacking is None:
        return found | {"gone": gone.sum(0), "x gone": x.T @ gone}
    target = torch.addmm(lacking.reshape(len(x), -1), gone, weight.T)
    return found | {"target": target.sum(0), "x target": x.T @ target}


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

    def add(self, found: Sequence[tuple[int, Products]]) -> None:
        """What batches gave, each with its fold."""
        added: dict[tuple[int, str], list[Tensor]] = {}
        for fold, products in found:
            for key, value in products.items():
                added.setdefault((fold, key), []).append(value.to(wide(value.device)))
        for (fold, key), values in added.items():
            sums = self.folds[fold]
            if key not in sums:
                sums[key] = torch.zeros_like(values[0], dtype=torch.float64)
            _accumulate(sums[key], values)

    def correction(self, weight: Tensor, centered: bool, device: torch.device = CPU) -> Correction:
        """Where to round a matrix to, on the processor.

        Arguments: `weight`, the original's; `centered`, whether a bias can follow; `device`, where the sums are.
        """
        with all_hands():
            ridge, total = self.ridge(weight, centered, device), self.total()
            system = _System.of(total, weight.to(device).double(), centered)
            del total
            added, shift = system.solve(ridge)
            aim = Aim(weight + added.float().cpu(), system.inputs().float().cpu().numpy())
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
        halves = [_System.of(sums, judged, centered, rows).halved() for sums in self.folds]  # will do to choose by

        def judge(trial: tuple[float, int]) -> float:
            ridge, fold = trial
            return halves[1 - fold].error(halves[fold].regress(ridge))

        trials = [(ridge, fold) for ridge in RIDGES for fold in (0, 1)]
        # A GPU's libraries are not to be called first by several threads.
        with team(len(trials) if device == CPU and len(halves[0].moment) < LARGE else 1) as run:
            errors = run(judge, trials)
        return RIDGES[int(np.argmin(np.reshape(errors, (-1, 2)).sum(1)))]


@dataclass(frozen=True, slots=True)
class _System:
    """E[x' x'^T] and E[x' t^T], about the means, if centered; float64, or float32 to choose by."""

    moment: Tensor  # [in, in]
    product: Tensor  # [in, out]
    mean: Tensor  # of x', [in]
    target: Tensor  # mean of t, [out]
    centered: bool

    @classmethod
    def of(cls, sums: Products, weight: Tensor, centered: bool, rows: np.ndarray | None = None) -> _System:
        """Arguments: `weight`, float64 [out, in]; `rows`, the outputs in question, if `weight` has them alone."""
        count, own = sums["count"], slice(None) if rows is None else torch.from_numpy(rows)
        if "target" in sums:
            product, target = sums["x target"][:, own] / count, sums["target"][own] / count
        else:
            product, target = _product(sums["x gone"], weight.T / count), weight @ sums["gone"] / count
        moment, mean = sums["xx"] / count, sums["x"] / count
        if centered:
            moment, product = moment.addr_(mean, mean, alpha=-1), product.addr_(mean, target, alpha=-1)
        return cls(moment, product, mean, target, centered)

    def halved(self) -> _System:
        """In float32."""
        return replace(self, moment=self.moment.float(), product=self.product.float())

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """What to add to the weights, float64 [out, in], and to the bias, float64 [out]."""
        found = self.regress(ridge)
        return found.T, self.target - self.mean @ found if self.centered else torch.zeros_like(self.target)

    def inputs(self) -> Tensor:
        """The inputs' second moment, float64 [in, in]; about the mean, a constant input keeps a trace of its power."""
        moment = self.moment.clone()
        if self.centered:
            power = moment.diagonal() + self.mean.square()
            moment.diagonal().clamp_(min=TRACE * float(power.mean()))
        return moment

    def regress(self, ridge: float) -> Tensor:
        """(moment + ridge)^-1 product, [in, out]; none where that cannot be factored."""
        if ridge == math.inf:
            return torch.zeros_like(self.product)
        moment = self.moment.clone()
        moment.diagonal().add_(ridge * max(float(moment.diagonal().mean()), 1e-30))
        if moment.device == CPU:
            found = triangular.factored(moment)
            return torch.zeros_like(self.product) if found is None else found.solve(self.product)
        lower, failed = torch.linalg.cholesky_ex(moment)
        return torch.zeros_like(self.product) if int(failed) else torch.cholesky_solve(self.product, lower)

    def error(self, found: Tensor) -> float:
        """Mean squared error of a regression's result, up to a constant."""
        return float((found * _product(self.moment, found)).sum() - 2 * (found * self.product).sum())


def _product(left: Tensor, right: Tensor) -> Tensor:
    return triangular.product(left, right) if left.device == CPU else left @ right


def _accumulate(total: Tensor, values: Sequence[Tensor]) -> None:
    """Add to it one after the other, on the processor some rows at a time."""
    if total.dim() < 2 or total.device != CPU:
        for value in values:
            total += value.double()
        return

    def add(rows: slice) -> None:
        own = total[rows]
        for value in values:
            own += value[rows].double()

    with team(len(total)) as run:
        run(add, triangular.tiles(len(total)))


def _stored(tensor: TensorSpec, weight: Tensor) -> Tensor:
    """[out, in] as a layer stores it, and back."""
    return weight.T if tensor.kind == "conv1d" else weight


def _by_token(values: Tensor, hidden: Tensor) -> Tensor:
    """[windows, context, features], also where a model ran its windows as one (OPT); routed experts' are left alone."""
    tokens = hidden.shape[:-1]
    flat = values.dim() < hidden.dim() and len(values) == tokens.numel()
    return values.view(*tokens, -1) if flat else values


def _first_time(forward: Callable[..., Tensor], outputs: dict[int, Tensor], number: int, *arguments: Tensor) -> Tensor:
    if number not in outputs:
        outputs[number] = forward(*arguments)
    return outputs[number]


def _close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= RESIDUAL_TOLERANCE * float(other.abs().max())


@contextmanager
def _before(module: nn.Module, see: Callable[[Tensor], Any]) -> Iterator[None]:
    """Within, `see` gets the module's inputs."""
    handle = module.register_forward_pre_hook(lambda _, arguments: (see(arguments[0]), None)[1])
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: nn.Module, see: Callable[[Tensor], Any]) -> Iterator[None]:
    """Within, `see` gets the module's outputs."""
    handle = module.register_forward_hook(lambda _, arguments, output: (see(output), None)[1])
    try:
        yield
    finally:
        handle.remove()
