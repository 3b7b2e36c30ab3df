"""How many threads torch computes with, and that they compute alike."""

from __future__ import annotations

import torch

# What a model's layers take from libraries of vector mathematics.
FIRST_CALLS = (torch.exp, torch.log, torch.tanh, torch.erf, torch.sigmoid, torch.sin, torch.cos, torch.rsqrt)


def set_threads(count: int) -> None:
    """Late digits of sums follow the number of threads, so it is fixed.

    Libraries of vector mathematics choose their code for the processor when they are first called. Once, in 14 runs of
    the original model, one of two threads made something else of its half of the first batch (2.4e-4 in hidden states),
    and of no other: so the first calls are made here, on one thread.
    """
    torch.set_num_threads(count)
    for function in FIRST_CALLS:
        function(torch.ones(64))
    torch.ones(64, 64) @ torch.ones(64, 64)
