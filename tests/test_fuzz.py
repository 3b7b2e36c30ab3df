"""Damaged packed directories, of every codec: none is accepted, none ends in an error of another type.

Twice: bytes damaged as disks and networks do, which the hashes must catch; and damage with all hashes made again, as
an attacker or a bug would, which the readers of manifest, payload and codes must survive. A small number of each runs
always, the full one behind the marker `fuzz` (make fuzz).
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Packed
from safetensors.numpy import load, save

from nashswarm.loading import dequantized
from nashswarm.packed import MANIFEST, PAYLOAD, PackedError, _sealed, open_packed
from nashswarm.types import NashSwarmError

PackedModels = Callable[[str, str], Packed]

METHODS = ["uniform4", "nash", "rtn4-g64", "gptq3-g128", "market-tiles-2_5", "market-coded-3_0"]  # one a codec
CORRUPTIONS, ALL_CORRUPTIONS = 1_200, 100_000
FORGERIES, ALL_FORGERIES = 1_200, 200_000
BATCHES = 10  # of a method in the full runs, each with a seed of its own, so that several processes can share them
SECONDS, MEMORY = 1.0, 64 << 20  # of processor time, so that other work on the machine is not held against the readers


# --- damage --------------------------------------------------------------------------------------------------------


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def zero(data: bytearray, rng: random.Random) -> None:
    page = rng.choice((16, 512, 4096))
    start = rng.randrange(len(data)) // page * page
    data[start : start + page] = bytes(len(data[start : start + page]))


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.choice((rng.randrange(len(data)), len(data) - 1)) :]


def append(data: bytearray, rng: random.Random) -> None:
    data += rng.choice((b"\n", b"\0", b" ", rng.randbytes(rng.randrange(1, 100)), bytes(data)))


def swap(data: bytearray, rng: random.Random) -> None:
    size = min(rng.choice((8, 64, 512)), len(data) // 2)
    one, other = sorted(rng.sample(range(len(data) // size), 2))
    a, b = data[one * size : (one + 1) * size], data[other * size : (other + 1) * size]
    data[one * size : (one + 1) * size], data[other * size : (other + 1) * size] = b, a


def insert(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data)) : 0] = rng.randbytes(rng.randrange(1, 20))


DAMAGES = (flip, flip, flip, zero, truncate, append, swap, insert)


def damage_files(directory: Path, originals: dict[str, dict[str, bytes]], method: str, rng: random.Random) -> str:
    """Damage one file of a directory, or exchange it for another; returns what was done, '' where nothing changed."""
    files = originals[method]
    name = rng.choice([*files, PAYLOAD, MANIFEST])
    if rng.random() < 0.1:
        other = rng.choice([m for m in originals if m != method])
        source, own = rng.choice(((files, rng.choice([n for n in files if n != name])), (originals[other], name)))
        (directory / name).write_bytes(source[own])
        return f"{name} exchanged" if source[own] != files[name] else ""
    data, damage = bytearray(files[name]), rng.choice(DAMAGES)
    damage(data, rng)
    (directory / name).write_bytes(data)
    return f"{damage.__name__} {name}" if data != files[name] else ""


@pytest.fixture(scope="module")
def originals(packed: PackedModels) -> dict[str, dict[str, bytes]]:
    """Method -> file -> bytes."""
    return {m: {p.name: p.read_bytes() for p in packed("gpt2", m).directory.iterdir()} for m in METHODS}


def restore(directory: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)


def corrupt(originals: dict[str, dict[str, bytes]], directory: Path, method: str, rounds: int, seed: int) -> None:
    rng = random.Random(f"{method} {seed}")
    restore(directory, originals[method])
    open_packed(directory)
    for number in range(rounds):
        done = damage_files(directory, originals, method, rng)
        if done:
            try:
                open_packed(directory)
            except PackedError:
                pass
            else:
                pytest.fail(f"{method}, round {number}: {done}: accepted")
        for name, data in originals[method].items():
            (directory / name).write_bytes(data)


# --- forgery -------------------------------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 7, 255, 256, 65_535, 2**31 - 1, 2**31, 2**53, 2**62, -(2**63), 0.5, 1e308, float("nan"))


def forge_value(value: Any, rng: random.Random) -> Any:
    """Another value in its place, of the same type or not."""
    if isinstance(value, bool | int | float) and rng.random() < 0.7:
        return rng.choice((*NUMBERS, value + 1, value - 1, value * 2, -value))
    return rng.choice((None, True, "", "x", [], {}, [value], {"x": value}, *NUMBERS))


def forge_document(document: Any, rng: random.Random) -> None:
    """Change, drop, add or move one entry somewhere in a JSON document."""
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.85:
            place = place[key]
            continue
        action = rng.random()
        if action < 0.75:
            place[key] = forge_value(place[key], rng)
        elif action < 0.85:
            del place[key]
        else:
            other = rng.choice(keys)
            place[key], place[other] = place[other], place[key]
        break


def forge_arrays(arrays: dict[str, np.ndarray], rng: random.Random) -> None:
    """Change values, dtype, shape or presence of one array of a payload."""
    key = rng.choice(list(arrays))
    array, action = arrays[key], rng.random()
    data = bytearray(array.tobytes())
    if action < 0.6 and data:
        rng.choice((flip, flip, zero, swap if len(data) > 32 else flip))(data, rng)
        arrays[key] = np.frombuffer(bytes(data), array.dtype).reshape(array.shape)
    elif action < 0.7:
        arrays[key] = array.reshape(-1)[: rng.randrange(array.size + 1)]
    elif action < 0.8:
        arrays[key] = np.concatenate([array.reshape(-1)] * 2)
    elif action < 0.9:
        arrays[key] = array.astype(rng.choice((np.uint8, np.int8, np.uint16, np.float16, np.float32, np.int64)))
    elif action < 0.95:
        del arrays[key]
    else:
        arrays[rng.choice((*arrays, "x", "x.codes"))] = array


def forge_header(data: bytes, rng: random.Random) -> bytes:
    """Damage a safetensors header, which then says something else of the same bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    header = bytearray(data[8 : 8 + size])
    rng.choice((flip, truncate, insert, swap))(header, rng)
    length = rng.choice((len(header), size, 0, 2**40, 2**63, len(data)))
    return struct.pack("<Q", length) + bytes(header) + data[8 + size :]


def forge(directory: Path, files: dict[str, bytes], rng: random.Random) -> None:
    """Damage manifest or payload, then make every hash and size again."""
    manifest, payload = json.loads(files[MANIFEST]), files[PAYLOAD]
    del manifest["seal"]
    action = rng.random()
    if action < 0.45:
        arrays = dict(load(payload))
        for _ in range(rng.choice((1, 1, 2))):
            if arrays:
                forge_arrays(arrays, rng)
        payload = save({k: np.ascontiguousarray(a) for k, a in arrays.items()})
    elif action < 0.6:
        payload = forge_header(payload, rng)
    else:
        for _ in range(rng.choice((1, 1, 1, 3))):
            forge_document(manifest, rng)
    listed = manifest.get("files")
    if isinstance(listed, dict) and PAYLOAD in listed and action < 0.6:
        listed[PAYLOAD] = [len(payload), hashlib.sha256(payload).hexdigest()]
    (directory / PAYLOAD).write_bytes(payload)
    try:
        (directory / MANIFEST).write_bytes(_sealed(manifest))
    except (ValueError, TypeError):  # NaN, which no manifest of ours can hold
        body = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()[:-1]
        (directory / MANIFEST).write_bytes(body + b',"seal":"%s"}' % hashlib.sha256(body).hexdigest().encode())


def attack(originals: dict[str, dict[str, bytes]], directory: Path, method: str, rounds: int, seed: int) -> None:
    rng = random.Random(f"forge {method} {seed}")
    files = copy.deepcopy(originals[method])
    restore(directory, files)
    list(dequantized(open_packed(directory)))
    size = sum(map(len, files.values()))
    memory = peak()
    for number in range(rounds):
        forge(directory, files, rng)
        started = time.process_time()
        try:
            for _ in dequantized(open_packed(directory)):
                pass
        except NashSwarmError:
            pass
        except Exception as error:
            keep = Path(tempfile.mkdtemp(prefix=f"nashswarm-{method}-"))
            shutil.copytree(directory, keep, dirs_exist_ok=True)
            pytest.fail(f"{method}, round {number}: {error!r}; kept in {keep}")
        assert time.process_time() - started < SECONDS, f"{method}, round {number}"
        assert peak() - memory <= size + MEMORY, f"{method}, round {number}"


def peak() -> int:
    """Bytes that were ever resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def share(count: int) -> int:
    """A batch's part of all that is done."""
    return -(-count // (len(METHODS) * BATCHES))


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """On a file system in memory, where there is one: hundreds of thousands of files are written."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield tmp_path / "packed"
        return
    place = Path(tempfile.mkdtemp(prefix="nashswarm-", dir=shared))
    yield place / "packed"
    shutil.rmtree(place)


@pytest.mark.parametrize("method", METHODS)
def test_no_corruption_is_accepted(method: str, originals: dict[str, dict[str, bytes]], directory: Path) -> None:
    corrupt(originals, directory, method, CORRUPTIONS // len(METHODS), 0)


@pytest.mark.parametrize("method", METHODS)
def test_no_forgery_crashes_hangs_or_bloats(
    method: str, originals: dict[str, dict[str, bytes]], directory: Path
) -> None:
    attack(originals, directory, method, FORGERIES // len(METHODS), 0)


@pytest.mark.fuzz
@pytest.mark.parametrize("batch", range(1, BATCHES + 1))
@pytest.mark.parametrize("method", METHODS)
def test_none_of_many_corruptions_is_accepted(
    method: str, batch: int, originals: dict[str, dict[str, bytes]], directory: Path
) -> None:
    corrupt(originals, directory, method, share(ALL_CORRUPTIONS), batch)


@pytest.mark.fuzz
@pytest.mark.parametrize("batch", range(1, BATCHES + 1))
@pytest.mark.parametrize("method", METHODS)
def test_none_of_many_forgeries_crashes_hangs_or_bloats(
    method: str, batch: int, originals: dict[str, dict[str, bytes]], directory: Path
) -> None:
    attack(originals, directory, method, share(ALL_FORGERIES), batch)
