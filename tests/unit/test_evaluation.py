"""The evaluator against pycocotools itself, and against itself on several processes."""

import contextlib
import io
import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from codetr.evaluation.inputs import inputs
from codetr.evaluation.mean_ap import MeanAveragePrecision, detection_metric
from codetr.evaluation.summary import Evaluation
from codetr.types import Detections

NAMES = ["ant", "bee", "cat", "dog", "elk"]
KEYS = [
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
]
Image = tuple[Detections, dict[str, Tensor]]


def image(objects: int, extra: int, crowds: float = 0.0, classes: int = 4, ties: bool = False) -> Image:
    """Random objects of all sizes; detections are jittered copies of them and `extra` random boxes."""
    corner, size = torch.rand(objects, 2) * 400, torch.exp(torch.rand(objects, 2) * 4 + 1.5)
    boxes = torch.cat([corner, corner + size], 1)
    labels = torch.randint(classes, (objects,))
    area = size.prod(1) * (0.5 + torch.rand(objects) / 2)
    truth = {"boxes": boxes, "labels": labels, "iscrowd": (torch.rand(objects) < crowds).long(), "area": area}
    jitter = boxes + size.repeat(1, 2) * torch.randn(objects, 4) * 0.08
    corner = torch.rand(extra, 2) * 400
    found = torch.cat([jitter, torch.cat([corner, corner + 5 + torch.rand(extra, 2) * 200], 1)])
    scores = torch.rand(objects + extra)
    guess = torch.where(torch.rand(objects) < 0.8, labels, torch.randint(classes, (objects,)))
    return (
        Detections(
            (scores * 5).round() / 5 if ties else scores, torch.cat([guess, torch.randint(classes, (extra,))]), found
        ),
        truth,
    )


def nothing() -> tuple[Detections, dict[str, Tensor]]:
    none, no_boxes, no_labels = torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    truth = {"boxes": no_boxes, "labels": no_labels, "iscrowd": no_labels, "area": none}
    return Detections(none, no_labels, no_boxes), truth


def scenario(name: str) -> dict[int, Image]:
    """Images by id; ids are neither dense nor in order."""
    empty_detections, empty_truth = nothing()
    full = [image(12, 20) for _ in range(8)]
    images = {
        "random": full,
        "crowds": [image(12, 20, crowds=0.4) for _ in range(8)],
        "only crowds": [image(6, 6, crowds=1.1) for _ in range(3)],
        "tied scores": [image(12, 30, ties=True) for _ in range(8)],
        "more than a hundred": [image(60, 150, classes=1), image(30, 200, classes=1), image(5, 120, classes=2)],
        "empty images": [*full[:3], (empty_detections, full[3][1]), (full[4][0], empty_truth), nothing()],
        "one class": [image(9, 9, classes=1) for _ in range(4)],
        "thresholds": [shifted(step) for step in range(10)],
        "area of zero": [(d, {**t, "area": t["area"] * (t["labels"] > 0)}) for d, t in full],
        "no detections": [(empty_detections, t) for _, t in full],
        "no truth": [(d, empty_truth) for d, _ in full],
        "nothing": [nothing(), nothing()],
    }[name]
    return {(7 * i + 3) % 31 * 1000: one for i, one in enumerate(images)}


def shifted(step: int) -> Image:
    """A detection whose IoU lies on a threshold exactly, and sizes on the borders of the area ranges."""
    side = (32.0, 96.0, 100.0)[step % 3]
    box = torch.tensor([[0.0, 0.0, side, side]])
    found = torch.tensor([[0.0, 0.0, side, side * (0.5 + 0.05 * step)]])
    label = torch.tensor([step % 2])
    truth = {"boxes": box, "labels": label, "iscrowd": torch.zeros(1).long(), "area": torch.tensor([side**2])}
    return Detections(torch.tensor([0.5]), label, found), truth


def evaluate(
    images: dict[int, Image],
    backend: str = "hotcoco",
    limit: int = 100,
    iou_type: str = "bbox",
    federated: bool = False,
) -> Evaluation:
    metric = detection_metric(NAMES, limit, backend, federated, iou_type)
    ids = list(images)
    for some in (ids[:2], ids[2:]):
        update(metric, {i: images[i] for i in some})
    metric.compute()
    return metric.evaluations[iou_type]


def update(metric: MeanAveragePrecision, images: dict[int, Image]) -> None:
    found, truth = [found for found, _ in images.values()], [truth for _, truth in images.values()]
    metric.update(*inputs(list(images), found, truth, masks="segm" in metric.iou_types))


def xywh(boxes: Tensor) -> np.ndarray:
    x0, y0, x1, y1 = boxes.double().numpy().T
    return np.stack([x0, y0, x1 - x0, y1 - y0], 1)


def reference(images: dict[int, Image], limit: int = 100, judge: type[COCOeval] = COCOeval) -> COCOeval:
    """judge: pycocotools' own class, or one that also sees what an object has under `ignored`."""
    annotations, results = [], []
    for i, (found, truth) in images.items():
        ignored = truth.get("ignore", torch.zeros_like(truth["iscrowd"]))
        columns = zip(xywh(truth["boxes"]), truth["labels"], truth["iscrowd"], truth["area"], ignored, strict=True)
        for box, label, crowd, area, ignore in columns:
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": int(label), "bbox": box.tolist()}
            annotations.append(entry | {"iscrowd": int(crowd), "area": float(area), "ignored": bool(ignore)})
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
        result = judge(truth, found, "bbox")
        result.params.maxDets = [1, 10, limit]
        result.evaluate()
        result.accumulate()
        result.summarize()
    return result


SCENARIOS = [
    *("random", "crowds", "only crowds", "tied scores", "more than a hundred", "empty images", "one class"),
    *("thresholds", "area of zero", "no detections", "no truth", "nothing"),
]


@pytest.mark.parametrize("backend", ["hotcoco", "faster_coco_eval", "pycocotools"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_twelve_numbers_are_those_of_pycocotools(name: str, backend: str) -> None:
    images = scenario(name)
    numbers = evaluate(images, backend).numbers
    expected = dict(zip(KEYS, reference(images).stats.tolist(), strict=True))
    assert numbers == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["random", "crowds", "empty images", "only crowds"])
def test_curves_and_classes_are_those_of_pycocotools(name: str) -> None:
    images = scenario(name)
    evaluation = evaluate(images)
    expected = reference(images).eval
    np.testing.assert_allclose(evaluation.precision, expected["precision"][..., 0, -1], atol=1e-12)
    np.testing.assert_allclose(evaluation.recall, expected["recall"][..., 0, -1], atol=1e-12)
    for k, one in enumerate(NAMES):
        precision = expected["precision"][:, :, k, 0, -1]
        ap = precision[precision > -1].mean() if (precision > -1).any() else -1
        assert math.isclose(evaluation.map_per_class[one], ap, abs_tol=1e-12)
        count = sum(int(((t["labels"] == k) & (t["iscrowd"] == 0)).sum()) for _, t in images.values())
        assert evaluation.objects_per_class[one] == count
    assert evaluation.map_per_class["elk"] == -1  # a class that never occurs
    assert evaluation.images == len(images)


def test_more_detections_per_image_than_coco_counts() -> None:
    images = scenario("more than a hundred")
    numbers = evaluate(images, limit=150).numbers
    precision = reference(images, limit=150).eval["precision"][..., 0, -1]
    assert math.isclose(numbers["map"], precision[precision > -1].mean(), abs_tol=1e-9)
    assert numbers["mar_150"] > evaluate(images).numbers["mar_100"]


def test_update_keeps_one_record_per_image_and_reset_forgets() -> None:
    images = scenario("random")
    metric = detection_metric(NAMES)
    update(metric, images)
    first = next(iter(images))
    update(metric, {first: images[first]})
    metric.compute()
    assert metric.evaluations["bbox"].numbers == evaluate(images).numbers
    metric.reset()
    metric.update([], [])
    metric.compute()
    assert set(metric.evaluations["bbox"].numbers.values()) == {-1.0}
    assert metric.evaluations["bbox"].images == 0


def shards(images: dict[int, Image], world: int, hungry: bool) -> list[dict[int, Image]]:
    """Split as a distributed sampler does: padded with repeated images. hungry: the last process has nothing."""
    ids, workers = list(images), world - hungry
    padded = ids + ids[: -len(ids) % workers]
    return [{i: images[i] for i in padded[rank::workers]} for rank in range(workers)] + [{}] * hungry


def same(a: Evaluation, b: Evaluation) -> bool:
    pairs = [(a.precision, b.precision), (a.recall, b.recall), (a.confusion, b.confusion)]
    rest = ("numbers", "map_per_class", "objects_per_class", "images")
    return all(np.array_equal(*pair) for pair in pairs) and all(getattr(a, n) == getattr(b, n) for n in rest)


def rectangles(boxes: Tensor) -> list[dict]:
    return coco_mask.frPyObjects(xywh(boxes), 500, 700) if len(boxes) else []


def process(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    names = ["crowds", "tied scores", "empty images", "nothing", "random", "random"]
    kinds = [{}, {}, {}, {}, {"iou_type": "segm"}, {"federated": True}]
    cases = [scenario(name) for name in names]
    for found, truth in (*cases[4].values(), *cases[5].values()):
        found.rle, truth["rle"] = rectangles(found.boxes_xyxy), rectangles(truth["boxes"])
        truth |= {"neg_labels": found.labels[:2], "not_exhaustive_labels": truth["labels"][:1]}
    alone = [evaluate(images, **kind) for images, kind in zip(cases, kinds, strict=True)]
    assert min(one.numbers["map"] for one in alone if one.precision.max() > 0) > 0.01
    for world in (3, 2):
        if rank >= world:
            return
        store = f"file://{folder}/store_{world}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        for name, images, kind, expected in zip(names, cases, kinds, alone, strict=True):
            for hungry in (False, True):
                part = shards(images, world, hungry)[rank]
                found = evaluate(part, **kind)
                assert same(found, expected), f"{name}: {world} processes, rank {rank}, hungry: {hungry}"
        dist.destroy_process_group()


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    mp.spawn(process, args=(str(tmp_path),), nprocs=3)
