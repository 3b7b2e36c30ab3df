"""The model card of a packed directory, what the manifest says in words: for whom meets it far from the project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FP32_BITS = 32
BASELINE = "source"  # the codec that stores no weights
FIGURES = {  # of the certificate: key -> what it is, in words
    "predicted_rise": "predicted rise in loss, nats per token",
    "price": "price of a byte, nats",
    "largest_deviation_gain": "most that a matrix could gain by other bits, nats",
    "duality_gap": "gap to the continuous optimum, nats",
}


def card(provenance: Mapping[str, Any], file_bytes: int) -> str:
    """README.md, in the hub's form. Arguments: `provenance`, the manifest's; `file_bytes`, of manifest and payload."""
    method, parameters = provenance["method"], provenance["parameters"]
    bits = 8 * file_bytes / parameters
    origin = f"`{provenance['id']}` at commit `{provenance['revision']}`" if provenance["id"] else "a local checkpoint"
    settings = ", ".join(f"{key} {value}" for key, value in method.items())
    shape, saved = f"{parameters:,} parameters ({provenance['architecture']})", 100 * (1 - bits / FP32_BITS)
    title = f"{bits:.2f} true bits per weight"
    size = f"{shape} in {file_bytes:,} bytes, {saved:.1f} % less than as float32; all bytes of the weights are counted."
    if method.get("codec") == BASELINE:
        title, size = "a baseline", f"{shape}, stored elsewhere."
    return "\n".join(
        [
            *_front(provenance),
            f"# {provenance['model']}, {title}",
            "",
            size,
            f"Made by nash-swarm of {origin}; the licence is the original's.",
            "",
            "```python",
            "import nashswarm",
            "from transformers import AutoTokenizer",
            "",
            'model = nashswarm.load("this directory")  # verified first; resident="packed" keeps it small in memory',
            'tokenizer = AutoTokenizer.from_pretrained("this directory")',
            "```",
            "",
            "`nashswarm inspect` shows where the bytes and bits are, `nashswarm verify` checks every file's SHA-256.",
            "",
            "## How it was made",
            "",
            f"Method: {settings}.",
            "",
            *_certificate(provenance["certificate"]),
            "What it loses on a text of yours is not said here: measure it.",
            "",
        ]
    )


def _front(provenance: Mapping[str, Any]) -> list[str]:
    base = [f"base_model: {provenance['id']}", "base_model_relation: quantized"] if provenance["id"] else []
    tags = ["tags:", "- quantized", "- nash-swarm"]
    return ["---", "library_name: transformers", "pipeline_tag: text-generation", *base, *tags, "---", ""]


def _certificate(certificate: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {words} | {certificate[key]:.3g} |" for key, words in FIGURES.items() if certificate.get(key) is not None
    ]
    histogram = certificate.get("histogram") or {}
    rows += [f"| weights of {bits} bits | {count:,} |" for bits, count in sorted(histogram.items(), key=_width)]
    return ["| the market's certificate | |", "|---|---|", *rows, ""] if rows else []


def _width(item: tuple[str, int]) -> int:
    return int(item[0])
