"""What several peers need: the original as their tools want it, bytes of what they store, and GPTQ's packing.

Needs torch and transformers of the peers' environment; nothing here imports a peer's tool.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nashswarm.bitpack import unpack
from nashswarm.processes import die_with_parent
from nashswarm.types import InputError, PeerJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AS_LINEAR = "its automatic path skips transformers' Conv1D, so these were turned into Linear first"


def calibration_windows(job: PeerJob) -> Tensor:
    """All whole windows of the calibration text, int64 [windows, context]."""
    count = job.ids.size // job.context
    if not count:
        raise InputError(f"{job.ids.size} calibration tokens are less than a window of {job.context}; give more text")
    return torch.from_numpy(job.ids[: count * job.context].astype(np.int64)).view(count, job.context)


def load_original(job: PeerJob, dtype: torch.dtype) -> PreTrainedModel:
    """The original in `dtype`, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.directory, dtype=dtype, local_files_only=True)
    return model.eval().requires_grad_(False)


def conv1d_to_linear(model: PreTrainedModel) -> None:
    """Replace each Conv1D, weight (in, out), by the Linear, weight (out, in), that computes the same."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            weight: Any = module.weight
            linear: Any = torch.nn.Linear(weight.shape[0], weight.shape[1], dtype=weight.dtype)
            linear.weight = torch.nn.Parameter(weight.data.T.contiguous(), requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)


def stored_parts(arrays: Mapping[str, Tensor], parts: Mapping[str, str]) -> dict[str, int]:
    """Bytes by part of a safetensors file that holds `arrays` and nothing else; the parts sum to its size.

    Arguments: `parts`, how an array's name ends -> its part; arrays of no part are headers.
    """
    from safetensors.torch import save

    found = dict.fromkeys(parts.values(), 0)
    for name, array in arrays.items():
        part = next((part for end, part in parts.items() if name.endswith(end)), None)
        if part is not None:
            found[part] += array.numel() * array.element_size()
    return found | {"headers": len(save(dict(arrays))) - sum(found.values())}


GPTQ_PARTS = {"qweight": "codes", "scales": "scales", "qzeros": "zeros", "g_idx": "map"}


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix as AutoGPTQ began to lay it out: w[i, o] = scale[g, o] (code[i, o] - zero[g, o]), g the group of i."""

    qweight: Tensor  # int32 [in * bits / 32, out], codes of a column as one stream of bits
    qzeros: Tensor  # int32 [groups, out * bits / 32]
    scales: Tensor  # float16 [groups, out]
    g_idx: Tensor | None = None  # int32 [in], the group of each input; None: consecutive inputs


def gptq_weight(packed: Packed, bits: int, zero_offset: int) -> Tensor:
    """float32 [out, in]. Arguments: `zero_offset`, what the format takes off a zero before it stores it (0 or 1)."""
    groups, outputs = packed.scales.shape
    inputs = packed.qweight.shape[0] * 32 // bits
    codes = _stream(packed.qweight.T.contiguous(), bits, outputs * inputs).reshape(outputs, inputs)
    zeros = _stream(packed.qzeros, bits, groups * outputs).reshape(groups, outputs).astype(np.int32) + zero_offset
    group = np.arange(inputs) // -(-inputs // groups) if packed.g_idx is None else packed.g_idx.numpy()
    scales = packed.scales.float().numpy()
    return torch.from_numpy(scales[group].T * (codes.astype(np.int32) - zeros[group].T).astype(np.float32))


def _stream(words: Tensor, bits: int, count: int) -> np.ndarray:
    """Codes of `bits` bits, the least significant first, in rows of little-endian 32-bit words."""
    return unpack(words.contiguous().numpy().astype("<i4").reshape(-1).view(np.uint8), bits, count)


def read_gptq(
    directory: Path, names: Sequence[str], bits: int, zero_offset: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Matrices by parameter's name, float32 [out, in], and the bytes stored for them, by part.

    Arguments: `directory`, a saved model whose modules hold `qweight`, `qzeros`, `scales` and, perhaps, `g_idx`.
    """
    from safetensors.torch import load_file

    arrays = {k: v for path in sorted(directory.rglob("*.safetensors")) for k, v in load_file(path).items()}
    stored: dict[str, Tensor] = {}
    matrices = {}
    for name in names:
        module = name.removesuffix(".weight")
        own = {end: arrays[f"{module}.{end}"] for end in GPTQ_PARTS if f"{module}.{end}" in arrays}
        if not {"qweight", "qzeros", "scales"} <= own.keys():
            raise InputError(f"{name}: the tool did not quantize this matrix")
        stored |= {f"{module}.{end}": array for end, array in own.items()}
        matrices[name] = gptq_weight(Packed(**own), bits, zero_offset)
    return matrices, stored_parts(stored, GPTQ_PARTS)


def call(*words: str | Path) -> str:
    """Run a program to its end; what it printed. Raises InputError with its last words where it fails."""
    done = subprocess.run(
        [str(w) for w in words], capture_output=True, text=True, errors="replace", preexec_fn=die_with_parent
    )
    if done.returncode:
        last = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()][-3:]
        raise InputError(f"{Path(words[0]).name} ended with {done.returncode}: {' / '.join(last)}")
    return f"{done.stdout}\n{done.stderr}"
