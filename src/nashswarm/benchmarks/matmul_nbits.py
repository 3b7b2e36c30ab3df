"""ONNX Runtime's MatMulNBits: 4-bit weights in blocks along the inputs, multiplied with activations of 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BITS = 4
ACCURACY = 4  # 8-bit activations, its fastest; weights' products are summed in int32
OPSET, ONNX_IR = 21, 10  # that versions of onnxruntime since 1.19 read
MISSING = "not installed: pip install -c constraints.txt onnx onnxruntime"


@dataclass(frozen=True, slots=True)
class Products:
    """Several matrices of one shape."""

    turns: list[Callable[[], object]]  # the product with each
    bytes: int  # codes and float32 scales of one, as the model stores them


def products(x: np.ndarray, rows: int, block: int, copies: int, threads: int) -> Products:
    """Random matrices, ready for products with `x`, float32 [batch, in].

    Arguments: `rows`, of each matrix; `block`, columns that share a scale. Raises ModuleNotFoundError where onnx or
    onnxruntime is not installed. Each matrix has a session of its own, whose threads sleep between two products.
    """
    import onnxruntime

    rng = np.random.default_rng(0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or they take cores from the next contestant
    turns: list[Callable[[], object]] = []
    for _ in range(copies):
        made = _model(rng, rows, x.shape, block)
        session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
        turns.append(lambda session=session: session.run(None, {"x": x}))  # type: ignore[misc]
    blocks = rows * -(-x.shape[1] // block)
    return Products(turns, blocks * block * BITS // 8 + 4 * blocks)


def _model(rng: np.random.Generator, rows: int, x: tuple[int, ...], block: int) -> bytes:
    """One node, as a serialized model."""
    from onnx import TensorProto, helper, numpy_helper

    blocks = -(-x[1] // block)
    codes = rng.integers(0, 256, (rows, blocks, block * BITS // 8), np.uint8)
    scales = rng.uniform(0.01, 0.02, rows * blocks).astype(np.float32)
    sides = {"K": x[1], "N": rows, "bits": BITS, "block_size": block, "accuracy_level": ACCURACY}
    names = ["x", "codes", "scales"]
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **sides)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x[0], rows])],
        [numpy_helper.from_array(array, name) for name, array in zip(names[1:], (codes, scales), strict=True)],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=ONNX_IR).SerializeToString()
    return data
