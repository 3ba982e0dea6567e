"""Dynamic int8: the same product on every processor, whatever the weights are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.quantize import constant_products, to_dynamic_int8, unsaturated_scales
from export.vision import quantize_vision
from models.quality import QualityGateFailed

LARGEST_PAIR = 128  # 255 * 128 fits into 16 bits with a sign, 255 * 129 does not


def one_product(weight: torch.Tensor) -> ir.Model:
    """[row, input] times `weight` [output, input], transposed."""
    outputs, inputs = weight.shape
    constant = ir.tensor(weight.T.contiguous().numpy(), name="weight")
    value = ir.Value(name="weight", shape=constant.shape, type=ir.TensorType(constant.dtype), const_value=constant)
    fed = ir.Value(name="x", shape=ir.Shape(["rows", inputs]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [fed, value], name="product")
    last = ir.node("Identity", node.outputs, name="last")
    last.outputs[0].name, last.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    last.outputs[0].shape = ir.Shape(["rows", outputs])
    opsets = {"": 20, "com.microsoft": 1}
    graph = ir.Graph([fed], last.outputs, nodes=[node, last], initializers=[value], opset_imports=opsets, name="g")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 33),
    power=st.sampled_from((0.3, 1.0, 4.0)),
    shift=st.sampled_from((-1.0, 0.0, 1.0)),
)
def test_no_pair_of_codes_is_larger_than_16_bits_hold(
    seed: int, outputs: int, inputs: int, power: float, shift: float
) -> None:
    drawn = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    weight = drawn.sign() * drawn.abs() ** power + shift
    scales = unsaturated_scales(weight)
    codes = (weight / scales[:, None]).round().int()
    assert int(codes.abs().max()) <= 127
    padded = torch.nn.functional.pad(codes, (0, inputs % 2)).unflatten(1, (-1, 2))
    for sign in (1, -1):
        assert int((sign * padded).clamp_min(0).sum(-1).max()) <= LARGEST_PAIR
    assert bool(((codes * scales[:, None] - weight).abs() <= scales[:, None] / 2 * 1.001).all())


@pytest.mark.parametrize("by_row", [False, True])
def test_weights_that_would_saturate_keep_their_product(by_row: bool) -> None:
    weight = torch.ones(
        32, 64
    )  # every pair is as large as pairs can be; with AVX2 and steps of 1 / 127 this gives 32, not 64
    x = np.tile(np.linspace(0.2, 1, 8, dtype=np.float32)[:, None], (1, 64))
    model = one_product(weight)
    to_dynamic_int8(model, constant_products(model), by_row=by_row)
    assert np.allclose(run(model, x), x @ weight.T.numpy(), rtol=0.02)


def test_by_row_a_small_row_beside_a_huge_one_keeps_its_product() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32) * np.float32([[1], [1000], [0]])
    expected = x @ weight.T.numpy()
    errors = []
    for by_row in (False, True):
        model = one_product(weight)
        to_dynamic_int8(model, constant_products(model), by_row=by_row)
        errors.append(float(np.abs(run(model, x)[0] - expected[0]).max()))
    assert errors[1] < 0.3 < errors[0]
    assert run(model, x)[2].tolist() == [0.0] * 16


def test_a_vision_graph_that_int8_spoils_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "vision.onnx"
    # Features that are small differences of large products: no int8 can keep them.
    weight = torch.full((4, 12), 1.0) + 1e-4 * torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    write_tiny_vision(source, weight)
    tiles = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2, 2)).astype(np.float32)
    with pytest.raises(QualityGateFailed, match="cosine"):
        quantize_vision(source, tmp_path / "vision_int8.onnx", tiles)


def write_tiny_vision(path: Path, weight: torch.Tensor) -> None:
    """pixel_values [1, 1, 3, 2, 2] -> image_features [1, 1, 4]: one product, less its mean."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Reshape", ["pixel_values", "flat"], ["x"], name="reshape"),
        helper.make_node("MatMul", ["x", "weight"], ["y"], name="product"),
        helper.make_node("ReduceMean", ["y", "axis"], ["mean"], name="mean", keepdims=1),
        helper.make_node("Sub", ["y", "mean"], ["image_features"], name="sub"),
    ]
    inputs = [
        helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["b", "n", 3, 2, 2]),
        helper.make_tensor_value_info("pixel_attention_mask", TensorProto.BOOL, ["b", "n", 2, 2]),
    ]
    outputs = [helper.make_tensor_value_info("image_features", TensorProto.FLOAT, [1, 1, 4])]
    constants = [
        numpy_helper.from_array(np.array([1, 1, 12]), "flat"),
        numpy_helper.from_array(np.array([-1]), "axis"),
        numpy_helper.from_array(weight.T.contiguous().numpy(), "weight"),
    ]
    graph = helper.make_graph(nodes, "vision", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
