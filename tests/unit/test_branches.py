"""Every auxiliary head evaluated on its own: in pixels of the original image, and against its own truth."""

from functools import partial

import pytest
import torch
from torch import Tensor

from codetr.callbacks.report import branches_table
from codetr.errors import UserError
from codetr.evaluation.mean_ap import detection_metric
from codetr.models.detector import Detector
from codetr.postprocess import PostProcess
from codetr.task import DetectionTask
from codetr.types import Batch, Frames, Targets
from toy_model import detector

CLASSES = ("disc", "ring", "star")
METRICS = partial(detection_metric, CLASSES)
HEADS = ["faster_rcnn", "atss", "retinanet", "fcos", "gfl", "paa", "mask_rcnn"]
FRAMES = Frames(
    sizes=torch.tensor([[64, 96], [96, 64]]),
    scale=torch.tensor([[0.5, 0.5], [2.0, 2.0]]),
    file_sizes=torch.tensor([[128, 192], [48, 32]]),
)
NETWORK = FRAMES.sizes


@pytest.fixture(scope="module")
def model() -> Detector:
    torch.manual_seed(0)
    heads_given = ["faster_rcnn_small", *HEADS[1:-1], "mask_rcnn_small"]
    return detector(CLASSES, f"model/auxiliary_head=[{','.join(heads_given)}]").eval()


@pytest.fixture(scope="module")
def batch() -> Batch:
    torch.manual_seed(1)
    rows, columns = torch.arange(96), torch.arange(96)
    padding = (rows >= NETWORK[:, :1])[:, :, None] | (columns >= NETWORK[:, 1:])[:, None]
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    nothing = Targets(torch.full((2, 1, 4), 0.5), torch.zeros(2, 1).long(), torch.zeros(2, 1).bool(), FRAMES)
    return Batch(images, padding, nothing, torch.tensor([3, 8]), [{}, {}])


def found_by(model: Detector, batch: Batch, name: str) -> list[Tensor]:
    """Straight from the head, in pixels of the network."""
    with torch.no_grad():
        pyramid = model.adapter(model.encode(batch.images, batch.padding))
        return [found.boxes_xyxy for found in model.heads[name].detect(pyramid, NETWORK)]


@pytest.mark.parametrize("name", HEADS)
def test_boxes_are_those_of_the_head_in_pixels_of_the_file(model: Detector, batch: Batch, name: str) -> None:
    memory = model.encode(batch.images, batch.padding)
    found = FRAMES.to_files(model.detect_with_heads(memory, NETWORK)[name])
    for image, factor in enumerate((2.0, 0.5)):
        assert len(found[image].scores) > 3
        torch.testing.assert_close(found[image].boxes_xyxy, found_by(model, batch, name)[image] * factor)
        assert (found[image].scores[:-1] >= found[image].scores[1:]).all()


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_perfect_when_its_own_detections_are_the_truth(model: Detector, batch: Batch, name: str) -> None:
    memory = model.encode(batch.images, batch.padding)
    truth = []
    for found in FRAMES.to_files(model.detect_with_heads(memory, NETWORK)[name]):
        boxes, labels = found.boxes_xyxy, found.labels
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        truth.append({"boxes": boxes, "labels": labels, "iscrowd": torch.zeros(len(labels)), "area": area})
    task = DetectionTask(model, None, PostProcess(100, None), METRICS, True, partial(print), None, {}, False)
    batch.truth = truth
    task.on_validation_epoch_start()
    with torch.no_grad():
        task.validation_step(batch, 0)
    for metric in task.metrics.values():
        metric.compute()
    evaluations = {name: metric.evaluations["bbox"] for name, metric in task.metrics.items()}
    assert set(evaluations) == {"val", *(f"val/branch/{head}" for head in HEADS)}
    assert evaluations[f"val/branch/{name}"].numbers["map"] == pytest.approx(1.0)
    main = evaluations.pop("val")
    assert main.numbers["map"] < 0.9
    table = branches_table(main, {name: own.numbers for name, own in evaluations.items()})
    assert list(table.columns[0].cells) == ["decoder", *evaluations]


@pytest.mark.parametrize(
    ("kept", "evaluate_heads", "key"), [(100, False, "postprocess"), (300, True, "model.detector.heads.")]
)
def test_what_is_counted_must_be_kept(model: Detector, kept: int, evaluate_heads: bool, key: str) -> None:
    metrics = partial(METRICS, max_detections=300)
    with pytest.raises(UserError, match=rf"metrics\.max_detections=300 counts more .* {key}.*max_detections=\d+ keeps"):
        DetectionTask(model, None, PostProcess(kept, None), metrics, evaluate_heads, partial(print), None, {}, False)


def test_off_by_default(model: Detector) -> None:
    task = DetectionTask(model, None, PostProcess(100, None), METRICS, False, partial(print), None, {}, False)
    assert list(task.metrics) == ["val"]
