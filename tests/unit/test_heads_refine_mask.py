"""Refined masks: which pixels count, what they are compared with, where they land in the image, and that the head
learns a shape; against brute force and closed forms."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from codetr.errors import UserError
from codetr.heads.mask import region_masks
from codetr.heads.mask_iou import MaskIoU, mask_iou_target, share_inside
from codetr.heads.paste import _paste, paste_masks
from codetr.heads.refine_mask import RefineMaskHead, counted_pixels, near_boundary, refined
from codetr.heads.regions import Regions
from codetr.heads.roi import RoIPool
from codetr.nn.boxes import best_pairs
from codetr.types import Detections, Frames, Prediction, Pyramid, Targets

WIDTH, CLASSES, SIZE = 32, 3, 6
STAGES = (SIZE, 2 * SIZE, 4 * SIZE, 8 * SIZE)


def head(**changes: float | tuple[float, ...]) -> RefineMaskHead:
    settings = {
        "stage_weights": (0.5, 0.75, 0.75, 1.0),
        "boundary_width": 2,
        "mask_weight": 1.0,
        "iou_weight": 0.5,
        "num_candidates": 20,
        "positive_iou": 0.5,
        "most_positive": 8,
        "regions_per_pass": 3,
    }
    iou = MaskIoU(WIDTH, SIZE, 2, 1, 8, CLASSES)
    return RefineMaskHead(RoIPool(SIZE, 4, 1), WIDTH, 1, 1, CLASSES, (1, 3), iou=iou, **(settings | changes))


def pyramid(images: int = 2) -> Pyramid:
    return Pyramid([torch.randn(images, WIDTH, 64 // s, 64 // s) for s in (4, 8, 16)], (4, 8, 16))


def discs(valid: list[list[bool]]) -> Targets:
    """Two objects per image, each the disc in its box; the second box is that of the padding."""
    boxes = torch.tensor([[16.0, 8, 48, 40], [8, 24, 40, 56]])
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    low, high = boxes[:, :2], boxes[:, 2:]
    center, radius = (low + high) / 2, (high - low) / 2
    position = (torch.stack([x, y]) - center[..., None, None]) / radius[..., None, None]
    count = len(valid)
    return Targets(
        boxes=(torch.cat([center, 2 * radius], 1) / 64).expand(count, -1, -1).clone(),
        labels=torch.tensor([[2, 1]]).expand(count, -1) * torch.tensor(valid),
        valid=torch.tensor(valid),
        frames=Frames.unscaled(torch.tensor([[64, 64]]).expand(count, -1)),
        masks=(position.square().sum(1) < 1).expand(count, -1, -1, -1) & torch.tensor(valid)[:, :, None, None],
    )


def prediction(targets: Targets, queries: int = 12) -> Prediction:
    """Boxes near the first object, and logits of random order."""
    boxes = targets.boxes[:, :1].repeat(1, queries, 1) + 0.05 * torch.randn(len(targets.boxes), queries, 4)
    return Prediction(torch.randn(len(boxes), queries, CLASSES), boxes.clamp(0.05, 0.95))


def test_without_objects_losses_and_gradients_are_zero() -> None:
    model, targets = head(), discs([[False, False], [False, False]])
    levels = pyramid()
    for level in levels.levels:
        level.requires_grad_()
    losses = model.losses(levels, prediction(targets), targets)
    assert losses.keys() == {"stage0", "stage1", "stage2", "stage3", "iou"}
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())
    assert (levels.levels[0].grad == 0).all()


def test_every_parameter_learns_from_regions_but_the_decoder_does_not() -> None:
    model, targets = head(), discs([[True, True], [True, False]])
    found = prediction(targets)
    found.boxes.requires_grad_()
    found.logits.requires_grad_()
    losses = model.losses(pyramid(), found, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() and (p.grad != 0).any() for p in model.parameters())
    assert found.boxes.grad is None
    assert found.logits.grad is None


def test_missing_masks_are_named() -> None:
    targets = replace(discs([[True, True]]), masks=None)
    with pytest.raises(UserError, match=r"data\.masks=true"):
        head().losses(pyramid(1), prediction(targets), targets)


def test_a_region_does_not_depend_on_its_batch() -> None:
    """Not on other regions or images, nor on the order."""
    model, levels = head().double().eval(), Pyramid([level.double() for level in pyramid().levels], (4, 8, 16))
    low = torch.rand(7, 2, dtype=torch.double) * 30
    boxes = torch.cat([low, low + 5 + torch.rand(7, 2, dtype=torch.double) * 25], 1)
    images, labels = torch.tensor([0, 1, 1, 0, 1, 0, 0]), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    together, iou = model(levels, model.semantics(levels), images, boxes, labels)
    for i in range(7):
        own = Pyramid([level[images[i]][None] for level in levels.levels], levels.strides)
        alone, own_iou = model(own, model.semantics(own), torch.tensor([0]), boxes[i : i + 1], labels[i : i + 1])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b[0])
        torch.testing.assert_close(iou[i], own_iou[0])


def test_the_loss_is_a_mean_that_padding_does_not_change() -> None:
    """An image twice has the loss of the image once; rows without an object do not count."""
    model, targets, levels = head(), discs([[True, True]]), pyramid(1)
    regions = Regions(targets.boxes_xyxy + torch.tensor([2.0, -1, 3, 1]), torch.tensor([[0, 1]]))
    once = model.region_losses(levels, regions, targets)
    twice = discs([[True, True], [True, True]])
    padding = Regions(torch.rand(2, 3, 4) * 20, torch.tensor([[-1, -2, -1]] * 2))
    padded = Regions(*(torch.cat([a.repeat(2, *[1] * (a.ndim - 1)), b], 1) for a, b in zip(regions, padding)))  # noqa: B905
    both = Pyramid([level.repeat(2, 1, 1, 1) for level in levels.levels], levels.strides)
    for name, loss in model.region_losses(both, padded, twice).items():
        torch.testing.assert_close(loss, once[name], msg=name)


def test_a_stage_has_the_mean_loss_of_the_pixels_that_count() -> None:
    """The same wrong answer everywhere, to a region that its object fills: one pixel's cross entropy."""
    model, targets, levels = head(), discs([[True, False]]), pyramid(1)
    targets.masks[:, 0] = True
    for classes in model.classes:
        torch.nn.init.zeros_(classes.weight)
        torch.nn.init.constant_(classes.bias, -1)
    losses = model.region_losses(levels, Regions(targets.boxes_xyxy[:, :1], torch.tensor([[0]])), targets)
    one = torch.log1p(torch.exp(torch.tensor(1.0)))
    for stage, weight in enumerate((0.5, 0.75, 0.75, 1.0)):
        torch.testing.assert_close(losses[f"stage{stage}"], weight * one)


def window_differs(mask: Tensor, width: int) -> Tensor:
    """Counting cells, one window after the other."""
    size = len(mask)
    result = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        for j in range(size):
            others = 0
            for y in range(i - width, i + width + 1):
                for x in range(j - width, j + width + 1):
                    cell = bool(mask[y, x]) if 0 <= y < size and 0 <= x < size else False
                    others += cell != bool(mask[i, j])
            result[i, j] = others > 0.1 * (2 * width + 1) ** 2
    return result


@pytest.mark.parametrize("width", [1, 2])
def test_near_boundary_against_counting(width: int) -> None:
    masks = torch.nn.functional.interpolate(torch.rand(4, 1, 3, 3), size=10, mode="bilinear")[:, 0] > 0.5
    masks[3] = True  # its boundary is that of the region
    expected = torch.stack([window_differs(mask, width) for mask in masks])
    assert 0 < expected.float().mean() < 1
    assert torch.equal(near_boundary(masks, width), expected)


def test_later_stages_count_near_boundaries_alone() -> None:
    """A predicted and a true edge, apart: the strips around both, none of the rest; the first two stages count all."""
    true_edge, own_edge = 0.25, 0.75
    goals, logits = [], []
    for size in STAGES:
        columns = ((torch.arange(size) + 0.5) / size).expand(1, size, size)
        goals.append((columns > true_edge).float())
        logits.append(torch.where(columns > own_edge, 5.0, -5.0))
    counted = counted_pixels(logits, goals, 2)
    assert counted[0].all()
    assert counted[1].all()
    for stage in (2, 3):
        row = counted[stage][0, STAGES[stage] // 2]
        cell = STAGES[stage] // STAGES[stage - 1]
        place = torch.arange(STAGES[stage]) + 0.5
        distance = torch.minimum((place / len(place) - true_edge).abs(), (place / len(place) - own_edge).abs())
        cells = distance * len(place) / cell  # of the stage before
        inner = place < len(place) * 0.9  # the mask ends with the region, which is a boundary as well
        assert row[(cells < 1.5) & inner].all()
        assert not row[(cells > 2.6) & inner].any()


def test_refined_masks_replace_boundaries_alone() -> None:
    """A coarse disc and a later stage that would erase everything: the middle stays, the rim goes."""
    grid = (torch.arange(12) + 0.5) / 6 - 1
    disc = 8 * (0.5 - (grid[:, None] ** 2 + grid**2))[None]
    erased = torch.full((1, 24, 24), -9.0)
    mask = refined([torch.zeros(1, 6, 6), disc, erased])
    same = torch.nn.functional.interpolate(disc[:, None], size=24, mode="bilinear", align_corners=True)[:, 0]
    kept = mask == same
    assert (mask[~kept] == -9).all()
    assert kept[0, 11:13, 11:13].all()
    assert kept[0, 0, 0]
    edge = window_differs(disc[0] >= 0, 1)
    i, j = torch.meshgrid(torch.arange(24) * 11 / 23, torch.arange(24) * 11 / 23, indexing="ij")
    corners = [(y.long(), x.long()) for y in (i.floor(), i.ceil()) for x in (j.floor(), j.ceil())]
    around = torch.stack([edge[corner] for corner in corners])
    assert around.all(0).any()
    assert not kept[0][around.all(0)].any()
    assert kept[0][~around.any(0)].all()


def test_share_inside_against_slicing() -> None:
    objects = (torch.rand(3, 1, 20, 30) < 0.4).float()
    corners = torch.rand(40, 4) * torch.tensor([34.0, 24, 34, 24]) - 2
    boxes = torch.cat([corners.view(-1, 2, 2).amin(1), corners.view(-1, 2, 2).amax(1)], 1)
    boxes[0] = torch.tensor([30.0, 20, 30, 20])  # nothing is there
    boxes[1] = torch.tensor([7.2, 3.1, 7.9, 3.8])  # less than a pixel is one
    boxes[2] = torch.tensor([0.0, 0, 30, 20])
    places = torch.arange(40) % 3
    expected = []
    for place, box in zip(places, boxes, strict=True):
        x1, y1, x2, y2 = (max(0, int(c)) for c in box)
        inside = objects[place, 0, y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
        expected.append(inside.sum() / objects[place].sum())
    found = share_inside(objects, torch.cat([places[:, None], boxes], 1))
    torch.testing.assert_close(found, torch.stack(expected))
    assert found[2] == 1


def test_mask_iou_target_is_of_the_whole_object() -> None:
    """Predicted: the left half of the region, which shows a full object (1/2), half of one (1/3), or nothing (0)."""
    logits = torch.full((3, 8, 8), -2.0)
    logits[:, :, :4] = 2
    goal = torch.ones(3, 8, 8)
    goal[2] = 0
    target = mask_iou_target(logits, goal, torch.tensor([1, 0.5, 0]))
    torch.testing.assert_close(target, torch.tensor([1 / 2, 32 / 128, 0]))


def test_mask_iou_of_the_objects_class_is_learned_where_masks_overlap() -> None:
    model, targets, levels = head(), discs([[True, False]]), pyramid(1)
    regions = Regions(targets.boxes_xyxy[:, :1], torch.tensor([[0]]))
    torch.nn.init.constant_(model.classes[1].bias, 1)
    loss = model.region_losses(levels, regions, targets)["iou"]
    images, boxes, label = torch.tensor([0]), regions.boxes[0], targets.labels[0, :1]
    logits, iou = model(levels, model.semantics(levels), images, boxes, label)
    mask = region_masks(targets.masks, targets.valid, images, images, boxes, STAGES[1])[0] > 0
    own = logits[1][0] > 0
    expected = (own & mask).sum() / (own | mask).sum()
    assert 0 < expected < 1
    torch.testing.assert_close(loss, 0.5 * (iou[0] - expected) ** 2)
    torch.nn.init.constant_(model.classes[1].bias, -99)
    assert model.region_losses(levels, regions, targets)["iou"] == 0


def test_paste_against_brute_force() -> None:
    """Bilinear by hand at every pixel's centre; boxes over the edges, outside, without area."""
    size, (height, width) = 5, (18, 23)
    boxes = torch.tensor(
        [[2.3, 4.7, 15.2, 11.9], [-6, -3, 9, 8], [15, 10, 40, 30], [30, 2, 44, 9], [4, 4, 4, 9], [-9, -9, -2, -3],
         [7.5, 3.5, 8.5, 4.5], [0, 0, 23, 18]]
    )  # fmt: skip
    masks = torch.rand(len(boxes), size, size)
    masks[0] = 1  # up to the box's sides
    expected = torch.zeros(len(boxes), height, width, dtype=torch.bool)

    def cell(mask: Tensor, row: int, column: int) -> float:
        return mask[row, column].item() if 0 <= row < size and 0 <= column < size else 0.0

    for n, (mask, (x1, y1, x2, y2)) in enumerate(zip(masks, boxes.tolist(), strict=True)):
        for i in range(height):
            for j in range(width):
                if x2 == x1:
                    continue
                row, column = (i + 0.5 - y1) / (y2 - y1) * size - 0.5, (j + 0.5 - x1) / (x2 - x1) * size - 0.5
                top, left = int(row // 1), int(column // 1)
                value = sum(
                    (1 - abs(row - r)) * (1 - abs(column - c)) * cell(mask, r, c)
                    for r in (top, top + 1)
                    for c in (left, left + 1)
                )
                expected[n, i, j] = value >= 0.5
    assert expected[0].any()
    assert expected[2].any()
    assert torch.equal(paste_masks(masks, boxes, (height, width)), expected)
    together = torch.zeros_like(expected)
    _paste(masks, boxes, together)  # as an accelerator does
    assert torch.equal(together, expected)
    assert paste_masks(masks[:0], boxes[:0], (height, width)).shape == (0, height, width)


def test_best_pairs_against_sorting() -> None:
    logits, boxes = torch.randn(2, 6, CLASSES), torch.rand(2, 6, 4) * 0.6 + 0.2
    sizes = torch.tensor([[40, 60], [50, 30]])
    scores, labels, found = best_pairs(Prediction(logits, boxes), sizes, 8)
    for image in range(2):
        height, width = sizes[image].tolist()
        pairs = [(logits[image, q, k].item(), q, k) for q in range(6) for k in range(CLASSES)]
        pairs = sorted(pairs, reverse=True)[:8]
        assert labels[image].tolist() == [label for *_, label in pairs]
        torch.testing.assert_close(scores[image], torch.tensor([logit for logit, *_ in pairs]).sigmoid())
        for row, (_, query, _) in zip(found[image], pairs, strict=True):
            x, y, w, h = boxes[image, query].tolist()
            corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            expected = torch.tensor(corners).clamp(min=0).minimum(torch.tensor([width, height] * 2))
            torch.testing.assert_close(row, expected)


def test_detections_of_a_batch_get_masks_in_original_pixels() -> None:
    """Image 1 has none; image 0's file is twice the network's size: its masks lie in the boxes there."""
    model, levels = head().eval(), pyramid()
    for classes in model.classes:  # no logits that are zero up to rounding
        torch.nn.init.normal_(classes.bias)
    low = torch.rand(5, 2) * 60
    boxes = torch.cat([low, low + 20 + torch.rand(5, 2) * 40], 1)
    labels = torch.randint(0, CLASSES, (5,))
    scores = torch.rand(5)
    nothing = Detections(scores[:0], labels[:0], boxes[:0])
    found, empty = model.segment(levels, [Detections(scores, labels, boxes / 2), nothing])
    assert empty.scores.shape == (0,)
    assert paste_masks(empty.inside, nothing.boxes_xyxy, (70, 90)).shape == (0, 70, 90)
    logits, iou = model(levels, model.semantics(levels), torch.zeros(5).long(), boxes / 2, labels)
    torch.testing.assert_close(found.scores, scores * iou)
    torch.testing.assert_close(found.inside, refined(logits).sigmoid())
    masks = paste_masks(found.inside, boxes, (128, 128))
    assert masks.any()
    y, x = (torch.arange(128) + 0.5 for _ in range(2))
    inside = (x > boxes[:, :1]) & (x < boxes[:, 2:3])
    inside = inside[:, None] & ((y > boxes[:, 1:2]) & (y < boxes[:, 3:]))[:, :, None]
    assert not (masks & ~inside).any()
    nobody = model.segment(levels, [nothing, nothing])
    assert [len(one.inside) for one in nobody] == [0, 0]


def test_half_precision_is_finite() -> None:
    model, targets = head(), discs([[True, True]])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(pyramid(1), prediction(targets), targets)
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())


def test_it_learns_a_shape() -> None:
    """A level that shows the disc: after a few steps the pasted mask is the disc, and its score says so."""
    model, targets = head(stage_weights=(0.5, 0.75, 1.0)), discs([[True, False]])
    shown = [
        torch.nn.functional.adaptive_avg_pool2d(targets.masks[:, :1].float(), 64 // s).repeat(1, WIDTH, 1, 1)
        for s in (4, 8, 16)
    ]
    levels = Pyramid(shown, (4, 8, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    near = Prediction(torch.randn(1, 12, CLASSES), targets.boxes[:, :1] + 0.02 * torch.randn(1, 12, 4))
    for _ in range(40):
        optimizer.zero_grad()
        sum(model.losses(levels, near, targets).values()).backward()
        optimizer.step()
    box = Detections(torch.ones(1), targets.labels[0, :1], targets.boxes_xyxy[0, :1])
    (found,) = model.eval().segment(levels, [box])
    (mask,) = paste_masks(found.inside, box.boxes_xyxy, (64, 64))
    truth = targets.masks[0, 0]
    iou = (mask & truth).sum() / (mask | truth).sum()
    assert iou > 0.9
    assert found.scores[0] > 0.7
