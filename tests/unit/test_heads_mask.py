"""The mask branch: what a region shows of its object, and a loss that sees nothing else."""

from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from codetr.errors import UserError
from codetr.heads.faster_rcnn import FasterRCNNHead
from codetr.heads.mask import MaskBranch, region_masks
from codetr.heads.roi import RoIPool
from codetr.types import Frames, Pyramid, Targets
from fixed_draws import fixed_draws

WIDTH, CLASSES = 8, 3


def branch() -> MaskBranch:
    return MaskBranch(RoIPool(4, 4, 2), WIDTH, 1, CLASSES, weight=0.7)


def pyramid() -> Pyramid:
    return Pyramid([torch.randn(2, WIDTH, 64 // s, 64 // s, requires_grad=True) for s in (4, 8, 16)], (4, 8, 16))


def targets() -> Targets:
    """Two objects in image 0, none in image 1; the second object is the left half of its box."""
    boxes = torch.tensor([[16.0, 8, 48, 40], [8, 16, 40, 48]])
    masks = torch.zeros(2, 2, 64, 64, dtype=torch.bool)
    masks[0, 0, 8:40, 16:48] = True
    masks[0, 1, 16:48, 8:24] = True
    centers = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1) / 64
    return Targets(
        boxes=centers.expand(2, -1, -1).clone(),
        labels=torch.tensor([[2, 1], [0, 0]]),
        valid=torch.tensor([[True, True], [False, False]]),
        frames=Frames.unscaled(torch.tensor([[64, 64], [64, 64]])),
        masks=masks,
    )


REGIONS = torch.tensor([[16.0, 8, 48, 40], [8, 16, 40, 48], [0, 16, 32, 48], [5, 5, 30, 20]]).expand(2, -1, -1)
OWNER = torch.tensor([[0, 1, 1, -1], [-1, -1, -2, -1]])


def test_a_region_shows_its_part_of_the_mask() -> None:
    """Every cell averages the 4 x 4 pixels beneath; an edge lies between cells."""
    goal = targets()
    images, places = torch.where(OWNER >= 0)
    shown = region_masks(goal.masks, goal.valid, images, OWNER[images, places], REGIONS[images, places], 8)
    whole = torch.ones(8, 8)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    middle = torch.zeros(8, 8)
    middle[:, 2:6] = 1
    assert torch.equal(shown, torch.stack([whole, left, middle]))


def test_region_masks_against_pixel_sampling() -> None:
    """Random masks and boxes: a fine grid of bilinear samples, one region after the other."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 3, 6, 6, generator=generator) < 0.5
    masks = masks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    valid = torch.tensor([[True, False, True], [True, True, True]])
    images, owner = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 0, 1, 2, 1])
    low = torch.rand(5, 2, generator=generator) * 16
    boxes = torch.cat([low, low + 8 + torch.rand(5, 2, generator=generator) * 20], 1)
    shown = region_masks(masks, valid, images, owner, boxes, 6)
    for i in range(5):
        mask = masks[images[i], owner[i]].float()
        x1, y1, x2, y2 = boxes[i].tolist()
        fine = (torch.arange(60) + 0.5) / 60
        gx, gy = (x1 + fine * (x2 - x1)) / 24 - 1, (y1 + fine * (y2 - y1)) / 24 - 1  # 48 pixels are [-1, 1]
        grid = torch.stack(torch.meshgrid(gx, gy, indexing="xy"), -1)
        sampled = torch.nn.functional.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        share = sampled.unflatten(0, (6, 10)).unflatten(2, (6, 10)).mean((1, 3))
        clear = (share - 0.5).abs() > 0.1
        assert clear.sum() > 20
        assert torch.equal(shown[i][clear], (share >= 0.5).float()[clear])


def test_loss_is_that_of_the_objects_class_alone() -> None:
    head, levels, goal = branch(), pyramid(), targets()
    expected = []
    for region, owner, label in ((0, 0, 2), (1, 1, 1), (2, 1, 1)):
        box = REGIONS[0, region][None]
        logits = head(levels, torch.tensor([0]), box)[0, label]
        mask = region_masks(goal.masks, goal.valid, torch.tensor([0]), torch.tensor([owner]), box, 8)[0]
        expected.append(binary_cross_entropy_with_logits(logits, mask))
    torch.testing.assert_close(head.loss(levels, REGIONS, OWNER, goal), 0.7 * torch.stack(expected).mean())


def test_nothing_positive_gives_zero_and_the_same_graph() -> None:
    head, levels = branch(), pyramid()
    loss = head.loss(levels, REGIONS, torch.full_like(OWNER, -1), replace(targets(), valid=torch.zeros(2, 2).bool()))
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


def test_gradient_reaches_the_pyramid_where_the_regions_are() -> None:
    head, levels = branch(), pyramid()
    head.loss(levels, REGIONS, OWNER, targets()).backward()
    gradient = levels.levels[1].grad
    assert gradient[0].abs().sum() > 0
    assert (gradient[1] == 0).all()


def mask_rcnn() -> FasterRCNNHead:
    overrides = ["model=conditional_detr_tiny", "model.num_classes=3", "model.width=16"]
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", [*overrides, "model/auxiliary_head=[mask_rcnn_small]"])
    return instantiate(config.model.detector.heads.mask_rcnn, _convert_="all")


def test_the_masks_choose_neither_regions_nor_boxes() -> None:
    """Mask R-CNN is Faster R-CNN with one more loss."""
    head, goal = mask_rcnn(), targets()
    levels = Pyramid([torch.randn(2, 16, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)], (4, 8, 16, 32, 64))
    with fixed_draws():
        with_masks = head(levels, goal)
        branch, head.mask = head.mask, None
        without = head(levels, goal)
    mask_loss = with_masks.losses.pop("mask")
    assert mask_loss > 0
    assert with_masks.losses == without.losses
    for name, value in vars(without.positives).items():
        assert torch.equal(value, getattr(with_masks.positives, name)), name
    head.mask = branch
    inverted: Tensor = ~goal.masks
    with fixed_draws():
        assert head(levels, replace(goal, masks=inverted)).losses["mask"] != mask_loss


def test_missing_masks_are_named() -> None:
    with pytest.raises(UserError, match=r"data\.masks=true"):
        branch().loss(pyramid(), REGIONS, OWNER, replace(targets(), masks=None))
