"""Ignored objects, such as `difficult` ones of VOC: neither found nor missed, and what finds them is no mistake."""

from __future__ import annotations

import pytest
import torch
from pycocotools.cocoeval import COCOeval
from test_evaluation import KEYS, NAMES, evaluate, image, reference

from codetr.types import Detections


class Ignoring(COCOeval):
    """pycocotools takes the flag from `iscrowd` alone, after a line that would take it from the object."""

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for one in objects:
                one["ignore"] = int(one["iscrowd"] or one["ignored"])


@pytest.mark.parametrize("backend", ["hotcoco", "faster_coco_eval", "pycocotools"])
def test_random_cases(backend: str) -> None:
    torch.manual_seed(3)
    images = {i: image(12, 20, crowds=0.1) for i in range(8)}
    for _, truth in images.values():
        truth["ignore"] = torch.rand(12) < 0.3
    evaluation = evaluate(images, backend)
    found = [evaluation.numbers[key] for key in KEYS]
    assert found == pytest.approx(reference(images, judge=Ignoring).stats.tolist(), abs=1e-9)
    for _, truth in images.values():
        del truth["ignore"]
    assert evaluation.numbers["map"] != pytest.approx(evaluate(images).numbers["map"], abs=1e-3)


def test_found_or_missed_is_the_same() -> None:
    """One object is found; of two ignored ones, one is found with a higher score."""
    boxes = torch.tensor([[0.0, 0, 50, 50], [100, 0, 180, 60], [0, 100, 40, 150]])
    labels = torch.zeros(3, dtype=torch.long)
    truth = {"boxes": boxes, "labels": labels, "iscrowd": labels, "area": torch.tensor([2500.0, 4800, 2000])}
    truth["ignore"] = torch.tensor([False, True, True])
    found = Detections(torch.tensor([0.5, 0.9]), labels[:2], boxes[:2])
    evaluation = evaluate({1: (found, truth)})
    assert evaluation.numbers["map"] == pytest.approx(1)
    assert evaluation.numbers["mar_100"] == 1
    assert evaluation.objects_per_class[NAMES[0]] == 1
