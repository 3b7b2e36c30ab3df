"""Round to nearest on asymmetric grids, one for each group of consecutive weights of a row: the field's baseline.

w' = scale * (code - zero), codes and zeros unsigned integers of `bits` bits, scale float16. At 4 bits and groups of 64
a weight costs 4 + (16 + 4) / 64 = 4.31 bits. Symmetric grids have their zero at 2^(bits - 1) and do not store it: they
are what other programs' formats hold (`nashswarm.exports`). Clipping is searched: of `CLIPS` shrunken ranges, each
group keeps the one with the least squared error (with a second moment at hand, weighted by its diagonal, the inputs'
power).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nashswarm import feedback
from nashswarm.bitpack import pack, unpack
from nashswarm.types import Candidates, Choice, InputError, Job, PackedTensor, TensorSpec

SELLS = ("widths", "candidates")
WIDTHS = (2, 3, 4, 8)
# Matrices of a block that programs multiply as one, and then want in one width.
TEAMS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
CLIPS = tuple(1 - 0.04 * i for i in range(16))  # 1.00 down to 0.40 of the range: 2 bits want about 0.6, 4 bits 0.9
CHUNK = 1 << 24  # weights per round of the search; bounds its temporaries to about 0.3 GiB


@dataclass(frozen=True, slots=True)
class Settings:
    """`group` weights share a grid; embeddings and the head may have groups of their own."""

    group: int = 64
    embedding_group: int | None = None
    clip_search: bool = True
    symmetric: bool = False
    widths: tuple[int, ...] = WIDTHS  # that a market may buy
    fused: bool = False  # where it buys: q, k and v of a block have one width, and so have gate and up

    def __post_init__(self) -> None:
        if not self.widths or not {*self.widths} <= {*WIDTHS} or list(self.widths) != sorted({*self.widths}):
            raise ValueError(f"widths: {list(self.widths)} are not rising widths out of {list(WIDTHS)}")
        for key in ("group", "embedding_group"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: {value} is too small; at least 1 weight")

    def group_of(self, tensor: TensorSpec) -> int:
        """The group for this tensor."""
        own = tensor.part in ("embedding", "head") and self.embedding_group is not None
        return self.embedding_group if own and self.embedding_group is not None else self.group


def encode(job: Job, settings: Settings) -> PackedTensor:
    """Codes, scales and zeros of `choice.bits` bits. The last group of a row is shorter where in % group != 0."""
    assert job.choice.bits is not None
    bits, group = job.choice.bits, settings.group_of(job.tensor)
    scales, zeros = row_grids(job, bits, group, settings, _input_power(job))
    top, step = 2**bits - 1, max(1, CHUNK // job.tensor.shape[1])
    pieces = []
    for i in range(0, job.tensor.shape[0], step):
        groups = _grouped(job.weight[i : i + step], group)
        codes = quantize(groups, scales[i : i + step], zeros[i : i + step], top)
        pieces.append(codes.to(torch.uint8).reshape(groups.shape[0], -1)[:, : job.tensor.shape[1]])
    grids = (scales, None if settings.symmetric else zeros)
    return packed_groups("grouped", job.tensor, torch.cat(pieces), *grids, bits, group)


def offer(job: Job, settings: Settings) -> Candidates:
    """Bytes and damage of a matrix at every width that is for sale. Raises InputError where it has no statistics."""
    model = curvature(job)
    inputs = model.inputs.double()
    return priced(job, settings, lambda error: float(((error @ inputs) * error).sum(1) @ model.rows))


def curvature(job: Job) -> feedback.Curvature:
    """What errors of the matrix cost. Raises InputError where that was not measured."""
    if job.statistics is None:
        raise InputError(f"{job.tensor.name}: there are no statistics; run the score stage")
    return feedback.curvature(job.statistics, job.tensor.name)


def priced(job: Job, settings: Settings, damage: Callable[[Tensor], float]) -> Candidates:
    """One player, rounded to nearest at every width. `damage` of an error, float64 [out, in], twice nats per token."""
    (rows, columns), group = job.tensor.shape, settings.group_of(job.tensor)
    grids = rows * -(-columns // group)
    sizes, damages = [], []
    for bits in settings.widths:
        packed = encode(dataclasses.replace(job, choice=Choice(bits=bits)), settings)
        damages.append(0.5 * damage((decode(packed) - job.weight).double()))
        zeros = 0 if settings.symmetric else -(-bits * grids // 8)
        sizes.append(-(-bits * rows * columns // 8) + 2 * grids + zeros)
    return Candidates(
        options=np.array(settings.widths, np.float64),
        size=np.array(sizes, np.float64)[None],
        distortion=np.minimum.accumulate(np.array(damages))[None],
        continuous=False,
        weights=np.array([job.tensor.weights]),
        whole=True,
        team=_team(job.tensor) if settings.fused else None,
    )


def _team(tensor: TensorSpec) -> str | None:
    """The block's name and the modules that must share a width, for a matrix that is of them."""
    block, _, module = tensor.name.removesuffix(".weight").rpartition(".")
    for team in TEAMS:
        if module in team and tensor.layer is not None:
            return ".".join([block, *team])
    return None


def row_grids(job: Job, bits: int, group: int, settings: Settings, power: Tensor | None) -> tuple[Tensor, Tensor]:
    """The grids of all groups of a matrix: scales float16 and zeros uint8, both [out, groups]."""
    weights = None if power is None else _grouped(power[None], group)
    step = max(1, CHUNK // job.tensor.shape[1])
    pieces = [
        fit_grids(_grouped(job.weight[i : i + step], group), bits, weights, settings, job.tensor.name)
        for i in range(0, job.tensor.shape[0], step)
    ]
    scales, zeros = (torch.cat(part) for part in zip(*pieces, strict=True))
    return scales, zeros


def decode(packed: PackedTensor) -> Tensor:
    """float32 [out, in]. Raises InputError, or ValueError from `bitpack`, for what `encode` did not write."""
    (rows, columns), (bits, group) = packed.shape, _grid_numbers(packed)
    group = min(group, columns)  # whatever a forged one says, no row is padded beyond twice its size
    groups = -(-columns // group)
    zeros_stored = {"zeros": ("uint8", (None,))} if "zeros" in packed.arrays else {}
    packed.expect({"bits", "group"}, codes=("uint8", (None,)), scales=("uint16", (rows, groups)), **zeros_stored)
    scales = torch.from_numpy(np.array(packed.arrays["scales"])).view(torch.float16).view(rows, groups, 1).float()
    zeros: Tensor | int = 2 ** (bits - 1)
    if "zeros" in packed.arrays:
        zeros = torch.from_numpy(unpack(packed.arrays["zeros"], bits, rows * groups)).view(rows, groups, 1)
    codes = torch.from_numpy(unpack(packed.arrays["codes"], bits, rows * columns)).view(rows, columns)
    weights = scales * (_grouped(codes, group).float() - zeros)
    return weights.reshape(rows, -1)[:, :columns].contiguous()


def _grid_numbers(packed: PackedTensor) -> tuple[int, int]:
    """Width and group. Checked before anything is computed of them: 2^bits of a forged width takes all memory."""
    bits, group = packed.scalars["bits"], packed.scalars["group"]
    if type(bits) is not int or bits not in WIDTHS:
        raise InputError(f"bits is {bits!r}, expected one of {', '.join(map(str, WIDTHS))}")
    if type(group) is not int or group < 1:
        raise InputError(f"group is {group!r}, expected a number of weights, at least 1")
    return bits, group


def packed_groups(
    codec: str, tensor: TensorSpec, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int
) -> PackedTensor:
    """The layout that `decode` reads: codes uint8 [out, in], scales float16 [out, groups], zeros uint8 or None."""
    arrays = {"codes": pack(codes.numpy(), bits), "scales": scales.contiguous().view(torch.uint16).numpy()}
    if zeros is not None:
        arrays["zeros"] = pack(zeros.numpy(), bits)
    return PackedTensor(codec, tensor.shape, arrays, {"bits": bits, "group": group})


def fit_grids(groups: Tensor, bits: int, power: Tensor | None, settings: Settings, name: str) -> tuple[Tensor, Tensor]:
    """The grid of every group: float32 [..., group] -> scale float16 [...], zero uint8 [...].

    `power`, broadcastable to `groups`, weights the squared error of the clip search. The range always holds 0, so that
    the zero fits the codes' width even where all weights have one sign. Raises InputError beyond float16's range.
    """
    top = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if settings.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.zeros_like(low, dtype=torch.float16), torch.zeros_like(low)
    for clip in CLIPS if settings.clip_search else (1.0,):
        # Rounded to float16 first: codes must be right for the scale that is stored.
        scale = ((high - low) * (clip / top)).half()
        if not scale.isfinite().all():
            raise InputError(f"{name}: weights reach {groups.abs().max():.3g}, beyond what a float16 scale can carry")
        zero = (-low * clip / scale).nan_to_num(0, top, 0).round_().clamp_(0, top)
        if settings.symmetric:
            zero.fill_(2 ** (bits - 1))
        error = groups - snap(groups, scale, zero, top)
        cost = error.square_() if power is None else error.square_().mul_(power)
        total = cost.sum(-1)
        better = total < best_error
        best_error = torch.where(better, total, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero.to(torch.uint8)


def quantize(groups: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Nearest codes, float32 [..., group], on the grids scale and zero [...]; an all-zero group has code zero."""
    inverse = (1 / scale.float()).nan_to_num_(0, 0, 0)  # a scale that underflowed to 0 decodes to 0 whatever the code
    return (groups * inverse.unsqueeze(-1)).add_(zero.float().unsqueeze(-1)).round_().clamp_(0, top)


def snap(groups: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """The nearest values on the grids, float32 [..., group]."""
    codes = quantize(groups, scale, zero, top)
    return codes.sub_(zero.float().unsqueeze(-1)).mul_(scale.float().unsqueeze(-1))


def _input_power(job: Job) -> Tensor | None:
    """The diagonal of the inputs' second moment, float32 [in], where it is known."""
    if job.statistics is None or job.statistics.second_moment is None:
        return None
    return torch.from_numpy(job.statistics.second_moment).diagonal()


def _grouped(matrix: Tensor, group: int) -> Tensor:
    """[rows, columns] -> [rows, groups, group], the last group padded by repeating the row's last value.

    A repeated value widens no range, so the pad changes no grid (it adds a little weight to that value's error).
    """
    pad = -matrix.shape[1] % group
    if pad:
        matrix = torch.cat([matrix, matrix[:, -1:].expand(-1, pad)], 1)
    return matrix.reshape(matrix.shape[0], -1, group)
