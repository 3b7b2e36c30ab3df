"""From checkpoint to packed tensors: what is in scope, what the codec is told, and what is kept."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, FAMILIES, VOCABULARY, Models, no_progress, stored

from nashswarm import artifacts, models, quantize, statistics
from nashswarm.codecs import classes, grouped, kept
from nashswarm.config import Method, Params, Scoring, load_room, parse_method
from nashswarm.importance import magnitude, swarm
from nashswarm.packed import file_bytes, open_packed
from nashswarm.quantize import Course, Model, Plain
from nashswarm.types import Allocation, Choice, InputError, Job, NashSwarmError, PackedTensor, TokenizedSplit

NO_IDS = np.empty(0, np.int32)  # for methods that fit nothing to calibration text


def plain(model: Model, allocation: Allocation) -> Course:
    """Every matrix aims at itself."""
    return Course(Plain(model), allocation)


def encoded_by(model: Model, method: Method, allocation: Allocation | None = None) -> dict[str, PackedTensor]:
    allocation = allocation or quantize.allocate(model, method, no_progress)
    return dict(quantize.encode(model, method, allocation, plain(model, allocation), no_progress))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_allocator_sees_the_scope_and_nothing_else(family: str, quantizable: Models, params: Params) -> None:
    model = quantizable(family)
    for name in ("paper-nash", "nash", "uniform4", "fp32"):
        method = params.methods[name]
        allocation = quantize.allocate(model, method, no_progress)
        scope = model.index.scope(method.scope)
        assert list(allocation.choices) == [t.name for t in scope]
        assert sum(allocation.histogram.values()) == sum(t.weights for t in scope)


def test_the_papers_thresholds_are_of_the_named_importance(quantizable: Models, params: Params) -> None:
    """With all weights drawn, 0.7 and 0.9 quantiles of |w|, or of the swarm's product."""
    model = quantizable("gpt2")
    spec = model.index.scope("linear")[0]
    weight = model.checkpoint.tensor(spec)
    for name, importance in (("paper-nash", magnitude), ("paper-swarm", swarm)):
        method = params.methods[name]
        settings = dataclasses.replace(method.allocator_settings, sample=10**9)
        allocation = quantize.allocate(model, dataclasses.replace(method, allocator_settings=settings), no_progress)
        expected = np.quantile(importance.importance(weight).numpy(), (0.7, 0.9))
        assert allocation.choices[spec.name].thresholds == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["paper-uniform4", "paper-nash"])
def test_matrices_out_of_scope_are_kept_bit_for_bit(
    family: str, method: str, quantizable: Models, params: Params
) -> None:
    model, chosen = quantizable(family), params.methods[method]
    encoded = encoded_by(model, chosen)
    assert set(encoded) == {t.name for t in model.index.tensors}
    for spec in model.index.tensors:
        if spec.linear:
            assert encoded[spec.name].codec == chosen.codec
        else:
            assert encoded[spec.name].codec == "kept"
            assert torch.equal(kept.decode(encoded[spec.name]), model.checkpoint.tensor(spec))


def test_the_codec_gets_weight_choice_importance_and_statistics(
    quantizable: Models, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, jobs = quantizable("llama"), []
    real = classes.encode

    def record(job: Job, settings: Any) -> Any:
        jobs.append(job)
        return real(job, settings)

    monkeypatch.setattr(classes, "encode", record)
    method = params.methods["nash"]
    allocation = quantize.allocate(model, method, no_progress)
    encoded_by(model, method, allocation)
    assert [j.tensor for j in jobs] == list(model.index.tensors)
    for job in jobs:
        weight = model.checkpoint.tensor(job.tensor)
        assert torch.equal(job.weight, weight)
        assert job.choice == allocation.choices[job.tensor.name]
        assert torch.equal(job.importance, weight.abs())  # type: ignore[arg-type]
        for name, value in dataclasses.asdict(model.statistics(job.tensor.name)).items():  # type: ignore[arg-type]
            assert np.array_equal(getattr(job.statistics, name), value)


def test_embeddings_get_the_width_of_embeddings(quantizable: Models, params: Params) -> None:
    model, method = quantizable("llama"), params.methods["rtn3-g64"]
    encoded = encoded_by(model, method)
    bits = {t.name: encoded[t.name].scalars["bits"] for t in model.index.tensors}
    assert {bits[t.name] for t in model.index.tensors if t.part in ("embedding", "head")} == {4}
    assert {bits[t.name] for t in model.index.tensors if t.part in ("attention", "mlp")} == {3}


def test_tensors_come_in_the_models_order_one_by_one(quantizable: Models, params: Params) -> None:
    """A packed tensor is handed on before the next is read, so that one matrix is in memory at a time."""
    model, method, read = quantizable("gpt2"), params.methods["rtn4-g64"], []
    allocation = quantize.allocate(model, method, no_progress)

    class Recording:
        directory = model.checkpoint.directory

        def tensor(self, spec: Any) -> torch.Tensor:
            read.append(spec.name)
            return model.checkpoint.tensor(spec)

    watched = dataclasses.replace(model, checkpoint=Recording())  # type: ignore[arg-type]
    names = []
    for name, _ in quantize.encode(watched, method, allocation, plain(watched, allocation), no_progress):
        names.append(name)
        assert read == names
    assert names == [t.name for t in model.index.tensors]


def test_the_progress_bar_counts_tensors(quantizable: Models, params: Params) -> None:
    model, method, seen = quantizable("gpt2"), params.methods["paper-uniform4"], []

    def progress(items: Any, title: str) -> Any:
        seen.append((len(items), title))
        return items

    allocation = quantize.allocate(model, method, progress)
    list(quantize.encode(model, method, allocation, plain(model, allocation), progress))
    assert seen == [(1, "allocate"), (len(model.index.tensors), "pack")]


def test_the_manifest_tells_how_the_model_was_made(quantizable: Models, tmp_path: Path) -> None:
    model = quantizable("opt")
    method = parse_method("mine", {"codec": "grouped", "bits": 3, "group": 16})
    quantize.pack(model, method, quantize.allocate(model, method, no_progress), NO_IDS, tmp_path / "p", no_progress)
    opened = open_packed(tmp_path / "p")
    provenance = opened.provenance
    assert (provenance.model, provenance.source, provenance.architecture) == ("opt", "path", "OPTForCausalLM")
    assert provenance.method == {
        **{"name": "mine", "scope": "all", "accounting": "true", "importance": "magnitude"},
        **{"allocator": "uniform", "codec": "grouped", "bits": 3, "embedding_bits": None},
        **{"group": 16, "embedding_group": None, "clip_search": True, "symmetric": False},
        **{"widths": [2, 3, 4, 8], "fused": False},
    }
    assert provenance.certificate["histogram"] == {"3": sum(t.weights for t in model.index.tensors)}
    assert parse_method("mine", {k: v for k, v in provenance.method.items() if k != "name"}) == method
    assert {t.scalars["group"] for t in opened.tensors.values()} == {16}


@pytest.mark.parametrize("damage", ["weights", "config.json", "gone"])
def test_a_model_that_changed_since_is_refused(damage: str, quantizable: Models, tmp_path: Path) -> None:
    import shutil

    model, layout = quantizable("gpt2"), artifacts.Layout(tmp_path)
    shutil.copytree(model.checkpoint.directory, tmp_path / "model")
    record = dataclasses.replace(model.record, directory="model")
    artifacts.write_source(layout.download("m"), record, model.index)
    assert quantize.open_model(layout, "m").index == model.index
    file = tmp_path / "model" / ("config.json" if damage == "config.json" else "model.safetensors")
    if damage == "gone":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    with pytest.raises(InputError, match=f"{file.name} {'is gone' if damage == 'gone' else 'changed'} since it was"):
        quantize.open_model(layout, "m")


def test_an_allocation_decides_what_is_quantized(quantizable: Models) -> None:
    """Tensors that the allocation leaves out are kept, whatever the scope says."""
    model = quantizable("gpt2")
    method = parse_method("mine", {"codec": "grouped"})
    one = model.index.tensors[3].name
    encoded = encoded_by(model, method, Allocation({one: Choice(bits=8)}, {}))
    assert {n for n, p in encoded.items() if p.codec == "grouped"} == {one}
    exact = model.checkpoint.tensor(model.index.tensors[3])
    assert not torch.equal(grouped.decode(encoded[one]), exact)
    assert all(load_room("codecs", p.codec) is kept for n, p in encoded.items() if n != one)


def test_a_methods_outcome_does_not_depend_on_other_runs(quantizable: Models, params: Params) -> None:
    """No global state: nash after rtn4 is nash."""
    model, nash = quantizable("gpt2"), params.methods["nash"]
    run: Callable[[], Allocation] = lambda: quantize.allocate(model, nash, no_progress)  # noqa: E731
    first = run()
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (the point: nothing may draw from it)
    quantize.allocate(model, params.methods["rtn4-g64"], no_progress)
    assert run() == first


# --- budgets -------------------------------------------------------------------------------------------------------

LARGER = 96  # windows of calibration text


def calibration(windows: int = LARGER) -> np.ndarray:
    """Independent tokens of skewed frequencies, int32."""
    frequency = 1 / np.arange(4, VOCABULARY + 4)
    rng = np.random.default_rng(0)
    return rng.choice(VOCABULARY, windows * CONTEXT, p=frequency / frequency.sum()).astype(np.int32)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A GPT-2 of half a million weights, so that a matrix' chance does not outweigh a thousandth of the budget."""
    from transformers import AutoModelForCausalLM, GPT2Config

    directory = tmp_path_factory.mktemp("larger")
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=144, n_layer=2, n_head=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    index = models.describe(directory)
    scoring = Scoring(tokens=2048, batch_tokens=1024)
    original = models.load_original(directory, index)
    gathered = statistics.gather(lambda: original, index, calibration(), scoring, no_progress)
    read = stored(tmp_path_factory.mktemp("statistics"), gathered)
    files = {name: artifacts.sha256_file(directory / name) for name in models.checkpoint_files(directory)}
    record = artifacts.SourceRecord("path", str(directory), None, None, files)
    return Model("larger", index, record, models.Checkpoint.open(directory, index), read)


def coded(budget: float, prefix_tokens: int = 0) -> Method:
    settings = {"allocator": "market", "codec": "coded", "budget": budget, "prefix_tokens": prefix_tokens}
    return parse_method("mine", settings)


@pytest.fixture(scope="module")
def bought(larger: Model) -> Callable[[float], Allocation]:
    """Budget -> its allocation. How much is fitted does not matter to it."""
    return cache(lambda budget: quantize.allocate(larger, coded(budget), no_progress))


def rounds_of(caplog: pytest.LogCaptureFixture) -> list[int]:
    """Bytes of each packing that was not the last."""
    return [int(str(r.args[0])) for r in caplog.records if "once more" in r.message and isinstance(r.args, tuple)]


def resized(allocation: Allocation, factor: float, step: float = 0.0) -> Allocation:
    """Its expected sizes, and log2 of its steps, changed."""
    choices = {
        n: dataclasses.replace(c, size=(c.size or 0) * factor, step=(c.step or 0) + step)
        for n, c in allocation.choices.items()
    }
    return dataclasses.replace(allocation, choices=choices)


def total(allocation: Allocation) -> float:
    return sum(c.size or 0 for c in allocation.choices.values())


@pytest.mark.parametrize("prefix_tokens", [0, 2048])
@pytest.mark.parametrize("budget", [2.0, 3.0, 4.5])
def test_coded_models_hit_their_budget(
    budget: float, prefix_tokens: int, larger: Model, bought: Callable[[float], Allocation], tmp_path: Path
) -> None:
    allocation, method = bought(budget), coded(budget, prefix_tokens)
    asked = int(budget * larger.index.parameters / 8)
    assert allocation.asked_bytes == asked
    quantize.pack(larger, method, allocation, calibration(), tmp_path / "p", no_progress)
    assert 0 <= asked - file_bytes(tmp_path / "p") <= 0.001 * asked
    certificate = open_packed(tmp_path / "p").provenance.certificate
    assert certificate["asked_bytes"] == asked
    assert "bought_bytes" not in certificate  # the file's size would stand in the file


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix_tokens", [0, 1024])
@pytest.mark.parametrize("budget", [2.5, 4.0])
def test_small_models_never_exceed_their_budget(
    budget: float,
    prefix_tokens: int,
    family: str,
    quantizable: Models,
    split: Callable[..., TokenizedSplit],
    tmp_path: Path,
) -> None:
    """Of so few weights each matrix' size is chance to some thousandths."""
    model, method = quantizable(family), coded(budget, prefix_tokens)
    allocation = quantize.allocate(model, method, no_progress)
    quantize.pack(model, method, allocation, split(family, seed=3).ids, tmp_path / "p", no_progress)
    assert allocation.asked_bytes is not None
    assert 0 <= allocation.asked_bytes - file_bytes(tmp_path / "p") <= 0.01 * allocation.asked_bytes


def test_no_part_of_the_budget_is_for_text(
    larger: Model, bought: Callable[[float], Allocation], tmp_path: Path
) -> None:
    """Without a prefix no calibration text is read."""
    quantize.pack(larger, coded(3.0), bought(3.0), NO_IDS, tmp_path / "p", no_progress)
    with pytest.raises(InputError, match="0 calibration tokens"):
        quantize.pack(larger, coded(3.0, 64), bought(3.0), NO_IDS, tmp_path / "q", no_progress)


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_steps_are_steered_to_the_bytes_that_were_expected(
    factor: float, larger: Model, bought: Callable[[float], Allocation]
) -> None:
    """All expectations are wrong by 3 %: unsteered, the sizes are what they are; steered, they add up as expected."""
    allocation, found = resized(bought(3.0), factor), {}
    for steer in (False, True):
        course = Course(Plain(larger), allocation, steer=steer)
        list(quantize.encode(larger, coded(3.0), allocation, course, no_progress))
        found[steer] = sum(course.sizes.values()) / total(allocation)
    assert abs(found[False] - 1) > 0.02
    assert abs(found[True] - 1) < abs(found[False] - 1) / 3


def test_one_wrong_expectation_is_made_up_for_by_the_rest(larger: Model, bought: Callable[[float], Allocation]) -> None:
    allocation = bought(3.0)
    choices = dict(allocation.choices)
    first = next(t.name for t in larger.index.tensors if t.layer == 0)
    choices[first] = dataclasses.replace(choices[first], size=(choices[first].size or 0) * 0.8)
    allocation = dataclasses.replace(allocation, choices=choices)
    course = Course(Plain(larger), allocation)
    list(quantize.encode(larger, coded(3.0), allocation, course, no_progress))
    assert course.sizes[first] > 1.1 * (choices[first].size or 0)
    assert abs(sum(course.sizes.values()) / total(allocation) - 1) < 0.005


def test_reserve_is_kept_and_corrections_are_bounded(larger: Model, bought: Callable[[float], Allocation]) -> None:
    allocation = bought(3.0)
    course = Course(Plain(larger), allocation, reserve=0.02 * total(allocation))
    list(quantize.encode(larger, coded(3.0), allocation, course, no_progress))
    assert abs(sum(course.sizes.values()) / (0.98 * total(allocation)) - 1) < 0.004
    name = larger.index.tensors[2].name
    choice, steps = allocation.choices[name], []
    for factor in (0.01, 100.0):
        course = Course(Plain(larger), resized(allocation, factor), reserve=total(allocation) / factor)
        steps.append((course.steered(name, choice).step or 0) - (choice.step or 0))
    assert max(map(abs, steps)) == pytest.approx(quantize.STEERING)
    assert Course(Plain(larger), resized(allocation, 0.5), steer=False).steered(name, choice) == choice


@pytest.mark.parametrize(
    ("factor", "octaves", "missed"), [(0.98, 0.0, 0.01), (1.02, 0.0, 0.01), (1.0, -0.4, 0.02), (1.0, 0.4, 0.02)]
)
@pytest.mark.parametrize("prefix_tokens", [0, 1024])
def test_a_packing_that_misses_is_done_again(
    factor: float,
    octaves: float,
    missed: float,
    prefix_tokens: int,
    larger: Model,
    bought: Callable[[float], Allocation],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Sizes are not as expected, or steps are off by more than one round may correct."""
    assert not octaves or abs(octaves) > quantize.STEERING
    caplog.set_level(logging.INFO, "nashswarm")
    allocation = resized(bought(3.0), factor, step=octaves)
    quantize.pack(larger, coded(3.0, prefix_tokens), allocation, calibration(), tmp_path / "p", no_progress)
    asked, last = allocation.asked_bytes or 0, file_bytes(tmp_path / "p")
    earlier = rounds_of(caplog)
    assert 1 <= len(earlier) < quantize.PACKING_ROUNDS
    assert abs(earlier[0] - asked) > missed * asked
    assert 0 <= asked - last <= 0.002 * asked


@pytest.mark.parametrize("octaves", [-0.6, 0.1, 0.6])
def test_a_round_corrects_all_steps_alike_by_what_the_last_one_took(
    octaves: float, larger: Model, bought: Callable[[float], Allocation]
) -> None:
    allocation, taken, corrections = resized(bought(3.0), 1.0, step=octaves), dict[str, float](), dict[str, float]()
    for _ in range(2):
        course = Course(Plain(larger), allocation, taken=taken)
        list(quantize.encode(larger, coded(3.0), allocation, course, no_progress))
        taken, corrections = course.taken_at_bought_steps(), course.corrections
    *most, _ = corrections.values()  # the last one makes up for what is over
    assert most == pytest.approx([-octaves] * len(most), abs=0.1)
    assert sum(course.sizes.values()) == pytest.approx(total(allocation), rel=0.002)


def test_what_fits_is_not_given_up_for_what_might_fit_better(
    larger: Model, bought: Callable[[float], Allocation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds of packing that fit by 2 % first, and exceed the budget whatever else is tried."""
    allocation, tried = bought(3.0), []
    asked = allocation.asked_bytes or 0

    def write(*arguments: Any) -> None:
        course = arguments[4]
        tried.append(course.reserve)
        course.sizes["some"] = 1.0

    monkeypatch.setattr(quantize, "_write", write)
    sizes = iter([1.01, 0.98, 1.02])
    monkeypatch.setattr(quantize.packed, "file_bytes", lambda _: int(asked * next(sizes, 0.98)))
    quantize.pack(larger, coded(3.0), allocation, NO_IDS, tmp_path / "p", no_progress)
    assert len(tried) == quantize.PACKING_ROUNDS
    assert tried[-1] == tried[1]
    assert len(set(tried[:-1])) == quantize.PACKING_ROUNDS - 1


def test_a_budget_beyond_reach_is_named_and_leaves_nothing(
    larger: Model, bought: Callable[[float], Allocation], tmp_path: Path
) -> None:
    """Less than what a model takes beside its codes."""
    allocation = dataclasses.replace(bought(3.0), asked_bytes=1000)
    with pytest.raises(NashSwarmError, match=r"^methods\.mine\.budget: \d+ bytes were packed, beyond \d+; raise it"):
        quantize.pack(larger, coded(3.0), allocation, NO_IDS, tmp_path / "p", no_progress)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_spent_is_said_once(larger: Model, caplog: pytest.LogCaptureFixture) -> None:
    method = parse_method("mine", {"allocator": "market", "codec": "tiles", "budget": 20.0})
    with caplog.at_level("INFO"):
        allocation = quantize.allocate(larger, method, no_progress)
    assert allocation.bought_bytes < 20 * larger.index.parameters / 8
    assert sum("nats per byte" in r.message for r in caplog.records) <= 2
    assert sum("that is all there is to buy" in r.message for r in caplog.records) == 1


def test_what_cannot_be_spent_is_packed_once(larger: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nashswarm")
    allocation = quantize.allocate(larger, coded(40.0), no_progress)
    asked = allocation.asked_bytes or 0
    assert 0 < (allocation.bought_bytes or 0) < 0.9 * asked
    quantize.pack(larger, coded(40.0, 1024), allocation, calibration(), tmp_path / "p", no_progress)
    assert rounds_of(caplog) == []
    assert file_bytes(tmp_path / "p") == pytest.approx(allocation.bought_bytes, rel=0.01)


@pytest.mark.parametrize("budget", [0.01, 0.1])
def test_a_budget_below_the_coarsest_options_is_named(budget: float, larger: Model) -> None:
    with pytest.raises(NashSwarmError, match=r"^methods\.mine\.budget: the coarsest options take .* raise the budget"):
        quantize.allocate(larger, coded(budget), no_progress)


def test_projections_between_widths_are_kept(tmp_path: Path) -> None:
    """OPT-350M's embeddings are narrower than its blocks; two matrices in no block lie between."""
    from transformers import AutoModelForCausalLM, OPTConfig

    sizes = {"hidden_size": 72, "word_embed_proj_dim": 36, "ffn_dim": 100, "num_hidden_layers": 2}
    config = OPTConfig(**sizes, num_attention_heads=4, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "m")
    index, ids = models.describe(tmp_path / "m"), calibration()
    load = partial(models.load_streamed, tmp_path / "m", index)
    for tensor, found in statistics.gather(load, index, ids, Scoring(tokens=512), no_progress):
        artifacts.write_statistics(tmp_path / "s", tensor.name, found)
    between = {t.name for t in index.tensors if t.part == "other"}
    assert {name.split(".")[-2] for name in between} == {"project_in", "project_out"}
    record = artifacts.SourceRecord("path", str(tmp_path / "m"), None, None, {})
    checkpoint = models.Checkpoint.open(tmp_path / "m", index)
    model = Model("m", index, record, checkpoint, partial(artifacts.read_statistics, tmp_path / "s"))
    method = coded(6.0, 256)
    allocation = quantize.allocate(model, method, no_progress)
    quantize.pack(model, method, allocation, ids, tmp_path / "p", no_progress)
    assert {name for name, t in open_packed(tmp_path / "p").tensors.items() if t.codec == "kept"} == between


def test_biases_follow_where_a_prefix_is_fitted(
    larger: Model, bought: Callable[[float], Allocation], tmp_path: Path
) -> None:
    moved = {}
    for tokens in (0, 1024):
        quantize.pack(larger, coded(3.0, tokens), bought(3.0), calibration(), tmp_path / str(tokens), no_progress)
        stored = open_packed(tmp_path / str(tokens)).vectors
        moved[tokens] = {n for n in stored if not np.array_equal(stored[n], larger.checkpoint.read(n).half().numpy())}
    assert moved[0] == set()
    owners = {t.name.removesuffix("weight") + "bias" for t in larger.index.tensors if t.layer is not None}
    assert moved[1024] == owners
