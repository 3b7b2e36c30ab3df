"""The model card that lies in every packed directory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml
from conftest import FAMILIES, Packed

from nashswarm.card import card

PackedModels = Callable[[str, str], Packed]


@pytest.mark.parametrize("method", ["nash", "rtn4-g64", "market-coded-3_0", "market-tiles-3_25"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_says_what_the_files_hold(family: str, method: str, packed: PackedModels) -> None:
    opened = packed(family, method).opened
    text = (opened.directory / "README.md").read_text(encoding="utf-8")
    bits = 8 * opened.size.file_bytes / opened.provenance.parameters
    assert f"in {opened.size.file_bytes:,} bytes" in text
    assert f"{bits:.2f} true bits per weight" in text
    assert f"name {method}" in text
    assert ("market's certificate" in text) == bool(opened.provenance.certificate.get("histogram"))
    assert ("price of a byte" in text) == method.startswith("market")


def test_a_baselines_card_claims_no_size(packed: PackedModels) -> None:
    text = (packed("gpt2", "fp32").directory / "README.md").read_text(encoding="utf-8")
    assert "a baseline" in text
    assert "true bits" not in text


def test_the_front_matter_names_a_hubs_model_and_nothing_else() -> None:
    known = {
        "model": "gpt2",
        "architecture": "GPT2LMHeadModel",
        "parameters": 8,
        "method": {"name": "m"},
        "certificate": {},
    }
    hub = card({**known, "id": "openai-community/gpt2", "revision": "a" * 40}, 3)
    local = card({**known, "id": None, "revision": None}, 3)
    front = yaml.safe_load(hub.split("---")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("openai-community/gpt2", "quantized")
    assert f"`openai-community/gpt2` at commit `{'a' * 40}`" in hub
    assert "base_model" not in yaml.safe_load(local.split("---")[1])
    assert "a local checkpoint" in local
