"""Schedules of tasks whose times are known, the cost model's fit, and what calls move against their formulas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PROJECT

from nashswarm import preflight, statistics
from nashswarm.benchmarks import crews, recording, scale
from nashswarm.benchmarks.costs import TERMS, Counts, Rates, fit
from nashswarm.benchmarks.quantization import Shape, write_model
from nashswarm.benchmarks.schedule import NONE, Made, Network, Phase, Sum, Task, _Run, jobs, makespan, serial
from nashswarm.benchmarks.tables import tables
from nashswarm.benchmarks.workload import CHAINED, INSIDE, TABLES, At, Model, Text, parts, returned, sent, tokens_of
from nashswarm.config import Scoring
from nashswarm.console import quiet
from nashswarm.engine import AHEAD
from nashswarm.models import describe

WORKERS = (1, 2, 4, 8, 16)
METHOD = "market-coded-3_0"


# --- schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
def test_equal_tasks_are_as_many_times_faster_as_there_are_workers(workers: int) -> None:
    phases = [Phase([Task(2.0)] * 48)]
    assert serial(phases) / makespan(phases, workers) == pytest.approx(workers)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_chain_is_no_faster(workers: int) -> None:
    phases = [Phase([Task(2.0)], gap=0.5)] * 10
    assert makespan(phases, workers) == pytest.approx(serial(phases)) == pytest.approx(25)


@pytest.mark.parametrize("workers", WORKERS)
def test_what_the_driver_does_alone_bounds_the_rest(workers: int) -> None:
    phases = [Phase([Task(1.0)] * 32, gap=8.0)]  # Amdahl: a fifth is serial
    assert serial(phases) / makespan(phases, workers) == pytest.approx(1 / (0.2 + 0.8 / workers))


def test_more_workers_than_tasks_are_idle() -> None:
    phases = [Phase([Task(3.0)] * 4)]
    assert makespan(phases, 16) == makespan(phases, 4) == 3


def test_bytes_pass_one_link_each_way() -> None:
    network = Network(bandwidth=10.0, latency=0.25)
    assert makespan([Phase([Task(1.0, sent=20, returned=30)])], 1, network) == pytest.approx(2 + 0.25 + 1 + 3 + 0.25)
    many = [Phase([Task(0.0, returned=10)] * 8)]
    assert makespan(many, 8, network) == pytest.approx(0.25 + 8 + 8 * 0 + 0.25)  # a second each, whoever computes


def test_results_are_handled_while_workers_compute() -> None:
    phases = [Phase([Task(1.0, after=1.0)] * 10)]
    assert serial(phases) == 20
    assert makespan(phases, 1) == pytest.approx(11)


def test_every_worker_makes_what_its_tasks_have_in_common() -> None:
    phases = [Phase([Task(1.0)] * 8, start=3.0)]
    assert serial(phases) == makespan(phases, 1) == 11
    assert makespan(phases, 4) == 5


def test_a_long_task_holds_up_those_that_are_too_far_ahead() -> None:
    """Results come in order, so no more than AHEAD tasks for each worker are under way."""
    tasks = [Task(10.0)] + [Task(1.0)] * 20
    within = 2 * AHEAD - 1  # which the second worker has done by then
    assert makespan([Phase(tasks)], 2) == pytest.approx(10 + (20 - within) / 2, abs=1)
    assert makespan([Phase(tasks, ahead=21)], 2) < makespan([Phase(tasks)], 2)


def test_sums_are_spread_over_workers() -> None:
    phases = [Phase([Task(1.0)] * 4, sums=[Sum(add=0.5, result=1.0)] * 4, after=0.25)]
    assert serial(phases) == 4 + 4 * (4 * 0.5 + 1) + 0.25
    assert makespan(phases, 1) == serial(phases)
    assert makespan(phases, 2) == 2 + 2 * 3 + 0.25
    assert makespan(phases, 4) == 1 + 3 + 0.25
    assert makespan(phases, 16) == makespan(phases, 4)  # as many as there are sums


def test_parts_move_from_worker_to_worker() -> None:
    """Ten bytes a second: of two parts of 10 bytes each, one is on the worker that adds them up."""
    network = Network(bandwidth=10.0, latency=0.0)
    one = [Phase([Task(1.0)] * 2, sums=[Sum(part=10)])]
    assert makespan(one, 1, network) == 2
    assert makespan(one, 2, network) == 1 + 1
    assert makespan(one, 2, Network(10.0, 0.25)) == pytest.approx((0.25 + 1 + 0.25) + 0.25 + (1 + 0.25) + 0.25)
    # Two sums: the first needs what the second worker sends, and the second what the first one does, at once.
    assert makespan([Phase([Task(1.0)] * 2, sums=[Sum(part=10)] * 2)], 2, network) == 1 + 1
    # Three: all ask the first worker first, which sends to one after the other; then they no longer meet.
    assert makespan([Phase([Task(1.0)] * 3, sums=[Sum(part=10)] * 3)], 3, network) == 1 + 3


def test_sums_results_pass_the_drivers_link() -> None:
    phases = [Phase([Task(1.0)], sums=[Sum(returned=10)] * 3)]
    assert makespan(phases, 3, Network(10.0, 0.0)) == 1 + 3


def test_the_next_tasks_run_while_results_of_sums_are_handled() -> None:
    one = Phase([Task(2.0)] * 2, sums=[Sum(add=0.5)], after=1.5)
    assert makespan([one], 2) == 2 + 1 + 1.5
    assert makespan([one, one], 2) == (2 + 1) + (2 + 1) + 1.5  # one worker adds up, the other begins and waits
    assert makespan([one, Phase(gap=0.25)], 2) == 2 + 1 + 1.5  # the driver does that while a worker adds up


def test_sums_are_handed_on_from_window_to_window() -> None:
    """AHEAD tasks for each worker, and the next ones begin when their parts are added up."""
    tasks = [Task(1.0)] * 2 * AHEAD
    assert makespan([Phase(tasks, sums=[Sum(add=0.5)])], 1) == 2 * AHEAD * 1.5
    assert makespan([Phase(tasks * 2, sums=[Sum(add=0.5)])], 2) == 2 * (AHEAD + 2 * AHEAD * 0.5)  # one adds, one waits
    # The sum so far is twice as wide as a part: 20 and 10 bytes come to the first worker, or 20 and the part is there.
    run = _Run(2, Network(bandwidth=100.0, latency=0.0))
    assert run.fold([Sum(part=10, add=1.0)], [Made(0.0, 1)], [Made(0.0, 1)], False) == [Made(0.2 + 0.1 + 1.0, 0)]
    run = _Run(2, Network(bandwidth=100.0, latency=0.0))
    assert run.fold([Sum(part=10, add=1.0)], [Made(0.0, 0)], [Made(0.0, 1)], False) == [Made(0.2 + 1.0, 0)]


def test_schedules_repeat() -> None:
    rng = np.random.default_rng(0)
    tasks = [Task(*map(float, rng.random(5))) for _ in range(100)]
    phases = [Phase(tasks[:50], 0.1, 0.2, sums=[Sum(*map(float, rng.random(4)))] * 5, after=0.1), Phase(tasks[50:])]
    network = Network(3.0, 0.01)
    assert len({makespan(phases, 7, network) for _ in range(3)}) == 1
    assert makespan(phases, 7, network) < makespan(phases, 1, network) < serial(phases) + 100


def test_jobs_begin_with_the_longest() -> None:
    assert jobs([1, 1, 1, 3], 2) == 3
    assert jobs([2.0] * 16, 8) == 4


# --- the fit -------------------------------------------------------------------------------------------------------

RATES = Rates(2e11, 1e6, 1e10)


def test_fit_finds_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    planted = np.array([1.3, 40.0, 0.0, 2.0, 0.01])
    made = [Counts(*(10 ** rng.uniform(6, 12, 2)), *(10 ** rng.uniform(3, 8, 2))) for _ in range(40)]
    cost = fit([(counts, float(counts.seconds(RATES) @ planted)) for counts in made], RATES)
    assert [cost.coefficients.get(name, 0.0) for name in TERMS] == pytest.approx(planted, rel=1e-5, abs=1e-9)
    assert max(map(abs, cost.residuals)) < 1e-9
    larger = Counts(1e15, 0, 1e9, 1e9)
    assert cost.of(larger, RATES) == pytest.approx(float(larger.seconds(RATES) @ planted))
    assert cost.of(larger, replace(RATES, products=4e11)) < cost.of(larger, RATES)


def test_no_coefficient_is_negative() -> None:
    measured = [(Counts(products=n * 1e9), 1.0 / n) for n in (1, 2, 4)]
    assert all(value > 0 for value in fit(measured, RATES).coefficients.values())


# --- what was recorded ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[recording.Record]:
    """Of a model of two small blocks."""
    root = tmp_path_factory.mktemp("m")
    write_model(root / "model", Shape(2, 64, 2, 300))
    return [recording._score(root, root), *recording._method(root, root, METHOD)]


def test_calls_move_what_the_formulas_say(records: list[recording.Record]) -> None:
    seen = set()
    for found in records:
        if found.stage not in ("score", "pack"):
            continue
        for call in found.calls:
            at = recording._at(found.model, found.stage, found.method, call.label, call.about)
            if call.label in ("_embedded", "_forward", "_head", "_block", "put", "_encode"):
                assert call.sent == sent(call.label, at), call
            if call.label in ("_embedded", "_forward", "_head", "_block", "_head.result", "_block.result", "put"):
                assert call.returned == returned(call.label, at), call
            if call.label in ("_head", "_block"):
                assert call.kept == sum(parts(call.label, at)), call
            if call.label in ("_head.add", "_block.add"):
                assert call.sent == sum(parts(call.label.removesuffix(".add"), at)), call
            if call.label == "compare" and call.returned:
                assert call.returned == returned(call.label, at), call
            if call.label == "_encode":
                assert call.returned == pytest.approx(returned(call.label, at), rel=0.01), call
            seen.add(call.label)
    assert {"_embedded", "_forward", "_head", "_block", "about", "compare", "add", "_encode", "put"} <= seen
    assert {f"{of}.{what}" for of in ("_head", "_block") for what in ("add", "result")} <= seen


@pytest.mark.parametrize("width", [64, 1600, 4096])
def test_parts_are_the_pipelines_stripes(width: int) -> None:
    model = Model(2, width, 300)
    for label, layer in (("_block", 0), ("_head", 2)):
        index = scale.index_of(model)
        sides = {t.name: t.shape for t in index.tensors}
        wide = [
            8 * len(s.rows) if s.moment == "fisher" else 4 * len(s.rows) * sides[s.tensor][s.moment == "second"]
            for s in statistics.stripes(index, layer)
        ]
        assert parts(label, At(model)) == wide
        assert max(wide) <= statistics.STRIPE


def test_metrics_hold_all_that_predictions_need(records: list[recording.Record]) -> None:
    document: dict[str, dict[str, object]] = {"rates": {"products": 1e11, "rounding": 1e6, "reading": 1e10}}
    for found in records:
        for key, value in scale.noted(found).items():
            document.setdefault(key, {}).update(value)
    for found in records:
        old = {
            **document,
            "measured": {**document["measured"], f"{found.stage} {found.method} _gone after - 64x300": 1.0},
        }
        rest = scale.without(old, found)["measured"]
        own = scale.noted(found)["measured"]
        assert rest == {k: v for k, v in document["measured"].items() if k not in own}
    units = scale.units_of(document)
    prices = scale.Prices.of(units, Rates(**document["rates"]))  # type: ignore[arg-type]
    for unit in units:  # what was measured costs what it did
        if unit.seconds > 0:
            found_seconds = prices.seconds(unit.stage, unit.method, unit.label, unit.part, unit.at)
            assert found_seconds == pytest.approx(unit.seconds, rel=1e-6)
    stages = scale.Stages(prices, Model(2, 64, 300), {METHOD: 1.0}, Text(2, {METHOD: 1}, 3))
    for stage, method in (("score", "all"), *((s, METHOD) for s in ("allocate", "pack", "evaluate"))):
        times = [stages.many(stage, method, n, NONE) for n in WORKERS]
        assert all(0 < later <= earlier * 1.001 for earlier, later in pairwise(times)), stage
        assert times[0] <= stages.one(stage, method) * 1.001
    assert stages.grid([METHOD] * 8, 8, NONE)[1] in WORKERS


def test_what_the_driver_does_with_statistics_is_that_of_a_block(records: list[recording.Record]) -> None:
    """Not of the head, which comes before the first block."""
    score = records[0]
    noted = {(u.label, u.part): u.seconds for u in recording.units(score)}
    first = {c.about: c.gap for c in reversed(score.calls) if c.label == "_block"}
    assert noted["_block", "gap"] == max(first.values())
    head = next(i for i, c in enumerate(score.calls) if c.label == "_head.result")
    assert score.calls[head + 1].label == "_block"
    assert score.calls[head + 1].about == "1"


def test_what_all_wait_for_is_timed_with_every_crew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(crews, "alone", lambda threads, work, *arguments: work(*arguments))
    monkeypatch.setattr(crews, "set_crew", asked.append)
    found = crews.measure([1, 2], quiet, [METHOD], recording.TINY)
    assert asked == [1, 2]
    assert found.keys() == {"1", "2"}
    names = {f"{METHOD} {label} {role}" for label in ("add seconds", "correct gap") for role in INSIDE}
    names |= {f"{METHOD} _encode seconds {role}" for role in (*INSIDE, *TABLES)}
    for own in found.values():
        assert own.keys() == names
        assert min(own.values()) > 0
    shares = scale.shares({"crews": {"seconds": found}})
    assert set(shares[1].values()) == {1.0}
    assert shares[2] == {key: seconds / found["1"][key] for key, seconds in found["2"].items()}


def test_speed_ups_by_crews_are_against_one_thread() -> None:
    document = json.loads((PROJECT / "metrics/benchmarks/scale.json").read_text(encoding="utf-8"))
    key = f"{METHOD} correct gap mlp.c_fc"
    table = tables({**document, "crews": {"seconds": {"16": {key: 2.0}, "1": {key: 12.0}, "4": {key: 4.0}}}})["crews"]
    assert table.splitlines()[0] == "| method | what | matrix | s, 1 thread | 4 threads | 16 threads |"
    assert table.splitlines()[2] == f"| {METHOD} | correction | mlp.c_fc | 12.00 | 3.0 | 6.0 |"


def test_workers_on_one_machine_share_its_cores(records: list[recording.Record]) -> None:
    """Crews halve what everything waits for, and nothing else."""
    document: dict[str, dict[str, object]] = {"rates": {"products": 1e11, "rounding": 1e6, "reading": 1e10}}
    for found in records:
        for key, value in scale.noted(found).items():
            document.setdefault(key, {}).update(value)
    prices = scale.Prices.of(scale.units_of(document), Rates(**document["rates"]))  # type: ignore[arg-type]
    stages = scale.Stages(prices, Model(2, 64, 300), {METHOD: 1.0}, Text(2, {METHOD: 3}, 3))
    alone = ("add seconds", "correct gap", "_encode seconds")
    shares = {f"{METHOD} {what} {role}": 0.5 for what in alone for role in (*INSIDE, *TABLES)}
    one, halved = (replace(stages, crews=given).one("pack", METHOD) for given in ({}, {1: shares}))
    waited = 0.0
    for role in (*TABLES, *INSIDE * 2):
        for what in alone if role in INSIDE else alone[-1:]:
            label, part = what.split()
            waited += prices.seconds("pack", METHOD, label, part, At(stages.model, role, tokens_of("pack", METHOD)))
    assert one - halved == pytest.approx(waited / 2, rel=1e-6)


def test_all_stages_of_a_method_run_one_after_the_other() -> None:
    """By workers on one machine: seconds are the stages' sums, by one worker and by many."""
    document = json.loads((PROJECT / "metrics/benchmarks/scale.json").read_text(encoding="utf-8"))
    rows = {(row["stage"], row["method"]): row for row in document["speed_ups"]["gpt2-xl"]}
    for method in recording.METHODS:
        parts = [("score", "all"), ("allocate", method), ("pack", method), ("evaluate", method)]
        own, whole = [rows[part] for part in parts if part in rows], rows["all, one machine", method]
        assert whole["seconds"] == pytest.approx(sum(row["seconds"] for row in own), rel=0.01)
        if method in CHAINED:
            own[2] = rows["pack, one machine", method]
        for count, speed_up in whole["speed_up"].items():
            taken = sum(row["seconds"] / row["speed_up"][count] for row in own)
            assert speed_up == pytest.approx(whole["seconds"] / taken, rel=0.05)  # others pass a network there


def test_memory_is_what_preflight_says(tmp_path: Path) -> None:
    write_model(tmp_path / "model", Shape(2, 64, 2, 300))
    real, made = describe(tmp_path / "model"), scale.index_of(Model(2, 64, 300))
    assert preflight.scoring_need(made, Scoring()).memory == preflight.scoring_need(real, Scoring()).memory


# --- what is committed ---------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_metrics_hold() -> None:
    document = json.loads((PROJECT / "metrics/benchmarks/scale.json").read_text(encoding="utf-8"))
    page = (PROJECT / "docs/scale.md").read_text(encoding="utf-8")
    for name, table in tables(document).items():
        assert f"<!-- table: {name} -->\n{table}\n" in page, f"{name}: see python tools/scale.py show"


LARGEST = "1T"  # whose schedules take most of a minute


@pytest.mark.parametrize("left_out", [{LARGEST}, pytest.param(set[str](), marks=pytest.mark.scale)])
def test_what_follows_from_the_records_follows_again(left_out: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads((PROJECT / "metrics/benchmarks/scale.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(scale, "MODELS", {n: model for n, model in scale.MODELS.items() if n not in left_out})
    again = json.loads(json.dumps(scale.derived(document)))
    for name in ("costs", "speed_ups", "memory_gib", "predictions"):
        found = {key: value for key, value in document[name].items() if key not in left_out}
        kept, made = dict(leaves(found)), dict(leaves(again[name]))
        assert made.keys() == kept.keys(), f"{name}: run python tools/scale.py predict"
        numbers = {k: v for k, v in made.items() if isinstance(v, int | float) and "residual" not in k}
        assert numbers == pytest.approx({k: kept[k] for k in numbers}, rel=0.02), name  # libraries' last digits


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield place, value
        return
    for key, inner in items:
        yield from leaves(inner, f"{place}.{key}")
