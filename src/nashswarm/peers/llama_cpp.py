"""llama.cpp's K- and I-quants with an importance matrix: https://github.com/ggml-org/llama.cpp.

`llama-quantize`, `llama-imatrix` and the converter are those in llama-cpp-python's source package, built by
tools/llama_cpp.sh into the peers' environment. llama.cpp chooses a type for each matrix by itself, tables included;
where a row is no multiple of 256 it takes a wider type without a word, so what the file holds is counted.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nashswarm.types import InputError, PeerJob, PeerWeights

if TYPE_CHECKING:
    from torch import Tensor

PROGRAMS = "llama.cpp"  # below the environment
ARCHITECTURE = "GPT2LMHeadModel"
KINDS = re.compile(r"I?Q[1-8]_[A-Z0-9]+(_[A-Z]+)?")
FIXED = 24  # bytes of a GGUF file before its first key: magic, version, two counts
PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Settings:
    """`kind` is one of llama-quantize's types, e.g. Q4_K_M or IQ3_XXS."""

    kind: str
    imatrix: bool = True

    def __post_init__(self) -> None:
        if not KINDS.fullmatch(self.kind):
            raise ValueError(f"kind: '{self.kind}' is no type of llama-quantize, such as Q4_K_M or IQ3_XXS")


def quantize(job: PeerJob, settings: Settings) -> PeerWeights:
    """Convert at float16, measure the importance matrix on all of the calibration text, quantize, read back."""
    from nashswarm import tooling

    home = Path(sys.prefix) / PROGRAMS
    if not (home / "llama-quantize").is_file():
        raise InputError("llama-quantize is not in the peers' environment; tools/llama_cpp.sh builds it")
    if job.index.architecture != ARCHITECTURE:
        raise InputError(f"{job.index.architecture}: the map of names and rows here is for {ARCHITECTURE} alone")
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        _convert(home, job, scratch)
        whole, quantized = scratch / "whole.gguf", scratch / "quantized.gguf"
        options: list[str | Path] = []
        if settings.imatrix:
            matrix, text = scratch / "imatrix.gguf", scratch / "calibration.txt"
            size = ("-c", str(job.context), "-t", str(job.threads))
            tooling.call(home / "llama-imatrix", "-m", whole, "-f", text, "-o", matrix, *size, "--no-ppl")
            options = ["--imatrix", matrix]
        tooling.call(home / "llama-quantize", *options, whole, quantized, settings.kind, str(job.threads))
        matrices, parts, notes = _read(quantized, job)
    return PeerWeights(matrices, parts, (home / "VERSION").read_text().strip(), notes)


def _convert(home: Path, job: PeerJob, scratch: Path) -> None:
    """whole.gguf, and the calibration text as the importance matrix' program reads it."""
    from transformers import AutoTokenizer

    original = scratch / "original"
    original.mkdir()
    for path in job.directory.iterdir():
        if path.is_file() and path.name != "config.json":
            (original / path.name).symlink_to(path.resolve())
    config = json.loads((job.directory / "config.json").read_bytes())
    config |= {"architectures": [job.index.architecture], "n_ctx": job.index.context}  # the converter needs both
    (original / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(job.directory, local_files_only=True)
    (scratch / "calibration.txt").write_text(tokenizer.decode(job.ids), encoding="utf-8")
    sys.path[:0] = [str(home), str(home / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    # It knows pre-tokenizers by a hash of what a tokenizer makes of a text, which differs for every vocabulary.
    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    sys.argv = ["convert", str(original), "--outfile", str(scratch / "whole.gguf"), "--outtype", "f16"]
    convert_hf_to_gguf.main()


def _read(path: Path, job: PeerJob) -> tuple[dict[str, Tensor], dict[str, int], tuple[str, ...]]:
    """Matrices that the file holds quantized, their bytes by part, and what there is to say.

    Keys (configuration, vocabulary) are not counted, nor is what is stored as floats: it is left alone.
    """
    import gguf
    import torch

    reader = gguf.GGUFReader(path)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, job.index.layers)
    stored: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
    keys = min(tensor.field.offset for tensor in reader.tensors) - FIXED
    data = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    matrices, bytes_, kinds = {}, 0, Counter[str]()
    for spec in job.index.tensors:
        tensor = stored[table.get_name(spec.name, try_suffixes=(".weight",))]
        kinds[tensor.tensor_type.name] += spec.weights
        if tensor.tensor_type.name not in PLAIN:
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(spec.shape)
            matrices[spec.name] = torch.from_numpy(weights.copy())
            bytes_ += int(tensor.n_bytes)
    if "output.weight" in stored and job.index.head in matrices:
        raise InputError("the file holds a head of its own beside the table it is tied to; that is not counted here")
    shares = ", ".join(f"{kind} {100 * n / sum(kinds.values()):.0f} %" for kind, n in kinds.most_common())
    headers = os.stat(path).st_size - keys - data
    notes = (f"types it chose: {shares}; its scales lie within the codes' blocks",)
    return matrices, {"codes": bytes_, "headers": headers}, notes
