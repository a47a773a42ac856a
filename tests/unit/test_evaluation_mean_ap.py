"""In place of torchmetrics' metric: the same input, the same keys, the same values."""

import contextlib
import io
import pickle
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.detection import MeanAveragePrecision as Theirs
from torchvision.ops import box_convert

from codetr.evaluation.mean_ap import MeanAveragePrecision

pytestmark = pytest.mark.filterwarnings("ignore:Encountered more than")
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


def shaped(seed: int) -> Sample:
    """Boxes and masks, without areas; every image has objects and detections."""
    boxes, masks = batch(seed), batch(seed, masks=True)
    both = [[a | b for a, b in zip(*images, strict=True)] for images in zip(boxes, masks, strict=True)]
    for own in both[1]:
        own.pop("area", None)
    return both[0][::3], both[1][::3]


def same(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(own) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(own[name].to(value.dtype), value, rtol=0, atol=1e-7)  # theirs are of 32 bits


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
    preds, target = batch(1, masks=True)
    for metric in (own, theirs):
        metric.update(preds[:1] + preds[2:], target[:1] + target[2:])
    same(own.compute(), theirs.compute())


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize("backend", ["hotcoco", "faster_coco_eval", "pycocotools"])
def test_every_option_at_once_gives_theirs(backend: str, average: str) -> None:
    thresholds = {"iou_thresholds": [0.3, 0.5, 0.6], "rec_thresholds": [0.1, 0.5, 0.75, 0.9]}
    for iou_types in (["bbox"], ["segm"], ["bbox", "segm"]):
        per_class = average == "macro" or len(iou_types) == 1  # else theirs takes the second type for macro
        options = {"class_metrics": per_class, "extended_summary": True, "average": average, **thresholds}
        own = MeanAveragePrecision(iou_type=iou_types, backend=backend, **options)
        theirs = Theirs(iou_type=iou_types, **options)
        for seed in range(2):
            for metric in (own, theirs):
                metric.update(*shaped(seed))
        result, expected = own.compute(), theirs.compute()
        for prefix in ("",) if len(iou_types) == 1 else ("bbox_", "segm_"):
            ious, pairs = result.pop(f"{prefix}ious"), expected.pop(f"{prefix}ious")
            assert set(ious) == set(pairs)
            for pair, value in pairs.items():
                torch.testing.assert_close(ious[pair], torch.as_tensor(value).reshape(ious[pair].shape))
            assert not (result[f"{prefix}map_75"] + 1).any()
        same(result, expected)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_files_hold_what_was_evaluated(iou_type: str, tmp_path: Path) -> None:
    """pycocotools finds the same in them, and read back they are the same; with more masks than a byte can count."""
    metric = MeanAveragePrecision(iou_type=iou_type, backend="pycocotools")
    for seed in range(3):
        metric.update(*batch(seed, masks=iou_type == "segm"))
    metric.compute()
    metric.tm_to_coco(str(tmp_path / "all"))
    files = [str(tmp_path / f"all_{part}.json") for part in ("preds", "target")]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(files[1])
        judge = COCOeval(truth, truth.loadRes(files[0]), iou_type)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert metric.evaluations[iou_type].numbers["map"] == pytest.approx(judge.stats[0], abs=1e-9)
    again = MeanAveragePrecision(box_format="xywh", iou_type=iou_type)
    again.update(*again.coco_to_tm(*files, iou_type=iou_type))
    same(again.compute(), metric.compute())


def test_masks_that_are_missed_count_as_missed() -> None:
    """As in pycocotools. torchmetrics has no number when nothing at all was found."""
    preds = [{"masks": torch.zeros(0), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}]
    target = [{"masks": torch.ones(1, 10, 10), "labels": torch.tensor([4])}]
    metric = MeanAveragePrecision(iou_type="segm")
    metric.update(preds, target)
    assert metric.compute()["map"] == 0
    assert metric.compute()["classes"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box_format": "yxyx"}, "`box_format` to be one of"),
        ({"iou_type": ["bbox", "mask"]}, "`iou_type` to be one of"),
        ({"iou_thresholds": 0.5}, "`iou_thresholds` to either be `None` or a list of floats"),
        ({"rec_thresholds": [1]}, "`rec_thresholds` to either be `None` or a list of floats"),
        ({"max_detection_thresholds": [1, 10]}, "should have length 3"),
        ({"max_detection_thresholds": [1.0, 10, 100]}, "a list of ints"),
        ({"extended_summary": 1}, "`extended_summary` to be a boolean"),
        ({"average": "none"}, "`average` to be one of"),
        ({"backend": "lvis"}, "`backend` to be one of"),
        ({"dist_sync": True}, "Unexpected keyword arguments: `dist_sync`"),
    ],
)
def test_arguments_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanAveragePrecision(**options)


def test_input_is_checked() -> None:
    metric = MeanAveragePrecision()
    (found,), (truth,) = ([one[0]] for one in batch(0))
    with pytest.raises(ValueError, match="sample 1 of `preds`, but got"):
        metric.update([found, found | {"scores": found["scores"][1:]}], [truth, truth])
    with pytest.raises(ValueError, match="all dicts in `target` to contain the `labels` key"):
        metric.update([found], [{"boxes": truth["boxes"]}])
    with pytest.raises(ValueError, match="all boxes in `target` to be of type Tensor"):
        metric.update([found], [truth | {"boxes": truth["boxes"].numpy()}])


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
    together = MetricCollection({"bbox": MeanAveragePrecision(), "segm": MeanAveragePrecision(iou_type="segm")})
    together.update(*shaped(1))
    together.update(*shaped(1))
    assert set(together.compute_groups) == {0, 1}  # not taken for one and the same
    assert together.compute()["bbox_map"] != together.compute()["segm_map"]
    halves = [MeanAveragePrecision(), MeanAveragePrecision()]
    for i, half in enumerate(halves):
        half.update(*batch(i))
    halves[1].merge_state(halves[0])
    same(halves[1].compute(), copy.compute())
    with pytest.raises(ValueError, match="to have the same length, but got 4 and 3"):
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
