"""The figures of a packed model: true sizes, the paper's claims, and the keys that others script against."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import CONTEXT, FAMILIES, Models, Packed, no_progress

from nashswarm import evaluation, metrics
from nashswarm.config import Evaluation, PaperProtocol
from nashswarm.corpora import TokenizedSplit
from nashswarm.loading import load_for_evaluation
from nashswarm.models import load_streamed
from nashswarm.packed import MANIFEST, PAYLOAD, PackedError, PackedModel

pytestmark = pytest.mark.usefixtures("isolated_modes")
PackedModels = Callable[[str, str], Packed]


@pytest.mark.parametrize("method", ["rtn4-g64", "nash", "paper-nash", "paper-uniform4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_files(family: str, method: str, packed: PackedModels, quantizable: Models) -> None:
    made, index = packed(family, method), quantizable(family).index
    figures = metrics.size_figures(made.opened, index)
    on_disk = sum((made.directory / name).stat().st_size for name in (MANIFEST, PAYLOAD))
    assert figures["file_bytes"] == on_disk == sum(figures["parts"].values())
    assert figures["bits_per_weight"] == pytest.approx(8 * on_disk / index.parameters, rel=1e-5)
    assert figures["compression"] == pytest.approx(1 - on_disk / (4 * index.parameters), abs=1e-5)
    matrices = index.scope(made.method.scope)
    own = sum(a.nbytes for t in matrices for a in made.opened.tensors[t.name].arrays.values())
    assert figures["matrix_bits_per_weight"] == pytest.approx(8 * own / sum(t.weights for t in matrices), rel=1e-5)
    assert ("claimed_mib" in figures) == method.startswith("paper")


def test_the_papers_claim_counts_codes_of_the_touched_weights_alone(packed: PackedModels, quantizable: Models) -> None:
    figures = metrics.size_figures(packed("gpt2", "paper-uniform4").opened, quantizable("gpt2").index)
    table = quantizable("gpt2").index.tensors[0].weights
    assert figures["claimed_mib"] == pytest.approx(table * 4 / 8 / 2**20, rel=1e-5)
    assert figures["claimed_bits_per_weight"] == 4.0
    assert figures["claimed_compression"] == 0.875
    assert figures["file_bytes"] > table  # the other matrices are kept, whatever the claim


def test_claims_by_hand() -> None:
    """70 % at 2, 20 % at 4, 10 % at 8 bits are 3.0; 2^23 weights of 3 bits are 3 MiB."""
    assert metrics.claimed_figures({2: 700, 4: 200, 8: 100}) == {
        "claimed_mib": pytest.approx(3000 / 8 / 2**20, rel=1e-5),
        "claimed_bits_per_weight": 3.0,
        "claimed_compression": 0.90625,
    }
    assert metrics.claimed_figures({3: 2**23})["claimed_mib"] == 3.0


def test_the_baseline_has_32_bits(packed: PackedModels, quantizable: Models) -> None:
    index = quantizable("opt").index
    figures = metrics.size_figures(packed("opt", "fp32").opened, index)
    assert figures["file_bytes"] == 4 * index.parameters
    assert figures["bits_per_weight"] == figures["matrix_bits_per_weight"] == 32.0
    assert figures["compression"] == figures["claimed_compression"] == 0.0
    assert figures["claimed_mib"] == pytest.approx(4 * index.parameters / 2**20, rel=1e-5)


@pytest.mark.parametrize("method", ["rtn4-g64", "paper-nash", "market-coded-3_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_matrix_has_its_true_bits(family: str, method: str, packed: PackedModels, quantizable: Models) -> None:
    made, index = packed(family, method), quantizable(family).index
    rows = metrics.tensor_rows(made.opened, index)
    assert [row[:4] for row in rows] == [[t.name, t.part, t.layer, t.weights] for t in index.tensors]
    for name, _, _, weights, bits in rows:
        stored = sum(array.nbytes for array in made.opened.tensors[name].arrays.values())
        assert bits == pytest.approx(8 * stored / weights, rel=1e-5)
    outside = {t.name for t in index.tensors} - {t.name for t in index.scope(made.method.scope)}
    assert {row[4] for row in rows if row[0] in outside} <= {32.0}  # kept as in the checkpoint
    parts, shared = made.opened.size.parts, next(iter(made.opened.tensors.values())).shared.values()
    others = parts["headers"] + parts.get("vectors", 0) + sum(array.nbytes for array in shared)
    assert sum(row[3] * row[4] / 8 for row in rows) == pytest.approx(made.opened.size.file_bytes - others, rel=1e-5)


def test_the_baseline_has_no_table_of_matrices(packed: PackedModels, quantizable: Models) -> None:
    assert metrics.tensor_rows(packed("gpt2", "fp32").opened, quantizable("gpt2").index) == []


def test_only_the_papers_accounting_needs_a_histogram(packed: PackedModels, quantizable: Models) -> None:
    index = quantizable("gpt2").index
    for method in ("rtn4-g64", "fp32"):
        made = packed("gpt2", method).opened
        bare = by_hand(made, certificate={}, method={"codec": made.provenance.method["codec"]})
        assert metrics.size_figures(bare, index) == metrics.size_figures(made, index)
        assert metrics.document(bare, index, {}, Evaluation())["allocation"].keys() <= {"tensors"}
    with pytest.raises(PackedError, match=r"manifest.json: provenance.certificate has no histogram .* pack the model"):
        metrics.size_figures(by_hand(packed("gpt2", "paper-nash").opened, certificate={}), index)


def test_a_model_without_quantized_matrices_has_no_matrix_bits(packed: PackedModels, quantizable: Models) -> None:
    made = packed("gpt2", "paper-nash").opened
    kept = {name: tensor for name, tensor in made.tensors.items() if tensor.codec == "kept"}
    bare = dataclasses.replace(by_hand(made, method={"codec": "classes"}), tensors=kept)
    assert metrics.size_figures(bare, quantizable("gpt2").index)["matrix_bits_per_weight"] is None


def by_hand(made: PackedModel, **changes: Any) -> PackedModel:
    return dataclasses.replace(made, provenance=dataclasses.replace(made.provenance, **changes))


@pytest.mark.parametrize("method", ["fp32", "paper-nash", "rtn4-g64"])
def test_the_document_has_the_contracts_keys(
    method: str, packed: PackedModels, quantizable: Models, split: Callable[..., TokenizedSplit]
) -> None:
    made, model, texts = packed("gpt2", method), quantizable("gpt2"), split("gpt2")
    settings = Evaluation(context=CONTEXT, paper=PaperProtocol(texts=(3, 5), length=8))
    original = load_streamed(model.checkpoint.directory, model.index)
    baseline = evaluation.original_outputs(lambda: original, texts, settings, CONTEXT, no_progress)
    quantized = load_for_evaluation(made.opened, model.checkpoint.directory, model.index)
    head = evaluation.original_head(model.checkpoint.directory, model.index)
    beside = lambda: evaluation.Original(head, baseline)  # noqa: E731
    losses = evaluation.measure(lambda: quantized, beside, texts, settings, CONTEXT, no_progress)
    document = json.loads(
        json.dumps(metrics.document(made.opened, model.index, {"tiny": losses}, settings), allow_nan=False)
    )
    assert document["size"].keys() >= {"file_bytes", "bits_per_weight", "matrix_bits_per_weight"}
    assert document["quality"]["tiny"].keys() >= {
        *("loss", "perplexity", "tokens", "delta_loss", "delta_loss_ci95", "delta_loss_percent", "resolved"),
        *("kl_mean", "kl_p99", "top1_agreement"),
    }
    assert document["paper"]["tiny"].keys() >= {"loss", "perplexity", "delta_loss_percent", "texts"}
    assert document["allocation"].keys() >= {"price", "largest_deviation_gain", "duality_gap", "histogram"}
    assert ("tensors" in document["allocation"]) == (method != "fp32")
    blocks = document["quality"]["tiny"]["window_blocks"]
    assert sum(blocks["targets"]) == document["quality"]["tiny"]["tokens"]
    assert sum(blocks["rises"]) / sum(blocks["targets"]) == pytest.approx(
        document["quality"]["tiny"]["delta_loss"], 1e-4
    )
    assert document["quality"]["tiny"]["tokens"] == sum(w.size - 1 for w in evaluation.windows(texts.ids, CONTEXT))
    assert (document["quality"]["tiny"]["delta_loss"] == 0) == (method == "fp32")
