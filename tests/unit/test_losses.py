"""Every loss function the package uses, ours and the libraries', against the official ones, with gradients."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss
from transformers.loss.loss_rt_detr import RTDetrLoss
from transformers.models.rt_detr.configuration_rt_detr import RTDetrConfig

from codetr.losses import ClassLoss, Focal, QualityFocal, Varifocal, giou_loss

LOSSES = [Focal(0.25, 2.0), QualityFocal(2.0), Varifocal(0.75, 2.0)]


def ours(labels: Tensor, like: Tensor) -> Tensor:
    """The official code gives background the last label."""
    return labels.masked_fill(labels == like.shape[1], -1)


def elementwise(name: str, pred: Tensor, target: list[Tensor]) -> Tensor:
    match name:
        case "focal":
            return Focal(0.25, 2.0)(pred, ours(target[0], pred), torch.full(pred.shape[:1], 0.5))
        case "quality_focal":
            return QualityFocal(2.0)(pred, ours(target[0], pred), target[1]).sum(1)
        case "cross_entropy":
            return functional.cross_entropy(pred, target[0], reduction="none")
        case "bce_soft":
            return functional.binary_cross_entropy_with_logits(pred, target[0], reduction="none")
        case "giou":
            return giou_loss(pred, target[0])
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


def scalar(loss: ClassLoss, logit: float, positive: bool, quality: float) -> float:
    """One element, from the papers' equations."""
    p = 1 / (1 + math.exp(-logit))

    def cross_entropy(y: float) -> float:
        return -(y * math.log(p) + (1 - y) * math.log(1 - p))

    match loss:
        case Focal(alpha, gamma) if positive:
            return -alpha * (1 - p) ** gamma * math.log(p)
        case Focal(alpha, gamma):
            return -(1 - alpha) * p**gamma * math.log(1 - p)
        case QualityFocal(beta):
            return abs(quality * positive - p) ** beta * cross_entropy(quality * positive)
        case Varifocal(alpha, gamma) if positive and quality > 0:
            return quality * cross_entropy(quality)
        case Varifocal(alpha, gamma):
            return -alpha * p**gamma * math.log(1 - p)
    raise AssertionError(loss)


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """logits [2, 5, 3], labels with background, qualities with a zero; garbage where it must not be read."""
    logits = torch.randn(2, 5, 3, dtype=torch.double) * 3
    labels = torch.tensor([[0, -1, 2, 1, -1], [2, 1, -1, 0, 0]])
    quality = torch.rand(2, 5, dtype=torch.double)
    quality[0, 0] = 0
    return logits, labels, quality.masked_fill(labels < 0, float("nan"))


@pytest.mark.parametrize("loss", [*LOSSES, Focal(0.6, 1.5), QualityFocal(1.5), Varifocal(0.3, 1.0)], ids=str)
def test_every_element_by_hand(loss: ClassLoss) -> None:
    logits, labels, quality = draw()
    got = loss(logits, labels, quality)
    for image, query, k in itertools.product(range(2), range(5), range(3)):
        positive = labels[image, query].item() == k
        q = quality[image, query].item() if positive else 0.0
        expected = scalar(loss, logits[image, query, k].item(), positive, q)
        assert got[image, query, k].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradients(loss: ClassLoss) -> None:
    logits, labels, quality = draw()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, quality), logits.requires_grad_())


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_confident_logits_stay_finite(loss: ClassLoss) -> None:
    logits = torch.tensor([[-200.0, 200.0], [200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    value = loss(logits, torch.tensor([0, 0, -1]), torch.tensor([0.0, 1.0, 0.5]))
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [QualityFocal(2.0), Varifocal(0.75, 2.0)], ids=str)
def test_a_positive_is_best_at_its_quality(loss: ClassLoss) -> None:
    quality = torch.linspace(0.05, 0.95, 19, dtype=torch.double)
    logits = quality.logit()[:, None].requires_grad_()
    loss(logits, torch.zeros(19, dtype=torch.long), quality).sum().backward()
    assert logits.grad.abs().max() < 1e-14


def test_varifocal_equals_the_transformers_library() -> None:
    """Values only: theirs keeps the gradient out of the weights, the paper's equation does not."""
    reference = RTDetrLoss(RTDetrConfig(num_labels=3))
    logits, boxes, goal = torch.randn(1, 6, 3), torch.rand(1, 6, 4) * 0.3 + 0.2, torch.rand(2, 4) * 0.3 + 0.2
    queries, objects, classes = torch.tensor([1, 4]), torch.tensor([1, 0]), torch.tensor([2, 0])
    outputs, targets = {"logits": logits, "pred_boxes": boxes}, [{"class_labels": classes, "boxes": goal}]
    expected = reference.loss_labels_vfl(outputs, targets, [(queries, objects)], num_boxes=2)["loss_vfl"]
    labels, quality = torch.full((1, 6), -1), torch.zeros(1, 6)
    labels[0, queries] = classes[objects]
    a, b = (box_convert(x, "cxcywh", "xyxy") for x in (boxes[0, queries], goal[objects]))
    quality[0, queries] = box_iou(a, b).diag()
    loss = Varifocal(reference.alpha, reference.gamma)(logits, labels, quality)
    torch.testing.assert_close(loss.sum() / 2, expected, rtol=1e-6, atol=1e-6)


def test_giou_loss_equals_torchvisions() -> None:
    """Also of boxes that touch, that miss each other and that have no area; with its gradient."""
    torch.manual_seed(0)
    low = torch.rand(2, 3, 500, 2, dtype=torch.double)
    boxes, goals = torch.cat([low, low + torch.rand_like(low)], -1)
    boxes[:, :20, 2:], goals[:, 10:40] = boxes[:, :20, :2], boxes[:, 10:40]
    goals[:, 40:60, :2] = boxes[:, 40:60, 2:]
    goals[:, 40:60, 2:] = goals[:, 40:60, :2] + 0.1
    weight, found = torch.rand(3, 500, dtype=torch.double), []
    for loss in (giou_loss, generalized_box_iou_loss):
        ours, theirs = boxes.clone().requires_grad_(), goals.clone().requires_grad_()
        value = loss(ours, theirs)
        found.append((value.detach(), *torch.autograd.grad((value * weight).sum(), (ours, theirs))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(found[0][0], found[1][0])
