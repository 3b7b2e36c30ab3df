"""Every file in codecs/ against the room's contract: exact round trips, bounded errors, no surprise on odd weights.

A newcomer adds a line to ROWS: the choices under which it is tested, and the bound on its error.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, Models
from safetensors.numpy import load, save
from torch import Tensor

from nashswarm import feedback
from nashswarm.allocators import percentile
from nashswarm.bitpack import unpack
from nashswarm.codecs import classes, coded, gptq, grouped, kept, source, tiles, uniform
from nashswarm.config import load_room
from nashswarm.types import Choice, InputError, Job, NashSwarmError, Offer, PackedTensor, Part, Statistics, TensorSpec

NAME = "model.layers.3.mlp.up.weight"
FLOAT32, FLOAT16 = 2.0**-24, 2.0**-11  # relative rounding errors
TINIEST_HALF = 2.0**-24  # the spacing of float16 near 0


# --- jobs ----------------------------------------------------------------------------------------------------------


def statistics(shape: tuple[int, int], seed: int = 0) -> Statistics:
    """A well-conditioned second moment whose columns differ, and Fisher information whose rows differ."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(4 * shape[1] + 8, shape[1])) * rng.lognormal(size=shape[1])
    return Statistics(
        second_moment=(inputs.T @ inputs / len(inputs)).astype(np.float32),
        fisher=rng.lognormal(size=shape[0]).astype(np.float32),
    )


def job_of(
    weight: Tensor, choice: Choice | Callable[[Tensor], Choice], part: Part = "mlp", found: Statistics | None = None
) -> Job:
    """A job with all that a codec may look at."""
    shape = (weight.shape[0], weight.shape[1])
    importance = weight.abs()
    made = choice if isinstance(choice, Choice) else choice(importance)
    spec = TensorSpec(NAME, shape, "linear", part, 3)
    return Job(spec, weight, made, importance if made.classes else None, found or statistics(shape))


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 20


def with_outlier(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[weight.shape[0] // 2, weight.shape[1] // 3] = 100.0
    return weight


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: normal(24, 64),
    "ragged": lambda: normal(7, 150),
    "one row": lambda: normal(1, 50),
    "one column": lambda: normal(50, 1),
    "one weight": lambda: normal(1, 1),
    "all zero": lambda: torch.zeros(6, 70),
    "constant": lambda: torch.full((6, 70), 0.03),
    "negative constant": lambda: torch.full((6, 70), -0.03),
    "one sign": lambda: normal(6, 70).abs() + 0.5,
    "other sign": lambda: -normal(6, 70).abs() - 0.5,
    "1e-30": lambda: normal(6, 70) * 1e-30,
    "1e30": lambda: normal(6, 70) * 1e30,
    "outlier": lambda: with_outlier(normal(6, 70)),
    "dead rows and columns": lambda: normal(6, 70) * (torch.arange(6)[:, None] % 2) * (torch.arange(70) % 3 > 0),
    "float32's range": lambda: torch.where(normal(6, 70) > 0, 3.4e38, -3.4e38),
}


# --- the table -----------------------------------------------------------------------------------------------------


def bits_of(widths: tuple[int, ...]) -> dict[str, Callable[[Tensor], Choice]]:
    return {f"{bits} bits": lambda importance, bits=bits: Choice(bits=bits) for bits in widths}  # type: ignore[misc]


def mixed(*widths: int) -> Callable[[Tensor], Choice]:
    """Classes of equal shares."""

    def choose(importance: Tensor) -> Choice:
        shares = np.arange(1, len(widths)) / len(widths)
        thresholds = np.quantile(importance.numpy(), shares).astype(np.float32)
        return Choice(classes=widths, thresholds=tuple(map(float, thresholds)))

    return choose


Bound = Callable[[Job, PackedTensor, Tensor], None]


def exact(job: Job, packed: PackedTensor, found: Tensor) -> None:
    assert torch.equal(found, job.weight)


def _within(job: Job, found: Tensor, step: Tensor | float) -> None:
    """Half a step, and float32's rounding of the grid's two ends."""
    slack = 8 * FLOAT32 * float(job.weight.abs().max())
    error = (found.double() - job.weight.double()).abs()
    assert bool((error <= torch.as_tensor(step).double() / 2 * (1 + 1e-5) + slack).all()), float(error.max())


def half_a_step(job: Job, packed: PackedTensor, found: Tensor) -> None:
    """The step is what the weights' range asks for, not what the codec says it took."""
    assert job.choice.bits is not None
    span = float(job.weight.double().max() - job.weight.double().min())
    _within(job, found, span / (2**job.choice.bits - 1))


def half_a_step_of_the_class(job: Job, packed: PackedTensor, found: Tensor) -> None:
    assert job.importance is not None
    places = np.searchsorted(np.array(job.choice.thresholds, np.float32), job.importance.numpy(), side="right")
    steps = torch.zeros(job.tensor.shape, dtype=torch.float64)
    for index, bits in enumerate(job.choice.classes):
        members = job.weight[torch.from_numpy(places == index)].double()
        if len(members):
            steps[torch.from_numpy(places == index)] = (members.max() - members.min()) / (2**bits - 1)
    _within(job, found, steps)


def half_a_step_of_the_group(job: Job, packed: PackedTensor, found: Tensor) -> None:
    """Clipping trades single errors for the group's weighted sum of squares, which may not exceed no clipping's.

    Without clipping an error is at most half a step of the range that holds 0, plus what rounding the scale to float16
    adds over all of its codes.
    """
    group, top = int(packed.scalars["group"]), 2 ** int(packed.scalars["bits"]) - 1
    assert job.statistics is not None
    assert job.statistics.second_moment is not None
    power = torch.from_numpy(job.statistics.second_moment).double().diagonal()
    for start in range(0, job.tensor.shape[1], group):
        weight = job.weight[:, start : start + group].double()
        span = weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)
        bound = span / top / 2 + span * FLOAT16 + top * TINIEST_HALF
        own = power[start : start + group]
        padded = own.sum() + own[-1] * (group - len(own))  # a short group is padded with its last value
        error = (found[:, start : start + group].double() - weight).square() @ own
        assert bool((error <= bound.square() * padded * (1 + 1e-4)).all()), start


def damage(job: Job, error: Tensor) -> float:
    """1/2 tr(outputs E inputs E^T), float64; rows weigh by themselves where only the diagonal of outputs is known."""
    found = feedback.curvature(job.statistics, job.tensor.name)  # type: ignore[arg-type]
    outputs = found.rows.diag() if found.outputs is None else found.outputs.double()
    return 0.5 * float((outputs @ error.double() @ found.inputs.double() * error.double()).sum())


def no_worse_than_nothing(job: Job, packed: PackedTensor, found: Tensor) -> None:
    """Feedback on a clipped grid has no bound per weight; it may not do more damage than zeros would."""
    assert damage(job, job.weight - found) <= damage(job, job.weight) * (1 + 1e-4)


def half_a_step_after_feedback(job: Job, packed: PackedTensor, found: Tensor) -> None:
    """The module's claim: damage is 1/2 sum rows_r (e_rc D_c)^2, each |e_rc| at most half of its step."""
    model, steps = coded._loss_model(job, coded.Settings())
    step = steps.of_rows()[:, None].double() * steps.of_columns(job.choice.step or 0.0).double()
    most = 0.5 * float((step / 2 / model.columns.step.double()).square().sum(1) @ model.rows)
    # Codes beyond 2^24 are not exact in float32: the rounding of the weights themselves comes on top.
    rounding = damage(job, job.weight) * (32 * FLOAT32) ** 2 * job.weight.numel()
    assert damage(job, job.weight - found) <= most * (1 + 1e-3) + rounding


@dataclass(frozen=True)
class Row:
    """How one codec is tested."""

    choices: Mapping[str, Callable[[Tensor], Choice]]
    bound: Bound
    settings: tuple[dict[str, Any], ...] = field(default=({},))


def tiled(*widths: int) -> Callable[[Tensor], Choice]:
    """Tiles of 16 x 128 that take the widths in turn, a strip after the other."""

    def choose(importance: Tensor) -> Choice:
        strips, tiles = -(-importance.shape[0] // 16), -(-importance.shape[1] // 128)
        digits = "".join(str(widths[i % len(widths)]) for i in range(strips * tiles))
        return Choice(tiles=tuple(digits[i : i + tiles] for i in range(0, strips * tiles, tiles)))

    return choose


TILES = {f"{b} bits": tiled(b) for b in tiles.TILE_WIDTHS} | {"mixed": tiled(4, 0, 8, 1, 3, 2, 6, 5)}
STEPS = {f"step 2^{k}": lambda importance, k=k: Choice(step=float(k)) for k in (-8, -6, -4, 0)}  # type: ignore[misc]
GROUPS: tuple[dict[str, Any], ...] = ({}, {"group": 48}, {"group": 1}, {"group": 1000}, {"clip_search": False})
ROWS: dict[str, Row] = {
    "kept": Row({"as it is": lambda importance: Choice()}, exact),
    "uniform": Row(bits_of(uniform.WIDTHS), half_a_step),
    "classes": Row({"2/4/8": mixed(2, 4, 8), "3": mixed(3), "8/2": mixed(8, 2)}, half_a_step_of_the_class),
    "grouped": Row(bits_of(grouped.WIDTHS), half_a_step_of_the_group, GROUPS),
    "gptq": Row(bits_of(gptq.WIDTHS), no_worse_than_nothing, ({}, {"group": 48})),
    "coded": Row(STEPS, half_a_step_after_feedback),
    "tiles": Row(TILES, no_worse_than_nothing),
}
STORES_NOTHING = {"source"}  # the baseline: tested by itself below
NAMES = sorted(p.stem for p in (PROJECT / "src/nashswarm/codecs").glob("*.py") if p.stem != "__init__")
CASES = [
    pytest.param(name, settings, choice, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in settings.items())}-{label}")
    for name in NAMES
    if name in ROWS
    for settings in ROWS[name].settings
    for label, choice in ROWS[name].choices.items()
]


def test_every_codec_has_a_line_in_the_table() -> None:
    assert set(NAMES) <= set(ROWS) | STORES_NOTHING, (
        "a new codec needs a line in ROWS, or the contract is not tested for it"
    )


@cache
def weights(case: str) -> Tensor:
    return WEIGHTS[case]()


# --- the contract --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_room_declares_what_config_reads(name: str) -> None:
    room = load_room("codecs", name)
    assert room.__doc__
    assert dataclasses.is_dataclass(room.Settings)
    assert room.Settings.__dataclass_params__.frozen
    assert isinstance(room.WIDTHS, tuple)
    assert isinstance(room.SELLS, tuple)
    assert {*room.SELLS} <= {"widths", "classes", "candidates"}
    assert all(type(bits) is int and bits > 0 for bits in room.WIDTHS)
    assert room.Settings() == room.Settings()


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize(("name", "settings", "choice"), CASES)
def test_weights_come_back_as_the_codec_meant_them(
    name: str, settings: dict[str, Any], choice: Callable[[Tensor], Choice], case: str
) -> None:
    """Sound results, or an error of ours that names the tensor; never a warning, a crash, or silent nonsense."""
    room, weight = load_room("codecs", name), weights(case)
    job = job_of(weight.clone(), choice)
    packed = encoded(name, job, settings)
    if isinstance(packed, NashSwarmError):
        assert NAME in str(packed)
        assert case in ("1e30", "float32's range", "outlier"), f"ordinary weights are refused: {packed}"
        return
    assert torch.equal(job.weight, weight), "encode changed its input"
    assert packed.codec == name
    assert packed.shape == tuple(weight.shape)
    check_arrays(packed)
    found, again = room.decode(packed), room.decode(packed)
    assert found.dtype == torch.float32
    assert found.shape == weight.shape
    assert found.is_contiguous()
    assert torch.equal(found, again)
    assert bool(found.isfinite().all())
    ROWS[name].bound(job, packed, found)
    assert torch.equal(found, room.decode(through_a_file(packed)))


def encoded(name: str, job: Job, settings: dict[str, Any]) -> PackedTensor | NashSwarmError:
    """The packed tensor, or the error of ours that was raised in its place."""
    room = load_room("codecs", name)
    try:
        packed: PackedTensor = room.encode(job, room.Settings(**settings))
    except NashSwarmError as error:
        return error
    return packed


def check_arrays(packed: PackedTensor) -> None:
    for part, array in {**packed.arrays, **packed.shared}.items():
        assert isinstance(array, np.ndarray), part
        assert part in {"codes", "scales", "zeros", "map", "tables"}
        assert array.flags.c_contiguous, part
        assert array.dtype in (np.uint8, np.int8, np.uint16, np.float16, np.float32), part
    assert not {"codec", "shape"} & set(packed.scalars)
    assert all(type(v) in (int, float) and math.isfinite(v) for v in packed.scalars.values())


def through_a_file(packed: PackedTensor) -> PackedTensor:
    """As packed.py would hand it back: read-only arrays, scalars through JSON."""
    arrays = load(save({k: np.ascontiguousarray(v) for k, v in packed.arrays.items()})) if packed.arrays else {}
    shared = load(save({k: np.ascontiguousarray(v) for k, v in packed.shared.items()})) if packed.shared else {}
    for array in (*arrays.values(), *shared.values()):
        array.flags.writeable = False
    return dataclasses.replace(
        packed, arrays=arrays, shared=shared, scalars=json.loads(json.dumps(dict(packed.scalars)))
    )


@pytest.mark.parametrize(("name", "settings", "choice"), CASES)
def test_encoding_is_deterministic(name: str, settings: dict[str, Any], choice: Callable[[Tensor], Choice]) -> None:
    room = load_room("codecs", name)
    one, two = (room.encode(job_of(normal(9, 70), choice), room.Settings(**settings)) for _ in range(2))
    assert one.scalars == two.scalars
    for mine, other in ((one.arrays, two.arrays), (one.shared, two.shared)):
        assert {k: v.tobytes() for k, v in mine.items()} == {k: v.tobytes() for k, v in other.items()}


def test_curves_hold_up_to_the_finest_steps() -> None:
    """Beyond six bits most codes are escapes, whose values travel apart: they are paid for, too."""
    job = job_of(normal(64, 200), Choice(), "mlp", statistics((64, 200)))
    offered = coded.offer(job, coded.Settings())
    for option, size in list(zip(offered.options, offered.size[0], strict=True))[6::3]:
        choice = Choice(step=-float(option))
        packed = coded.encode(dataclasses.replace(job, choice=choice), coded.Settings())
        assert packed.arrays["codes"].nbytes == pytest.approx(size, rel=0.12)


@pytest.mark.parametrize("shape", [(1, 10), (3, 70000), (32, 9), (256, 1024), (768, 256), (4096, 4096), (50257, 768)])
def test_curves_are_measured_on_rows_of_all_parts(shape: tuple[int, int]) -> None:
    rows = coded._sample_rows(*shape).tolist()
    assert rows == sorted(set(rows))
    assert 0 <= rows[0] <= rows[-1] < shape[0]
    assert len(rows) >= min(shape[0], coded.SAMPLE_ROWS)
    assert max(np.diff([-1, *rows, shape[0]])) <= 2 * shape[0] / len(rows) + 1
    if len(rows) < shape[0] and shape[1] > 1024:
        assert len({row % 64 for row in rows}) > 16  # places within a head


@pytest.mark.parametrize("part", ["attention", "mlp", "embedding", "head"])
@pytest.mark.parametrize("name", [n for n in NAMES if n in ROWS])
def test_every_part_of_a_model_can_be_packed(name: str, part: Part) -> None:
    """A table that is only looked up has no second moment, a tied one has both."""
    room, shape = load_room("codecs", name), (9, 70)
    lookup = {"frequency": np.full(9, 0.1, np.float32), "lookup_moment": 0.01 * np.eye(70, dtype=np.float32)}
    kinds = [statistics(shape)]
    if part == "embedding":
        kinds += [Statistics(**lookup), dataclasses.replace(statistics(shape), **lookup)]
    for found in kinds:
        for choice in ROWS[name].choices.values():
            job = job_of(normal(*shape), choice, part, found)
            decoded = room.decode(room.encode(job, room.Settings()))
            assert decoded.shape == shape
            assert bool(decoded.isfinite().all())


@pytest.mark.parametrize("case", ["dead column", "one token", "tiny", "huge"])
@pytest.mark.parametrize("name", [n for n in NAMES if n in ROWS])
def test_odd_statistics_do_no_harm(name: str, case: str) -> None:
    """Inputs that were always zero, a moment of rank one, moments at the edges of float32."""
    found = statistics((9, 70))
    moment = np.array(found.second_moment)
    if case == "dead column":
        moment[:, ::5] = moment[::5] = 0
    elif case == "one token":
        moment = np.outer(moment[0], moment[0])
    else:
        moment *= {"tiny": np.float32(1e-30), "huge": np.float32(1e30)}[case]
    room = load_room("codecs", name)
    for choice in ROWS[name].choices.values():
        job = job_of(normal(9, 70), choice, found=dataclasses.replace(found, second_moment=moment))
        packed = encoded(name, job, {})
        if isinstance(packed, NashSwarmError):
            assert NAME in str(packed)
            continue
        decoded = room.decode(packed)
        assert bool(decoded.isfinite().all())
        # Not the weights' scale times anything large: feedback must not run away along directions without input.
        assert float((decoded - job.weight).abs().max()) < 40 * float(job.weight.abs().max())


BATCHED = [n for n in NAMES if hasattr(load_room("codecs", n), "encode_all")]


@pytest.mark.parametrize("name", BATCHED)
def test_matrices_coded_together_decode_as_alone(name: str) -> None:
    room = load_room("codecs", name)
    for choice in ROWS[name].choices.values():
        jobs = [
            dataclasses.replace(job, tensor=dataclasses.replace(job.tensor, name=f"w{i}"))
            for i, job in enumerate(
                job_of(normal(*shape, seed=i), choice) for i, shape in enumerate([(9, 70), (30, 8), (1, 5)])
            )
        ]
        together = list(room.encode_all(iter(jobs), room.Settings()))
        assert [n for n, _ in together] == ["w0", "w1", "w2"]
        for job, (_, packed) in zip(jobs, together, strict=True):
            check_arrays(packed)
            assert torch.equal(room.decode(packed), room.decode(room.encode(job, room.Settings())))


OFFERING = [n for n in NAMES if hasattr(load_room("codecs", n), "offer")]


@pytest.mark.parametrize("case", ["normal", "ragged", "one row", "one column", "outlier", "all zero"])
@pytest.mark.parametrize("name", OFFERING)
def test_offers_cost_more_as_they_do_less_damage(name: str, case: str) -> None:
    room = load_room("codecs", name)
    found = room.offer(job_of(weights(case), Choice()), room.Settings())
    players, options = found.size.shape
    assert found.distortion.shape == (players, options)
    assert found.options.shape == (options,)
    assert found.weights.sum() == weights(case).numel()
    assert players % found.per_strip == 0
    assert bool(np.isfinite(found.size).all() and np.isfinite(found.distortion).all())
    assert bool((np.diff(found.options) > 0).all())
    assert bool((np.diff(found.size) >= 0).all() and (np.diff(found.distortion) <= 0).all())
    assert bool((found.size >= 0).all() and (found.distortion >= 0).all())


# --- uniform -------------------------------------------------------------------------------------------------------


def test_uniform_by_hand_at_2_bits() -> None:
    """-1..2 in 4 levels: scale 1, codes 0 1 2 3 and 1 for 0.4 (1.4), 2 for 0.6; four a byte, lowest bits first."""
    weight = torch.tensor([[-1.0, 0.0, 1.0], [2.0, 0.4, 0.6]])
    packed = uniform.encode(job_of(weight, Choice(bits=2)), uniform.Settings())
    assert packed.arrays["codes"].tolist() == [0 | 1 << 2 | 2 << 4 | 3 << 6, 1 | 2 << 2]
    assert packed.arrays["scales"].tolist() == [-1.0, 1.0]
    assert packed.scalars == {"bits": 2}
    assert uniform.decode(packed).tolist() == [[-1.0, 0.0, 1.0], [2.0, 0.0, 1.0]]


def test_uniform_stores_codes_and_two_floats() -> None:
    for bits in uniform.WIDTHS:
        arrays = uniform.encode(job_of(normal(7, 150), Choice(bits=bits)), uniform.Settings()).arrays
        assert {k: v.nbytes for k, v in arrays.items()} == {"codes": -(-7 * 150 * bits // 8), "scales": 8}


# --- classes -------------------------------------------------------------------------------------------------------


def test_a_weight_at_a_threshold_is_in_the_upper_class_as_the_allocator_counts_it() -> None:
    importance = torch.tensor([[0.0, 1.0, 1.5], [2.0, 2.5, 1.0]])
    found = classes.class_map(importance, (1.0, 2.0))
    assert found.tolist() == [[0, 1, 1], [2, 2, 1]]
    offered = [Offer(TensorSpec(NAME, (2, 3), "linear", "mlp", 0), importance.numpy().ravel())]
    allocation = percentile.allocate(offered, percentile.Settings(shares=(0.4, 0.4, 0.2)))
    counts = classes.class_map(importance, allocation.choices[NAME].thresholds).flatten().bincount(minlength=3)
    assert dict(zip((2, 4, 8), counts.tolist(), strict=True)) == allocation.histogram


def test_classes_have_grids_of_their_own() -> None:
    weight = torch.tensor([[0.1, -0.2, 5.0, -7.0, 0.3, 0.0]])
    job = job_of(weight, Choice(classes=(2, 8), thresholds=(1.0,)))
    packed = classes.encode(job, classes.Settings())
    grids = packed.arrays["scales"]
    assert grids[0] == pytest.approx([-0.2, 0.5 / 3], rel=1e-6)
    assert grids[1] == pytest.approx([-7.0, 12 / 255], rel=1e-6)
    assert packed.arrays["codes"].size == 1 + 2
    assert classes.decode(packed)[0, 2:4].tolist() == pytest.approx([5.0, -7.0])


def entropy_bits(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


@pytest.mark.parametrize("shares", [(0.7, 0.2, 0.1), (0.98, 0.01, 0.01), (1 / 3, 1 / 3, 1 / 3)])
def test_the_class_map_is_as_small_as_its_entropy_and_no_smaller(shares: tuple[float, ...]) -> None:
    weight = normal(512, 512)
    importance = weight.abs().numpy()
    thresholds = np.quantile(importance, np.cumsum(shares)[:-1]).astype(np.float32)
    packed = classes.encode(
        job_of(weight, Choice(classes=(2, 4, 8), thresholds=tuple(map(float, thresholds)))), classes.Settings()
    )
    counts = np.bincount(np.searchsorted(thresholds, importance.ravel(), side="right"), minlength=3)
    least = entropy_bits(counts) * weight.numel() / 8
    size = packed.arrays["map"].nbytes
    assert size >= least
    assert size + packed.arrays["tables"].nbytes <= 1.01 * least + 200


def test_the_nash_mix_truly_takes_over_4_bits() -> None:
    """At 70/20/10 %: 3.0 bits of codes and 1.157 of the map, where the paper counts 3.0."""
    weight = normal(512, 512)
    thresholds = tuple(map(float, np.quantile(weight.abs().numpy(), (0.7, 0.9)).astype(np.float32)))
    packed = classes.encode(job_of(weight, Choice(classes=(2, 4, 8), thresholds=thresholds)), classes.Settings())
    bits = 8 * sum(a.nbytes for a in packed.arrays.values()) / weight.numel()
    assert 8 * packed.arrays["codes"].nbytes / weight.numel() == pytest.approx(3.0, abs=0.001)
    assert 3.0 + entropy_bits(np.array([7, 2, 1])) < bits
    assert bits == pytest.approx(4.157, abs=0.02)


# --- grouped -------------------------------------------------------------------------------------------------------


def test_grouped_by_hand_at_2_bits() -> None:
    """Range -1..2: scale 1, zero 1; the second group is short, holds one sign, and its range is stretched to 0."""
    weight = torch.tensor([[-1.0, 0.0, 0.9, 2.0, 3.0, 6.0]])
    settings = grouped.Settings(group=4, clip_search=False)
    packed = grouped.encode(job_of(weight, Choice(bits=2)), settings)
    assert packed.arrays["scales"].view(np.float16).ravel().tolist() == [1.0, 2.0]
    assert unpack(packed.arrays["zeros"], 2, 2).tolist() == [1, 0]
    assert unpack(packed.arrays["codes"], 2, 6)[:4].tolist() == [0, 1, 2, 3]
    assert grouped.decode(packed)[0].tolist() in ([-1, 0, 1, 2, 2, 6], [-1, 0, 1, 2, 4, 6])  # 3 lies between 2 and 4


def test_grouped_at_4_bits_errs_as_theory_says() -> None:
    """Groups of 64 normal weights range over 4.69 standard deviations on average (E max - E min), 15 steps wide.

    So the squared error is E[range^2] / 15^2 / 12 = 22.4 / 2700 = 0.0083 of the variance; clipping gains a little.
    """
    weight = normal(256, 1024)
    ranges = weight.view(-1, 64).amax(1) - weight.view(-1, 64).amin(1)
    theory = float(ranges.square().mean()) / 15**2 / 12
    errors = {}
    for search in (False, True):
        settings = grouped.Settings(group=64, clip_search=search)
        job = dataclasses.replace(job_of(weight, Choice(bits=4)), statistics=None)
        errors[search] = float((grouped.decode(grouped.encode(job, settings)) - weight).square().mean())
    assert theory / float(weight.var()) == pytest.approx(0.0083, rel=0.02)
    # The zero is rounded to a code, which cuts one end by up to half a step: a few percent beyond the plain formula.
    assert errors[False] == pytest.approx(theory, rel=0.05)
    assert 0.85 * theory < errors[True] < errors[False]


@pytest.mark.parametrize("bits", grouped.WIDTHS)
@pytest.mark.parametrize("case", ["normal", "ragged", "one sign", "outlier", "dead rows and columns", "one column"])
def test_the_clip_search_never_does_worse_than_none(case: str, bits: int) -> None:
    weight, errors = weights(case), {}
    for search in (False, True):
        settings = grouped.Settings(group=64 if weight.shape[1] % 64 == 0 else 10, clip_search=search)
        job = dataclasses.replace(job_of(weight, Choice(bits=bits)), statistics=None)
        errors[search] = float((grouped.decode(grouped.encode(job, settings)) - weight).double().square().sum())
    assert errors[True] <= errors[False] * (1 + 1e-6)


def test_the_clip_search_weighs_errors_by_input_power() -> None:
    weight, found = normal(64, 64, seed=1), statistics((64, 64), seed=1)
    power = torch.from_numpy(np.diagonal(found.second_moment).copy())  # type: ignore[arg-type]
    errors = []
    for seen in (found, None):
        job = dataclasses.replace(job_of(weight, Choice(bits=2)), statistics=seen)
        errors.append(float((grouped.decode(grouped.encode(job, grouped.Settings())) - weight).square().sum(0) @ power))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", grouped.WIDTHS)
def test_groups_of_one_sign_keep_their_levels(bits: int, sign: int) -> None:
    weight = sign * torch.linspace(1.0, 1.5, 64)[None]
    found = grouped.decode(grouped.encode(job_of(weight, Choice(bits=bits)), grouped.Settings()))
    assert float((found - weight).abs().max()) <= 1.5 / (2**bits - 1)
    assert bool((found.sign() == sign).all())
    if bits >= 4:
        assert found.unique().numel() >= 4


def test_embeddings_and_heads_have_groups_of_their_own() -> None:
    settings = grouped.Settings(group=64, embedding_group=16)
    parts: tuple[Part, ...] = ("mlp", "attention", "embedding", "head")
    found = {p: grouped.encode(job_of(normal(4, 64), Choice(bits=4), p), settings).scalars["group"] for p in parts}
    assert found == {"mlp": 64, "attention": 64, "embedding": 16, "head": 16}


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(NashSwarmError, match=f"{re.escape(NAME)}: weights reach .*e\\+29, beyond what a float16 scale"):
        grouped.encode(job_of(weights("1e30"), Choice(bits=4)), grouped.Settings())


# --- gptq and coded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq", "coded", "tiles"])
def test_codecs_with_feedback_name_missing_statistics(name: str) -> None:
    room = load_room("codecs", name)
    choice = {"gptq": Choice(bits=4), "coded": Choice(step=-6.0), "tiles": Choice(tiles=("4",))}[name]
    for found in (None, Statistics()):
        job = dataclasses.replace(job_of(normal(4, 8), choice), statistics=found)
        with pytest.raises(NashSwarmError, match=re.escape(NAME)):
            room.encode(job, room.Settings())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_beats_rounding_to_nearest(bits: int) -> None:
    weight = normal(64, 128)
    job = job_of(weight, Choice(bits=bits))
    plain = grouped.decode(grouped.encode(job, grouped.Settings()))
    fed = gptq.decode(gptq.encode(job, gptq.Settings()))
    assert damage(job, fed - weight) < damage(job, plain - weight)


# --- kept and source -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float16, 2), (torch.bfloat16, 2), (torch.float32, 4)])
def test_kept_takes_the_narrowest_lossless_type(dtype: torch.dtype, bytes_each: int) -> None:
    weight = (torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype).float()
    weight[0, 0] = -0.0
    packed = kept.encode(job_of(weight, Choice()), kept.Settings())
    assert packed.arrays["codes"].nbytes == weight.numel() * bytes_each
    assert torch.equal(kept.decode(packed).view(torch.int32), weight.view(torch.int32))


def test_source_stores_nothing_and_says_where_the_weights_are() -> None:
    packed = source.encode(job_of(normal(4, 8), Choice(bits=32)), source.Settings())
    assert packed.arrays == {}
    assert packed.shape == (4, 8)
    with pytest.raises(NashSwarmError, match="stores no weights; load the checkpoint"):
        source.decode(packed)


# --- offers of whole matrices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("codec", ["grouped", "gptq"])
def test_an_offer_states_the_bytes_and_the_damage_of_each_width(
    codec: str, symmetric: bool, quantizable: Models
) -> None:
    """Bytes of the arrays; of `grouped` the damage by its definition, with both sides of the quadratic model."""
    model = quantizable("gpt2")
    room = load_room("codecs", codec)
    settings = room.Settings(group=32, symmetric=symmetric)
    tensor = next(t for t in model.index.tensors if "c_proj" in t.name)
    job = Job(tensor, model.checkpoint.tensor(tensor), Choice(), statistics=model.statistics(tensor.name))
    candidates = room.offer(job, settings)
    assert candidates.whole
    statistics = job.statistics
    assert statistics is not None
    assert statistics.second_moment is not None
    assert statistics.fisher is not None
    for i, bits in enumerate(candidates.options):
        packed = room.encode(dataclasses.replace(job, choice=Choice(bits=int(bits))), settings)
        assert candidates.size[0, i] == sum(a.nbytes for a in packed.arrays.values())
        if codec == "grouped":
            error = (room.decode(packed) - job.weight).double().numpy()
            damage = 0.5 * statistics.fisher @ ((error @ statistics.second_moment) * error).sum(1)
            assert candidates.distortion[0, i] == pytest.approx(damage, rel=1e-5)
    assert (np.diff(candidates.distortion[0]) < 0).all()


@pytest.mark.parametrize("codec", ["grouped", "gptq"])
def test_an_offer_without_statistics_is_an_error(codec: str, quantizable: Models) -> None:
    model = quantizable("gpt2")
    room = load_room("codecs", codec)
    tensor = model.index.tensors[0]
    with pytest.raises(InputError, match="no statistics; run the score stage"):
        room.offer(Job(tensor, model.checkpoint.tensor(tensor), Choice()), room.Settings())


@pytest.mark.parametrize("widths", [(), (8, 4), (4, 4), (1, 2), (5,)])
def test_widths_that_a_grid_has_not_are_an_error(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="are not rising widths out of"):
        load_room("codecs", "grouped").Settings(widths=widths)
