"""Regions pooled all at once, against one call of RoIAlign per region."""

import pytest
import torch
from torchvision.ops import roi_align

from codetr.heads.roi import RoIPool
from codetr.types import Pyramid

STRIDES = (8, 16, 32, 64)


@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_regions_and_their_gradients_equal_those_of_single_calls(ratio: int) -> None:
    """A region has features of its own level alone, to the digit; one that is not valid has none, whatever its box."""
    torch.manual_seed(0)
    levels = [torch.randn(2, 3, 256 // s, 256 // s, dtype=torch.double, requires_grad=True) for s in STRIDES]
    low, sides = torch.rand(2, 40, 2).double() * 200, (torch.rand(2, 40, 2).double() * 5).exp()
    boxes, valid = torch.cat([low, low + sides], -1), torch.rand(2, 40) < 0.8
    boxes[:, 0], boxes[:, 1, 2:] = -20.0, boxes[:, 1, :2]  # outside of the image; without area
    boxes[~valid] = torch.tensor([0.0, 0, 256, 256]).double()
    pool = RoIPool(3, 2, ratio)
    pooled = pool(Pyramid(levels, STRIDES), boxes, valid)
    number = pool.levels(boxes, STRIDES[:-1])
    assert number[valid].unique().tolist() == [0, 1, 2]
    singles = []
    for image, place in valid.nonzero().tolist():
        level = int(number[image, place])
        one = levels[level][image : image + 1], [boxes[image, place][None]]
        singles.append(roi_align(*one, 3, 1 / STRIDES[level], ratio, aligned=True))
    expected = torch.cat(singles)
    assert torch.equal(pooled[valid], expected)
    assert not pooled[~valid].any()
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((pooled[valid] * weight).sum(), levels[:-1])
    theirs = torch.autograd.grad((expected * weight).sum(), levels[:-1])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
