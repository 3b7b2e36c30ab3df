"""Names of devices, and which of them are there."""

from __future__ import annotations

import pytest
import torch

from nashswarm.devices import repeatable, resolve, wide
from nashswarm.types import NashSwarmError


def test_auto_is_the_processor_where_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve("auto") == resolve("cpu") == torch.device("cpu")
    with pytest.raises(NashSwarmError, match=r"compute.device: no cuda on this machine, which has cpu; set one of"):
        resolve("cuda")


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps")])
def test_auto_is_a_gpu_where_one_is(cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve("auto") == torch.device(expected)


def test_float64_is_computed_where_it_can_be() -> None:
    assert wide(torch.device("mps")) == torch.device("cpu")
    assert wide(torch.device("cuda")) == torch.device("cuda")


def fused() -> list[bool]:
    """Kernels of attention that torch may take."""
    cuda = torch.backends.cuda
    return [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()]


def test_attention_on_a_gpu_takes_no_fused_kernel_where_gradients_must_repeat() -> None:
    before = fused()
    with repeatable(torch.device("cpu")):
        assert fused() == before
    with repeatable(torch.device("cuda")):
        assert not any(fused())
        assert torch.backends.cuda.math_sdp_enabled()
    assert fused() == before
