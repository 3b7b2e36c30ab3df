"""CUDA kernels compiled at their first use by NVRTC, which comes with torch's builds for CUDA; called by ctypes."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


def compiled(source: bytes, name: str, *options: str) -> bytes:
    """Machine code of CUDA source. Raises OSError where NVRTC is missing, RuntimeError with its words else."""
    nvrtc, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    words = [option.encode() for option in options]
    _done(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None))
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
        if failed:
            _done(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _done(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"NVRTC ended with {failed}: {log.value.decode(errors='replace').strip()[:300]}")
        _done(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        made = ctypes.create_string_buffer(size.value)
        _done(nvrtc.nvrtcGetCUBIN(program, made))
        return made.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class Function:
    """One kernel of a compiled program, loaded on one device. Raises OSError, RuntimeError."""

    def __init__(self, program: bytes, name: str, device: torch.device) -> None:
        with torch.cuda.device(device):
            torch.empty(1, device=device)  # torch's context is there, and current
            self._driver = ctypes.CDLL("libcuda.so.1")
            self._context, self._module, self._function = (ctypes.c_void_p() for _ in range(3))
            self._checked(self._driver.cuCtxGetCurrent(ctypes.byref(self._context)))
            self._checked(self._driver.cuModuleLoadData(ctypes.byref(self._module), program))
            found = self._driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode())
            self._checked(found)

    def start(self, blocks: int, threads: int, *arguments: Any) -> None:
        """On the current stream of the current device. Arguments: `arguments`, of ctypes' types."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        sides = (blocks, 1, 1, threads, 1, 1, 0)
        self._checked(self._driver.cuCtxSetCurrent(self._context))  # a thread's first call may come without
        self._checked(self._driver.cuLaunchKernel(self._function, *sides, stream, places, None))

    def _checked(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"CUDA's driver: {(text.value or b'unknown error').decode()} ({code})")


def _done(code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC ended with {code}")


def _nvrtc() -> ctypes.CDLL:
    """That of torch's CUDA: where the loader finds it, or in the packages beside torch. Raises OSError."""
    name = f"libnvrtc.so.{(torch.version.cuda or '').partition('.')[0]}"
    packages = Path(torch.__file__).parents[1] / "nvidia"
    parts = sorted(packages.glob("*/lib/libnvrtc-builtins.so.*"))  # which it asks for by name alone
    for place in [*map(str, sorted(packages.glob(f"*/lib/{name}"))), name]:
        try:
            for part in parts:
                ctypes.CDLL(str(part))
            return ctypes.CDLL(place)
        except OSError as error:
            logger.info("%s cannot be used: %s", place, error)
    raise OSError(f"{name} is not there")
