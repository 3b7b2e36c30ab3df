"""Unclipped integers with a step for every row and column of the loss model, trellis, error feedback, entropy coding.

A grid of step s costs about h - log2 s bits a weight after entropy coding and leaves an error of s^2 / 12 (with the two
grids of a trellis, 0.8 of it at the same bits: see `trellis`). With feedback on both sides (see `feedback`) the loss is
1/2 sum_rc rows_r (e_rc D_c)^2; at equal slope -dD/dR, then,

    s_rc = k / D_c * rho_r,    rho_r = rows_r^-a / sqrt(mean(rows^(1 - 2a)))

with one k for the whole model in the limit of high rates; at low rates the market sets one k per matrix by measured
curves. a = 1/2 is the theory for high rates, and is used for projections; tables whose rows are tokens have a = 1/4,
since frequencies span four decades and the rarest rows would lose all their bits.

Steps lie on a grid of 1/8 octave, rounded before feedback, so that a column's or a row's takes one byte. Codes are
any integers. Contexts of the coder are a scale per row and per column and the trellis' quantizer (see `entropy`); its
tables are common to all tensors of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from nashswarm import entropy, feedback, rans, rounding, trellis
from nashswarm.patches import Patch
from nashswarm.threads import team
from nashswarm.types import Candidates, InputError, Job, PackedTensor, TensorSpec, Tuning

SELLS = ("candidates",)
WIDTHS: tuple[int, ...] = ()
STEPS_PER_OCTAVE = 8
BASE_UNITS = 1 << 16  # per octave: an integer in the manifest, exact everywhere
# log2 of the weights' spread in steps, from nearly no bits to 14 a weight; above 2 bits the curves are straight.
SPREADS = np.concatenate([np.arange(-3, 2, 0.5), np.arange(2.0, 13.0)])
# Of the outputs' mean Fisher information: where the local model sees next to no curvature, errors leave its range.
# On the reference model at 3.0 bits, rise in loss by damping: 0.01: 0.107, 0.3: 0.053, 1.0: 0.054 (0.069 without
# interaction of rows); at 2.0 bits 0.01: 1.79, 1.0: 0.38 (0.43 without).
OUTPUT_DAMPING = 1.0
# Of the inputs' mean power. KL at 3.0 bits on the reference and on a Llama-style model: 0.03: 0.0334 and 0.0634, 0.1:
# 0.0331 and 0.0623, 0.3: 0.0333 and 0.0625; at 2.0 bits on the reference model 0.03: 0.179, 0.1: 0.176.
INPUT_DAMPING = 0.1
SAMPLE = 1 << 15  # weights per tensor from which its curves are measured
SAMPLE_ROWS = 32  # at least
SIDES = ("rows", "columns")
COLUMNS = 64  # rounded between two matrix products, at least; with 128, half as many threads could follow each other
SAMPLE_STATES = 8  # of the trellis there: with more, curves are alike
TUNED = {"with": "tuning_steps"}  # settings that no document states where this one is off


@dataclass(frozen=True, slots=True)
class Settings:
    """Exponents a of the rows' weights: of projections, and of tables whose rows are tokens; the rest as it says."""

    row_exponent: float = 0.5
    token_row_exponent: float = 0.25
    states: int = 32  # of the trellis: more are slower and a little better
    prefix_tokens: int = 16384  # of calibration, to fit each matrix to what is quantized before it; 0 for none
    tuning_steps: int = field(default=0, metadata=TUNED)  # in which all codes are trained together; 0 for none
    tuning_tokens: int = field(default=4096, metadata=TUNED)  # of text, drawn from the original, in each of them
    tuning_rate: float | None = field(default=None, metadata=TUNED)  # in steps of the grids; None: 0.19 / sqrt(steps)

    def __post_init__(self) -> None:
        if self.states not in trellis.POLYNOMIALS:
            raise ValueError(f"states: {self.states} is none of {', '.join(map(str, trellis.POLYNOMIALS))}")
        if self.prefix_tokens < 0:
            raise ValueError(f"prefix_tokens: {self.prefix_tokens} is negative; 0 turns the fitting off")
        if self.tuning_steps < 0:
            raise ValueError(f"tuning_steps: {self.tuning_steps} is negative; 0 turns tuning off")
        if self.tuning_tokens < 1:
            raise ValueError(f"tuning_tokens: {self.tuning_tokens} is too small; at least 1, which is a window")
        if self.tuning_rate is not None and not self.tuning_rate > 0:
            raise ValueError(f"tuning_rate: {self.tuning_rate} moves nothing; give more than 0, or null for the rule")


def draft(settings: Settings) -> Settings:
    """As many bytes, made faster: at the same steps, trellises of 8 and of 32 states cost the same to a thousandth."""
    return replace(settings, states=SAMPLE_STATES)


def tuning(settings: Settings) -> Tuning | None:
    """How codes are trained once all matrices are rounded, if they are."""
    steps, tokens, rate = settings.tuning_steps, settings.tuning_tokens, settings.tuning_rate
    return Tuning(steps, tokens, rate) if steps else None


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
        with np.errstate(over="ignore"):  # of a forged base; what is not finite is refused where weights are decoded
            octaves = self.base + factor + self.columns / STEPS_PER_OCTAVE
            return torch.from_numpy(np.exp2(octaves).astype(np.float32))


# --- what the market sees ------------------------------------------------------------------------------------------


def offer(job: Job, settings: Settings) -> Candidates:
    """Bytes and damage of one matrix over a range of k, measured on a sample of its weights, rounded without feedback.

    Feedback moves weights by less than a step, which changes their entropy little and their rounding error not at all.
    """
    model, steps = _loss_model(job, settings)
    rows = _sample_rows(*job.tensor.shape)
    row_damage, column_damage = model.damage()
    weight, damage = job.weight[rows], row_damage[rows]
    scale = float(row_damage.sum() / damage.sum().clamp(min=1e-300))
    relative = weight / (steps.of_rows()[rows, None] * steps.of_columns(0))  # in steps of k = 1
    spread = float(relative.square().mean().sqrt())
    if not spread > 0:
        relative, spread = relative + 1e-30, 1e-30  # an all-zero matrix: any step gives zeros
    factors = float(np.log2(spread)) - SPREADS  # log2 k, falling: rising precision
    widths = steps.of_rows()[rows, None] * (steps.of_columns(0) * column_damage.sqrt().float())
    sizes, damages = [], []
    for factor in factors:
        codes, errors = _round_sample(relative * 2.0**-factor)
        errors = errors.mul(widths).mul_(2.0**factor)
        damages.append(0.5 * scale * float(errors.double().square().sum(1) @ damage))
        counts = entropy.histogram(codes, *entropy.fit_scales(codes), machine=trellis.machine(SAMPLE_STATES))
        sizes.append(_coded_bytes(codes, counts) * job.tensor.shape[0] / len(rows))
    overhead = sum(job.tensor.shape) * 0.5  # a byte per row and column twice, compressed about four to one
    return Candidates(
        options=-factors,
        size=np.maximum.accumulate(np.array(sizes))[None] + overhead,
        distortion=np.minimum.accumulate(np.array(damages))[None],
        continuous=True,
        weights=np.array([job.tensor.weights]),
    )


def _sample_rows(out: int, into: int) -> Tensor:
    """Rows to measure on, int64, rising, at regular distances. Where they are few, one is drawn from each of equal
    parts: far apart, regular ones can all have the same place in their heads."""
    stride = max(1, -(-out * into // SAMPLE))
    if out <= SAMPLE_ROWS:
        return torch.arange(out)
    if out // stride >= SAMPLE_ROWS:
        return torch.arange(0, out, stride)
    places = (np.arange(SAMPLE_ROWS) + np.random.default_rng(0).random(SAMPLE_ROWS)) * (out / SAMPLE_ROWS)
    return torch.from_numpy(places.astype(np.int64))


def _round_sample(scaled: Tensor) -> tuple[np.ndarray, Tensor]:
    """Float32 [rows, columns], in steps, rounded without feedback: codes int32, errors float32, both of that shape."""
    bound = trellis.LARGEST / 2
    patch = Patch.alone(scaled.clamp(-bound, bound).T.contiguous().numpy())
    rows, columns = (np.ones(size, np.float32) for size in scaled.shape)
    states = np.full(len(columns), trellis.START, np.uint8)
    codes = trellis.round_patch(patch, rows, columns, states, trellis.machine(SAMPLE_STATES))
    return np.ascontiguousarray(codes.T), torch.from_numpy(patch.values.T)


def _coded_bytes(codes: np.ndarray, counts: np.ndarray) -> float:
    """Of codes with tables of their own."""
    beyond = entropy.long_escape_bytes(codes) if counts[:, rans.ESCAPE].any() else 0
    return entropy.estimate_bytes(counts, entropy.fit_tables(counts)) + beyond


def _loss_model(job: Job, settings: Settings) -> tuple[feedback.LossModel, Steps]:
    model = feedback.loss_model(job, "coded", INPUT_DAMPING, OUTPUT_DAMPING, together=0)
    exponent = settings.token_row_exponent if model.spread is None else settings.row_exponent
    return model, _steps(model.columns, model.rows, exponent)


def _steps(columns: feedback.Factor, rows: Tensor, exponent: float) -> Steps:
    """Steps at k = 1: rows_r^-a / D_c / sqrt(mean(rows^(1 - 2a)))."""
    mean = float(rows.mean())
    relative = (rows / mean).clamp(min=1e-6)
    rho = -exponent * relative.log2() - 0.5 * torch.log2(relative.pow(1 - 2 * exponent).mean() * mean)
    octaves = columns.step.double().log2()
    row_base, column_base = float(rho.median()), float(octaves.median())
    return Steps(row_base + column_base, _eighths(rho - row_base), _eighths(octaves - column_base))


def _eighths(octaves: Tensor) -> np.ndarray:
    return (octaves * STEPS_PER_OCTAVE).round().clamp(-127, 127).to(torch.int8).numpy()


# --- encoding ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rounded:
    """One matrix after rounding, before the coder's tables are known."""

    name: str
    shape: tuple[int, int]
    base: int  # of the steps, in 1 / BASE_UNITS octaves
    steps: Steps
    states: int
    codes: np.ndarray  # int8, int16 or int32 [out, in]: the narrowest that holds them
    contexts: tuple[np.ndarray, np.ndarray]  # int8 [out], int8 [in]
    counts: np.ndarray  # int64 [TABLES, SYMBOLS], of symbols in their contexts
    size: float  # bytes of its codes with tables of its own

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All of it but its name and shape, as arrays."""
        numbers = {k: np.array(getattr(self, k)) for k in ("base", "states", "size")}
        pairs = {"steps": (self.steps.rows, self.steps.columns), "contexts": self.contexts}
        named = {f"{k}.{side}": a for k, pair in pairs.items() for side, a in zip(SIDES, pair, strict=True)}
        return {**numbers, **named, "codes": self.codes, "counts": self.counts}

    @classmethod
    def from_arrays(cls, tensor: TensorSpec, kept: Mapping[str, np.ndarray]) -> Self:
        """Inverse of `to_arrays`."""
        base, states, size = (kept[k].item() for k in ("base", "states", "size"))
        rows, columns, row_contexts, column_contexts = (kept[f"{k}.{s}"] for k in ("steps", "contexts") for s in SIDES)
        steps = Steps(base / BASE_UNITS, rows, columns)
        contexts = row_contexts, column_contexts
        return cls(tensor.name, tensor.shape, base, steps, states, kept["codes"], contexts, kept["counts"], size)

    def weight(self) -> Tensor:
        """The rounded values, float32 [out, in]."""
        return _values(self.codes.astype(np.int32), self.steps, trellis.machine(self.states))

    def latents(self) -> Tensor:
        """The same in steps."""
        return _in_steps(self.codes.astype(np.int32), trellis.machine(self.states))

    def step(self) -> tuple[Tensor, Tensor]:
        """Of rows, float32 [out], and of columns, float32 [in]; a weight's is their product."""
        return self.steps.of_rows(), self.steps.of_columns(0)

    def recoded(self, codes: np.ndarray) -> Self:
        """The same matrix, with the same steps, and other codes, int32 [out, in].

        Raises InputError for codes beyond all bounds.
        """
        if codes.min() == trellis.OUT_OF_BOUNDS:
            raise InputError(f"{self.name}: codes reach {trellis.LARGEST} in tuning; lower tuning_rate")
        return replace(self, **_fitted(codes, trellis.machine(self.states)))


def search(rounded: Sequence[Rounded], device: torch.device) -> rounding.Processor | rounding.Gpu:
    """What rounds all these matrices at once, while their codes are trained."""
    (states,) = {item.states for item in rounded}
    return rounding.search([item.shape for item in rounded], states, device)


def round_one(job: Job, settings: Settings) -> Rounded:
    """Round one matrix. Raises InputError where its codes leave all bounds, or where it has no statistics."""
    assert job.choice.step is not None
    (model, unit), machine = _loss_model(job, settings), trellis.machine(settings.states)
    base = round((unit.base + job.choice.step) * BASE_UNITS)
    steps = replace(unit, base=base / BASE_UNITS)
    rows, columns = steps.of_rows().numpy(), steps.of_columns(0).numpy()
    # In rounding order, until all are rounded.
    codes, blocks = np.empty(job.tensor.shape[::-1], np.int32), entropy.first_rows(job.tensor.shape)
    edges, begins = trellis.decisions(blocks, model.spread is not None), np.zeros(len(job.weight) + 1, np.bool_)
    begins[blocks] = True
    states = np.empty(len(codes), np.uint8)  # of the machine in every column, in rounding order

    def visit(patch: Patch) -> None:
        column, first = patch.place
        own, fresh = states[column:][: len(patch.columns)], begins[patch.edges[:-1] + first]
        found = trellis.round_patch(patch, rows[patch.rows], columns[patch.columns], own, machine, fresh)
        if found.min() == trellis.OUT_OF_BOUNDS:
            raise InputError(f"{job.tensor.name}: codes reach {trellis.LARGEST}; lower the budget")
        codes[column : column + len(found), first : first + found.shape[1]] = found

    size = max(COLUMNS, len(columns) // feedback.STEPS // COLUMNS * COLUMNS)
    feedback.sweep(job.weight, model.columns, model.spread, size, edges, visit)
    orders = feedback.row_order(job.weight, model.spread), model.columns.order
    fitted = _fitted(feedback.restored(torch.from_numpy(codes), *orders).numpy(), machine)
    return Rounded(job.tensor.name, job.tensor.shape, base, steps, settings.states, **fitted)


def _fitted(codes: np.ndarray, machine: trellis.Machine) -> dict[str, Any]:
    """What `Rounded` holds of codes, int32 [out, in]; here, since matrices are rounded beside each other."""
    with team(len(codes)) as run:
        contexts = entropy.fit_scales(codes, run=run)
        counts = entropy.histogram(codes, *contexts, machine=machine, run=run)
    most = np.abs(codes).max(initial=0) if counts[:, rans.ESCAPE].any() else rans.RADIUS
    narrow = codes.astype(np.min_scalar_type(-1 - most))
    return {"codes": narrow, "contexts": contexts, "counts": counts, "size": _coded_bytes(codes, counts)}


def assemble(rounded: Sequence[Rounded]) -> Iterator[tuple[str, PackedTensor]]:
    """Fit the tables that all matrices have in common, and code every matrix."""
    tables = entropy.fit_tables(np.sum([item.counts for item in rounded], 0))
    shared = {"tables": _bytes(entropy.tables_to_bytes(tables)), "scales": _pack_scales(rounded)}
    position, total = 0, 2 * sum(sum(item.shape) for item in rounded)
    for item in rounded:
        machine = trellis.machine(item.states)
        stream = entropy.encode(item.codes.astype(np.int32), *item.contexts, tables, machine=machine)
        scalars = {"base": item.base, "position": position, "states": item.states, "total": total}
        position += 2 * sum(item.shape)
        yield item.name, PackedTensor("coded", item.shape, {"codes": _bytes(stream)}, scalars, shared)


def encode(job: Job, settings: Settings) -> PackedTensor:
    """One matrix by itself, with tables of its own."""
    return next(assemble([round_one(job, settings)]))[1]


def _pack_scales(rounded: Sequence[Rounded]) -> np.ndarray:
    """All int8 side information of the model in one compressed block: contexts and steps, rows then columns each."""
    pieces = [p for r in rounded for p in (r.contexts[0], r.steps.rows, r.contexts[1], r.steps.columns)]
    return _bytes(entropy.scales_to_bytes(np.concatenate(pieces)))


def decode(packed: PackedTensor) -> Tensor:
    """float32 [out, in]. Raises InputError, or EntropyError, for what `encode` did not write."""
    flat = ("uint8", (None,))
    packed.expect({"base", "position", "states", "total"}, codes=flat, tables=flat, scales=flat)
    (rows, columns), position = packed.shape, packed.scalars["position"]
    stored = (packed.shared[part].tobytes() for part in ("tables", "scales"))
    tables, every = _read_shared(*stored, packed.scalars["total"])
    scales = every[position : position + 2 * (rows + columns)]
    row_context, row_steps, column_context, column_steps = np.split(scales, [rows, 2 * rows, 2 * rows + columns])
    machine, stream = trellis.machine(packed.scalars["states"]), packed.arrays["codes"].tobytes()
    codes = entropy.decode(stream, packed.shape, row_context, column_context, tables, machine=machine)
    return _values(codes, Steps(packed.scalars["base"] / BASE_UNITS, row_steps, column_steps), machine)


@lru_cache(maxsize=1)  # of the model that is being decoded, matrix by matrix
def _read_shared(tables: bytes, scales: bytes, total: int) -> tuple[entropy.Tables, np.ndarray]:
    every = entropy.scales_from_bytes(scales, total)
    every.flags.writeable = False
    return entropy.tables_from_bytes(tables), every


def _values(codes: np.ndarray, steps: Steps, machine: trellis.Machine) -> Tensor:
    return _in_steps(codes, machine).mul_(steps.of_rows()[:, None]).mul_(steps.of_columns(0))


def _in_steps(codes: np.ndarray, machine: trellis.Machine) -> Tensor:
    used = trellis.quantizers(codes, entropy.first_rows(codes.shape), machine)
    return torch.from_numpy(trellis.values(codes, used))


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)
