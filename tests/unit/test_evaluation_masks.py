"""Mask AP against pycocotools itself."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from codetr.data.segmentations import encode
from codetr.evaluation.inputs import inputs
from codetr.evaluation.mean_ap import detection_metric
from codetr.evaluation.summary import Evaluation
from codetr.types import Detections

NAMES = ["ant", "bee", "cat", "yak"]
KEYS = [
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
]
Image = tuple[Detections, dict]


def blobs(count: int, height: int, width: int) -> Tensor:
    """[count, height, width] bool: ellipses with holes, some of them empty."""
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    centre = torch.rand(count, 2, 1, 1) * torch.tensor([height, width])[:, None, None]
    radius = torch.exp(torch.rand(count, 2, 1, 1) * 3 + 1)
    inside = ((y - centre[:, 0]) / radius[:, 0]) ** 2 + ((x - centre[:, 1]) / radius[:, 1]) ** 2 < 1
    return inside & (torch.rand(count, height, width) < 0.95)


def image(objects: int, extra: int, crowds: float) -> Image:
    """Detections are the objects moved by a pixel or two, and others; boxes and their scores say nothing."""
    height, width = torch.randint(60, 150, (2,)).tolist()
    masks, labels = blobs(objects, height, width), torch.randint(3, (objects,))
    moved = [mask.roll(torch.randint(-2, 3, (2,)).tolist(), (0, 1)) for mask in masks]
    found = torch.cat([*(one[None] for one in moved), blobs(extra, height, width)])
    truth = {
        "boxes": torch.rand(objects, 4),
        "labels": labels,
        "iscrowd": torch.rand(objects) < crowds,
        "area": masks.sum((1, 2)) * (0.5 + torch.rand(objects)),
        "rle": encode(masks),
    }
    count = objects + extra
    guess = torch.cat([labels, torch.randint(3, (extra,))])
    return Detections(torch.rand(count), guess, torch.rand(count, 4), encode(found), torch.rand(count)), truth


def reference(images: dict[int, Image]) -> COCOeval:
    annotations, results, sizes = [], [], []
    for i, (found, truth) in images.items():
        size = next((r["size"] for r in [*truth["rle"], *found.rle]), (1, 1))
        sizes.append({"id": i, "height": size[0], "width": size[1]})
        columns = (truth["rle"], truth["labels"].tolist(), truth["iscrowd"].tolist(), truth["area"].tolist())
        for runs, label, crowd, area in zip(*columns, strict=True):
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": label, "segmentation": runs}
            annotations.append(entry | {"iscrowd": int(crowd), "area": area})
        for runs, label, score in zip(found.rle, found.labels.tolist(), found.mask_scores.tolist(), strict=True):
            results.append({"image_id": i, "category_id": label, "segmentation": runs, "score": score})
    truth = COCO()
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    truth.dataset = {"info": {}, "images": sizes, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        result = COCOeval(truth, truth.loadRes(results), "segm")
        result.evaluate()
        result.accumulate()
        result.summarize()
    return result


def scenario(crowds: float) -> dict[int, Image]:
    """Some with no truth, one with no detection; ids are not in order."""
    torch.manual_seed(0)
    shapes = [(8, 12), (0, 5), (6, 0), (12, 20), (3, 3), (0, 0)]
    images = {(7 * i + 3) % 31: image(*shape, crowds) for i, shape in enumerate(shapes)}
    found, truth = images[17]
    images[17] = found.above(2.0), truth
    return images


def evaluate(images: dict[int, Image], backend: str = "hotcoco") -> Evaluation:
    metric = detection_metric(NAMES, 100, backend, iou_type="segm")
    for i, (found, truth) in images.items():
        metric.update(*inputs([i], [found], [truth], masks=True))
    metric.compute()
    return metric.evaluations["segm"]


@pytest.mark.parametrize("backend", ["hotcoco", "faster_coco_eval", "pycocotools"])
@pytest.mark.parametrize("crowds", [0.0, 0.4])
def test_the_numbers_are_those_of_pycocotools(crowds: float, backend: str) -> None:
    images = scenario(crowds)
    own = evaluate(images, backend)
    expected = reference(images)
    assert own.numbers == pytest.approx(dict(zip(KEYS, expected.stats.tolist(), strict=True)), abs=1e-9)
    np.testing.assert_allclose(own.precision, expected.eval["precision"][..., 0, -1], atol=1e-12)
    assert 0.05 < own.numbers["map"] < 0.9
    assert own.map_per_class["yak"] == -1


def test_perfect_masks_are_perfect_whatever_their_boxes() -> None:
    images = {}
    for i in range(4):
        _, truth = image(5, 0, 0.0)
        found = Detections(torch.zeros(5), truth["labels"], torch.zeros(5, 4), truth["rle"], torch.rand(5))
        images[i] = found, truth
    numbers = evaluate(images).numbers
    assert numbers["map"] == numbers["mar_100"] == 1.0


def test_run_lengths_hold_every_pixel() -> None:
    masks = torch.rand(5, 7, 11) < 0.5
    masks[3] = False
    decoded = coco_mask.decode(encode(masks))
    assert torch.equal(torch.from_numpy(decoded).permute(2, 0, 1).bool(), masks)
    assert encode(masks[:0]) == []
    assert all(type(one["counts"]) is str and list(one["size"]) == [7, 11] for one in encode(masks))
