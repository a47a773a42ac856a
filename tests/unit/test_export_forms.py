"""Forms of operations that enter exported graphs, beside those that train."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from codetr.kernels.msda import (
    deformable_attention_gathered,
    deformable_attention_reference,
    deformable_attention_sampled,
)
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn
from torch.nn import functional as F

from codetr.exporting.products import join_products
from codetr.models.encoder import _firsts
from codetr.ops.gather import largest

SHAPES = ((7, 9), (4, 5), (1, 3))


@pytest.mark.parametrize("form", [deformable_attention_gathered, deformable_attention_sampled])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_in_other_forms_is_the_reference(coordinates: int, form: Callable[..., Tensor]) -> None:
    """In float64; also far outside of the maps, and beside padding that holds anything."""
    torch.manual_seed(0)
    cells = sum(height * width for height, width in SHAPES)
    value = torch.randn(2, cells, 2, 4, dtype=torch.float64)
    reference = torch.rand(2, 11, 3, coordinates, dtype=torch.float64) * 1.4 - 0.2
    offsets, logits = torch.randn(2, 11, 2, 3, 4, 2, dtype=torch.float64) * 3, torch.randn(2, 11, 2, 3, 4)
    offsets[0, 0] *= 1e4
    valid = torch.tensor([[[7, 9], [4, 5], [1, 3]], [[5, 6], [3, 3], [1, 2]]], dtype=torch.int32)
    inputs = value, SHAPES, reference, offsets, logits.double(), valid
    expected = deformable_attention_reference(*inputs)
    # The weights are a softmax in float32, in whatever dtype the rest is.
    torch.testing.assert_close(form(*inputs), expected, rtol=1e-6, atol=1e-6)


def test_first_pixels_are_those_of_nearest_interpolation() -> None:
    """Of the maps of every stride, on sides with and without a rest."""
    for side in range(1, 1400):
        pixels = torch.arange(side, dtype=torch.float64).view(1, 1, side, 1).expand(1, 1, side, 3)
        for stride in (4, 8, 16, 32, 64, 128):
            cells = -(-side // stride)
            nearest = F.interpolate(pixels, size=(cells, 2))[0, 0, :, 0]
            assert torch.equal(_firsts(cells, side, torch.device("cpu")), nearest.long()), (side, stride)


class Best(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return largest(values, 7)


def test_ties_go_to_the_first_in_onnx_runtime_too(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """With zeros of both signs, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 3, (40, 50), generator=generator) / 2.0
    values[::3, 4], values[1::3, 9], values[::2, 11], values[::4, 30] = torch.inf, torch.nan, -0.0, -torch.inf
    batch = torch.export.Dim("batch")
    options = {"dynamo": True, "opset_version": 20, "optimize": False, "verbose": False}
    program = torch.onnx.export(Best().eval(), (values,), dynamic_shapes=({0: batch},), **options)
    path = tmp_path / "best.onnx"
    onnx.save(program.model_proto, path)
    for some in (values, values[:3]):
        (found,) = onnxruntime.InferenceSession(path).run(None, {"values": some.numpy()})
        assert torch.equal(torch.from_numpy(found), largest(some, 7))


def test_linear_layers_become_one_operation_each() -> None:
    """Also behind one another, through a ReLU, beside one another, and of rows with several axes; other sums stay."""
    rng = np.random.default_rng(0)
    draw = {"w1": (4, 6), "b1": (6,), "w2": (6, 3), "b2": (3,), "w3": (4, 3), "b3": (3,), "w4": (3, 3)}
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in draw.items()}
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> g (float[N, M, 4] x, float[N, M, 3] other)
           => (float[N, M, 3] y, float[N, M, 6] wide) {
            p1 = MatMul(x, w1)  s1 = Add(b1, p1)  r1 = Relu(s1)  wide = Identity(r1)
            p2 = MatMul(r1, w2)  s2 = Add(p2, b2)
            p3 = MatMul(x, w3)  s3 = Add(p3, b3)
            p4 = MatMul(s3, w4)  s4 = Add(p4, other)
            y = Add(s2, s4) }"""
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    model = onnx.shape_inference.infer_shapes(model)
    ours = onnx_ir.from_proto(model)
    join_products(ours.graph)
    RemoveUnusedNodesPass()(ours)
    joined = onnx_ir.to_proto(ours)
    onnx.checker.check_model(joined, full_check=True)
    kinds = [node.op_type for node in joined.graph.node]
    assert (kinds.count("Gemm"), kinds.count("MatMul"), kinds.count("Relu")) == (3, 1, 1)
    assert kinds.count("Reshape") == 4  # x to rows, and three back
    inputs = {"x": rng.standard_normal((2, 5, 4), dtype=np.float32), "other": np.ones((2, 5, 3), np.float32)}
    found, expected = (
        onnxruntime.InferenceSession(one.SerializeToString()).run(None, inputs) for one in (joined, model)
    )
    for one, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, true, rtol=1e-5, atol=1e-5)
