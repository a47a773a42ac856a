"""COCO instance annotations and their images as a map-style data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image, Mask

from codetr.data.checks import (
    OnError,
    Report,
    Verify,
    check_annotations,
    check_images,
    check_masks,
    read_coco,
    select_classes,
)
from codetr.data.images import read_image
from codetr.data.sampling import Objects
from codetr.data.segmentations import Segmentations, fault
from codetr.errors import UserError


@dataclass
class Sample:
    """One image with its objects.

    image: [3, H, W] uint8 RGB. boxes: [n, 4] xyxy pixels, inside the image; labels: [n]; masks: [n, H, W] uint8, 1
    on the object, or None where the data set reads none; all without crowds.
    original_size: (height, width) of the image in pixels of the file; file_size: of the file itself. truth: all
    objects, crowds included, in pixels of the file: `boxes` [m, 4] xyxy float64, `labels` [m] int64, `iscrowd` [m]
    bool, `area` [m] float64 as in the file; where the data set reads them, `runs`: m compressed run lengths.
    """

    image: Image
    boxes: BoundingBoxes
    labels: Tensor
    image_id: int
    original_size: tuple[float, float]
    file_size: tuple[int, int]
    truth: dict[str, Any]
    masks: Mask | None = None


class CocoDetection(Dataset[Sample]):
    """Images of the folder `root` with the objects of a COCO instances file, checked on construction.

    Labels are 0, 1, ... in the order of `class_names`: all categories in the order of the file, or `classes`.
    `category_ids` holds the file's id of each label. `report` tells what was dropped (see `codetr.data.checks`).
    The annotations are numpy columns: unlike lists of dicts, they stay shared between worker processes, where
    every touched Python object would be copied. masks, runs: also read the objects' segmentations, for `masks` to
    train with, or for `runs` of the truth.

    Raises UserError for what `codetr.data.checks` lists; UnreadableImage from indexing.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str | Path,
        *,
        classes: Sequence[str] | None = None,
        on_error: OnError = "stop",
        verify: Verify = "complete",
        masks: bool = False,
        runs: bool = False,
    ) -> None:
        self.root, source = Path(root), Path(annotations)
        document = read_coco(source)
        self.report = Report(source)
        names = select_classes(document["categories"], classes, source)
        self.class_names, self.category_ids = tuple(names.values()), tuple(names)
        images = check_images(document["images"], self.root, verify, self.report)
        sizes = {i["id"]: (i["height"], i["width"]) for i in images}
        records, boxes = check_annotations(
            document["annotations"],
            known_images={i.get("id") for i in document["images"]},
            sizes=sizes,
            categories={c["id"] for c in document["categories"]},
            report=self.report,
        )
        if masks or runs:
            records, boxes = check_masks(records, boxes, sizes, self.report)
        self.report.settle(on_error)
        if not images:
            raise UserError(f"{source} names no usable image in {self.root}")
        self._set_images(images)
        self._set_objects(records, boxes)
        self._masks, self._runs = masks, runs
        self._segmentations = self._read_segmentations(records) if masks or runs else None

    def _set_images(self, images: list[dict[str, Any]]) -> None:
        self.image_ids = np.array([i["id"] for i in images], np.int64)
        self.sizes = np.array([(i["height"], i["width"]) for i in images], np.int64).reshape(-1, 2)
        self._files = np.array([i["file_name"] for i in images], np.str_)

    def _set_objects(self, records: list[dict[str, Any]], boxes: np.ndarray) -> None:
        """Sort the objects of the selected classes by image; object j of image i is row offsets[i] + j."""
        label_of = {c: label for label, c in enumerate(self.category_ids)}
        position = {int(image): i for i, image in enumerate(self.image_ids)}
        labels = np.array([label_of.get(r["category_id"], -1) for r in records], np.int64)
        owner = np.array([position[r["image_id"]] for r in records], np.int64)
        # COCO's own default: an object is no crowd, and covers its box.
        crowd = np.array([bool(r.get("iscrowd", 0)) for r in records], bool)
        area = np.array([r.get("area", np.nan) for r in records], np.float64)
        area = np.where(np.isnan(area), np.prod(boxes[:, 2:] - boxes[:, :2], 1), area)
        rows = np.argsort(owner, kind="stable")
        rows = rows[labels[rows] >= 0]
        self._boxes, self._labels, self._crowd, self._area = boxes[rows], labels[rows], crowd[rows], area[rows]
        self._offsets = np.searchsorted(owner[rows], np.arange(len(self.image_ids) + 1))
        self._rows = rows

    def _read_segmentations(self, records: list[dict[str, Any]]) -> Segmentations:
        """Of the objects in their order; a crowd without a usable one covers its box."""
        size_of = {
            int(i): (height, width) for i, (height, width) in zip(self.image_ids, self.sizes.tolist(), strict=True)
        }
        usable = (
            records[row].get("segmentation")
            if not crowd or fault(records[row].get("segmentation"), size_of[records[row]["image_id"]]) is None
            else [[x0, y0, x1, y0, x1, y1, x0, y1]]
            for row, crowd, (x0, y0, x1, y1) in zip(self._rows, self._crowd, self._boxes.tolist(), strict=True)
        )
        return Segmentations(usable)

    @property
    def label_counts(self) -> dict[str, int]:
        """Class name -> number of objects to train on (no crowds)."""
        counts = np.bincount(self._labels[~self._crowd], minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    def objects(self) -> Objects:
        """The labels to train on (no crowds) of all images, for `codetr.data.sampling`."""
        if not self._crowd.any():
            return Objects(self._offsets, self._labels)
        kept = np.concatenate([[0], np.cumsum(~self._crowd)])
        return Objects(kept[self._offsets], self._labels[~self._crowd])

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, index: int) -> Path:
        """The image file of one sample."""
        return self.root / str(self._files[index])

    def truth(self, index: int) -> dict[str, Any]:
        """What the evaluator needs to know of one image (see `Sample`), without reading the image."""
        rows = slice(self._offsets[index], self._offsets[index + 1])
        columns = {"boxes": self._boxes, "labels": self._labels, "iscrowd": self._crowd, "area": self._area}
        truth: dict[str, Any] = {name: torch.tensor(column[rows]) for name, column in columns.items()}
        if self._runs and self._segmentations is not None:
            height, width = map(int, self.sizes[index])
            truth["runs"] = self._segmentations.runs(range(rows.start, rows.stop), (height, width))
        return truth

    def __getitem__(self, index: int) -> Sample:
        height, width = map(int, self.sizes[index])
        image = read_image(self.path(index), (height, width))
        truth = self.truth(index)
        objects = ~truth["iscrowd"]
        boxes = truth["boxes"][objects].float()
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
        return Sample(
            image=Image(image),
            boxes=BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=(height, width)),
            labels=truth["labels"][objects],
            image_id=int(self.image_ids[index]),
            original_size=(height, width),
            file_size=(height, width),
            truth=truth,
            masks=Mask(self._read_masks(index, (height, width))) if self._masks else None,
        )

    def _read_masks(self, index: int, size: tuple[int, int]) -> Tensor:
        assert self._segmentations is not None
        rows = np.arange(self._offsets[index], self._offsets[index + 1])
        return self._segmentations.masks(rows[~self._crowd[rows]], size)
