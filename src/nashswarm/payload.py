"""A safetensors file from arrays that come one at a time: none of them is in memory once it has come.

The library for the format writes what it is handed whole. Here arrays go to a spool beside the file as they are made;
when all are there, the header can be written, and the pieces are copied behind it in the order that the format's own
library gives them, so that the bytes are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

import numpy as np

from nashswarm.artifacts import naming
from nashswarm.types import NashSwarmError

# The format's names of what numpy holds, in the order in which its library lays them out.
DTYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "uint32": "U32", "float32": "F32", "int32": "I32",
    "float16": "F16", "uint16": "U16", "int16": "I16", "uint8": "U8", "int8": "I8", "bool": "BOOL",
}  # fmt: skip
ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "F16", "U16", "I16", "I8", "U8", "BOOL")
CHUNK = 1 << 20


class Payload:
    """Arrays under way to a safetensors file. Use it as a context: the spool is gone behind it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pieces: dict[str, tuple[str, tuple[int, ...], int, int]] = {}  # key -> dtype, shape, start, bytes
        self._end = 0

    def __enter__(self) -> Self:
        with naming(self.path):
            self._spool: IO[bytes] = tempfile.TemporaryFile(dir=self.path.parent)
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, key: str, array: np.ndarray) -> None:
        """Take an array over; nothing happens where one came before under the same key."""
        if key in self.pieces:
            return
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        with naming(self.path):
            self._spool.write(array.reshape(-1).view(np.uint8).data)
        self.pieces[key] = (DTYPES[array.dtype.name], array.shape, self._end, array.nbytes)
        self._end += array.nbytes

    def finish(self) -> tuple[int, str]:
        """Write the file and sync it. Returns its bytes and their SHA-256. Raises NashSwarmError without space."""
        order = sorted(self.pieces, key=lambda k: (ORDER.index(self.pieces[k][0]), k))
        header, start = {}, 0
        for key in order:
            dtype, shape, _, count = self.pieces[key]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + count]}
            start += count
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        check_space(self.path.parent, 8 + len(text) + start)
        found, size = hashlib.sha256(), 0
        with naming(self.path), self.path.open("wb") as file:
            self._spool.flush()
            for block in (len(text).to_bytes(8, "little"), text, *self._blocks(order)):
                file.write(block)
                found.update(block)
                size += len(block)
            file.flush()
            os.fsync(file.fileno())
        return size, found.hexdigest()

    def _blocks(self, order: list[str]) -> Iterator[bytes]:
        for key in order:
            _, _, start, left = self.pieces[key]
            self._spool.seek(start)
            while left:
                block = self._spool.read(min(left, CHUNK))
                left -= len(block)
                yield block


def check_space(directory: Path, needed: int) -> None:
    """Raise NashSwarmError where the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise NashSwarmError(f"{directory}: {needed:,} bytes are to be written and {free:,} are free; make room")
