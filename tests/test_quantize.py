"""From checkpoint to packed tensors: what is in scope, what the codec is told, and what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, Models, no_progress

from nashswarm import artifacts, quantize
from nashswarm.codecs import classes, grouped, kept
from nashswarm.config import Method, Params, load_room, parse_method
from nashswarm.importance import magnitude, swarm
from nashswarm.packed import open_packed
from nashswarm.quantize import Course, Model, Plain
from nashswarm.types import Allocation, Choice, InputError, Job, PackedTensor

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
        assert job.statistics is model.statistics(job.tensor.name)


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
        **{"group": 16, "embedding_group": None, "clip_search": True},
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
