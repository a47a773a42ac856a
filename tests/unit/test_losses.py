"""Every loss function the package uses, ours and the libraries', against the official ones, with gradients."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from codetr.losses import quality_focal_loss


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Background, the last label, has no column."""
    return functional.one_hot(labels, like.shape[1] + 1)[:, :-1].to(like)


def elementwise(name: str, pred: Tensor, target: list[Tensor]) -> Tensor:
    match name:
        case "focal":
            return sigmoid_focal_loss(pred, one_hot(target[0], pred), 0.25, 2.0)
        case "quality_focal":
            return quality_focal_loss(pred, one_hot(target[0], pred) * target[1][:, None], 2.0).sum(1)
        case "cross_entropy":
            return functional.cross_entropy(pred, target[0], reduction="none")
        case "bce_soft":
            return functional.binary_cross_entropy_with_logits(pred, target[0], reduction="none")
        case "giou":
            return generalized_box_iou_loss(pred, target[0])
        case "l1":
            return (pred - target[0]).abs()
    raise AssertionError(name)


@pytest.mark.parametrize("reduction", ["plain", "weight", "avg_factor"])
@pytest.mark.parametrize("name", ["focal", "quality_focal", "cross_entropy", "bce_soft", "giou", "l1"])
def test_value_and_gradient(official: Path, name: str, reduction: str) -> None:
    tensors = load_file(official / "losses" / "losses.safetensors")
    setting = json.loads((official / "losses" / "settings.json").read_text())[f"{name}.{reduction}"]
    case = {
        k.removeprefix(f"{name}.{reduction}."): v for k, v in tensors.items() if k.startswith(f"{name}.{reduction}.")
    }
    pred = case["pred"].requires_grad_()
    losses = elementwise(name, pred, [v for k, v in sorted(case.items()) if k.startswith("target")])
    weight = case.get("weight", torch.ones(()))
    losses = losses * (weight[:, None] if weight.dim() == 1 and losses.dim() == 2 else weight)
    loss = losses.sum() / (setting["avg_factor"] or losses.numel()) * setting["cfg"]["loss_weight"]
    loss.backward()
    torch.testing.assert_close(loss, case["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pred.grad, case["grad"], rtol=1e-4, atol=1e-6)


def test_quality_focal_loss_vanishes_at_the_target() -> None:
    targets = torch.linspace(0.05, 0.95, 19, dtype=torch.double)
    logits = targets.logit().requires_grad_()
    losses = quality_focal_loss(logits, targets)
    losses.sum().backward()
    assert losses.max() < 1e-30
    assert logits.grad.abs().max() < 1e-14


def test_quality_focal_loss_gradient() -> None:
    logits = torch.randn(12, dtype=torch.double, requires_grad=True)
    targets = torch.rand(12, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda x: quality_focal_loss(x, targets), logits)
