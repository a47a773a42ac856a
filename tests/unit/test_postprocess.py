"""The best (query, class) pairs, and the suppression of duplicates within a class."""

import json
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor
from torchvision.ops import box_iou

from codetr.application import compose
from codetr.evaluation.inputs import inputs
from codetr.postprocess import NMS, PostProcess, SoftNMS, Suppression
from codetr.types import Prediction

BOX, FAR = [0.25, 0.25, 0.2, 0.2], [0.75, 0.75, 0.2, 0.2]
SIZES = torch.tensor([[100, 200]])


def test_best_pairs_in_pixels_of_the_original_image() -> None:
    logits = torch.tensor([[[2.0, 1.0], [0.0, 3.0]]])
    (found,) = PostProcess(3, None)(Prediction(logits, torch.tensor([[BOX, FAR]])), SIZES)
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    assert found.labels.tolist() == [1, 0, 1]
    expected = torch.tensor([[130.0, 65, 170, 85], [30.0, 15, 70, 35], [30.0, 15, 70, 35]])
    torch.testing.assert_close(found.boxes_xyxy, expected)


def test_boxes_are_cut_at_the_image() -> None:
    (found,) = PostProcess(1, None)(Prediction(torch.zeros(1, 1, 1), torch.tensor([[[0.0, 1.0, 0.4, 0.4]]])), SIZES)
    torch.testing.assert_close(found.boxes_xyxy, torch.tensor([[0.0, 80, 40, 100]]))


def test_suppression_keeps_the_better_one_of_a_class_and_other_classes() -> None:
    near = [0.26, 0.25, 0.2, 0.2]
    logits = torch.tensor([[[3.0, -9.0], [2.0, -9.0], [-9.0, 1.0], [0.5, -9.0]]])
    (found,) = PostProcess(4, NMS(0.6))(Prediction(logits, torch.tensor([[BOX, near, near, FAR]])), SIZES)
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 1.0, 0.5]).sigmoid())
    assert found.labels.tolist() == [0, 1, 0]


def soft_nms_by_hand(boxes: Tensor, scores: Tensor, labels: Tensor, rule: SoftNMS) -> list[tuple[float, int]]:
    """(score, index), box by box, as the paper's algorithm is written down."""
    left = dict(enumerate(scores.tolist()))
    found = []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        found.append((left.pop(best), best))
        for other in list(left):
            iou = float(box_iou(boxes[best, None], boxes[other, None])) if labels[best] == labels[other] else 0.0
            if rule.method == "gaussian":
                left[other] *= math.exp(-(iou**2) / rule.sigma)
            elif iou >= rule.iou:
                left[other] *= 1 - iou
            if left[other] < rule.min_score:
                del left[other]
    return found


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("classes", [1, 3])
def test_soft_suppression_equals_the_algorithm_box_by_box(method: str, classes: int) -> None:
    rule = SoftNMS(method, 0.4, 0.3, 0.05)  # type: ignore[arg-type]
    torch.manual_seed(classes)
    low = torch.rand(4, 30, 2) * 20
    boxes = torch.cat([low, low + 10 + torch.rand(4, 30, 2) * 30], -1)
    boxes[3] = boxes[3, 0]  # all the same
    scores, labels = torch.rand(4, 30), torch.randint(classes, (4, 30))
    final, index, kept = rule(boxes, scores, labels, 30)
    for image in range(4):
        expected = soft_nms_by_hand(boxes[image], scores[image], labels[image], rule)
        assert index[image, kept[image]].tolist() == [i for _, i in expected]
        torch.testing.assert_close(final[image, kept[image]], torch.tensor([s for s, _ in expected]))


def test_soft_suppression_of_one_box_and_of_ties() -> None:
    rule = SoftNMS("linear", 0.5, 0.5, 0.001)
    one = torch.tensor([[[0.0, 0, 10, 10]]])
    final, index, kept = rule(one, torch.tensor([[0.7]]), torch.zeros(1, 1).long(), 5)
    assert (final.tolist(), index.tolist(), kept.tolist()) == ([[pytest.approx(0.7)]], [[0]], [[True]])
    equal = one.expand(1, 3, 4)
    _, index, kept = rule(equal, torch.full((1, 3), 0.7), torch.tensor([[0, 1, 0]]), 5)
    assert index[kept].tolist() == [0, 1]


@pytest.mark.parametrize("variant", ["no_nms", "nms", "soft_nms", "soft_nms_low", "config"])
def test_detections_equal_the_official_ones(official: Path, variant: str) -> None:
    """Of Co-DINO, with its NMS and its soft-NMS, from the recorded predictions."""
    folder = official / "co_dino_5scale_r50"
    expected, forward, inputs = (
        load_file(folder / f"{name}.safetensors") for name in ("detections", "forward", "inputs")
    )
    settings = json.loads((folder / "config.json").read_text())["detection_variants"][variant]
    suppression: Suppression | None = None
    if rule := settings.get("nms"):
        iou = rule["iou_threshold"]
        suppression = NMS(iou) if rule["type"] == "nms" else SoftNMS("linear", iou, 0.5, 0.001)
    last = Prediction(forward["cls_logits"][-1], forward["boxes"][-1])
    # The recorded boxes are those of the network's input, divided by a scale that is rounded.
    found = PostProcess(settings["max_per_img"], suppression)(last, inputs["img_shape"])
    for image, one in enumerate(found):
        key, scale = f"{variant}.original.img{image}.", inputs["scale_factor"][image]
        torch.testing.assert_close(one.scores, expected[key + "scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(one.labels, expected[key + "labels"].long())
        torch.testing.assert_close(one.boxes_xyxy / scale, expected[key + "boxes"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("postprocess", ["top_k", "nms", "soft_nms"])
@pytest.mark.parametrize("federated", [False, True])
def test_three_hundred_perfect_detections_have_a_recall_of_one(postprocess: str, federated: bool) -> None:
    """LVIS' line of the README: what is counted is also kept."""
    lvis = [f"postprocess={postprocess}", f"metrics.federated={federated}", "metrics.max_detections=300"]
    config = compose("train", lvis)
    columns, rows = (torch.arange(300) % 20 / 20, torch.arange(300) // 20 / 15)
    boxes = torch.stack([columns + 0.025, rows + 0.03, torch.full((300,), 0.04), torch.full((300,), 0.05)], 1)
    (found,) = instantiate(config.postprocess)(
        Prediction(torch.ones(1, 300, 1), boxes[None]), torch.tensor([[900, 1000]])
    )
    metric = instantiate(config.metrics)(["disc"])
    xyxy = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1).double() * 1000
    xyxy[:, 1::2] *= 0.9
    zeros = torch.zeros(300)
    truth = {"boxes": xyxy, "labels": zeros.long(), "iscrowd": zeros.bool(), "area": zeros + 1800}
    truth |= {"neg_labels": torch.zeros(0).long(), "not_exhaustive_labels": torch.zeros(0).long()} if federated else {}
    metric.update(*inputs([1], [found], [truth]))
    assert float(metric.compute()["mar_300"]) == pytest.approx(1)
