"""A safetensors file written piece by piece is the library's own, byte for byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from nashswarm import payload
from nashswarm.payload import DTYPES, Payload
from nashswarm.types import NashSwarmError

ARRAYS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.sampled_from(sorted(DTYPES)).flatmap(lambda name: hnp.arrays(np.dtype(name), hnp.array_shapes(min_side=0))),
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(ARRAYS)
def test_bytes_are_those_of_the_library(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray]
) -> None:
    path = tmp_path_factory.mktemp("payload") / "x.safetensors"
    with Payload(path) as pieces:
        for key, array in arrays.items():
            pieces.add(key, array)
        size, digest = pieces.finish()
    data = path.read_bytes()
    assert data == save({k: np.ascontiguousarray(a) for k, a in arrays.items()})
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_array_that_came_before_is_kept(tmp_path: Path) -> None:
    with Payload(tmp_path / "x") as pieces:
        pieces.add("a", np.zeros(3, np.uint8))
        pieces.add("a", np.ones(3, np.uint8))
        pieces.finish()
    assert (tmp_path / "x").read_bytes() == save({"a": np.zeros(3, np.uint8)})


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Payload(tmp_path / "x") as pieces:
        pieces.add("a", np.zeros(1000, np.uint8))
        monkeypatch.setattr(payload.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 999})())
        with pytest.raises(NashSwarmError, match=r"1,072 bytes are to be written and 999 are free; make room"):
            pieces.finish()
    assert list(tmp_path.iterdir()) == []
