"""Anchors, box deltas, assignment, regions and losses against torchvision's detection models, where they define the
same. Where the definitions part, a comment says how."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torchvision.models.detection._utils import BoxCoder as TorchvisionCoder
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.fcos import FCOSHead as TorchvisionFCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, box_convert, box_iou, sigmoid_focal_loss
from torchvision.ops.poolers import LevelMapper

from codetr.assign import BACKGROUND, IGNORED
from codetr.assign.max_iou import assign_max_iou
from codetr.heads.dense import Dense, Selection
from codetr.heads.faster_rcnn import FasterRCNNHead
from codetr.heads.fcos import FCOSHead
from codetr.heads.retinanet import RetinaNetHead
from codetr.heads.roi import BoxHead, RoIPool
from codetr.heads.rpn import RPN, ProposalSelection
from codetr.losses import Focal
from codetr.nn.anchors import AnchorGrid
from codetr.nn.boxes import BoxCoder
from codetr.types import Frames, Positives, Pyramid, Targets

CLASSES, SIDE, STRIDES = 4, 128, (8, 16, 32)
SELECTION = Selection(100, 0.5, 10)
SCALES, RATIOS = (4.0, 6.0), (0.5, 1.0, 2.0)
every_seed = pytest.mark.parametrize("seed", range(5))


def pyramid(batch: int = 1, channels: int = 1) -> Pyramid:
    return Pyramid([torch.randn(batch, channels, SIDE // s, SIDE // s) for s in STRIDES], STRIDES)


def boxes(*shape: int, least: float = 4, most: float = 60) -> Tensor:
    sides = least + torch.rand(*shape, 2) * (most - least)
    low = torch.rand(*shape, 2) * (SIDE - sides)
    return torch.cat([low, low + sides], -1)


def padded(objects: Tensor, labels: Tensor, count: int) -> Targets:
    """Of one image: `objects` [count, 4], and as many dummies."""
    rows = torch.cat([objects, boxes(count + 1)])[None]
    valid = torch.arange(rows.shape[1])[None] < count
    every = torch.cat([labels, torch.randint(0, CLASSES, (count + 1,))])[None]
    return Targets(box_convert(rows / SIDE, "xyxy", "cxcywh"), every, valid, Frames.unscaled(torch.full((1, 2), SIDE)))


def theirs(targets: Targets) -> list[dict[str, Tensor]]:
    """The same for torchvision: without dummies."""
    valid = targets.valid[0]
    return [{"boxes": targets.boxes_xyxy[0, valid], "labels": targets.labels[0, valid]}]


def scene(anchors: Tensor, seed: int, count: int) -> Targets:
    """Objects whose best anchors overlap no other object more, and them by 0.3 at least.

    An anchor that is the best of one object but overlaps another one more is the former's here (as in the official
    code, so that no object remains without), and the latter's in torchvision. And an object's best anchor that is worse
    than `low_quality` is positive in torchvision alone.
    """
    torch.manual_seed(seed)
    for _ in range(1000):
        targets = padded(boxes(count, least=14), torch.randint(0, CLASSES, (count,)), count)
        iou = box_iou(theirs(targets)[0]["boxes"], anchors)
        best = iou.amax(1, keepdim=True)
        if count == 0 or (((iou < best) | (iou == iou.amax(0))).all() and best.min() > 0.3):
            return targets
    raise AssertionError("no such scene")


@every_seed
@pytest.mark.parametrize(("high", "low"), [(0.7, 0.3), (0.5, 0.4), (0.5, 0.5)])
def test_thresholds_equal_the_matchers(seed: int, high: float, low: float) -> None:
    """Without low-quality matches the definitions are the same, with dummies and unusable anchors added to ours."""
    torch.manual_seed(seed)
    objects, valid = boxes(3, 6), torch.rand(3, 6) < 0.7
    anchors = torch.cat([boxes(92), objects.flatten(0, 1).repeat(6, 1) + torch.randn(108, 4)])
    valid[0] = False
    objects[1], valid[1] = objects[1].round(), True
    anchors[:6] = objects[1]
    anchors[:6, 2:] += (objects[1, :, 2:] - objects[1, :, :2]) * torch.tensor([1, 0])  # IoU exactly 1/2
    usable = torch.rand(3, 200) < 0.8
    matched_index = assign_max_iou(anchors, usable, objects, valid, high, low, None)
    for i in range(3):
        expected = torch.full((200,), BACKGROUND)  # torchvision's models do so without objects, their Matcher raises
        if valid[i].any():
            index = Matcher(high, low)(box_iou(objects[i, valid[i]], anchors))
            expected = valid[i].nonzero()[:, 0][index.clamp(min=0)].where(index >= 0, index)
        assert torch.equal(matched_index[i], expected.where(usable[i], IGNORED))
    assert (matched_index >= 0).any()


@every_seed
@pytest.mark.parametrize(("high", "low", "quality"), [(0.7, 0.3, 0.3), (0.5, 0.4, 0.0)])
def test_low_quality_matches_equal_the_matchers(seed: int, high: float, low: float, quality: float) -> None:
    """But for anchors that are an object's best ones: for the difference see `scene`."""
    torch.manual_seed(seed)
    objects, anchors = boxes(5), boxes(150)
    objects[3] = objects[1] + 0.1  # alike enough to have the same best anchor
    iou = box_iou(objects, anchors)
    usable, valid = torch.ones(1, 150).bool(), torch.ones(1, 5).bool()
    (matched_index,) = assign_max_iou(anchors, usable, objects[None], valid, high, low, quality)
    best_of = (iou == iou.amax(1, keepdim=True)) & (iou.amax(1, keepdim=True) >= quality)
    taken, contested = best_of.any(0), (best_of & (iou < iou.amax(0))).any(0)
    with_low, without = (Matcher(high, low, allow)(iou) for allow in (True, False))
    assert torch.equal(matched_index[~contested], with_low.where(taken, without)[~contested])
    last = (best_of * torch.arange(5)[:, None]).amax(0)  # of several objects
    assert torch.equal(matched_index[taken], last[taken])


@every_seed
@pytest.mark.parametrize("count", [0, 1, 4])
def test_rpn_equals_torchvisions(seed: int, count: int) -> None:
    """Labels, boxes to regress to, and with every anchor sampled the losses, but for torchvision's smooth L1."""
    levels = pyramid()
    head = RPN(1, SCALES, RATIOS, 0.7, 0.3, 0.3, 10**6, 1.0, 2.0, 3.0)
    anchors = torch.cat(head.grid(levels))
    targets = scene(anchors, seed, count)
    other = RegionProposalNetwork(None, None, 0.7, 0.3, 256, 0.5, {}, {}, 0.7)
    (label,), (matched,) = other.assign_targets_to_anchors([anchors], theirs(targets))
    logits, deltas = torch.randn(1, len(anchors)), torch.randn(1, len(anchors), 4)
    losses = head.losses(logits, deltas, levels, targets)
    used, positive = label >= 0, label > 0
    assert positive.sum() >= count
    expected = binary_cross_entropy_with_logits(logits[0, used], label[used], reduction="sum")
    # An image without positives counts one all the same, as in the official code.
    number = used.sum() + (count == 0)
    torch.testing.assert_close(losses["class"], 2 * expected / number)
    goals = other.box_coder.encode([matched[positive]], [anchors[positive]])[0]
    torch.testing.assert_close(losses["l1"], 3 * (deltas[0, positive] - goals).abs().sum() / number)


@every_seed
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_retinanet_equals_torchvisions(seed: int, count: int, box_loss: str) -> None:
    """Both losses of one image and their gradients. Of several, torchvision averages each image's losses, the official
    code all anchors'."""
    levels = pyramid(channels=16)
    head = RetinaNetHead(
        16, CLASSES, 1, 4, SCALES, RATIOS, (1.0,) * 4, 0.5, 0.4, 0.25, 2.0, box_loss, 1.0, 1.0, SELECTION
    )
    anchors = torch.cat(head.grid(levels))
    targets = scene(anchors, seed, count)
    backbone = nn.Identity()
    backbone.out_channels = 16
    generator = AnchorGenerator(((8,),), ((0.5, 1.0, 2.0),))
    other = RetinaNet(backbone, CLASSES, anchor_generator=generator)
    other.head.regression_head._loss_type = box_loss
    logits = torch.randn(1, len(anchors), CLASSES, requires_grad=True)
    deltas = torch.randn(1, len(anchors), 4).mul(0.3).requires_grad_()
    losses = head.losses(Dense(logits, deltas, None), head.assign(levels, targets))
    given = {"cls_logits": logits, "bbox_regression": deltas}
    expected = other.compute_loss(theirs(targets), given, [anchors])
    for ours, their_name, of in (("class", "classification", logits), (box_loss, "bbox_regression", deltas)):
        torch.testing.assert_close(losses[ours], expected[their_name])
        ours_by, theirs_by = (torch.autograd.grad(loss, of)[0] for loss in (losses[ours], expected[their_name]))
        torch.testing.assert_close(ours_by, theirs_by)


class Recorder(nn.Module):
    """A head whose only loss is whom the anchors belong to."""

    def compute_loss(self, targets: list, outputs: dict, anchors: list[Tensor], matched: list[Tensor]) -> list[Tensor]:
        return matched


def torchvision_fcos(head: nn.Module) -> FCOS:
    backbone = nn.Identity()
    backbone.out_channels = 32
    generator = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    return FCOS(backbone, CLASSES, anchor_generator=generator, head=head, center_sampling_radius=1.5)


@every_seed
@pytest.mark.parametrize("count", [0, 1, 8])
def test_fcos_equals_torchvisions(seed: int, count: int) -> None:
    """Owners, class and centerness loss. torchvision puts the points on the cells' corners and weighs all boxes alike;
    the paper puts them in their middles, and the official code weighs by centerness."""
    torch.manual_seed(seed)
    levels = pyramid(channels=16)
    head = FCOSHead(16, CLASSES, 3, 1, 4, 8, 1.5, 8, 0.25, 2.0, 1.0, 1.0, 1.0, SELECTION)
    cells = torch.cat(AnchorGrid((1.0,), (1.0,), offset=0.5)(levels)).double()
    targets = padded(boxes(count, most=110), torch.randint(0, CLASSES, (count,)), count)
    truth = theirs(targets)
    # torchvision subtracts areas from 1e8: too much for single precision
    exact = [{"boxes": truth[0]["boxes"].double(), "labels": truth[0]["labels"]}]
    sizes = [16 * 16, 8 * 8, 4 * 4]
    (matched_index,) = torchvision_fcos(Recorder()).compute_loss(exact, {}, [cells], sizes)
    found = head.assign(levels, targets)
    assert torch.equal(found.positive[0], matched_index >= 0)
    assert torch.equal(found.negative[0], matched_index < 0)
    own = matched_index >= 0
    assert torch.equal(found.target_boxes_xyxy[0, own], truth[0]["boxes"][matched_index[own]])
    assert torch.equal(found.labels[0, own], truth[0]["labels"][matched_index[own]])
    logits, centerness = torch.randn(1, len(cells), CLASSES), torch.randn(1, len(cells))
    losses = head.losses(Dense(logits, torch.rand(1, len(cells), 4) * 50, centerness), found)
    given = {
        "cls_logits": logits,
        "bbox_regression": torch.zeros(1, len(cells), 4),
        "bbox_ctrness": centerness[..., None],
    }
    other = torchvision_fcos(TorchvisionFCOSHead(32, 1, CLASSES, 1))
    expected = other.compute_loss(truth, given, [cells.float()], sizes)
    torch.testing.assert_close(losses["class"], expected["classification"])
    torch.testing.assert_close(losses["centerness"], expected["bbox_ctrness"])


@every_seed
@pytest.mark.parametrize("count", [0, 1, 5])
def test_faster_rcnn_assigns_proposals_as_torchvision(seed: int, count: int) -> None:
    """All of them sampled, with the objects in front; there too, a region's background is a class: 0 there, the last
    here."""
    torch.manual_seed(seed)
    head = FasterRCNNHead(
        RPN(1, SCALES, RATIOS, 0.7, 0.3, 0.3, 1, 0.5, 1, 1), ProposalSelection(1, 0.7, 1), RoIPool(3, 14, 2),
        BoxHead(1, 3, 0, 1, 2, 8, CLASSES, False), (1.0,) * 4, 0.5, 10**6, 1.0, 1.0, 1.0, 0.0, 0.5, 10,
    )  # fmt: skip
    targets, proposals = padded(boxes(count), torch.randint(0, CLASSES, (count,)), count), boxes(1, 80)
    truth = theirs(targets)[0]
    regions = head.sample(proposals, torch.ones(1, 80).bool(), targets)
    other = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100)
    candidates = torch.cat([truth["boxes"], proposals[0]])
    (index,), (label,) = other.assign_targets_to_proposals([candidates], [truth["boxes"]], [truth["labels"] + 1])
    kept = regions.matched_index[0] != IGNORED
    order = torch.cat([(label > 0).nonzero()[:, 0], (label == 0).nonzero()[:, 0]])
    assert torch.equal(regions.boxes[0, kept], candidates[order])
    assert torch.equal(regions.matched_index[0, kept], index.where(label > 0, BACKGROUND)[order])
    logits = torch.randn(1, len(kept), CLASSES + 1)
    labels = (label - 1)[order]
    found = Positives(
        regions.boxes,
        regions.boxes,
        torch.full_like(regions.matched_index, -1).masked_scatter(kept[None], labels),
        regions.boxes,
        regions.matched_index >= 0,
        regions.matched_index == BACKGROUND,
    )
    losses = head.losses(logits, torch.zeros(1, len(kept), CLASSES, 4), found)
    expected = cross_entropy(logits[0, kept].roll(1, -1), label[order])
    torch.testing.assert_close(losses["class"], expected)


@every_seed
@pytest.mark.parametrize("stds", [(1.0, 1.0, 1.0, 1.0), (0.125, 0.125, 0.25, 0.25)])  # float32 has them exactly
def test_box_deltas_equal_torchvisions(seed: int, stds: tuple[float, float, float, float]) -> None:
    """Its weights are our standard deviations' inverses. It does not clip shrinking, so no side here is a 60th."""
    torch.manual_seed(seed)
    anchors, goals = boxes(100).double(), boxes(100).double()
    coder, other = BoxCoder(stds), TorchvisionCoder(tuple(1 / s for s in stds))
    torch.testing.assert_close(coder.encode(anchors, goals), other.encode([goals], [anchors])[0])
    deltas = torch.randn(100, 4, dtype=torch.double) * torch.tensor([2.0, 2, 3, 3]) / torch.tensor(stds)
    deltas[:, 2:].clamp_(min=-4 / max(stds))
    assert (deltas * torch.tensor(stds))[:, 2:].max() > math.log(1000 / 16)  # growing is clipped
    torch.testing.assert_close(coder.decode(anchors, deltas), other.decode(deltas, [anchors])[:, 0])


@pytest.mark.parametrize("ratios", [(1.0,), (0.25, 1.0, 4.0)])
def test_anchors_equal_torchvisions(ratios: tuple[float, ...]) -> None:
    """Where its rounding to whole half sides changes nothing; in the same order."""
    levels = pyramid()
    sizes = tuple(tuple(int(s * stride) for s in (4, 8)) for stride in STRIDES)
    other = AnchorGenerator(sizes, (ratios,) * 3)
    (expected,) = other(ImageList(torch.zeros(1, 3, SIDE, SIDE), [(SIDE, SIDE)]), levels.levels)
    assert torch.equal(torch.cat(AnchorGrid((4.0, 8.0), ratios)(levels)), expected)


def test_other_anchors_are_torchvisions_before_rounding() -> None:
    """The octaves and ratios of RetinaNet: torchvision's corners are whole pixels, ours and the official code's not."""
    levels, octaves = pyramid(), [4 * 2 ** (i / 3) for i in range(3)]
    sizes = tuple(tuple(s * stride for s in octaves) for stride in STRIDES)
    other = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 3)
    (expected,) = other(ImageList(torch.zeros(1, 3, SIDE, SIDE), [(SIDE, SIDE)]), levels.levels)
    ours = torch.cat(AnchorGrid(octaves, (0.5, 1.0, 2.0))(levels))
    assert 0.3 < (ours - expected).abs().max() <= 0.5
    for level, grid in zip(other.cell_anchors, AnchorGrid(octaves, (0.5, 1.0, 2.0))(levels), strict=True):
        assert torch.equal(grid[:9].round(), level)


@every_seed
@pytest.mark.parametrize(("finest", "cells"), [(4, 14), (8, 14), (8, 4)])
def test_region_levels_equal_torchvisions(seed: int, finest: int, cells: float) -> None:
    """`finest_cells` cells per side are canonical on every level: FPN's 224 pixels at stride 16 are 14 of them."""
    torch.manual_seed(seed)
    strides = tuple(finest * 2**i for i in range(4))
    regions = torch.cat([torch.zeros(500, 2), torch.rand(500, 2).mul(8).exp()], -1)
    borders = cells * finest * 2.0 ** torch.arange(-1, 6)
    regions = torch.cat([regions, torch.stack([borders * 0, borders * 0, borders, borders], -1), torch.zeros(1, 4)])
    least = int(math.log2(finest))
    expected = LevelMapper(least, least + 3, canonical_scale=int(cells * 16), canonical_level=4)([regions])
    assert expected.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(RoIPool(3, cells, 2).levels(regions, strides), expected)


@every_seed
@pytest.mark.parametrize("ratio", [0, 2])
def test_pooled_regions_equal_torchvisions(seed: int, ratio: int) -> None:
    """torchvision pools as before RoIAlign's `aligned`, half a cell to the lower right. The coarsest level is for the
    RPN alone."""
    torch.manual_seed(seed)
    levels = pyramid(2, 3)
    levels.levels.append(torch.full((2, 3, 2, 2), torch.nan))
    four = Pyramid(levels.levels, (*STRIDES, 64))
    regions, valid = boxes(2, 60, least=32, most=126), torch.rand(2, 60) < 0.8
    pool = RoIPool(5, 1.5, ratio)
    level = pool.levels(regions, STRIDES)
    assert level.unique().tolist() == [1, 2]
    assert (pool.levels(regions, four.strides) == 3).any()
    shift = torch.tensor(STRIDES)[level][..., None] / 2
    other = MultiScaleRoIAlign(["0", "1", "2"], 5, ratio, canonical_scale=24, canonical_level=4)
    features = {str(i): f for i, f in enumerate(levels.levels[:3])}
    expected = other(features, [r[v] for r, v in zip(regions - shift, valid, strict=True)], [(SIDE, SIDE)] * 2)
    pooled = pool(four, regions, valid)
    torch.testing.assert_close(pooled[valid], expected)
    assert not pooled[~valid].any()


@every_seed
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 1.0)])
def test_focal_loss_equals_torchvisions(seed: int, alpha: float, gamma: float) -> None:
    """With its gradient, whatever the quality."""
    torch.manual_seed(seed)
    logits = torch.randn(3, 50, CLASSES, dtype=torch.double).mul(4).requires_grad_()
    labels = torch.randint(-1, CLASSES, (3, 50))
    target = one_hot(labels.where(labels >= 0, CLASSES), CLASSES + 1)[..., :-1].double()
    ours = Focal(alpha, gamma)(logits, labels, torch.rand(3, 50, dtype=torch.double))
    expected = sigmoid_focal_loss(logits, target, alpha, gamma)
    torch.testing.assert_close(ours, expected)
    weight = torch.rand_like(logits)
    gradients = [torch.autograd.grad((loss * weight).sum(), logits)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients)
