"""Ignored objects, such as `difficult` ones of VOC: neither found nor missed, and what finds them is no mistake."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_evaluation import KEYS, NAMES, Image, evaluate, image, xywh

from codetr.types import Detections


class Ignoring(COCOeval):
    """pycocotools takes the flag from `iscrowd` alone, after a line that would take it from the object."""

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for one in objects:
                one["ignore"] = int(one["iscrowd"] or one["difficult"])


def reference(images: dict[int, Image]) -> list[float]:
    annotations, results = [], []
    for i, (found, truth) in images.items():
        flags = zip(truth["labels"], truth["iscrowd"], truth["area"], truth["ignore"], strict=True)
        for box, (label, crowd, area, ignore) in zip(xywh(truth["boxes"]), flags, strict=True):
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": int(label), "bbox": box.tolist()}
            annotations.append(entry | {"iscrowd": int(crowd), "area": float(area), "difficult": bool(ignore)})
        for box, label, score in zip(xywh(found.boxes_xyxy), found.labels, found.scores, strict=True):
            entry = {"image_id": i, "category_id": int(label), "bbox": box.tolist(), "score": float(score)}
            results.append(entry | {"area": float(box[2] * box[3]), "iscrowd": 0, "id": len(results) + 1})
    truth, found = COCO(), COCO()
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    for coco, entries in ((truth, annotations), (found, results)):
        coco.dataset = {"images": [{"id": i} for i in images], "annotations": entries, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        result = Ignoring(truth, found, "bbox")
        result.evaluate()
        result.accumulate()
        result.summarize()
    return result.stats.tolist()


@pytest.mark.parametrize("backend", ["hotcoco", "faster_coco_eval", "pycocotools"])
def test_random_cases(backend: str) -> None:
    torch.manual_seed(3)
    images = {i: image(12, 20, crowds=0.1) for i in range(8)}
    for _, truth in images.values():
        truth["ignore"] = torch.rand(12) < 0.3
    metrics = evaluate(images, backend)
    assert metrics.evaluation is not None
    found = [metrics.evaluation.numbers[key] for key in KEYS]
    assert found == pytest.approx(reference(images), abs=1e-9)
    for _, truth in images.values():
        del truth["ignore"]
    assert metrics.evaluation.numbers["map"] != pytest.approx(evaluate(images).compute()["map"], abs=1e-3)


def test_found_or_missed_is_the_same() -> None:
    """One object is found; of two ignored ones, one is found with a higher score."""
    boxes = torch.tensor([[0.0, 0, 50, 50], [100, 0, 180, 60], [0, 100, 40, 150]])
    labels = torch.zeros(3, dtype=torch.long)
    truth = {"boxes": boxes, "labels": labels, "iscrowd": labels, "area": torch.tensor([2500.0, 4800, 2000])}
    truth["ignore"] = torch.tensor([False, True, True])
    found = Detections(torch.tensor([0.5, 0.9]), labels[:2], boxes[:2])
    metrics = evaluate({1: (found, truth)})
    assert metrics.evaluation is not None
    assert metrics.evaluation.numbers["map"] == pytest.approx(1)
    assert metrics.evaluation.numbers["mar_100"] == 1
    assert metrics.evaluation.objects_per_class[NAMES[0]] == 1
