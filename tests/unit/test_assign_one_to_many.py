"""ATSS and maximum IoU against the official cases, alone and batched with padding; brute force; properties."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.ops import box_iou

from codetr.assign import BACKGROUND, IGNORED
from codetr.assign.atss import assign_atss
from codetr.assign.max_iou import assign_max_iou
from codetr.assign.paa import assign_paa
from codetr.ops.gather import largest, smallest

assign_rpn = partial(assign_max_iou, positive=0.7, negative=0.3, low_quality=0.3)
assign_rcnn = partial(assign_max_iou, positive=0.5, negative=0.5, low_quality=None)


def pad(rows: list[Tensor], fill: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Box lists as [B, n, 4], n >= 1, and [B, n] validity; padding is a random box, to prove that it is unused."""
    count = max(1, *map(len, rows))
    valid = torch.arange(count) < torch.tensor([len(r) for r in rows])[:, None]
    low = torch.rand(len(rows), count, 2) * 80
    boxes = torch.cat([low, low + torch.rand(len(rows), count, 2) * 60 + 1], -1)
    boxes[valid] = torch.cat(rows)
    return boxes, valid


def index(gt_inds: Tensor) -> Tensor:
    """The recorded 0 = background, -1 = ignored, k = object k - 1 in our numbers."""
    return torch.where(gt_inds < 0, IGNORED, gt_inds - 1)


GROUPS = [[i] for i in range(20)] + [list(range(20)), [0, 7], [3, 0, 6, 4]]


@pytest.mark.parametrize("cases", GROUPS, ids=str)
def test_atss_equals_official(official: Path, cases: list[int]) -> None:
    data = load_file(official / "assigners" / "atss.safetensors")
    anchors = list(data["anchors"].split(data["num_level_anchors"].tolist()))
    boxes, valid = pad([data[f"case{i}.gt_boxes"] for i in cases])
    owner = assign_atss(anchors, torch.ones(len(cases), 256).bool(), boxes, valid, 9)
    assert torch.equal(owner, torch.stack([index(data[f"case{i}.gt_inds"]) for i in cases]))


@pytest.mark.parametrize("cases", GROUPS, ids=str)
def test_max_iou_equals_official_rpn(official: Path, cases: list[int]) -> None:
    data = load_file(official / "assigners" / "max_iou_rpn.safetensors")
    boxes, valid = pad([data[f"case{i}.gt_boxes"] for i in cases])
    owner = assign_rpn(data["anchors"], torch.ones(len(cases), 576).bool(), boxes, valid)
    assert torch.equal(owner, torch.stack([index(data[f"case{i}.gt_inds"]) for i in cases]))


@pytest.mark.parametrize("cases", GROUPS, ids=str)
def test_max_iou_equals_official_rcnn(official: Path, cases: list[int]) -> None:
    data = load_file(official / "assigners" / "max_iou_rcnn.safetensors")
    boxes, valid = pad([data[f"case{i}.gt_boxes"] for i in cases])
    proposals, real = pad([data[f"case{i}.proposals"] for i in cases])
    owner = assign_rcnn(proposals, real, boxes, valid)
    for row, keep, case in zip(owner, real, cases, strict=True):
        assert torch.equal(row[keep], index(data[f"case{case}.gt_inds"]))
        assert (row[~keep] == IGNORED).all()


def scene(batch: int = 3, objects: int = 5) -> tuple[list[Tensor], Tensor, Tensor]:
    """Anchors of three levels on a 96 x 96 image, and objects of every size."""
    anchors = []
    for stride in (8, 16, 32):
        y, x = torch.meshgrid(torch.arange(0, 96, stride), torch.arange(0, 96, stride), indexing="ij")
        centers = torch.stack([x, y], -1).flatten(0, 1).float()
        anchors.append(torch.cat([centers - stride * 2, centers + stride * 2], 1))
    low = torch.rand(batch, objects, 2) * 60
    return anchors, torch.cat([low, low + 4 + torch.rand(batch, objects, 2) * 50], -1), torch.rand(batch, objects) < 0.8


def brute_force_max_iou(anchors: Tensor, usable: Tensor, boxes: Tensor, valid: Tensor) -> list[int]:
    iou = box_iou(boxes, anchors)
    owner = []
    for a in range(len(anchors)):
        best = max((iou[m, a].item() for m in range(len(boxes)) if valid[m]), default=-1.0)
        choice = BACKGROUND if best < 0.3 else IGNORED
        for m in reversed(range(len(boxes))):
            if valid[m] and best >= 0.7 and iou[m, a].item() == best:
                choice = m
        for m in range(len(boxes)):
            object_best = iou[m][usable].max().item()
            if valid[m] and object_best >= 0.3 and iou[m, a].item() == object_best:
                choice = m
        owner.append(choice if usable[a] else IGNORED)
    return owner


def brute_force_atss(anchors: list[Tensor], usable: Tensor, boxes: Tensor, valid: Tensor, topk: int = 9) -> list[int]:
    every, starts = torch.cat(anchors), [0]
    for level in anchors:
        starts.append(starts[-1] + len(level))
    centers, best, owner = (every[:, :2] + every[:, 2:]) / 2, [-1.0] * len(every), [BACKGROUND] * len(every)
    iou = box_iou(boxes, every)
    for m in range(len(boxes)):
        if not valid[m]:
            continue
        candidates = []
        for first, last in pairwise(starts):
            level = [a for a in range(first, last) if usable[a]]
            middle = (boxes[m, :2] + boxes[m, 2:]) / 2
            candidates += sorted(level, key=lambda a: (centers[a] - middle).norm().item())[:topk]
        threshold = iou[m, candidates].mean() + iou[m, candidates].std()
        for a in candidates:
            inside = torch.cat([centers[a] - boxes[m, :2], boxes[m, 2:] - centers[a]]).min() > 0.01
            if inside and iou[m, a] >= threshold and iou[m, a].item() > best[a]:
                best[a], owner[a] = iou[m, a].item(), m
    return [o if u else IGNORED for o, u in zip(owner, usable, strict=True)]


def test_equal_to_brute_force_with_invalid_anchors_and_objects() -> None:
    for _ in range(5):
        anchors, boxes, valid = scene()
        usable = torch.rand(3, sum(map(len, anchors))) < 0.7
        every = torch.cat(anchors)
        rpn = assign_rpn(every, usable, boxes, valid)
        atss = assign_atss(anchors, usable, boxes, valid, 9)
        for i in range(3):
            assert rpn[i].tolist() == brute_force_max_iou(every, usable[i], boxes[i], valid[i])
            assert atss[i].tolist() == brute_force_atss(anchors, usable[i], boxes[i], valid[i])


def test_scaling_the_image_scales_the_assignment() -> None:
    anchors, boxes, valid = scene()
    usable = torch.ones(3, sum(map(len, anchors))).bool()
    double = [level * 2 for level in anchors]
    assert torch.equal(assign_atss(anchors, usable, boxes, valid, 9), assign_atss(double, usable, boxes * 2, valid, 9))
    assert torch.equal(
        assign_rpn(torch.cat(anchors), usable, boxes, valid), assign_rpn(torch.cat(double), usable, boxes * 2, valid)
    )


@pytest.mark.parametrize("gap", [4.0, -4.0])
def test_an_anchor_of_two_objects_goes_to_the_one_of_higher_iou(gap: float) -> None:
    """Two squares around one anchor, one closer to its size; in either order."""
    anchor = torch.tensor([[40.0, 40.0, 56.0, 56.0]])
    boxes = anchor.repeat(2, 1)[None] + torch.tensor([[-1.0, -1, 1, 1], [-1.0, -1, 1 + gap / 2, 1]])
    expected = box_iou(boxes[0], anchor)[:, 0].argmax()
    usable, valid = torch.ones(1, 1).bool(), torch.ones(1, 2).bool()
    assert assign_atss([anchor], usable, boxes, valid, 9).item() == expected
    assert assign_rcnn(anchor, usable, boxes, valid).item() == expected


def test_thresholds_belong_to_the_positives_and_to_neither() -> None:
    """An IoU of exactly 1/2: not below a negative threshold of 1/2, and at least a positive one."""
    anchor, boxes = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[[0.0, 0, 2, 4]]])
    usable, valid = torch.ones(1, 1).bool(), torch.ones(1, 1).bool()
    assert assign_rcnn(anchor, usable, boxes, valid).item() == 0
    assert assign_max_iou(anchor, usable, boxes, valid, 0.7, 0.5, None).item() == IGNORED
    assert assign_max_iou(anchor, usable, boxes, valid, 0.7, 0.5, 0.5).item() == 0


@pytest.mark.parametrize("seed", range(5))
def test_atss_breaks_ties_by_the_anchors_index(seed: int) -> None:
    """Objects in the middle between cells have many equally near anchors. Which of them an object takes must not depend
    on its image's batch mates or padded objects. Against a stable sort."""
    torch.manual_seed(seed)
    anchors, levels = [], []
    for stride in (8, 16, 32):
        places = torch.arange(0, 256, stride).float()
        center = torch.stack(torch.meshgrid(places, places, indexing="xy"), -1).flatten(0, 1)
        anchors.append(torch.cat([center - 4 * stride, center + 4 * stride], 1))
        levels.append(center)
    low = torch.randint(0, 5, (1, 4, 2)) * 32.0
    boxes = torch.cat([low, low + torch.randint(1, 4, (1, 4, 2)) * 32], -1)
    everywhere = torch.ones(1, sum(map(len, anchors))).bool()
    alone = assign_atss(anchors, everywhere, boxes, torch.ones(1, 4).bool(), 9)
    for more, images in ((1, 1), (7, 3), (40, 2)):
        padded = torch.cat([boxes, torch.rand(1, more, 4).cumsum(-1) * 60], 1).expand(images, -1, -1)
        valid = (torch.arange(4 + more) < 4).expand(images, -1)
        owner = assign_atss(anchors, everywhere.expand(images, -1), padded, valid, 9)
        assert torch.equal(owner, alone.expand(images, -1))
    for center in levels:
        middle = (boxes[0, :, :2] + boxes[0, :, 2:]) / 2
        distance = (center[None] - middle[:, None]).square().sum(-1).sqrt()
        assert torch.equal(smallest(distance, 9), distance.sort(dim=1, stable=True).indices[:, :9])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paa_chooses_the_same_with_the_padding_cut_and_kept(seed: int, dtype: torch.dtype) -> None:
    """Costs of few values, so that most are equal: an image alone, and on the larger canvas of a batch with more
    objects. The canvas adds cells at the right and below, none of which are candidates."""
    torch.manual_seed(seed)
    sides, wide, objects = (16, 8, 4), (29, 15, 8), 3
    owner, cost, padded, padded_cost = [], [], [], []
    for side, canvas in zip(sides, wide, strict=True):
        own = torch.randint(-1, objects, (1, side, side))
        price = torch.randint(1, 5, (1, side, side)).to(dtype) / 4
        more = torch.nn.functional.pad(own, (0, canvas - side, 0, canvas - side), value=IGNORED)
        owner.append(own.flatten(1))
        cost.append(price.flatten(1))
        padded.append(more.flatten(1))
        padded_cost.append(torch.zeros(1, canvas, canvas, dtype=dtype))
        padded_cost[-1][:, :side, :side] = price
        padded_cost[-1] = padded_cost[-1].flatten(1)
    alone = assign_paa(torch.cat(owner, 1), torch.cat(cost, 1), [s * s for s in sides], objects, 9)
    assert 0 < (alone >= 0).sum() < (torch.cat(owner, 1) >= 0).sum()
    kept = torch.cat(padded, 1)
    real = kept != IGNORED
    for images, more in ((1, 0), (3, 7), (2, 40)):
        found = assign_paa(
            kept.expand(images, -1),
            torch.cat(padded_cost, 1).expand(images, -1),
            [s * s for s in wide],
            objects + more,
            9,
        )
        assert torch.equal(found[:, real[0]], alone.expand(images, -1))
        assert (found[:, ~real[0]] < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 300, 20_000])
def test_the_largest_are_those_of_a_stable_sort(size: int, dtype: torch.dtype) -> None:
    """Numbers of both signs with many ties, zeros of both signs and infinities among them."""
    values = (torch.randn(3, size) * 4).round().div(2).to(dtype)
    values[0, ::3], values[1, ::4], values[2, ::5] = -0.0, torch.inf, -torch.inf
    order = values.sort(dim=-1, descending=True, stable=True).indices[:, :100]
    assert torch.equal(largest(values, 100), order)
    assert torch.equal(largest(values[:, None].expand(3, 2, size), 100), order[:, None].expand(3, 2, -1))
    assert torch.equal(smallest(values, 100), values.sort(dim=-1, stable=True).indices[:, :100])


def test_what_is_no_number_is_the_largest() -> None:
    """As `topk` has it, so that it cannot pass unseen; whatever its sign."""
    values = torch.tensor([0.0, 3.0, torch.nan, -torch.tensor(torch.nan), 5.0, torch.nan])
    assert largest(values, 4).tolist() == [2, 3, 5, 4]
