"""The loss model: what errors cost that were shaped by damped feedback, against the quadratic form itself."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from nashswarm import feedback
from nashswarm.types import Choice, InputError, Job, Statistics, TensorSpec

ROWS, COLUMNS = 48, 64


def moment(size: int, seed: int) -> np.ndarray:
    """Of correlated inputs whose power falls over three decades, float32 [size, size]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
    x = mixed * torch.logspace(0, -1.5, size)
    return np.asarray((x.T @ x / len(x)).numpy())


def job(outputs: bool = True) -> Job:
    gradient = moment(ROWS, 1)
    found = Statistics(moment(COLUMNS, 0), gradient.diagonal().copy(), gradient if outputs else None)
    spec = TensorSpec("w", (ROWS, COLUMNS), "linear", "mlp", 0)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    return Job(spec, weight, Choice(), statistics=found)


def rounded(weight: Tensor, model: feedback.LossModel, step: float) -> Tensor:
    """Rounded to multiples of `step`, float32 [out, in], errors handed on to later columns and, if need be, rows."""
    found = torch.empty_like(weight)
    spread = None if model.spread is None else model.spread.spread().numpy()

    def quantize(column: int, values: Tensor) -> Tensor:
        targets = values.numpy().copy()
        for r in range(len(targets)):
            found[r, column] = float(np.round(targets[r] / step) * step)
            if spread is not None:
                targets[r + 1 :] += (float(values[r]) - float(found[r, column])) * spread[r, r + 1 :]
        return found[:, column].clone()

    visit = partial(feedback.round_columns, quantize=quantize)
    feedback.sweep(weight, model.columns, None, 24, [0, len(weight)], visit)
    return found


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("damping", [1e-6, 0.03, 1.0])
def test_the_damage_of_uniform_errors_is_predicted(outputs: bool, damping: float) -> None:
    """Evenly spread errors of a step s have the power s^2 / 12, and no correlation before they are handed on."""
    task, step = job(outputs), 0.02
    model = feedback.loss_model(task, "test", damping, damping, together=0)
    error = (task.weight - rounded(task.weight, model, step)).double()
    curvature = model.curvature
    true = curvature.rows.diag() if curvature.outputs is None else curvature.outputs.double()
    measured = 0.5 * float((true @ error @ curvature.inputs.double() * error).sum())
    rows, columns = model.damage()
    predicted = 0.5 * step**2 / 12 * float(rows.sum() * columns.sum())
    assert measured == pytest.approx(predicted, rel=0.15)
    if damping == 1.0:
        damped = 0.5 * step**2 / 12 * float(model.rows.sum() * (model.columns.step.double() ** -2).sum())
        assert damped > 1.3 * measured


def test_without_damping_damage_is_what_rounding_sees() -> None:
    model = feedback.loss_model(job(), "test", 1e-9, 1e-9, together=1)
    rows, columns = model.damage()
    assert torch.allclose(rows, model.rows, rtol=1e-3)
    assert torch.allclose(columns, model.columns.step.double() ** -2, rtol=1e-3)


def test_what_a_loss_model_needs_is_named() -> None:
    with pytest.raises(InputError, match=r"^w: codec 'test' needs statistics; run the score stage"):
        feedback.loss_model(dataclasses.replace(job(), statistics=None), "test", 0.01, 1.0, together=0)
    silent = Statistics(moment(COLUMNS, 0), np.zeros(ROWS, np.float32))
    with pytest.raises(InputError, match=r"^w: its Fisher information is zero"):
        feedback.loss_model(dataclasses.replace(job(), statistics=silent), "test", 0.01, 1.0, together=0)


def test_tokens_that_calibration_never_saw_keep_a_share_of_the_weight() -> None:
    seen = np.array([900.0, 99.0, 1.0, 0.0], np.float32)
    moment = np.eye(3, dtype=np.float32)
    head = feedback.curvature(Statistics(second_moment=moment, fisher=seen), "head").rows
    table = feedback.curvature(Statistics(frequency=seen, lookup_moment=moment), "embedding").rows
    expected = (1 - feedback.TOKEN_FLOOR) * seen + feedback.TOKEN_FLOOR * seen.mean()
    for rows in (head, table):
        assert rows.numpy() == pytest.approx(expected)
        assert rows.min() > 0
        assert float(rows.sum()) == pytest.approx(float(seen.sum()))
    projection = Statistics(second_moment=moment, fisher=seen, gradient_moment=np.diag(seen))
    assert np.array_equal(feedback.curvature(projection, "projection").rows.numpy(), seen)
