"""A detector with a mask head: masks lie on the file's pixels, also where a canvas surrounds the image."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.transforms import v2

from codetr.data.collate import collate
from codetr.data.datamodule import DetectionDataModule
from codetr.data.dataset import DetectionDataset
from codetr.data.readers import coco
from codetr.data.sampling import Uniform
from codetr.data.transforms import Transform, fit_canvas, transformed
from codetr.evaluation.mean_ap import detection_metric
from codetr.inference import Model
from codetr.inference.outputs import Writer
from codetr.inference.sources import Images
from codetr.instances import with_masks
from codetr.models.detector import Detector
from codetr.postprocess import PostProcess
from codetr.task import DetectionTask
from codetr.types import Detections
from toy_model import detector

CLASSES = ("disc", "ring", "star")
MASKS = ("model/mask_head=refine_mask", "model.detector.mask_head.iou.hidden_width=16")
HEIGHT, WIDTH = 60, 90
CORNERS = [5, 5, 45, 5, 45, 20, 25, 20, 25, 35, 5, 35]  # of a polygon along the sides of pixels
PIPELINES = {"resized": v2.Resize(64, max_size=96), "on a canvas": fit_canvas(96, 114)}


def opened(detector: Detector, transform: Transform, most: int) -> Model:
    """As `codetr.load` makes it of a file."""
    return Model(
        path=Path("toy.ckpt"),
        detector=detector,
        class_names=CLASSES,
        category_ids=tuple(range(len(CLASSES))),
        transform=transform,
        size_divisor=32,
        postprocess=PostProcess(most, None),
        config={},
        step=0,
    )


@pytest.fixture(scope="module")
def model() -> Detector:
    torch.manual_seed(0)
    model = detector(CLASSES, *MASKS).eval()
    for classes in model.mask_head.classes:  # most of a region, not all of it
        classes.weight.data.mul_(0.02)
        torch.nn.init.constant_(classes.bias, 0.2)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 9, 3), np.uint8)
    paths = [folder / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        Image.fromarray(pixels[i]).resize((WIDTH, HEIGHT) if i else (HEIGHT, WIDTH)).save(path)
    return paths


def inside(masks: np.ndarray, boxes: torch.Tensor) -> np.ndarray:
    """[n] bool: no pixel of the mask [H, W, n] has its centre outside of its box."""
    y, x = np.arange(masks.shape[0])[:, None, None] + 0.5, np.arange(masks.shape[1])[:, None] + 0.5
    x0, y0, x1, y1 = boxes.double().numpy().T
    return ~(masks.astype(bool) & ~((x > x0) & (x < x1) & (y > y0) & (y < y1))).any((0, 1))


@pytest.mark.parametrize("name", PIPELINES)
def test_masks_have_the_size_of_the_file_and_lie_in_their_boxes(
    model: Detector, files: list[Path], name: str, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    results = opened(model, PIPELINES[name], 8).predict(files, score_threshold=0.0, batch_size=2)
    with Writer(out, files, pictures=True) as writer:
        for one, size in zip(results, [(90, 60), (60, 90)], strict=True):
            masks = coco_mask.decode(one.detections.rle)
            assert masks.shape == (*size, 8)
            assert masks.any()
            assert inside(masks, one.boxes_xyxy).all()
            assert np.array_equal(one.masks.permute(1, 2, 0), masks)
            writer.add(one)
    records = json.loads((out / "predictions.json").read_text())
    assert len(records) == 16
    for record in records:
        assert list(coco_mask.decode(record["segmentation"]).shape) == record["segmentation"]["size"]
        assert 0 <= record["mask_score"] <= record["score"]


def test_masks_of_weak_detections_are_not_made(model: Detector, files: list[Path]) -> None:
    every = opened(model, PIPELINES["resized"], 9)
    everything, some = (every.predict(files[0], score_threshold=t)[0] for t in (0.0, 2.0))
    best = everything.detections.scores[4].item()
    found = everything.detections.above(best)
    assert len(found.scores) == len(found.rle) == len(found.mask_scores) == 5
    assert some.detections.rle == []
    assert some.masks.shape == (0, 90, 60)


def test_a_canvas_changes_nothing_but_the_padding(model: Detector, files: list[Path]) -> None:
    """A resize to 64 x 96 with a canvas of 96 x 96 below it: the head sees the same places of the same features."""
    path = files[1]
    batches = [collate([Images([path], t)[0][0]], 1) for t in (PIPELINES["on a canvas"], v2.Resize(64))]
    for batch in batches:
        torch.testing.assert_close(batch.frames.file_sizes * batch.frames.scale, torch.tensor([[64.0, 96.0]]))
        assert batch.frames.file_sizes.tolist() == [[HEIGHT, WIDTH]]
    boxes = torch.tensor([[10.0, 5.0, 60.0, 50.0], [30.0, 20.0, 90.0, 60.0]]) * 64 / HEIGHT
    found = [Detections(torch.ones(2), torch.tensor([0, 2]), boxes)]
    canvas = batches[0]
    with torch.no_grad():
        memory = model(canvas.images, canvas.padding).memory
        own, other = (with_masks(model, memory, found, batch.frames)[0] for batch in batches)
    assert own.rle == other.rle
    assert own.rle[0]["size"] == [HEIGHT, WIDTH]
    assert coco_mask.area(own.rle).min() > 0


@pytest.fixture
def painted(tmp_path: Path) -> tuple[Path, Path]:
    """Two images with a polygon each, and a crowd: with run lengths in the first, without anything in the second."""
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    crowd = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    crowd[40:55, 10:70:3] = 1
    runs = coco_mask.encode(crowd)
    runs = {"size": [HEIGHT, WIDTH], "counts": runs["counts"].decode()}
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 9, 3), np.uint8)
        Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH})
        shape = {"segmentation": [CORNERS], "bbox": [5, 5, 40, 30], "iscrowd": 0, "area": 900}
        many = {"segmentation": None if i else runs, "bbox": [10, 40, 60, 15], "iscrowd": 1, "area": 300}
        for one in (many, shape):
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1, **one})
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return tmp_path / "images", tmp_path / "coco.json"


def test_truth_has_the_run_lengths_of_crowds_too(painted: tuple[Path, Path]) -> None:
    dataset = DetectionDataset(*painted, rle=True)
    assert dataset[0].masks is None
    polygon = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    polygon[5:35, 5:25] = polygon[5:20, 25:45] = 1
    for index, area in enumerate((15 * 20, 15 * 60)):
        truth = dataset.truth(index)
        assert truth["iscrowd"].tolist() == [True, False]
        assert coco_mask.area(truth["rle"]).tolist() == [area, 900]
        assert np.array_equal(coco_mask.decode(truth["rle"][1]), polygon)
    dense = DetectionDataset(*painted, masks=True)
    assert "rle" not in dense.truth(0)
    assert torch.equal(dense[0].masks[0], polygon)


def test_validation_reads_run_lengths_where_asked(painted: tuple[Path, Path]) -> None:
    def validation_set(masks: bool) -> DetectionDataset:
        folder, source = painted
        transform: Transform = v2.Identity()
        data = DetectionDataModule(
            root=str(folder.parent),
            train_images=folder.name,
            train_annotations=source.name,
            val_images=folder.name,
            val_annotations=source.name,
            reader=coco.read,
            cache=None,
            train_transform=transform,
            val_transform=transform,
            batch_size=1,
            eval_batch_size=2,
            size_divisor=1,
            num_workers=0,
            seed=0,
            sampling=Uniform,
            aspect_ratio_grouping=False,
            classes=None,
            on_error="stop",
            verify="exists",
            masks=False,
            val_masks=masks,
            prepare=None,
        )
        data.setup("fit")
        return data.val_set

    assert len(validation_set(True).truth(0)["rle"]) == 2
    assert "rle" not in validation_set(False).truth(0)


def test_mask_ap_is_of_the_masks_that_the_head_makes(model: Detector, painted: tuple[Path, Path]) -> None:
    """Truth made of the detector's own masks: mask AP is 1; without masks there is no number."""
    dataset = DetectionDataset(*painted, rle=True)
    batch = collate([transformed(dataset[i], PIPELINES["resized"]) for i in range(2)], 32)
    postprocess, metrics = PostProcess(5, None), partial(detection_metric, CLASSES, max_detections=5)
    task = DetectionTask(model, None, postprocess, metrics, False, None, None, {}, False)
    with torch.no_grad():
        found = task.validation_step(batch, 0)
        assert task.metrics["val/segm"].compute()["map"] < 0.5
        batch.truth = [
            {
                "boxes": torch.zeros(5, 4).double(),
                "labels": one.labels,
                "iscrowd": torch.zeros(5).bool(),
                "area": torch.from_numpy(coco_mask.area(one.rle).astype(float)),
                "rle": one.rle,
            }
            for one in found
        ]
        task.on_validation_epoch_start()
        task.validation_step(batch, 0)
        assert min(coco_mask.area(one.rle).min() for one in found) > 0
        assert task.metrics["val/segm"].compute()["map"] == 1.0
        assert task.metrics["val"].compute()["map"] == 0.0
        task.on_validation_epoch_start()
        batch.truth = [{name: one[name] for name in one if name != "rle"} for one in batch.truth]
        task.validation_step(batch, 0)
        task.metrics["val/segm"].compute()
    assert task.metrics["val/segm"].evaluations["segm"].images == 0
