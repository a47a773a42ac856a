"""What must hold for every auxiliary head of conf/: whom candidates go to, symmetries, padding, gradients."""

from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torchvision.ops import box_area, box_convert, box_iou, generalized_box_iou

from codetr.models.detector import Detector
from codetr.types import Frames, HeadOutput, Positives, Pyramid, Targets, box_scale
from toy_model import NARROW, SIZES

DENSE = ["retinanet", "fcos", "gfl", "paa", "atss"]  # their candidates are the cells' anchors or points
REGIONS = ["faster_rcnn", "mask_rcnn"]  # theirs are the RPN's proposals, here every one of its anchors
NAMES = DENSE + REGIONS
WIDTH, CLASSES, STRIDES, SIDE = 16, 3, (8, 16, 32), 128
SMALL = [f"model.num_classes={CLASSES}", "model.norm_groups=4"]
HEAD = [f"model.width={WIDTH}", f"model.pyramid_levels={len(STRIDES)}"]
SMALL_REGIONS = ["box_head.hidden_width=16", "box_head.size=3", "pool.size=3"]
EVERY_ANCHOR = ["proposals.per_level=100000", "proposals.count=100000", "proposals.nms_iou=1.0"]
EVERY_ANCHOR += ["rpn.anchor_scales=[4.0]", "num_samples=100000", "positive_fraction=1.0"]

every_head = pytest.mark.parametrize("name", NAMES)
every_dense_head = pytest.mark.parametrize("name", DENSE)


@cache
def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_module("codetr.conf", version_base="1.3"):
        return compose("train", [f"model/auxiliary_head=[{name}]", *SMALL, *overrides]).model.detector


def build(name: str) -> nn.Module:
    """The head as in conf/model/auxiliary_head, small."""
    own = [f"model.detector.heads.{name}.{o}" for o in SMALL_REGIONS + EVERY_ANCHOR if name in REGIONS]
    torch.manual_seed(0)
    return instantiate(composed(name, "model=co_deformable_tiny", *HEAD, *own).heads[name], _convert_="all")


def pyramid(batch: int, scale: float = 1.0, cells: tuple[int, ...] = (16, 8, 4)) -> Pyramid:
    """Random features; at scale 0 every predicted box is its anchor, and regions are the anchors themselves."""
    levels = [torch.randn(batch, WIDTH, n, n).mul(scale).requires_grad_() for n in cells]
    return Pyramid(levels, STRIDES)


def make_targets(
    boxes: Tensor, labels: Tensor, sizes: Tensor | None = None, valid: Tensor | None = None, side: int = SIDE
) -> Targets:
    """boxes: [B, M, 4] xyxy in pixels, also of padded rows. labels: [B, M]. Masks are the boxes' rectangles."""
    sizes = torch.tensor([[side, side]]).expand(len(boxes), -1) if sizes is None else sizes
    valid = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
    height, width = sizes.amax(0).tolist()
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    x0, y0, x1, y1 = boxes[..., None, None].unbind(2)
    masks = (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1) & valid[..., None, None]
    normalised = box_convert(boxes / box_scale(sizes)[:, None], "xyxy", "cxcywh")
    return Targets(normalised, labels, valid, Frames.unscaled(sizes), masks)


def random_boxes(batch: int, objects: int, low: float = 0, high: float = SIDE) -> Tensor:
    sides = (0.2 + 0.5 * torch.rand(batch, objects, 2)) * (high - low)
    corner = low + torch.rand(batch, objects, 2) * (high - low - sides)
    return torch.cat([corner, corner + sides], -1)


def run(head: nn.Module, levels: Pyramid, targets: Targets) -> HeadOutput:
    """With the same random draws every time: the RPN's loss is of a sample."""
    torch.manual_seed(0)
    return head(levels, targets)


def centers(found: Positives) -> Tensor:
    return (found.boxes_xyxy[..., :2] + found.boxes_xyxy[..., 2:]) / 2


# Candidate, its two objects, and which of them owns it. The candidate is an anchor of every anchor-based head: of ATSS,
# GFL and PAA on the finest level, of RetinaNet and the RPN on the middle one. FCOS has a point in its middle.
ANCHOR = [32.0, 32, 96, 96]
WITH_A_RIM, NEXT, NEXT_BUT_ONE = [30.0, 32, 96, 96], [40.0, 32, 104, 96], [48.0, 32, 112, 96]
# Ten anchors are nearer to the long object's centre, so this one is no candidate of its, although it overlaps more.
LONG, INNER = [32.0, 32, 128, 96], [44.0, 44, 84, 84]
CASES = [
    *((n, ANCHOR, [WITH_A_RIM, NEXT], 0) for n in ("atss", "gfl", "paa")),
    *((n, NEXT, [WITH_A_RIM, NEXT], 1) for n in ("atss", "gfl", "paa")),
    *((n, ANCHOR, [WITH_A_RIM, NEXT_BUT_ONE], 0) for n in ("retinanet", *REGIONS)),
    *((n, NEXT_BUT_ONE, [WITH_A_RIM, NEXT_BUT_ONE], 1) for n in ("retinanet", *REGIONS)),
    *((n, ANCHOR, [LONG, INNER], 0) for n in ("retinanet", *REGIONS)),
    *((n, ANCHOR, [LONG, INNER], 1) for n in ("atss", "gfl")),
    ("fcos", [28.0, 28, 92, 92], [[20.0, 20, 100, 100], [44.0, 44, 76, 76]], 1),
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("name", "candidate", "objects", "owner"), CASES)
def test_whose_a_candidate_of_two_objects_is(
    name: str, candidate: list[float], objects: list[list[float]], owner: int, swapped: bool
) -> None:
    """The one of higher IoU (RetinaNet, Faster R-CNN, PAA), of those whose candidate it is (ATSS, GFL); the smaller
    one (FCOS)."""
    order = [1, 0] if swapped else [0, 1]
    boxes = torch.tensor([objects])[:, order]
    found = run(build(name), pyramid(1, scale=0), make_targets(boxes, torch.tensor([order]))).positives
    same = (found.boxes_xyxy[0] - torch.tensor(candidate)).abs().amax(-1) < 1e-3
    assert found.labels[0, same].unique().tolist() == [owner]
    torch.testing.assert_close(found.target_boxes_xyxy[0, same][0], torch.tensor(objects[owner]))
    by_iou = box_iou(torch.tensor(objects), torch.tensor([candidate]))[:, 0].argmax()
    by_area = box_area(torch.tensor(objects)).argmin()
    assert owner == {"fcos": by_area}.get(name, by_iou) or (name in ("atss", "gfl") and objects[0] == LONG)


# Anchors that are among the nearest of an object. Above and below a flat one they overlap it as much as the one in its
# middle; beside a square one's corners IoU 0.62 is more than the mean of all candidates, 0.35, and less than mean plus
# deviation, 0.64.
FLAT = [32.0, 57, 96, 71]
REJECTED = [(FLAT, [32.0, 24, 96, 88]), (FLAT, [32.0, 40, 96, 104]), (ANCHOR, [40.0, 40, 104, 104])]


@pytest.mark.parametrize(("single", "candidate"), REJECTED)
@pytest.mark.parametrize("name", ["atss", "gfl"])
def test_atss_rejects_centers_outside_and_overlaps_below_the_threshold(
    name: str, single: list[float], candidate: list[float]
) -> None:
    found = run(build(name), pyramid(1), make_targets(torch.tensor([[single]]), torch.tensor([[0]]))).positives
    for box, positive in ((candidate, False), (ANCHOR, True)):
        same = (found.boxes_xyxy[0] - torch.tensor(box)).abs().amax(-1) < 1e-3
        assert found.positive[0, same].tolist() == [positive]


@pytest.mark.parametrize("seed", range(5))
def test_paa_takes_the_cheapest_candidates_of_each_object(seed: int) -> None:
    """Every predicted box being its anchor, and every score the same, these are the ones of highest GIoU."""
    torch.manual_seed(seed)
    boxes = random_boxes(1, 1)
    found = run(build("paa"), pyramid(1, scale=0), make_targets(boxes, torch.tensor([[0]]))).positives
    giou = generalized_box_iou(found.boxes_xyxy[0], boxes[0])[:, 0]
    candidate = box_iou(found.boxes_xyxy[0], boxes[0])[:, 0] >= 0.1
    positive = found.positive[0]
    assert (positive <= candidate).all()
    for level in (slice(0, 256), slice(256, 320), slice(320, 336)):
        assert positive[level].sum() <= 9
    assert 0 < positive.sum() < candidate.sum()
    assert giou[positive].min() >= giou[candidate & ~positive].max() - 1e-5


@every_head
@pytest.mark.parametrize("seed", range(3))
def test_at_twice_the_scale_the_same_candidates_are_positive(name: str, seed: int) -> None:
    """Image, objects, strides and, with them, anchors; the losses are relative, so they stay."""
    torch.manual_seed(seed)
    boxes, labels, levels = random_boxes(2, 4), torch.randint(0, CLASSES, (2, 4)), pyramid(2)
    head, sizes = build(name), torch.tensor([[SIDE, SIDE], [104, 120]])
    boxes = torch.minimum(boxes, box_scale(sizes)[:, None])
    one = run(head, levels, make_targets(boxes, labels, sizes))
    two = run(head, Pyramid(levels.levels, (16, 32, 64)), make_targets(boxes * 2, labels, sizes * 2))
    assert one.positives.positive.sum() > 10
    for key, value in vars(one.positives).items():
        assert torch.equal(value * 2 if key.endswith("xyxy") else value, getattr(two.positives, key)), key
    for term, value in one.losses.items():
        if term != "mask":  # its truth is made of pixels
            assert torch.equal(value, two.losses[term]), term


@every_head
@pytest.mark.parametrize(("height", "width"), [(72, 88), (64, 32), (31, 127)])
def test_padding_is_never_positive(name: str, height: int, width: int) -> None:
    """A small image, its objects at its lower right border, beside a large one."""
    sizes, end = torch.tensor([[SIDE, SIDE], [height, width]]), torch.tensor([width, height])
    boxes = random_boxes(2, 3)
    boxes[1] = torch.cat([end * torch.tensor([[0.0], [0.4], [0.7]]), end.expand(3, -1)], -1)
    found = run(build(name), pyramid(2), make_targets(boxes, torch.tensor([[0, 1, 2]] * 2), sizes)).positives
    assert found.positive.any(1).all()
    assert (centers(found)[1, found.positive[1]] < end).all()
    begin = centers(found)
    if name in DENSE:
        cells = [torch.full((n * n,), stride) for n, stride in zip((16, 8, 4), STRIDES, strict=True)]
        strides = torch.cat(cells).repeat_interleave(begin.shape[1] // sum(map(len, cells)))[:, None]
        begin = (begin / strides + 1e-3).floor() * strides
    used = found.positive | found.negative
    assert (begin[1, used[1]] < end).all()
    assert (begin[0, used[0]] >= end).any()


def test_the_rpn_learns_from_every_anchor_but_those_in_the_padding() -> None:
    rpn, levels, sizes = build("faster_rcnn").rpn, pyramid(2), torch.tensor([[SIDE, SIDE], [72, 88]])
    rpn.num_samples = 10**6
    anchors = torch.cat(rpn.grid(levels))
    logits, deltas = torch.zeros(2, len(anchors), requires_grad=True), torch.zeros(2, len(anchors), 4)
    boxes = torch.tensor([ANCHOR, [48.0, 30, 88, 72]])[:, None]
    losses = rpn.losses(logits, deltas, levels, make_targets(boxes, torch.zeros(2, 1).long(), sizes))
    losses["class"].backward()
    inside = ((anchors[:, :2] + anchors[:, 2:]) / 2 < sizes[:, None].flip(2)).all(-1)
    unsure = box_iou(boxes[:, 0], anchors) >= 0.3
    assert inside[0].all()
    assert not inside[1].all()
    assert torch.equal((logits.grad != 0) | unsure, inside | unsure)
    assert not logits.grad[~inside].any()


@every_head
def test_dummy_objects_own_nothing_and_positives_agree_with_their_objects(name: str) -> None:
    """Dummies have a label of their own, and lie where candidates would like them."""
    boxes, labels = random_boxes(2, 4), torch.tensor([[0, 1, 0, 2], [2, 1, 0, 2]])
    boxes[0, 3], boxes[1, 0] = torch.tensor(ANCHOR), torch.tensor(ANCHOR)
    targets = make_targets(boxes, labels, valid=labels != 2)
    levels, head = pyramid(2), build(name)
    found = run(head, levels, targets).positives
    assert found.positive.any(1).all()
    assert torch.equal(found.labels >= 0, found.positive)
    assert not (found.positive & found.negative).any()
    for image in range(2):
        own = found.positive[image]
        same = (found.target_boxes_xyxy[image, own][:, None] - boxes[image]).abs().amax(-1) < 1e-3
        assert (same.sum(1) == 1).all()
        owner = same.long().argmax(1)
        assert targets.valid[image, owner].all()
        assert torch.equal(labels[image, owner], found.labels[image, own])
        alone = torch.arange(4)[targets.valid[image]]
        one = Pyramid([level[image : image + 1] for level in levels.levels], STRIDES)
        without = run(head, one, make_targets(boxes[image : image + 1, alone], labels[image : image + 1, alone]))
        used = [p.positive | p.negative for p in (found, without.positives)]
        assert torch.equal(found.labels[image, used[0][image]], without.positives.labels[0, used[1][0]])


@every_dense_head
@pytest.mark.parametrize("seed", range(3))
def test_mirrored_objects_have_mirrored_positives(name: str, seed: int) -> None:
    """Anchors lie on the corners of the cells, FCOS' points in their middles: either way the cells of all levels are
    symmetric about x = 48. Features are mirrored along, and kernels symmetric."""
    torch.manual_seed(seed)
    boxes, labels = random_boxes(2, 4, high=96), torch.randint(0, CLASSES, (2, 4))
    cells = (12, 6, 3) if name == "fcos" else (13, 7, 4)
    head, levels, side = build(name), pyramid(2, 1, cells), 8 * cells[0]
    with torch.no_grad():
        for conv in (m for m in head.modules() if isinstance(m, nn.Conv2d)):
            sign = torch.ones(len(conv.weight), 1, 1, 1)
            if name == "paa" and conv is head.predictor.boxes:  # here predictions choose the positives
                sign[0] = -1  # to the side
            conv.weight.add_(sign * conv.weight.flip(-1))
    one = run(head, levels, make_targets(boxes, labels, side=side)).positives
    mirror = Pyramid([level.flip(-1) for level in levels.levels], STRIDES)
    two = run(head, mirror, make_targets(mirrored(boxes), labels, side=side)).positives
    assert one.positive.any(1).all()
    place = flipped_cells(cells, one.positive.shape[1])
    for key in ("labels", "positive", "negative", "features"):
        assert torch.equal(getattr(one, key), getattr(two, key)[:, place]), key
    torch.testing.assert_close(mirrored(two.boxes_xyxy[:, place]), one.boxes_xyxy)


def mirrored(boxes: Tensor) -> Tensor:
    """About x = 48."""
    return torch.tensor([96.0, 0, 96, 0]) + boxes[..., [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1])


def flipped_cells(cells: tuple[int, ...], count: int) -> Tensor:
    """The candidate at the mirrored place of every candidate."""
    per_cell, parts, start = count // sum(n * n for n in cells), [], 0
    for n in cells:
        parts.append(torch.arange(start, start + n * n * per_cell).view(n, n, per_cell).flip(1).flatten())
        start += n * n * per_cell
    return torch.cat(parts)


@every_dense_head
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("right", "down"), [(1, 0), (-1, 1)])
def test_moved_objects_have_moved_positives(name: str, seed: int, right: int, down: int) -> None:
    """By a cell of the coarsest level, far from the border; the features move along."""
    torch.manual_seed(seed)
    cells = (32, 16, 8)
    boxes, labels = random_boxes(1, 4, low=96, high=176), torch.randint(0, CLASSES, (1, 4))
    levels = [torch.nn.functional.pad(torch.randn(1, WIDTH, n // 2, n // 2), [n // 4] * 4) for n in cells]
    steps = [(down * n // 8, right * n // 8) for n in cells]
    moved = [level.roll(step, (2, 3)) for level, step in zip(levels, steps, strict=True)]
    head, shift = build(name), torch.tensor([right, down, right, down]) * 32.0
    one = run(head, Pyramid(levels, STRIDES), make_targets(boxes, labels, side=256)).positives
    two = run(head, Pyramid(moved, STRIDES), make_targets(boxes + shift, labels, side=256)).positives
    index, other = ([p.nonzero()[:, 0] for p in found.positive] for found in (one, two))
    assert len(index[0]) > 5
    torch.testing.assert_close(one.boxes_xyxy[0, index[0]] + shift, two.boxes_xyxy[0, other[0]])
    torch.testing.assert_close(one.target_boxes_xyxy[0, index[0]] + shift, two.target_boxes_xyxy[0, other[0]])
    assert torch.equal(one.features[0, index[0]], two.features[0, other[0]])
    assert torch.equal(one.labels[0, index[0]], two.labels[0, other[0]])


@every_dense_head
def test_features_are_the_pyramids_at_the_candidates_cell(name: str) -> None:
    levels = pyramid(2)
    found = run(build(name), levels, make_targets(random_boxes(2, 2), torch.zeros(2, 2).long())).positives
    per_cell, start = found.features.shape[1] // (16 * 16 + 8 * 8 + 4 * 4), 0
    for level, stride in zip(levels.levels, STRIDES, strict=True):
        stop = start + level[0, 0].numel() * per_cell
        x, y = (centers(found)[0, start:stop] / stride + 1e-3).floor().long().unbind(-1)
        assert torch.equal(found.features[:, start:stop], level[:, :, y, x].transpose(1, 2))
        start = stop
    assert start == found.features.shape[1]


@every_head
@pytest.mark.parametrize("which", ["none", "one image"])
def test_images_without_objects(name: str, which: str) -> None:
    """No positives there, finite losses, and a finite gradient for every parameter and level."""
    head, levels = build(name), pyramid(2)
    valid = torch.tensor([[False, False], [which != "none"] * 2])
    targets = make_targets(random_boxes(2, 2), torch.tensor([[0, 1], [1, 2]]), valid=valid)
    output = run(head, levels, targets)
    assert output.positives.positive.any(1).tolist() == valid.any(1).tolist()
    assert output.positives.negative.any(1).all()
    assert all(loss.isfinite() and loss.shape == () for loss in output.losses.values())
    assert all(value > 0 for term, value in output.losses.items() if term.endswith("class"))
    if which == "none":
        assert all(value == 0 for term, value in output.losses.items() if not term.endswith("class"))
    torch.stack(list(output.losses.values())).sum().backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(level.grad.isfinite().all() and level.grad.any() for level in levels.levels)


@every_head
def test_every_loss_alone_has_a_gradient(name: str) -> None:
    """To the pyramid, finite."""
    levels = pyramid(2)
    targets = make_targets(random_boxes(2, 3), torch.tensor([[0, 1, 2]] * 2))
    losses = run(build(name), levels, targets).losses
    for term, loss in losses.items():
        gradients = torch.autograd.grad(loss, levels.levels, retain_graph=True, allow_unused=True)
        found = [g for g in gradients if g is not None]
        assert all(g.isfinite().all() for g in found), term
        assert any(g.any() for g in found), term


MULTI_SCALE, SINGLE_SCALE = "co_deformable_tiny", "conditional_detr_tiny"
TINY = [*SIZES, NARROW, "model.num_points=2", "model.detector.main.num_queries=12"]
TINY += ["model.detector.encoder.num_layers=2", "model.detector.decoder.num_layers=1"]
TINY += ["model.detector.backbone.frozen_stages=2"]


def build_detector(model: str, name: str, *overrides: str) -> Detector:
    own = [f"model.detector.heads.{name}.{o}" for o in SMALL_REGIONS if name in REGIONS]
    torch.manual_seed(0)
    return instantiate(composed(name, f"model={model}", *TINY, *own, *overrides), _convert_="all")


def images() -> tuple[Tensor, Tensor]:
    """Two images and their padding; the second is smaller."""
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, 56:] = padding[1, :, 80:] = True
    return torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), padding


@every_head
@pytest.mark.parametrize("model", [MULTI_SCALE, SINGLE_SCALE])
def test_a_head_alone_trains_adapter_encoder_and_backbone(name: str, model: str) -> None:
    """Every parameter of every stage that is not frozen, of the neck, of every encoder layer and of the adapter."""
    detector = build_detector(model, name).train()
    with torch.no_grad():
        for parameter in detector.parameters():  # some begin at zero, and let no gradient through
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    boxes = torch.tensor([[[8.0, 8, 60, 50], [50, 10, 90, 60]], [[4.0, 4, 40, 40], [30, 20, 78, 54]]])
    targets = make_targets(boxes, torch.tensor([[0, 1], [2, 0]]), torch.tensor([[64, 96], [56, 80]]))
    output = detector(*images(), targets)
    assert output.head_losses.keys() == {name}
    torch.stack(list(output.head_losses[name].values())).sum().backward()
    trained = {n: p for n, p in detector.named_parameters() if p.requires_grad}
    shared = [n for n in trained if n.startswith(("backbone.", "neck.", "encoder.", "adapter."))]
    assert [n for n in shared if trained[n].grad is None or not trained[n].grad.any()] == []
    stages = {MULTI_SCALE: {"layer2", "layer3", "layer4"}, SINGLE_SCALE: {"layer2", "layer3"}}
    assert {n.split(".")[2] for n in shared if n.startswith("backbone.")} == stages[model]
    assert {n.split(".")[2] for n in shared if n.startswith("encoder.layers.")} == {"0", "1"}
    frozen = [p for p in detector.backbone.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)
    assert any(n.startswith("adapter.") for n in shared)
    assert all(p.grad is None for p in detector.decoder.parameters())


@every_head
@pytest.mark.parametrize("model", [MULTI_SCALE, SINGLE_SCALE])
def test_no_head_is_part_of_inference(name: str, model: str) -> None:
    """NaN in all that only trains changes nothing; what is left without it is the plain detector."""
    detector = build_detector(model, name, "model.query_groups=2").eval()
    prefixes = detector.training_only_prefixes()
    assert set(prefixes) == {"heads.", "adapter.", "queries.group_2.", f"queries.{name}."}
    given = images()
    with torch.no_grad():
        expected = detector.detect(*given)
        for key, value in [*detector.named_parameters(), *detector.named_buffers()]:
            if key.startswith(prefixes):
                value.fill_(float("nan"))
        found = detector.detect(*given)
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.logits, expected.logits)
    deployed = {key: value for key, value in detector.state_dict().items() if not key.startswith(prefixes)}
    plain = instantiate(composed("", f"model={model}", *TINY), _convert_="all").eval()
    plain.load_state_dict(deployed)
    with torch.no_grad():
        found = plain.detect(*given)
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("model", [MULTI_SCALE, SINGLE_SCALE])
def test_every_level_of_the_pyramid_trains_the_encoder(model: str) -> None:
    detector = build_detector(model, "atss")
    memory = detector.encode(*images())
    levels = detector.adapter(memory).levels
    assert len(levels) == 5
    for level in levels:
        (gradient,) = torch.autograd.grad((level * torch.rand_like(level)).sum(), memory.tokens, retain_graph=True)
        assert gradient.any()
