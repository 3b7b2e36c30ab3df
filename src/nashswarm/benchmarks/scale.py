"""From what tasks took to what stages will take: a cost model, larger models, more workers.

Calls of a width that was measured cost what they did there, wherever the fitted sum only carries them to another
vocabulary or number of blocks; those of any other width cost what the sum says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nashswarm import preflight
from nashswarm.benchmarks.costs import Cost, Rates, fit
from nashswarm.benchmarks.recording import METHODS, PASSED, SCORED, Record, Unit, rounds, units
from nashswarm.benchmarks.schedule import NONE, Network, Phase, Sum, Task, jobs, makespan, serial
from nashswarm.benchmarks.workers import BEHIND
from nashswarm.benchmarks.workload import (
    BATCH,
    CHAINED,
    CONTEXT,
    FIRST,
    INSIDE,
    OFFERED,
    PREFIX,
    TABLES,
    At,
    Model,
    Text,
    counts,
    parts,
    returned,
    sent,
    tokens_of,
)
from nashswarm.config import Scoring, parse_method
from nashswarm.engine import FARTHER
from nashswarm.evaluation import even_shares
from nashswarm.types import ModelIndex, TensorSpec

WORKERS = (1, 2, 4, 8, 16)
STAGES = ("score", "allocate", "pack", "evaluate")
CASES = [("score", "all"), *((stage, method) for method in METHODS for stage in STAGES[1:])]
# Whose tasks are the same code for all methods: they are fitted together.
COMMON = {"about", "compare", "add", "correct", "open"}
ON_DEVICE = {"_embedded", "_forward", "_head", "_block", "about", "compare", "batch"}


@dataclass(frozen=True)
class Prices:
    """Seconds of every call."""

    rates: Rates
    fitted: Mapping[str, Cost]  # group -> its sum
    measured: Mapping[str, float]  # a unit's key -> by what its seconds differ from the sum: a factor
    device: Rates | None = None  # of what runs models, where it is not a core

    @classmethod
    def of(cls, units: Sequence[Unit], rates: Rates) -> Prices:
        """Fitted to what was measured."""
        groups: dict[str, list[Unit]] = {}
        for unit in sorted(units, key=lambda u: u.at.model.vocabulary):  # of two, the factor of the larger is kept
            groups.setdefault(group(unit.stage, unit.method, unit.label, unit.part), []).append(unit)
        fitted = {
            name: fit([(counts(u.stage, u.method, u.label, u.part, u.at), u.seconds) for u in own], rates)
            for name, own in groups.items()
        }
        factors: dict[str, float] = {}
        for name, own in groups.items():
            for unit, residual in zip(own, fitted[name].residuals, strict=True):
                factors[_place(unit.stage, unit.method, unit.label, unit.part, unit.at)] = 1 / (1 + residual)
        return cls(rates, fitted, factors)

    def seconds(self, stage: str, method: str, label: str, part: str, at: At) -> float:
        """Of one call, or of the driver beside it; 0 where it was not among what was measured."""
        cost = self.fitted.get(group(stage, method, label, part))
        if cost is None:
            return 0.0
        made = counts(stage, method, label, part, at)
        if self.device and part == "seconds" and label in ON_DEVICE:
            reading = self.rates.reading if label == "_head" else self.device.reading  # labels are drawn on a core
            return cost.of(made, replace(self.device, reading=reading))
        return self.measured.get(_place(stage, method, label, part, at), 1.0) * cost.of(made, self.rates)


def group(stage: str, method: str, label: str, part: str) -> str:
    """Calls that one sum is fitted to."""
    shared = stage == "score" or label in COMMON or (stage, label) == ("evaluate", "batch")
    return " ".join((stage, "all" if shared else method, label, part))


def _place(stage: str, method: str, label: str, part: str, at: At) -> str:
    return f"{group(stage, method, label, part)} {at.role} {at.first} {at.model.width} {at.tokens}"


# --- stages as phases ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stages:
    """The phases of every stage on one model. Arguments: `ratio`, bytes a weight of packed matrices, by method."""

    prices: Prices
    model: Model
    ratio: Mapping[str, float]
    text: Text = field(default_factory=Text)
    crews: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # threads on one machine: see `shares`

    def phases(self, stage: str, method: str, workers: int) -> list[Phase]:
        """Of a stage with so many workers: members and shares of the text follow their number."""
        if stage == "score":
            return self._score()
        if stage == "allocate":
            return self._allocate(method)
        if stage == "evaluate":
            return [self._evaluate(method, workers)]
        return self._chain(method, workers) if method in CHAINED else self._apart(method)

    def _task(self, stage: str, method: str, label: str, at: At, chained: bool = False) -> Task:
        seconds, before, after = (
            self.prices.seconds(stage, method, label, part, at) for part in ("seconds", "before", "after")
        )
        rates = {"_encode": self.ratio.get(method, 0.0), "_candidates": OFFERED.get(method, 0.0)}
        back = rates[label] * at.out * at.into if label in rates else returned(label, at)
        return Task(seconds, before, after, sent(label, at) if label != "_encode" or chained else 0.0, back)

    def _score(self) -> list[Phase]:
        at, batches = At(self.model), self.text.score
        embedded, forward, head, block = (
            self._task("score", "all", label, at) for label in ("_embedded", "_forward", "_head", "_block")
        )
        start, gap = (
            self.prices.seconds("score", "all", label, part, at)
            for label, part in (("start", "seconds"), ("_block", "gap"))
        )
        return [
            Phase([embedded] * batches, start=start),
            *[Phase([forward] * batches)] * self.model.layers,
            Phase([head] * batches, sums=self._sums("_head", at)),
            *[Phase([block] * batches, sums=self._sums("_block", at), after=gap)] * self.model.layers,
        ]

    def _sums(self, label: str, at: At) -> list[Sum]:
        """Of the parts of score's calls; each takes as long as it is large."""
        sizes = parts(label, at)
        add, result = (self.prices.seconds("score", "all", f"{label}.{of}", "seconds", at) for of in ("add", "result"))
        each = [(size, size / sum(sizes)) for size in sizes]
        back = returned(f"{label}.result", at)
        return [Sum(size, add * share, result * share, back * share) for size, share in each]

    def _places(self) -> list[str]:
        return [*TABLES, *INSIDE * self.model.layers]

    def _allocate(self, method: str) -> list[Phase]:
        if METHODS[method]["allocator"] != "market":
            return []
        places = [At(self.model, role) for role in self._places()]
        offers, trial = ([self._task("allocate", method, f, at) for at in places] for f in ("_candidates", "_encode"))
        gap = self.prices.seconds("allocate", method, "round", "gap", At(self.model))
        return [Phase(offers, ahead=FARTHER), Phase(trial, ahead=FARTHER), Phase(gap=gap)]

    def _apart(self, method: str) -> list[Phase]:
        tasks = [self._task("pack", method, "_encode", At(self.model, role)) for role in self._places()]
        return [
            Phase(tasks, ahead=FARTHER),
            Phase(gap=self.prices.seconds("pack", method, "end", "gap", At(self.model))),
        ]

    def _chain(self, method: str, workers: int) -> list[Phase]:
        batches = self.text.prefix[method]
        size = -(-batches // min(workers, batches))
        members = -(-batches // size)

        def gap(label: str, at: At) -> float:
            return self.prices.seconds("pack", method, label, "gap", at)

        def crew(label: str, part: str, at: At) -> float:
            """Share of a thread's time that a crew takes: the largest that was timed, of no more than all cores."""
            timed = self.crews[max(n for n in self.crews if n <= workers)] if self.crews else {}
            return timed.get(f"{method} {label} {part} {at.role}", 1.0)

        def call(label: str, at: At) -> Phase:
            """Of all members; each computes its batches."""
            one = self._task("pack", method, label, at)
            back = one.returned * (size if label == "compare" else 1)
            return Phase([replace(one, seconds=one.seconds * size, returned=back)] * members, gap(label, at))

        def matrix(role: str, first: bool) -> list[Phase]:
            at = At(self.model, role, tokens_of("pack", method))
            rounding = self._task("pack", method, "_encode", at, chained=True)
            rounding = replace(rounding, seconds=crew("_encode", "seconds", at) * rounding.seconds)
            if role in TABLES:
                return [Phase(gap=gap("about", at)), Phase([rounding]), call("put", at)]
            enter = call("about", replace(at, first=first)) if role == FIRST else Phase(gap=gap("about", at))
            adding = self.prices.seconds("pack", method, "add", "seconds", at) * crew("add", "seconds", at)
            # So many batches were added where corrections were recorded.
            correcting = gap("correct", at) * crew("correct", "gap", at) + (batches - PASSED) * adding
            return [enter, call("compare", at), Phase([rounding], correcting), call("put", at)]

        places = [(role, False) for role in TABLES]
        places += [(role, layer == 0) for layer in range(self.model.layers) for role in INSIDE]
        chain = [phase for role, first in places for phase in matrix(role, first)]
        opened = call("open", At(self.model))
        return [opened, *chain, Phase(gap=gap("end", At(self.model)))]

    def _evaluate(self, method: str, workers: int) -> Phase:
        at = At(self.model)
        start, decode, batch = (
            self.prices.seconds("evaluate", method, part, "seconds", at) for part in ("start", "decode", "batch")
        )
        count = self.text.evaluate
        shares = [own.stop - own.start for own in even_shares([at.tokens] * count, workers)]
        return Phase([Task(decode + n * batch, returned=4.0 * n * at.tokens) for n in shares], start=start)

    # --- what comes of them ----------------------------------------------------------------------------------------

    def repeated(self, stage: str, method: str, rounds: int) -> float:
        """Seconds with one worker, where the market bought or the packing ran so many times."""
        found = self.phases(stage, method, 1)
        kept = found[:1] if stage == "allocate" else []
        return serial(kept) + rounds * serial(found[len(kept) :])

    def one(self, stage: str, method: str) -> float:
        """Seconds with one worker, without a network."""
        return serial(self.phases(stage, method, 1))

    def many(self, stage: str, method: str, workers: int, network: Network) -> float:
        """Seconds with some workers."""
        return makespan(self.phases(stage, method, workers), workers, network)

    def moved(self, stage: str, method: str, workers: int) -> float:
        """Bytes that pass the driver's link."""
        found = self.phases(stage, method, workers)
        return sum(t.sent + t.returned for p in found for t in p.tasks) + sum(s.returned for p in found for s in p.sums)

    def grid(self, methods: Sequence[str], workers: int, network: Network) -> tuple[float, int]:
        """Seconds of all methods behind one scoring, and how many run at once for that: the best of all divisors."""
        best = (float("inf"), 0)
        for at_once in (n for n in WORKERS if n <= workers):
            own = workers // at_once
            known = {m: sum(self.many(s, m, own, network) for s in STAGES[1:]) for m in dict.fromkeys(methods)}
            best = min(best, (jobs([known[m] for m in methods], at_once), at_once))
        return best[0] + self.many("score", "all", workers, network), best[1]


def speed_ups(
    stages: Stages, network: Network, sizes: Sequence[int], crews: Mapping[int, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Rows: a stage by a method, or a grid of so many methods, against one worker without a network.

    Arguments: `crews`, as by `shares`; with them, packing behind the prefix also by workers that are on one machine,
    and all stages of a method by such, one after the other.
    """
    found = [_row(stages, [(stage, method)], network) for stage, method in CASES if stages.one(stage, method) > 0]
    here, beside = Network(float("inf"), network.latency), replace(stages, crews=crews)
    if crews:
        chains = {method: [("pack", method)] for method in CHAINED}
        whole = {method: [("score", "all"), *((stage, method) for stage in STAGES[1:])] for method in METHODS}
        for name, rows in (("pack", chains), ("all", whole)):
            own = (_row(beside, cases, here) for cases in rows.values())
            found += [{**row, "stage": f"{name}, one machine", "moved_gb": 0.0} for row in own]
    for size in sizes:
        methods = [list(METHODS)[i % len(METHODS)] for i in range(size)]
        alone = stages.grid(methods, 1, NONE)[0]
        made = {n: stages.grid(methods, n, network) for n in WORKERS}
        row = {"stage": "grid", "method": f"{size} methods", "seconds": _digits(alone)}
        row["speed_up"] = {str(n): round(alone / seconds, 2) for n, (seconds, _) in made.items()}
        row["at_once"] = {str(n): at_once for n, (_, at_once) in made.items()}
        found.append(row)
    return found


def _row(stages: Stages, cases: Sequence[tuple[str, str]], network: Network) -> dict[str, Any]:
    """Of stages by a method, one after the other; named as the last one."""
    alone = sum(stages.one(*case) for case in cases)
    speed_up = {str(n): round(alone / sum(stages.many(*case, n, network) for case in cases), 2) for n in WORKERS}
    moved = sum(stages.moved(*case, WORKERS[-1]) for case in cases)
    return {
        "stage": cases[-1][0],
        "method": cases[-1][1],
        "seconds": _digits(alone),
        "moved_gb": _digits(moved / 1e9),
        "speed_up": speed_up,
    }


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def shares(document: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """Number of threads -> method, call and matrix -> their seconds over those of one thread; of CREWED alone."""
    crews: Mapping[str, Mapping[str, float]] = document.get("crews", {}).get("seconds", {})
    return {int(n): {key: own[key] / crews["1"][key] for key in own} for n, own in crews.items()}


# --- memory --------------------------------------------------------------------------------------------------------


def index_of(model: Model) -> ModelIndex:
    """A model of GPT-2's make, as `preflight` asks for it."""
    tables = [TensorSpec(role, model.shape(role), "embedding", "embedding", None) for role in TABLES]
    inside = [
        TensorSpec(f"h.{layer}.{role}", model.shape(role), "conv1d", "attention" if "attn" in role else "mlp", layer)
        for layer in range(model.layers)
        for role in INSIDE
    ]
    return ModelIndex("GPT2LMHeadModel", CONTEXT, model.vocabulary, TABLES[0], model.layers, (*tables, *inside), ())


def need(model: Model, stage: str, method: str, scored: int, prefix: int) -> float:
    """GiB that `preflight` says a process needs. Arguments: `scored`, tokens, `prefix`, of a market's prefix."""
    index = index_of(model)
    if stage == "score":
        return preflight.scoring_need(index, Scoring(tokens=scored)).memory / preflight.GIB
    own = {"prefix_tokens": prefix} if method in CHAINED else {}
    return preflight.packing_need(index, parse_method(method, {**METHODS[method], **own})).memory / preflight.GIB


def memory(model: Model) -> dict[str, float]:
    """Name of a stage and method -> GiB, by params.yaml's tokens."""
    text = Text()
    found = {"score": need(model, "score", "all", text.score * BATCH, 0)}
    found |= {f"pack {m}": need(model, "pack", m, 0, PREFIX.get(m, 0)) for m in METHODS}
    return {name: round(gib, 1) for name, gib in found.items()}


def residual(cost: Cost) -> tuple[float, float]:
    """Median and largest of |predicted / measured - 1|."""
    sizes = np.abs(np.array(cost.residuals))
    return float(np.median(sizes)), float(sizes.max())


# --- the metrics ---------------------------------------------------------------------------------------------------

MODELS = {
    "reference": Model(8, 256, 4096),
    "gpt2": Model(12, 768),
    "gpt2-medium": Model(24, 1024),
    "gpt2-xl": Model(48, 1600),
    "7B": Model(32, 4096),
    "70B": Model(80, 8192),
    "1T": Model(128, 25600),
}
GRIDS = (16, 64)  # methods
LINK = 1.25e9  # bytes a second: 10 GbE


@dataclass(frozen=True, slots=True)
class Machines:
    """Where a prediction is for."""

    workers: int
    gib: float  # of memory in each machine
    each: int  # workers in each machine, where memory suffices
    network: bool = False  # whether results leave the machine
    device: bool = False  # whether each worker has a GPU

    def fitting(self, gib: float) -> int:
        """Workers, where each needs so much."""
        return self.workers // self.each * min(self.each, int(self.gib / gib))


PLACES = {
    "2 cores, 24 GiB": Machines(2, 24, 2),
    "64 cores, 512 GiB": Machines(64, 512, 64),
    "16 x 64 cores, 512 GiB, 10 GbE": Machines(1024, 512, 64, network=True),
    "8 H100, 2 TiB": Machines(8, 2048, 8, device=True),
}
# NVIDIA's data sheet of the H100 SXM: float32 without tensor cores, HBM3. A bound: nothing was measured.
H100 = Rates(67e12, float("inf"), 3.35e12)  # what runs there rounds nothing


def noted(found: Record) -> dict[str, Any]:
    """What the metrics keep of a stage that was recorded."""
    model, (name, size) = found.model, _recorded(found)
    total = sum(c.gap + c.before + c.seconds + c.after for c in found.calls)
    stage = {"layers": model.layers, "rounds": rounds(found), "seconds": _digits(total)}
    document: dict[str, Any] = {
        "measured": {unit.key(): float(f"{unit.seconds:.4g}") for unit in units(found)},
        "stages": {f"{name} {size}": {**stage, "peak_gib": _digits(found.peak_bytes / 2**30)}},
    }
    if found.stage == "pack":
        rows = [c.returned for c in found.calls if c.label == "_encode" and "wte" in c.about]
        document["bytes_a_weight"] = {found.method: _digits(rows[0] / (model.vocabulary * model.width))}
    return document


def without(document: Mapping[str, Any], found: Record) -> dict[str, Any]:
    """The metrics less what an earlier recording measured of the same stage."""
    name, size = _recorded(found)
    measured = document.get("measured", {})
    kept = {k: v for k, v in measured.items() if not (k.startswith(f"{name} ") and k.endswith(f" {size}"))}
    return {**document, "measured": kept}


def _recorded(found: Record) -> tuple[str, str]:
    """Stage and method, and the model's size, as keys name them."""
    return f"{found.stage} {found.method}", f"{found.model.width}x{found.model.vocabulary}"


def derived(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fit, the schedules and the predictions."""
    prices = Prices.of(units_of(document), Rates(**document["rates"]))
    ratio = document["bytes_a_weight"]
    latency = document["workers"]["round_trip"]["median"] if "workers" in document else 0.001
    network = Network(LINK, latency)
    stages, crews = {name: Stages(prices, model, ratio) for name, model in MODELS.items()}, shares(document)
    return {
        "costs": {name: _fitted(cost) for name, cost in sorted(prices.fitted.items())},
        "check": check(document, prices, ratio),
        "simulated": pair(prices, ratio, Network(float("inf"), latency)),
        "network": {"bandwidth": LINK, "latency": latency},
        "speed_ups": {
            n: speed_ups(of, network, GRIDS, crews if n == CREWED else {}) for n, of in stages.items() if n in MEASURED
        },
        "memory_gib": {name: memory(model) for name, model in MODELS.items()},
        "predictions": {name: predictions(of, network) for name, of in stages.items()},
    }


MEASURED = ("reference", "gpt2", "gpt2-medium", "gpt2-xl")
CREWED = "gpt2-xl"  # whose matrices crews were timed with


def _fitted(cost: Cost) -> dict[str, Any]:
    median, largest = residual(cost)
    return {
        "coefficients": {name: _digits(value) for name, value in cost.coefficients.items()},
        "measurements": len(cost.residuals),
        "residual_median": _digits(median),
        "residual_largest": _digits(largest),
    }


def units_of(document: Mapping[str, Any]) -> list[Unit]:
    """What was measured, from its keys."""
    found = []
    for key, seconds in document["measured"].items():
        stage, method, label, part, role, *first, size = key.split()
        width, vocabulary = map(int, size.split("x"))
        layers = document["stages"][f"{stage} {method} {size}"]["layers"]
        at = At(Model(layers, width, vocabulary), "" if role == "-" else role, tokens_of(stage, method), bool(first))
        found.append(Unit(stage, method, label, part, at, seconds))
    return found


def check(document: Mapping[str, Any], prices: Prices, ratio: Mapping[str, float]) -> dict[str, Any]:
    """Of the stages that were recorded, over what each took: single calls, fitted sums, sums fitted to other widths.

    And the memory that `preflight` says they need.
    """
    measured = units_of(document)
    found: dict[str, Any] = {}
    text = Text(SCORED // BATCH, dict.fromkeys(CHAINED, PASSED))
    for key, stage in document["stages"].items():
        name, method, size = key.split()
        width, vocabulary = map(int, size.split("x"))
        if name == "evaluate" or not stage["rounds"]:
            continue
        others = Prices.of([u for u in measured if u.at.model.width != width], prices.rates)
        model, found[key] = Model(stage["layers"], width, vocabulary), {}
        for kind, own in (("calls", prices), ("sums", replace(prices, measured={})), ("others", others)):
            said = Stages(own, model, ratio, text).repeated(name, method, stage["rounds"])
            found[key][kind] = _digits(said / stage["seconds"])
        found[key]["preflight_gib"] = _digits(need(model, name, method, SCORED, PASSED * tokens_of(name, method)))
    return found


def pair(prices: Prices, ratio: Mapping[str, float], network: Network) -> dict[str, float]:
    """Seconds of the stages that `workers` measures with two workers, by simulation; one round of packing."""
    model, text = Model(2, 768, 4096), Text(4, {m: BEHIND // tokens_of("pack", m) for m in CHAINED}, 4)
    stages, cases = Stages(prices, model, ratio, text), (("score", "all"), ("evaluate", "gptq4-g128"))
    found = {f"{stage} 8192 tokens": stages.many(stage, method, 2, network) for stage, method in cases}
    found |= {f"pack {m}": stages.many("pack", m, 2, network) for m in ("gptq4-g128", "market-coded-3_0")}
    return {name: _digits(seconds) for name, seconds in found.items()}


def predictions(stages: Stages, network: Network) -> dict[str, Any]:
    """Place -> stage and method -> workers and hours; no hours where no worker fits.

    Bits are bought once and packed once: what misses the budget is done again.
    """
    found: dict[str, Any] = {}
    need = memory(stages.model)
    for name, place in PLACES.items():
        found[name] = {}
        for stage, method in CASES:
            if not stages.one(stage, method):
                continue
            workers = place.fitting(need[_limit(stage, method)])
            row: dict[str, Any] = {"workers": workers}
            if workers:
                own = replace(stages, prices=replace(stages.prices, device=H100 if place.device else None))
                seconds = own.many(stage, method, workers, network if place.network else NONE)
                row["hours"] = _digits(seconds / 3600)
            found[name][f"{stage} {method}"] = row
    return found


def _limit(stage: str, method: str) -> str:
    """Whose need, in `memory`, says how many workers fit: evaluating needs what packing without a prefix does."""
    return {"score": "score", "evaluate": "pack rtn4-g64"}.get(stage, f"pack {method}")
