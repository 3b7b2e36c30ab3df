"""All columns of a model through the trellis at once on a GPU: viterbi.cu, compiled at its first use.

It gives the codes of `trellis.round_patch`, bit for bit. Whatever goes wrong ends in a warning and None: callers then
round on the processor.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nashswarm import trellis
from nashswarm.kernels import nvrtc
from nashswarm.rans import RADIUS

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("viterbi.cu")
THREADS = 64  # of a block, each with up to 64 costs twice in registers; as in viterbi.cu


class Columns:
    """The columns of blocks of rows, in one flat tensor, and scratch space of 2 x 4 (64 states: 8) bytes a latent.

    Arguments: `begins`, int64 [columns], the place of a column's first row; `strides` and `rows`, int32 [columns];
    `total`, latents.
    """

    def __init__(
        self,
        kernel: nvrtc.Function,
        states: int,
        begins: NDArray[np.int64],
        strides: NDArray[np.int32],
        rows: NDArray[np.int32],
        total: int,
        device: torch.device,
    ) -> None:
        bits = torch.int64 if states > 32 else torch.int32
        self._kernel, self._count = kernel, len(begins)
        self._scratch = [torch.empty(total, dtype=bits, device=device) for _ in range(2)]
        self._places = [torch.from_numpy(part).to(device) for part in (begins, strides, rows)]

    def round(self, latents: Tensor, values: Tensor, codes: Tensor | None = None) -> None:
        """Float32 [total], in steps -> values, float32, and codes, int32, in steps, written to what is given."""
        with torch.cuda.device(latents.device):
            at = [None if t is None else t.data_ptr() for t in (latents, *self._scratch, values, codes, *self._places)]
            arguments = (*map(ctypes.c_void_p, at), ctypes.c_int32(self._count))
            self._kernel.start(-(-self._count // THREADS), THREADS, *arguments)


def kernel(states: int, device: torch.device) -> nvrtc.Function | None:
    """For a trellis of so many states; None, with one warning, where it cannot be had, and on other devices."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return _loaded(states, torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _loaded(states: int, index: int) -> nvrtc.Function | None:
    try:
        return nvrtc.Function(compiled(states, index), "round_columns", torch.device("cuda", index))
    except (OSError, RuntimeError, AttributeError) as error:
        logger.warning("codes cannot be rounded on the GPU (%s): the processor does it, which is slower", error)
        return None


def compiled(states: int, index: int) -> bytes:
    """viterbi.cu as machine code for a device. Raises OSError, RuntimeError."""
    major, minor = torch.cuda.get_device_capability(index)
    options = f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", "--fmad=false"
    return nvrtc.compiled(source(states), SOURCE.name, *options)


def source(states: int) -> bytes:
    """viterbi.cu, with what it wants before it."""
    machine = trellis.machine(states)
    known = {
        "STATES": states,
        "WAYS": ", ".join(map(str, machine.ways.reshape(-1))),
        "QUANTIZERS": ", ".join(map(str, machine.quantizer)),
        "BEYOND": RADIUS + 1,
        "LARGEST": trellis.LARGEST,
        "OUT_OF_BOUNDS": f"({trellis.OUT_OF_BOUNDS + 1} - 1)",  # C has no such constant
    }
    return "".join(f"#define {name} {value}\n" for name, value in known.items()).encode() + SOURCE.read_bytes()
