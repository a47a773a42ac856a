"""The matcher against brute force, and its behaviour at the edges."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from codetr.assign.hungarian import MatchingCost, match
from codetr.types import Frames, Prediction, Problem, Targets

COST = MatchingCost(focal=2.0, l1=5.0, giou=2.0, alpha=0.25, gamma=2.0)


def targets(counts: tuple[int, ...], most: int) -> Targets:
    batch = len(counts)
    boxes = torch.cat([torch.rand(batch, most, 2) * 0.6 + 0.2, torch.rand(batch, most, 2) * 0.3 + 0.05], -1)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    return Targets(boxes, torch.randint(4, (batch, most)), valid, Frames.unscaled(torch.full((batch, 2), 64)))


def prediction(layers: int, batch: int, queries: int) -> Prediction:
    boxes = torch.rand(layers, batch, queries, 4) * 0.5 + 0.1
    return Prediction(torch.randn(layers, batch, queries, 4) * 2, boxes)


def cost_by_hand(logits: Tensor, boxes: Tensor, label: int, truth: Tensor) -> Tensor:
    """Costs of one object to all queries, written out from the definition."""
    p = logits[:, label].sigmoid()
    focal = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
    giou = generalized_box_iou(box_convert(truth[None], "cxcywh", "xyxy"), box_convert(boxes, "cxcywh", "xyxy"))[0]
    return 2 * focal + 5 * (boxes - truth).abs().sum(1) - 2 * giou


def test_costs_equal_their_definition() -> None:
    goal, p = targets((3, 1), 3), prediction(2, 2, 5)
    cost = COST(p, goal.labels, goal.boxes)
    for layer, image, k in itertools.product(range(2), range(2), range(3)):
        expected = cost_by_hand(
            p.logits[layer, image], p.boxes[layer, image], int(goal.labels[image, k]), goal.boxes[image, k]
        )
        torch.testing.assert_close(cost[layer, image, k], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("repeats", [1, 2])
def test_matching_is_optimal(repeats: int) -> None:
    goal, p = targets((2, 0, 1), 3), prediction(2, 3, 5)
    cost = COST(p, goal.labels, goal.boxes)
    (known,) = match([Problem(p, repeats)], goal, COST)
    for layer, image in itertools.product(range(2), range(3)):
        count = int(goal.counts[image])
        rows = list(range(count)) * repeats
        best = min(
            sum(float(cost[layer, image, k, q]) for k, q in zip(rows, chosen, strict=True))
            for chosen in itertools.permutations(range(5), len(rows))
        )
        got = 0.0
        for q in range(5):
            if known.labels[layer, image, q] >= 0:
                owner = (goal.boxes[image] == known.boxes[layer, image, q]).all(1).nonzero()[0, 0]
                assert known.labels[layer, image, q] == goal.labels[image, owner]
                got += float(cost[layer, image, owner, q])
        assert int((known.labels[layer, image] >= 0).sum()) == len(rows)
        assert got == pytest.approx(best, abs=1e-5)


def test_many_problems_at_once_equal_one_by_one() -> None:
    goal = targets((3, 2), 4)
    problems = [Problem(prediction(3, 2, 7)), Problem(prediction(1, 2, 9), class_agnostic=True)]
    together = match(problems, goal, COST)
    for problem, known in zip(problems, together, strict=True):
        (alone,) = match([problem], goal, COST)
        assert torch.equal(alone.labels, known.labels)
        assert torch.equal(alone.boxes, known.boxes)
    assert int(together[1].labels.max()) == 0


def test_padding_of_the_targets_changes_nothing() -> None:
    p, wide = prediction(1, 2, 6), targets((2, 1), 5)
    narrow = Targets(wide.boxes[:, :2], wide.labels[:, :2], wide.valid[:, :2], wide.frames)
    a, b = match([Problem(p)], wide, COST)[0], match([Problem(p)], narrow, COST)[0]
    assert torch.equal(a.labels, b.labels)


def test_more_objects_than_queries() -> None:
    (known,) = match([Problem(prediction(1, 1, 2))], targets((4,), 4), COST)
    assert (known.labels >= 0).all()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_predictions_that_are_not_finite_change_no_other_image(value: str) -> None:
    p, goal = prediction(1, 3, 4), targets((1, 1, 1), 1)
    (before,) = match([Problem(p)], goal, COST)
    p.boxes[0, 2], p.logits[0, 2] = float(value), float("nan")
    (after,) = match([Problem(p)], goal, COST)
    assert torch.equal(after.labels[:, :2], before.labels[:, :2])
    assert (after.labels[0, 2] >= 0).sum() == 1


def test_every_problem_equals_scipy_on_its_own() -> None:
    """Layers, images, groups and repeats, with hard ties: half of the queries are equal."""
    goal = targets((6, 0, 4), 6)
    goal.boxes[0, 3] = goal.boxes[0, 0]  # two objects in the same place
    problems = []
    for queries, repeats in ((12, 1), (12, 1), (30, 3)):
        p = prediction(20, 3, queries)  # more layers than one block of costs
        p.logits[:, :, 1::2], p.boxes[:, :, 1::2] = p.logits[:, :, ::2], p.boxes[:, :, ::2]
        problems.append(Problem(p, repeats))
    for problem, known in zip(problems, match(problems, goal, COST), strict=True):
        cost = COST(problem.prediction, goal.labels, goal.boxes)
        for layer, image in itertools.product(range(20), range(3)):
            count = int(goal.counts[image])
            matrix = cost[layer, image, :count].repeat(problem.repeats, 1)
            best = matrix[linear_sum_assignment(matrix)].sum()
            labels, boxes = known.labels[layer, image], known.boxes[layer, image]
            queries = (labels >= 0).nonzero()[:, 0]
            assert len(queries) == count * problem.repeats
            mine = COST(
                Prediction(
                    *(
                        x[layer : layer + 1, image : image + 1, queries]
                        for x in (problem.prediction.logits, problem.prediction.boxes)
                    )
                ),
                labels[None, queries],
                boxes[None, queries],
            )
            torch.testing.assert_close(mine[0, 0].diagonal().sum(), best, rtol=1e-5, atol=1e-5)
            for k in range(count):  # every object exactly so often; objects in the same place share their number
                same = (goal.boxes[image, :count] == goal.boxes[image, k]).all(1).sum()
                assert (boxes[queries] == goal.boxes[image, k]).all(1).sum() == problem.repeats * same


@pytest.mark.parametrize("case", range(20))
def test_matching_equals_the_official_one(official: Path, case: int) -> None:
    data = load_file(official / "assigners" / "hungarian.safetensors")
    own = {k.removeprefix(f"case{case}."): v for k, v in data.items() if k.startswith(f"case{case}.")}
    height, width = own["img_shape"].tolist()[:2]
    count = len(own["gt_boxes"])
    goal = targets((count,), max(count, 1))
    scaled = own["gt_boxes"] / torch.tensor([width, height, width, height])
    goal.boxes[0, :count], goal.labels[0, :count] = box_convert(scaled, "xyxy", "cxcywh"), own["gt_labels"].long()
    p = Prediction(own["logits"][None, None], own["boxes"][None, None])
    (known,) = match([Problem(p)], goal, COST)
    owner = own["gt_inds"].long() - 1
    assert torch.equal(known.labels[0, 0] >= 0, owner >= 0)
    positive = owner >= 0
    torch.testing.assert_close(COST(p, goal.labels, goal.boxes)[0, 0, :count].T, own["cost"], rtol=1e-5, atol=1e-5)
    assert torch.equal(known.boxes[0, 0, positive], goal.boxes[0, owner[positive]])


def test_no_queries_match_nothing() -> None:
    """A small image may have no proposals left for a group."""
    (known,) = match([Problem(prediction(2, 1, 0))], targets((3,), 3), COST)
    assert known.labels.shape == (2, 1, 0)
