"""The command `nashswarm`, as a user calls it: figures that sum, files that are checked, errors in one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FAMILIES, PROJECT, Checkpoints, Packed, edit_json, tiny_text

from nashswarm import cli, models, packed
from nashswarm.config import load_params
from nashswarm.loading import load

PackedModels = Callable[[str, str], Packed]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """(words) -> exit code, what it printed, and its complaints."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nashswarm", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(tiny_text(60, 10)), encoding="utf-8")
    return path


def methods() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "params.yaml").read_text())["methods"]  # type: ignore[no-any-return]


# --- looking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn4-g64", "market-coded-3_0", "market-tiles-3_25"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_inspect_says_sums_to_the_files(family: str, method: str, packed: PackedModels, call: Call) -> None:
    directory = packed(family, method).directory
    code, out, _ = call("inspect", directory, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["files"] == {p.name: p.stat().st_size for p in directory.iterdir()}
    own = found["files"]["manifest.json"] + found["files"]["packed.safetensors"]
    assert sum(found["size"]["parts"].values()) == found["size"]["file_bytes"] == own
    assert found["size"]["bits_per_weight"] == 8 * own / found["parameters"]
    assert found["method"]["name"] == method
    assert len(found["tensors"]) == len(models.describe(directory).tensors)


def test_inspect_shows_parts_map_and_certificate(packed: PackedModels, call: Call) -> None:
    code, out, _ = call("inspect", packed("llama", "market-coded-3_0").directory)
    assert code == 0
    for word in ("true bits per weight", "codes", "MLP gate", "price", "duality gap", "lm_head"):
        assert word in out


def test_inspect_of_something_else_is_refused_in_one_line(tmp_path: Path, call: Call) -> None:
    code, out, err = call("inspect", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path}: no manifest.json; this is not a packed directory\n"


# --- checking ------------------------------------------------------------------------------------------------------


def test_verify_names_the_broken_one(packed: PackedModels, tmp_path: Path, call: Call) -> None:
    good = packed("gpt2", "market-coded-3_0").directory
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    payload = bytearray((bad / "packed.safetensors").read_bytes())
    payload[-1] ^= 1
    (bad / "packed.safetensors").write_bytes(payload)
    assert call("verify", good)[:2] == (0, f"{good}: sound\n")
    code, out, _ = call("verify", good, bad, "--json")
    found = json.loads(out)
    assert code == 1
    assert found[str(good)] is None
    assert "the SHA-256 is not that of the manifest" in found[str(bad)]


def test_a_baseline_is_sound_though_it_stores_no_weights(packed: PackedModels, call: Call) -> None:
    assert call("verify", packed("gpt2", "fp32").directory)[0] == 0


# --- using ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_loaded_models(family: str, packed: PackedModels, call: Call) -> None:
    directory = packed(family, "nash").directory
    code, out, _ = call("generate", directory, "na shi", "--tokens", "8", "--json")
    model, tokenizer = load(directory), models.load_tokenizer(directory)
    ids = torch.tensor([tokenizer("na shi")["input_ids"]])
    with torch.inference_mode():
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) == model.config.eos_token_id:
                break
    assert code == 0
    assert json.loads(out)["text"] == tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpacked_is_a_plain_checkpoint_of_the_same_weights(
    family: str, packed: PackedModels, tmp_path: Path, call: Call
) -> None:
    directory, plain = packed(family, "market-coded-3_0").directory, tmp_path / "plain"
    assert call("unpack", directory, "-o", plain)[0] == 0
    loaded, again = load(directory), models.load_original(plain, models.describe(plain))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in again.named_parameters())
    assert (
        models.load_tokenizer(plain)("na shi")["input_ids"] == models.load_tokenizer(directory)("na shi")["input_ids"]
    )


def test_an_estimate_does_not_run_a_models_code_either(checkpoint: Checkpoints, tmp_path: Path, call: Call) -> None:
    source = shutil.copytree(checkpoint("gpt2"), tmp_path / "model")
    assert call("estimate", source)[0] == 0
    edit_json(source / "config.json", auto_map={"AutoModelForCausalLM": "mine.Mine"})
    code, _, err = call("estimate", source)
    assert code == 2
    assert "`auto_map` asks to run code" in err


# --- making --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_packed_to_its_budget(
    family: str, checkpoint: Checkpoints, text: Path, tmp_path: Path, call: Call
) -> None:
    target = tmp_path / "packed"
    code, out, _ = call("quantize", checkpoint(family), "--text", text, "--bits", 6, "-o", target, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["method"]["name"] == "market-coded-6_0"
    assert 0.98 * found["certificate"]["asked_bytes"] <= found["size"]["file_bytes"]
    assert found["size"]["file_bytes"] <= found["certificate"]["asked_bytes"]
    assert packed.open_packed(target).provenance.model == checkpoint(family).name


@pytest.mark.parametrize("method", ["rtn4-g64", "gptq3-g128", "nash", "market-coded-3_0", "market-tiles-3_25"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_a_single_file_are_packed_to_the_same_bytes(
    family: str, method: str, checkpoint: Checkpoints, text: Path, tmp_path: Path, call: Call
) -> None:
    file = tmp_path / "method.yaml"
    file.write_text(yaml.safe_dump({method: methods()[method]}), encoding="utf-8")
    made = []
    for sharded in (False, True):
        source, target = tmp_path / str(sharded) / "model", tmp_path / str(sharded) / "packed"
        shutil.copytree(checkpoint(family, sharded=sharded), source)
        budget = ("--bits", 6) if "market" in method else ()
        words = ("--tokens", 512, "--method", file, *budget)
        code, _, err = call("quantize", source, "--text", text, "-o", target, *words)
        assert code == 0, err
        made.append({p.name: p.read_bytes() for p in sorted(target.iterdir())})
    assert len(list((tmp_path / "True/model").glob("*.safetensors"))) > 1
    assert made[0] == made[1]


@pytest.mark.parametrize(("codec", "bits"), [("coded", 3), ("coded", 2.5), ("tiles", 3.25)])
def test_a_budget_means_the_method_of_params(codec: str, bits: float) -> None:
    methods = load_params(PROJECT / "params.yaml").methods
    found = cli._method(None, bits, codec, [])
    assert found == methods[found.name]


def test_a_method_of_a_file_and_its_changes(checkpoint: Checkpoints, text: Path, tmp_path: Path, call: Call) -> None:
    file, target = tmp_path / "method.yaml", tmp_path / "packed"
    file.write_text(yaml.safe_dump({"mine": methods()["rtn4-g64"]}), encoding="utf-8")
    words = ("quantize", checkpoint("gpt2"), "--text", text, "-o", target, "--method", file, "--json")
    code, out, _ = call(*words, "--set", "embedding_group=32")
    method = json.loads(out)["method"]
    assert code == 0
    assert (method["name"], method["embedding_group"], method["codec"]) == ("mine", 32, methods()["rtn4-g64"]["codec"])


WRONG = {
    "model": (("nowhere",), "nowhere"),
    "text": (("--text", "nowhere.txt"), "nowhere.txt: no such text file"),
    "codec": (("--codec", "codet"), "did you mean 'coded'"),
    "setting": (("--set", "states=5"), "states: 5 is none of"),
    "words": (("--set", "states"), "--set states: give KEY=VALUE"),
    "file": (("--method", "nowhere.yaml"), "nowhere.yaml: not one method by its name"),
    "budget": (("--bits", "0.01"), "budget: the coarsest options take"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_and_the_old_directory_stays(
    words: tuple[str, ...], message: str, checkpoint: Checkpoints, text: Path, tmp_path: Path, call: Call
) -> None:
    target = tmp_path / "packed"
    target.mkdir()
    (target / "precious").write_text("kept")
    given: list[str | Path] = [checkpoint("gpt2"), "--text", text, "-o", target, *words]
    if words == ("nowhere",):
        given[0] = given.pop()
    code, out, err = call("quantize", *given)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert len(err.strip().split("\n")) == 1
    assert [p.name for p in target.iterdir()] == ["precious"]


def test_help_teaches_every_command(call: Call) -> None:
    out = call("--help")[1]
    assert all(command in out for command in ("quantize", "inspect", "verify", "generate", "unpack"))
    assert "nashswarm quantize ./gpt2 --text train.txt --bits 3 -o gpt2-3bit" in call("quantize", "--help")[1]
