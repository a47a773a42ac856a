"""In place of torchmetrics' metric: the same input, the same keys, the same values."""

import pickle
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.detection import MeanAveragePrecision as Theirs
from torchvision.ops import box_convert

from codetr.evaluation.mean_ap import MeanAveragePrecision

Sample = tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]
# Their own thresholds are of 32 bits.
PRECISE = {"iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(), "rec_thresholds": np.linspace(0, 1, 101).tolist()}


def batch(seed: int, box_format: str = "xyxy", masks: bool = False) -> Sample:
    """Labels with gaps; an image without objects, one without detections, crowds, given and missing areas."""
    torch.manual_seed(seed)
    preds, target = [], []
    for objects, extra in ((6, 9), (0, 4), (5, 0), (7, 120)):
        corner, size = torch.randint(30, (objects, 2)).double(), torch.randint(8, 60, (objects, 2)).double()
        boxes, labels = torch.cat([corner, corner + size], 1), torch.randint(3, (objects,)) * 7 + 2
        shift = torch.randint(-4, 5, (objects, 4)).double()
        corner = torch.randint(30, (extra, 2)).double()
        found = torch.cat([boxes + shift, torch.cat([corner, corner + 20], 1)])[: None if extra else 0]
        guess = torch.cat([labels, torch.randint(3, (extra,)) * 7 + 2])[: len(found)]
        own = {"labels": labels, "iscrowd": (torch.rand(objects) < 0.2).long()}
        own |= {"area": torch.randint(0, 2, (objects,)) * 500.0} if objects == 6 else {}
        preds.append({"labels": guess, "scores": torch.rand(len(guess)).double(), **boxed(found, box_format, masks)})
        target.append(own | boxed(boxes, box_format, masks))
    return preds, target


def boxed(rows: Tensor, box_format: str, masks: bool) -> dict[str, Tensor]:
    return {"masks": filled(rows)} if masks else {"boxes": box_convert(rows, "xyxy", box_format)}


def filled(boxes: Tensor) -> Tensor:
    y, x = torch.arange(100)[:, None], torch.arange(110)
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def same(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(own) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(own[name].to(value.dtype), value, rtol=0, atol=1e-7)  # theirs are of 32 bits


@pytest.mark.filterwarnings("ignore:Encountered more than")
@pytest.mark.parametrize("class_metrics", [False, True])
@pytest.mark.parametrize(
    ("box_format", "iou_type", "limits"),
    [("xyxy", "bbox", [1, 10, 100]), ("xywh", "bbox", [30, 5, 3]), ("cxcywh", "bbox", [1, 10, 100])],
)
def test_values_are_theirs(box_format: str, iou_type: str, limits: list[int], class_metrics: bool) -> None:
    options = {"box_format": box_format, "iou_type": iou_type, "max_detection_thresholds": limits}
    own = MeanAveragePrecision(**options, class_metrics=class_metrics)
    theirs = Theirs(**options, class_metrics=class_metrics, **PRECISE)
    for seed in range(3):
        for metric in (own, theirs):
            metric.update(*batch(seed, box_format))
    result, expected = own.compute(), theirs.compute()
    if limits[-1] != 100:  # theirs is pycocotools', which looks for 100 by name
        for name in ("map", "map_per_class"):
            assert (expected.pop(name) == -1).all()
            assert (result.pop(name) > 0).all() == (name == "map" or class_metrics)
    same(result, expected)


def test_masks_are_theirs() -> None:
    """Without the images that have no true mask: of those theirs forgets the detections."""
    own, theirs = MeanAveragePrecision(iou_type="segm"), Theirs(iou_type="segm", **PRECISE)
    theirs.warn_on_many_detections = False
    preds, target = batch(1, masks=True)
    for metric in (own, theirs):
        metric.update(preds[:1] + preds[2:], target[:1] + target[2:])
    same(own.compute(), theirs.compute())


def test_it_is_a_metric() -> None:
    metric = MeanAveragePrecision()
    assert isinstance(metric, Metric)
    first = metric(*batch(0))  # the numbers of the batch
    alone = MeanAveragePrecision()
    alone.update(*batch(0))
    same(first, alone.compute())
    metric.update(*batch(1))
    alone.update(*batch(1))
    same(metric.compute(), alone.compute())
    same(pickle.loads(pickle.dumps(metric)).compute(), alone.compute())
    copy = deepcopy(metric)
    metric.reset()
    metric.update(*batch(1))
    assert metric.compute()["map"] != alone.compute()["map"]
    same(copy.compute(), alone.compute())
    together = MetricCollection({"val": MeanAveragePrecision()})
    together.update(*batch(1))
    assert together.compute()["map"] == metric.compute()["map"]
    with pytest.raises(ValueError, match="of 4 images, target is of 3"):
        metric.update(batch(0)[0], batch(0)[1][:3])


def test_nothing_at_all() -> None:
    metric = MeanAveragePrecision(class_metrics=True)
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    metric.update([none | {"scores": torch.zeros(0)}], [none])
    assert metric.compute()["map"] == -1
    assert len(metric.compute()["classes"]) == 0


def process(rank: int, world: int, folder: str) -> None:
    images = [(p, t) for seed in range(3) for p, t in zip(*batch(seed), strict=True)][:11]
    alone = MeanAveragePrecision(class_metrics=True)
    alone.update(*map(list, zip(*images, strict=True)))
    expected = alone.compute()
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    metric = MeanAveragePrecision(class_metrics=True)
    for preds, target in images[rank::world]:
        metric.update([preds], [target])
    found = metric.compute()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    dist.destroy_process_group()


def test_two_processes_with_a_number_of_images_that_does_not_divide(tmp_path: Path) -> None:
    mp.spawn(process, args=(2, str(tmp_path)), nprocs=2)
