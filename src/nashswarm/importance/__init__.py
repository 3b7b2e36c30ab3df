"""One file per importance, found by its name in params.yaml.

An importance is a module with

    importance(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]

how much each weight matters, in any unit: allocators compare values, they do not add them up. The input is left as it
is. `tests/test_importance.py` checks every file here against this contract.
"""
