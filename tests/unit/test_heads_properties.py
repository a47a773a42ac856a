"""What must hold for every auxiliary head, whatever its weights."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from codetr.heads.atss import ATSSHead
from codetr.heads.dense import Dense, Selection
from codetr.heads.faster_rcnn import FasterRCNNHead
from codetr.heads.roi import BoxHead, RoIPool
from codetr.heads.rpn import RPN, ProposalSelection
from codetr.nn.anchors import AnchorGrid
from codetr.nn.boxes import BoxCoder, centerness_target, clip
from codetr.ops.nms import best_after_nms
from codetr.types import Frames, Pyramid, Targets
from fixed_draws import fixed_draws

WIDTH, CLASSES = 16, 3


def atss() -> ATSSHead:
    return ATSSHead(WIDTH, CLASSES, 3, 1, 4, 4, (0.1, 0.1, 0.2, 0.2), 9, 0.25, 2.0, 1, 2, 1, Selection(100, 0.6, 20))


def faster_rcnn() -> FasterRCNNHead:
    return FasterRCNNHead(
        rpn=RPN(WIDTH, (2.0, 4.0), (0.5, 1.0), 0.7, 0.3, 0.3, 64, 0.5, 1, 1),
        proposals=ProposalSelection(100, 0.7, 50),
        pool=RoIPool(3, 4, 2),
        box_head=BoxHead(WIDTH, 3, 0, 1, 2, 8, CLASSES, False),
        box_stds=(0.1, 0.1, 0.2, 0.2),
        positive_iou=0.5,
        num_samples=128,  # more than there are: images differ in their number of regions
        positive_fraction=0.25,
        class_weight=1,
        giou_weight=10,
        score_threshold=0.0,
        nms_iou=0.5,
        max_detections=20,
    )


both = pytest.mark.parametrize("build", [atss, faster_rcnn])


def pyramid(batch: int = 2) -> Pyramid:
    return Pyramid([torch.randn(batch, WIDTH, 64 // s, 64 // s, requires_grad=True) for s in (4, 8, 16)], (4, 8, 16))


def targets(batch: int = 2, objects: int = 3) -> Targets:
    centers, sides = torch.rand(batch, objects, 2) * 0.5 + 0.25, torch.rand(batch, objects, 2) * 0.3 + 0.15
    return Targets(
        torch.cat([centers, sides], -1),
        torch.randint(0, CLASSES, (batch, objects)),
        torch.ones(batch, objects).bool(),
        Frames.unscaled(torch.tensor([[64, 64], [48, 40]])[:batch]),
    )


def without_objects(t: Targets) -> Targets:
    return Targets(t.boxes, t.labels, torch.zeros_like(t.valid), t.frames)


@both
@pytest.mark.parametrize("empty", [False, True])
def test_same_graph_with_and_without_objects(build: Callable[[], nn.Module], empty: bool) -> None:
    """Finite losses, and a gradient for every parameter; without objects the box terms are zero."""
    head, goal = build(), targets()
    output = head(pyramid(), without_objects(goal) if empty else goal)
    assert all(loss.isfinite() and loss.shape == () for loss in output.losses.values())
    sum(output.losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    box_terms = {"giou", "l1", "rpn_l1", "centerness"} & output.losses.keys()
    assert all((output.losses[term] == 0) == empty for term in box_terms)
    assert output.positives.positive.any() != empty


@both
def test_gradient_reaches_the_pyramid(build: Callable[[], nn.Module]) -> None:
    levels, head, goal = pyramid(), build(), targets()
    sum(head(levels, goal).losses.values()).backward()
    assert all(level.grad.abs().sum() > 0 for level in levels.levels)
    levels = pyramid()
    head(levels, goal).positives.features.square().sum().backward()
    assert levels.levels[0].grad.abs().sum() > 0


@both
def test_padding_objects_changes_nothing(build: Callable[[], nn.Module]) -> None:
    head, levels, goal = build(), pyramid(), targets()
    extra = targets(objects=4)
    padded = Targets(
        torch.cat([goal.boxes, extra.boxes], 1),
        torch.cat([goal.labels, extra.labels], 1),
        torch.cat([goal.valid, torch.zeros_like(extra.valid)], 1),
        goal.frames,
    )
    with fixed_draws():
        one, other = head(levels, goal), head(levels, padded)
    for term, value in one.losses.items():
        torch.testing.assert_close(value, other.losses[term])
    used = [o.positives.positive | o.positives.negative for o in (one, other)]
    assert torch.equal(used[0].sum(1), used[1].sum(1))
    for name, value in vars(one.positives).items():
        masks = [o.positives.positive for o in (one, other)] if name == "target_boxes_xyxy" else used
        assert torch.equal(value[masks[0]], getattr(other.positives, name)[masks[1]])


@both
def test_positives_are_consistent(build: Callable[[], nn.Module]) -> None:
    goal = targets()
    found = build()(pyramid(), goal).positives
    assert not (found.positive & found.negative).any()
    assert torch.equal(found.labels >= 0, found.positive)
    assert found.positive.any(1).all()
    for i in range(2):
        own = found.positive[i]
        where = (found.target_boxes_xyxy[i, own][:, None] == goal.boxes_xyxy[i]).all(-1)
        assert where.any(1).all()
        assert torch.equal(goal.labels[i][where.long().argmax(1)], found.labels[i, own])


def test_cells_in_the_padding_are_never_used() -> None:
    """Image 1 is 48 x 40 in a 64 x 64 batch."""
    goal = targets()
    found = atss().assign(pyramid(), goal)
    centers = (found.boxes_xyxy[1, :, :2] + found.boxes_xyxy[1, :, 2:]) / 2
    inside = (centers < goal.frames.sizes[1].flip(0)).all(-1)
    assert torch.equal(found.positive[1] | found.negative[1], inside)
    assert (found.positive[0] | found.negative[0]).all()


def test_losses_do_not_see_ignored_anchors() -> None:
    """Predictions in the padding receive no gradient."""
    head, goal = atss(), targets()
    found = head.assign(pyramid(), goal)
    predictions = [p.detach().requires_grad_() for p in head.predictor(pyramid())]
    sum(head.losses(Dense(*predictions), found).values()).backward()
    ignored = ~(found.positive | found.negative)
    assert ignored.any()
    assert all((p.grad[ignored] == 0).all() for p in predictions)


@both
def test_detections_are_inside_and_sorted(build: Callable[[], nn.Module]) -> None:
    sizes = targets().frames.sizes
    for found, size in zip(build().detect(pyramid(), sizes), sizes, strict=True):
        assert 0 < len(found.scores) <= 20
        assert (found.scores.diff() <= 0).all()
        assert (found.boxes_xyxy >= 0).all()
        assert (found.boxes_xyxy <= size.flip(0).repeat(2)).all()


def test_detections_do_not_depend_on_batch_mates() -> None:
    for head in (atss(), faster_rcnn()):
        levels, sizes = pyramid(), targets().frames.sizes
        together = head.detect(levels, sizes)
        for i, found in enumerate(together):
            one = Pyramid([level[i : i + 1] for level in levels.levels], levels.strides)
            (alone,) = head.detect(one, sizes[i : i + 1])
            torch.testing.assert_close(alone.boxes_xyxy, found.boxes_xyxy, rtol=1e-4, atol=1e-4)


def test_proposals_are_constants_and_none_is_empty() -> None:
    """Boxes that lie outside of their image are empty after clipping."""
    head, levels, sizes = faster_rcnn(), pyramid(), targets().frames.sizes
    logits, deltas = head.rpn(levels)
    found, valid = head.rpn.propose(logits, deltas, levels, sizes, head.proposals)
    assert not found.requires_grad
    assert valid.any(1).all()
    shift = torch.tensor([100.0, 0, 0, 0]).where(torch.arange(deltas.shape[1])[:, None] % 2 == 0, 0)
    found, valid = head.rpn.propose(logits, shift.expand_as(deltas), levels, sizes, head.proposals)
    assert valid.any(1).all()
    assert ((found[..., 2:] > found[..., :2]).all(-1) | ~valid).all()


def test_wrong_number_of_levels_is_named() -> None:
    short = pyramid()
    with pytest.raises(ValueError, match="num_levels=3, the pyramid 2"):
        atss().predictor(Pyramid(short.levels[:2], short.strides[:2]))


def boxes(*shape: int) -> Tensor:
    low = torch.rand(*shape, 2) * 40
    return torch.cat([low, low + 2 + torch.rand(*shape, 2) * 20], -1)


def test_box_coder_is_its_own_inverse() -> None:
    anchors, goals = boxes(50).double(), boxes(50).double()
    coder = BoxCoder((0.1, 0.1, 0.2, 0.2))
    torch.testing.assert_close(coder.decode(anchors, coder.encode(anchors, goals)), goals, rtol=1e-5, atol=1e-5)
    huge = coder.decode(anchors, torch.full((50, 4), 1e4).double())
    torch.testing.assert_close(huge[:, 2:] - huge[:, :2], (anchors[:, 2:] - anchors[:, :2]) * 1000 / 16)


def test_anchors_have_the_area_and_ratio_asked_for() -> None:
    levels = Pyramid([torch.zeros(1, 1, 2, 3)], (8,))
    (anchors,) = AnchorGrid((2.0, 4.0), (0.5, 2.0), offset=0.5)(levels)
    sides = (anchors[:, 2:] - anchors[:, :2]).view(6, 4, 2)
    torch.testing.assert_close(sides.prod(-1), torch.tensor([256.0, 1024, 256, 1024]).expand(6, -1))
    torch.testing.assert_close(sides[..., 1] / sides[..., 0], torch.tensor([0.5, 0.5, 2, 2]).expand(6, -1))
    centers = (anchors[::4, :2] + anchors[::4, 2:]) / 2
    assert centers.tolist() == [[x, y] for y in (4, 12) for x in (4, 12, 20)]


def test_clip() -> None:
    out = clip(torch.tensor([[[-5.0, 3, 50, 70]], [[-5.0, 3, 50, 70]]]), torch.tensor([[60, 40], [80, 45]]))
    assert out.tolist() == [[[0, 3, 40, 60]], [[0, 3, 45, 70]]]


def test_centerness_is_one_in_the_middle_and_zero_outside() -> None:
    anchors = torch.tensor([[4.0, 4, 6, 6], [1.0, 4, 3, 6], [-3.0, 4, -1, 6]])
    goals = torch.tensor([0.0, 0, 10, 10]).expand(3, -1)
    torch.testing.assert_close(centerness_target(anchors, goals), torch.tensor([1.0, 0.5, 0.0]))


def test_nms_of_a_batch_equals_nms_one_by_one() -> None:
    candidates, scores = boxes(3, 120), torch.rand(3, 120)
    groups, valid = torch.randint(0, 4, (3, 120)), torch.rand(3, 120) < 0.8
    index, kept = best_after_nms(candidates, scores, groups, valid, 0.4, 25)
    for i in range(3):
        expected = []
        for group in range(4):
            members = (valid[i] & (groups[i] == group)).nonzero()[:, 0]
            expected += members[nms(candidates[i, members], scores[i, members], 0.4)].tolist()
        expected.sort(key=lambda n: -scores[i, n].item())
        assert index[i, kept[i]].tolist() == expected[:25]
        overlaps = box_iou(candidates[i, expected], candidates[i, expected]).triu(1)
        same = groups[i, expected][:, None] == groups[i, expected]
        assert (overlaps[same] <= 0.4).all()


def test_nms_of_nothing() -> None:
    index, kept = best_after_nms(
        boxes(2, 5), torch.rand(2, 5), torch.zeros(2, 5).long(), torch.zeros(2, 5).bool(), 0.5, 9
    )
    assert index.shape == (2, 5)
    assert not kept.any()


def test_regions_of_constant_features_are_constant_and_gaps_are_zero() -> None:
    levels = Pyramid([torch.full((2, 1, 64 // s, 64 // s), float(s)) for s in (4, 8, 16)], (4, 8, 16))
    regions = torch.tensor([[20.0, 20, 30, 30], [4.0, 4, 60, 60], [8.0, 8, 16, 16]]).expand(2, -1, -1)
    valid = torch.tensor([[True, True, False], [True, False, True]])
    pooled = RoIPool(3, 4, 0)(levels, regions, valid)
    assert pooled.mean((2, 3, 4)).tolist() == [[4, 8, 0], [4, 0, 4]]


def test_region_coordinates_keep_their_precision_under_reduced_features() -> None:
    """Half precision has no room for a region's coordinates."""
    reduced = [torch.randn(2, 1, 256 // s, 256 // s).bfloat16() for s in (4, 8, 16)]
    regions, valid = boxes(2, 6) + 180, torch.ones(2, 6).bool()
    pool = RoIPool(3, 4, 2)
    expected = pool(Pyramid([level.float() for level in reduced], (4, 8, 16)), regions, valid)
    assert torch.equal(pool(Pyramid(reduced, (4, 8, 16)), regions, valid), expected)


def total_loss(head: nn.Module, images: slice) -> Tensor:
    """Of some images of a fixed batch in which the second image has no objects."""
    torch.manual_seed(5)
    levels, goal = pyramid(), targets()
    goal.valid[1] = False
    frames = Frames.unscaled(goal.frames.sizes[images])
    part_goal = Targets(goal.boxes[images], goal.labels[images], goal.valid[images], frames)
    with fixed_draws():
        return sum(head(Pyramid([level[images] for level in levels.levels], levels.strides), part_goal).losses.values())


def train_on_one_image(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for build in (atss, faster_rcnn):
        torch.manual_seed(0)
        loss = total_loss(build(), slice(rank, rank + 1)).detach()
        dist.all_reduce(loss)
        torch.save(loss / 2, f"{folder}/{build.__name__}.{rank}")
    dist.destroy_process_group()


def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    """One image per process, the second without objects: the mean loss is that of both images in one process."""
    mp.spawn(train_on_one_image, args=(str(tmp_path),), nprocs=2)
    for build in (atss, faster_rcnn):
        torch.manual_seed(0)
        expected = total_loss(build(), slice(0, 2)).detach()
        torch.testing.assert_close(torch.load(tmp_path / f"{build.__name__}.1"), expected, rtol=1e-5, atol=1e-6)
