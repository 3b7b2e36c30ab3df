"""Codes to bytes and back, beside a copy of the unpacked bytes.

Unpacked are: for `bitpack` one byte a code; for the codec `tiles` 4 bytes a weight, the float32 that it decodes to; for
the entropy coder 4 bytes a code, the int32 that it decodes to. The copy is numpy's, on one thread, between two arrays
that stay; what is compared with it makes new arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nashswarm import bitpack, entropy, trellis
from nashswarm.benchmarks.machine import document, machine
from nashswarm.benchmarks.matrices import packed
from nashswarm.benchmarks.timing import Row, Turn, interleaved, rows
from nashswarm.config import Benchmark
from nashswarm.kernels.matrix import TILES
from nashswarm.types import Progress

REFERENCE = "copy"
SHAPE = (768, 3072)  # of a matrix of GPT-2 124M
SPREAD = 1.94  # standard deviation of normal codes of 3.0 bits
DISTINCT = 4  # streams; more of them differ in nothing
STATES = 32  # of the trellis, as `coded` has it unless told otherwise


def measure(settings: Benchmark, threads: int, progress: Progress) -> dict[str, Any]:
    """Bit packing at every width, decoding of tiles, entropy coding."""
    found, rng = machine(threads, settings.cold_mib, settings.rounds), np.random.default_rng(0)
    made: list[Row] = []
    for width in progress(settings.packing.widths, "packing"):
        made += _bitpack(rng, width, settings.packing.codes, settings.rounds)
    made += _tiles(rng, settings.packing.codes, settings.rounds)
    made += _entropy(rng, settings.packing.coded, settings.rounds, threads)
    return document(found, settings, made)


def _bitpack(rng: np.random.Generator, width: int, count: int, rounds: int) -> Iterator[Row]:
    codes = rng.integers(0, 1 << width, count, np.uint8 if width <= 8 else np.uint16)
    data = bitpack.pack(codes, width)
    work: dict[str, Turn] = {
        "pack": lambda _: bitpack.pack(codes, width),
        "unpack": lambda _: bitpack.unpack(data, width, count),
    }
    yield from _beside_copy(f"bitpack, {width} bits", work, codes, rounds)


def _tiles(rng: np.random.Generator, count: int, rounds: int) -> Iterator[Row]:
    """Decoding of a matrix of about as many weights."""
    matrix = packed((max(1, count // SHAPE[1]), SHAPE[1]), rng)
    decoded = TILES.decode(matrix).numpy()
    yield from _beside_copy("tiles, 3.25 bits", {"decode": lambda _: TILES.decode(matrix)}, decoded, rounds)


def _entropy(rng: np.random.Generator, count: int, rounds: int, threads: int) -> Iterator[Row]:
    """A model of about as many codes, in matrices of SHAPE, decoded one after the other; encoded one by one."""
    machine_, rows_ = trellis.machine(STATES), min(SHAPE[0], -(-count // SHAPE[1]))
    codes = [np.rint(rng.normal(0, SPREAD, (rows_, SHAPE[1]))).astype(np.int32) for _ in range(DISTINCT)]
    scales = [entropy.fit_scales(c) for c in codes]
    histograms = [entropy.histogram(c, *s, machine=machine_) for c, s in zip(codes, scales, strict=True)]
    tables = entropy.fit_tables(np.sum(histograms, 0))

    def encode(i: int) -> bytes:
        k = i % DISTINCT
        return entropy.encode(codes[k], *scales[k], tables, machine=machine_, threads=threads)

    streams, many = [encode(k) for k in range(DISTINCT)], max(1, round(count / codes[0].size))

    def decode(_: int) -> None:
        for i in range(many):
            k = i % DISTINCT
            entropy.decode(streams[k], codes[k].shape, *scales[k], tables, machine=machine_, threads=threads)

    bits = 8 * sum(map(len, streams)) / (DISTINCT * codes[0].size)
    yield from _beside_copy(f"entropy coder, {bits:.2f} bits", {"encode": encode}, codes[0], rounds)
    yield from _beside_copy(f"entropy coder, {many} matrices", {"decode": decode}, codes[0], rounds, many)


def _beside_copy(what: str, work: dict[str, Turn], unpacked: np.ndarray, rounds: int, many: int = 1) -> Iterator[Row]:
    """Arguments: `many`, how many arrays like `unpacked` a turn goes through."""
    target = np.empty_like(unpacked)

    def copy(_: int) -> None:
        for _ in range(many):
            np.copyto(target, unpacked)

    times = interleaved({REFERENCE: copy, **work}, rounds)
    sizes = dict.fromkeys(times, many * unpacked.nbytes)
    yield from rows(what, times, REFERENCE, sizes, items=many * unpacked.size)
