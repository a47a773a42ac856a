"""Merging what several views found: each way against a plain loop, and weighted boxes fusion against its authors'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor
from torchvision.ops import box_iou

from codetr.application import compose
from codetr.data.geometry import Window
from codetr.types import Detections
from codetr.views import NMS, WBF, SoftNMS, View
from codetr.views.seen import Seen, meeting

SIZE = (40, 40)
WHOLE = View(Window(0, 0, *SIZE))


def drawn(seed: int, views: int = 3, each: int = 40, classes: int = 2) -> Seen:
    """Crowded boxes; all views see the whole picture."""
    draws = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(views):
        corners = torch.rand(each, 2, generator=draws) * 20
        boxes = torch.cat([corners, corners + 5 + torch.rand(each, 2, generator=draws) * 10], 1)
        scores = torch.rand(each, generator=draws).sort(descending=True).values
        found.append(Detections(scores, torch.randint(classes, (each,), generator=draws), boxes))
    return Seen.of(found, [WHOLE] * views, SIZE)


def meets(seen: Seen) -> Tensor:
    """[n, n] IoU of those of one class from different views, else 0."""
    found = seen.found
    apart = (found.labels[:, None] == found.labels) & (seen.view[:, None] != seen.view)
    return box_iou(found.boxes_xyxy, found.boxes_xyxy).where(apart, 0)


@pytest.mark.parametrize("seed", range(4))
def test_of_detections_from_different_views_the_best_stay(seed: int) -> None:
    seen = drawn(seed)
    iou, left = meets(seen), []
    for i in range(len(iou)):
        if not any(iou[i, j] > 0.4 for j in left):
            left.append(i)
    found = NMS(0.4)(seen)
    assert 0 < len(left) < len(iou)
    torch.testing.assert_close(found.boxes_xyxy, seen.found.boxes_xyxy[left], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_fall_in_order(seed: int, method: str) -> None:
    seen = drawn(seed)
    merge = SoftNMS(method, 0.3, 0.5, 0.05)
    iou, scores = meets(seen).double(), seen.found.scores.double().clone()
    weight: dict[str, Callable[[float], float]] = {
        "linear": lambda o: 1 - o if o >= 0.3 else 1,
        "gaussian": lambda o: float(np.exp(-(o**2) / 0.5)),
    }
    waiting, expected = list(range(len(scores))), []
    while waiting:
        best = max(waiting, key=lambda i: scores[i])
        waiting.remove(best)
        expected.append(best)
        for other in waiting:
            scores[other] *= weight[method](float(iou[best, other]))
    expected = [i for i in expected if scores[i] >= 0.05]
    found = merge(seen)
    torch.testing.assert_close(found.boxes_xyxy, seen.found.boxes_xyxy[expected], rtol=0, atol=0)
    torch.testing.assert_close(found.scores, scores[expected].float(), rtol=0, atol=1e-6)


def fused(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, views: int, iou: float) -> np.ndarray:
    """Rows of box, score and label: Solovyev et al., section 3, word by word."""
    clusters: list[list[int]] = []

    def mean(cluster: list[int]) -> np.ndarray:
        return np.average(boxes[cluster], axis=0, weights=scores[cluster])

    for i in np.argsort(-scores, kind="stable"):
        own = [c for c in clusters if labels[c[0]] == labels[i]]
        ious = [float(box_iou(torch.tensor(mean(c))[None], torch.tensor(boxes[i])[None])) for c in own]
        if ious and max(ious) > iou:
            own[int(np.argmax(ious))].append(i)
        else:
            clusters.append([i])
    rows = [[*mean(c), scores[c].mean() * min(len(c), views) / views, labels[c[0]]] for c in clusters]
    return np.array(sorted(rows, key=lambda row: -row[4]))


def by_the_authors(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, view: np.ndarray, iou: float
) -> np.ndarray:
    package = pytest.importorskip("ensemble_boxes", reason="the authors' package is not installed: ensemble-boxes")
    lists = [
        [(own[view == v] / scale).tolist() for v in range(3)] for own, scale in ((boxes, 40), (scores, 1), (labels, 1))
    ]
    found = package.weighted_boxes_fusion(*lists, iou_thr=iou)
    return np.concatenate([found[0] * 40, found[1][:, None], found[2][:, None]], 1)


@pytest.mark.parametrize("judge", ["a plain loop", "the authors'"])
@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_fused_as_published(seed: int, judge: str) -> None:
    seen = drawn(seed)
    found = seen.found
    rows = [part.double().numpy() for part in (found.boxes_xyxy, found.scores, found.labels)]
    own = WBF(0.5, min_score=0)(seen)
    if judge == "a plain loop":
        expected = fused(*rows, views=3, iou=0.5)
    else:
        expected = by_the_authors(*rows, view=seen.view.numpy(), iou=0.5)
    assert 10 < len(expected) < len(found.scores)
    ours = torch.cat([own.boxes_xyxy, own.scores[:, None], own.labels[:, None]], 1).double().numpy()
    key = lambda table: table[np.lexsort(table[:, :5].round(3).T)]  # noqa: E731
    np.testing.assert_allclose(key(ours), key(expected), rtol=0, atol=2e-4)
    assert own.scores.tolist() == sorted(own.scores.tolist(), reverse=True)


def test_the_number_of_views_is_that_of_those_that_look_there() -> None:
    """Two tiles side by side and the whole: each place is looked at twice."""
    halves = [View(Window(0, 0, 40, 20), core=(-1, -1, 20, 99)), View(Window(0, 20, 40, 20), core=(20, -1, 99, 99))]
    box = torch.tensor([[5.0, 5.0, 15.0, 15.0]])
    one, none = torch.zeros(1).long(), Detections(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 4))
    found = [Detections(torch.tensor([0.8]), one, box), none, Detections(torch.tensor([0.4]), one, box)]
    assert WBF()(Seen.of(found, [*halves, WHOLE], SIZE)).scores.tolist() == pytest.approx([0.6])
    assert WBF()(Seen.of([found[0], none, none], [*halves, WHOLE], SIZE)).scores.tolist() == pytest.approx([0.4])


def test_what_is_compared_is_what_both_views_see() -> None:
    """The left view cuts off an object at x = 30; the right one sees from x = 10 on."""
    views = [View(Window(0, 0, 40, 30)), View(Window(0, 10, 40, 30))]
    one = torch.zeros(1).long()
    boxes = [torch.tensor([[0.0, 4.0, 30.0, 20.0]]), torch.tensor([[10.0, 4.0, 38.0, 20.0]])]
    found = [Detections(torch.tensor([score]), one, box) for score, box in zip((0.9, 0.8), boxes, strict=True)]
    pairs = meeting(Seen.of(found, views, SIZE), 0.5)
    assert pairs.iou.tolist() == pytest.approx([1.0])
    assert float(box_iou(*boxes)) < 0.6


def test_within_a_view_nothing_is_dropped() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    zeros = torch.zeros(2).long()
    pair = Detections(torch.tensor([0.9, 0.8]), zeros, boxes.repeat(2, 1))
    worse = Detections(torch.tensor([0.5, 0.4]), zeros, boxes.repeat(2, 1))
    assert NMS()(Seen.of([pair, worse], [WHOLE] * 2, SIZE)).scores.tolist() == pytest.approx([0.9, 0.8])


def test_many_tiles_are_compared_with_their_neighbours_alone() -> None:
    """And those are all that meet: as torchvision has it of all boxes, cut off where both views see."""
    views = [View(Window(y, x, 20, 20)) for y in range(0, 80, 10) for x in range(0, 80, 10)]
    draws = torch.Generator().manual_seed(0)
    found = []
    for view in views:
        corners = torch.rand(6, 2, generator=draws) * 12 + torch.tensor([view.window.left, view.window.top])
        boxes = torch.cat([corners, corners + 3 + torch.rand(6, 2, generator=draws) * 5], 1)
        found.append(Detections(torch.rand(6, generator=draws), torch.zeros(6).long(), boxes))
    seen = Seen.of(found, views, (90, 90))
    boxes, windows = seen.found.boxes_xyxy.double(), seen.windows[seen.view].double()
    expected = {}
    for a, b in combinations(range(len(boxes)), 2):
        low, high = torch.maximum(windows[a], windows[b])[:2], torch.minimum(windows[a], windows[b])[2:]
        if seen.view[a] != seen.view[b] and (low < high).all():
            cut = boxes[[a, b]].view(2, 2, 2).clamp(low, high).flatten(1)
            if (iou := float(box_iou(cut[:1], cut[1:]).nan_to_num(0))) > 0.3:
                expected[a, b] = iou
    pairs = meeting(seen, 0.3)
    assert len(expected) > 50
    assert dict(
        zip(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True), pairs.iou.tolist(), strict=True)
    ) == pytest.approx(expected, abs=1e-9)


def test_defaults_in_python_are_those_of_the_configuration() -> None:
    def same(one: Any, other: Any) -> None:
        assert type(one) is type(other)
        for field in fields(one):
            own, theirs = getattr(one, field.name), getattr(other, field.name)
            same(own, theirs) if is_dataclass(own) else None
            assert own == theirs, field.name

    for merge in ("nms", "soft_nms", "wbf"):
        given = ["views=[tiles,tta]", *(f"views/merge@views.{kind}.merge={merge}" for kind in ("tiles", "tta"))]
        views = compose("predict", ["checkpoint=x", "images=y", *given]).views
        made = {name: instantiate(part, _convert_="all") for name, part in views.items()}
        assert list(made) == ["tiles", "tta"]
        for own in made.values():
            same(own, type(own)(merge=type(own.merge)()))
