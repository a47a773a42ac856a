"""Forms of operations that enter exported graphs, beside those that train."""

from collections.abc import Callable

import onnx
import onnxruntime
import pytest
import torch
from codetr.kernels.msda import (
    deformable_attention_gathered,
    deformable_attention_reference,
    deformable_attention_sampled,
)
from torch import Tensor, nn
from torch.nn import functional as F

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
