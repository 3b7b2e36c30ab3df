"""Products with packed bits: within the stated bound of the decoded matrix, the same bits on every instruction set."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nashswarm.bitpack import pack
from nashswarm.codecs import tiles
from nashswarm.kernels import build, matrix
from nashswarm.kernels.matrix import Activations, Matrix
from nashswarm.types import InputError, PackedTensor

WIDTHS = tiles.TILE_WIDTHS
UNIT = 2.0**-24  # of float32's rounding
BATCHES = range(1, 9)
needs_kernels = pytest.mark.skipif(build.library() is None, reason="no compiler here")


def random_packed(
    shape: tuple[int, int], rows: int = 16, columns: int = 128, *, widths: tuple[int, ...] = WIDTHS, seed: int = 0
) -> PackedTensor:
    """Random codes, steps over all of a tile's range, columns in random order."""
    rng = np.random.default_rng(seed)
    strips, groups = -(-shape[0] // rows), -(-shape[1] // columns)
    index = rng.choice([WIDTHS.index(b) for b in widths], (strips, groups))
    bits, live = np.array(WIDTHS)[index], int((index > 0).sum())
    row, tile = rng.integers(0, 16, (live, rows)).astype(np.uint8), rng.integers(180, 240, live).astype(np.uint8)
    order = rng.permutation(shape[1])
    arrays = {
        "codes": rng.integers(0, 256, int(bits.sum()) * rows * columns // 8).astype(np.uint8),
        "scales": np.concatenate([tiles._pack_nibbles(row) if live else tile, tile]),
        "map": np.concatenate([pack(index, 3), pack(order, max(1, (shape[1] - 1).bit_length()))]),
    }
    base = int(rng.integers(-260, -190))
    return PackedTensor("tiles", shape, arrays, {"rows": rows, "columns": columns, "base": base})


def bound(packed: PackedTensor, x: Tensor, activations: Activations) -> Tensor:
    """As `Matrix` states it, float64 [batch, out]."""
    columns = packed.scalars["columns"]
    groups = -(-packed.shape[1] // columns)
    bits = tiles._Cut(packed.shape, packed.scalars["rows"], columns)
    order = torch.from_numpy(tiles._read_map(packed, bits)[1])
    weight = tiles.decode(packed).double().abs()[:, order]
    total = torch.zeros(len(x), packed.shape[0], dtype=torch.float64)
    for t in range(groups):
        own = slice(t * columns, (t + 1) * columns)
        total += x.double().abs()[:, order[own]].amax(1)[:, None] * weight[:, own].sum(1)
    return total * (UNIT * (groups + 8) + (1 / 254 if activations == "int8" else 0))


def activations_of(kind: str, batch: int, columns: int, seed: int) -> Tensor:
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "outlier":
        x[:, seed % columns] = 3e4
    if kind == "tiny":
        x *= 1e-20
    if kind == "zeros":
        x[:, : columns // 2] = 0
    return x


def not_finite() -> Iterator[tuple[PackedTensor, Tensor]]:
    """A matrix, and two rows of activations of which the first holds what is not finite."""
    for value in (float("nan"), float("inf")):
        x = torch.ones(2, 256)
        x[0, 17] = value
        yield random_packed((32, 256), widths=(3,)), x


def check(packed: PackedTensor, x: Tensor) -> None:
    made, expected = Matrix(packed), x.double() @ tiles.decode(packed).double().T
    for activations in ("float32", "int8"):
        found = [made.matmul(x, activations, most=most) for most in matrix.SETS]
        assert bool(((found[0].double() - expected).abs() <= bound(packed, x, activations)).all())
        assert all(torch.equal(found[0], other) for other in found[1:])


# --- what a product is ---------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_and_batch_is_within_the_bound(bits: int, batch: int) -> None:
    check(random_packed((40, 300), widths=(bits,), seed=bits), activations_of("normal", batch, 300, batch))


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 500)),
    rows=st.sampled_from([1, 3, 5, 8, 16, 24, 32, 48]),
    columns=st.sampled_from([32, 64, 96, 128, 160, 256]),
    batch=st.integers(1, 8),
    kind=st.sampled_from(["normal", "outlier", "tiny", "zeros"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_ragged_shapes_of_any_tiles_are_within_the_bound(
    shape: tuple[int, int], rows: int, columns: int, batch: int, kind: str, seed: int
) -> None:
    check(random_packed(shape, rows, columns, seed=seed), activations_of(kind, batch, shape[1], seed))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 300)),
    rows=st.sampled_from([1, 3, 16, 24, 48]),
    columns=st.sampled_from([32, 64, 96, 128]),
    numbers=st.lists(st.integers(0, 89), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_are_those_of_the_decoded_matrix(
    shape: tuple[int, int], rows: int, columns: int, numbers: list[int], seed: int
) -> None:
    packed = random_packed(shape, rows, columns, seed=seed)
    asked = torch.tensor(numbers, dtype=torch.int64) % shape[0]
    assert torch.equal(Matrix(packed).rows(asked[None]), tiles.decode(packed)[asked][None])


@pytest.mark.parametrize("number", [-1, 40])
def test_a_row_that_is_not_there_is_an_error(number: int) -> None:
    with pytest.raises(IndexError, match="of a matrix that has 40"):
        Matrix(random_packed((40, 64))).rows(torch.tensor([3, number]))


@needs_kernels
@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("columns", [128, 4096])
def test_largest_codes_and_activations_do_not_overflow(columns: int, activations: Activations) -> None:
    """All codes at their top, all activations at theirs, of one sign: the largest sums there can be."""
    for bits in WIDTHS[1:]:
        packed = random_packed((16, columns), columns=columns, widths=(bits,))
        full = {**packed.arrays, "codes": np.full_like(packed.arrays["codes"], 255)}
        packed = dataclasses.replace(packed, arrays=full)
        for x in (torch.ones(1, columns), -torch.ones(1, columns)):
            expected = x.double() @ tiles.decode(packed).double().T
            for most in matrix.SETS:
                found = Matrix(packed).matmul(x, activations, most=most)
                assert found.double().numpy() == pytest.approx(expected.numpy(), rel=UNIT * 16, abs=0)


@needs_kernels
def test_float32_is_as_near_as_torchs_product() -> None:
    """Root mean square of the error, to the float64 product; torch rounds after each of its sums."""
    packed = random_packed((256, 2048))
    x, weight = torch.randn(8, 2048, generator=torch.Generator().manual_seed(0)), tiles.decode(packed)
    expected = x.double() @ weight.double().T
    ours, torchs = ((y.double() - expected).square().mean().sqrt() for y in (Matrix(packed).matmul(x), x @ weight.T))
    assert float(ours) < 1.5 * float(torchs)


@needs_kernels
def test_int8_is_coarser_than_float32_and_no_more_than_expected() -> None:
    packed, x = random_packed((64, 512)), activations_of("normal", 4, 512, 0)
    made, weight = Matrix(packed), tiles.decode(packed)
    expected = x @ weight.T
    error = (made.matmul(x, "int8") - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-4 < float(error) < 2e-2


@needs_kernels
def test_rows_alone_and_together_and_threads_give_the_same_bits() -> None:
    made, x = Matrix(random_packed((700, 260))), activations_of("normal", 19, 260, 0)
    for activations in ("float32", "int8"):
        together = made.matmul(x, activations, threads=1)
        assert torch.equal(together, torch.cat([made.matmul(row[None], activations) for row in x]))
        assert all(torch.equal(together, made.matmul(x, activations, threads=n)) for n in (2, 3, 7))


@needs_kernels
def test_calls_from_several_threads_do_not_mix() -> None:
    made, x = Matrix(random_packed((512, 512))), activations_of("normal", 8, 512, 0)
    expected, wrong = made.matmul(x), []

    def work() -> None:
        wrong.extend(i for i in range(50) if not torch.equal(made.matmul(x, threads=3), expected))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@needs_kernels
def test_a_forked_process_computes_alone() -> None:
    made, x = Matrix(random_packed((512, 512))), activations_of("normal", 1, 512, 0)
    expected = made.matmul(x, threads=2)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(made.matmul(x, threads=2), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@needs_kernels
def test_threads_that_fell_asleep_are_called_up() -> None:
    """Behind pauses about as long as threads look out: some sleep, some are about to."""
    made, x = Matrix(random_packed((512, 512))), activations_of("normal", 1, 512, 0)
    expected = made.matmul(x, threads=1)
    for turn in range(300):
        time.sleep(turn % 7 * 5e-5)
        assert torch.equal(made.matmul(x, threads=4), expected)


@needs_kernels
def test_what_is_not_finite_is_not_hidden() -> None:
    for packed, x in not_finite():
        found = Matrix(packed).matmul(x)
        assert bool(found[0].isnan().all())
        assert bool(found[1].isfinite().all())


@needs_kernels
def test_shape_and_dtype_of_x_come_back() -> None:
    made = Matrix(random_packed((30, 100)))
    found = made.matmul(torch.randn(2, 3, 100, dtype=torch.bfloat16))
    assert (found.shape, found.dtype) == ((2, 3, 30), torch.bfloat16)
    assert made.matmul(torch.randn(100)).shape == (30,)
    assert made.matmul(torch.randn(0, 100)).shape == (0, 30)


def test_memory_is_that_of_the_packed_bytes() -> None:
    packed = random_packed((4096, 4096), widths=(3,))
    assert Matrix(packed).nbytes < 1.02 * sum(array.nbytes for array in packed.arrays.values())


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["codes", "scales", "map"])
@pytest.mark.parametrize("change", ["cut", "longer", "missing", "dtype"])
def test_malformed_arrays_are_refused(part: str, change: str) -> None:
    packed = random_packed((40, 300))
    array = packed.arrays[part]
    others = {k: v for k, v in packed.arrays.items() if k != part}
    changed = {"cut": array[:-1], "longer": np.append(array, np.uint8(0)), "dtype": array.astype(np.uint16)}
    arrays = others if change == "missing" else {**others, part: changed[change]}
    with pytest.raises(InputError, match=part):
        Matrix(dataclasses.replace(packed, arrays=arrays))


@pytest.mark.parametrize("change", [{"rows": 0}, {"rows": 2**40}, {"columns": 100}, {"base": 2**40}, {"base": 0.5}])
def test_wrong_scalars_are_refused(change: dict[str, int]) -> None:
    packed = random_packed((40, 300))
    with pytest.raises(InputError, match="tiles of"):
        Matrix(dataclasses.replace(packed, scalars={**packed.scalars, **change}))


def test_an_order_that_names_a_column_twice_is_refused() -> None:
    packed = random_packed((16, 256))
    data = packed.arrays["map"].copy()
    data[1:] = 0
    with pytest.raises(InputError, match="order of columns"):
        Matrix(dataclasses.replace(packed, arrays={**packed.arrays, "map": data}))


def test_other_codecs_and_activations_are_refused() -> None:
    packed = random_packed((16, 128))
    with pytest.raises(InputError, match="codec coded"):
        Matrix(dataclasses.replace(packed, codec="coded"))
    with pytest.raises(InputError, match=r"\[2, 127\]"):
        Matrix(packed).matmul(torch.ones(2, 127))
    with pytest.raises(InputError, match="int4"):
        Matrix(packed).matmul(torch.ones(2, 128), "int4")  # type: ignore[arg-type]


# --- how the library is found --------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No library is loaded, installed or cached; an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_installed", lambda: tmp_path / "none.so")
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


@needs_kernels
def test_a_checkout_compiles_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.library() is not None
    build.library.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda wanted: pytest.fail("compiled again"))
    assert build.library() is not None
    assert len(list((fresh / "cache/nashswarm").iterdir())) == 1


@needs_kernels
def test_a_library_of_another_source_is_left_alone(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = build._compile("0" * 16)
    monkeypatch.setattr(build, "_installed", lambda: old)
    other = fresh / "other.cpp"
    other.write_text(build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(build, "SOURCE", other)
    found = build.library()
    assert found is not None
    assert found.nashswarm_source() == build.source_hash().encode()


@needs_kernels
def test_rubbish_in_the_cache_is_replaced(fresh: Path) -> None:
    place = build._cached(build.source_hash())
    place.parent.mkdir(parents=True)
    place.write_bytes(b"no library")
    assert build.library() is not None


@pytest.mark.parametrize("broken", ["absent", "failing", "read-only"])
def test_without_a_library_products_are_right_and_one_warning_is_given(
    broken: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if broken == "absent":
        monkeypatch.setattr(build, "COMPILERS", ())
        monkeypatch.delenv("CXX", raising=False)
    elif broken == "failing":
        monkeypatch.setenv("CXX", "false")
    else:
        (fresh / "cache").write_text("a file where a directory should be")
    packed, x = random_packed((40, 300)), torch.randn(3, 300)
    with caplog.at_level(logging.WARNING):
        made = [Matrix(packed) for _ in range(2)]
        found = [m.matmul(x) for m in made]
    assert not made[0].fast
    assert torch.allclose(found[0], x @ tiles.decode(packed).T)
    assert [record.message.count("slow") for record in caplog.records] == [1]


def test_importing_compiles_nothing(fresh: Path) -> None:
    code = "import nashswarm.kernels.matrix"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CXX": "false"})
    assert not (fresh / "cache").exists()


# --- memory --------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_touched_beyond_the_arrays(seed: int, tmp_path: Path) -> None:
    """tests/fuzz_kernels.cpp, with the address and undefined-behaviour sanitizers."""
    compiler = next(filter(None, map(shutil.which, build.COMPILERS)))
    flags = [f for f in build.FLAGS if f not in ("-O3", "-fPIC")]
    sanitizers = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source, program = Path(__file__).with_name("fuzz_kernels.cpp"), tmp_path / "fuzz"
    include = f"-I{build.SOURCE.parent}"
    subprocess.run([compiler, *flags, *sanitizers, include, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program, str(seed), "2500"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[:2000]
