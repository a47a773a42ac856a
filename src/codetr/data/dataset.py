"""Annotated images as a map-style data set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image, Mask

from codetr.data.cache import open_table
from codetr.data.checks import Verify, check_files, select_classes
from codetr.data.findings import OnError
from codetr.data.image_records import take_lists
from codetr.data.images import decoded_factor, read_image
from codetr.data.readers import Reader, coco
from codetr.data.sampling import Objects, classes_of_images
from codetr.data.segmentations import Segmentations
from codetr.errors import UserError
from codetr.types import Truth

_CHUNK = 1 << 20  # objects


@dataclass
class Sample:
    """One image with its objects.

    image: [3, H, W] uint8 RGB.
    boxes: [n, 4] xyxy pixels, inside the image, of the objects to train on: no crowds, none ignored.
    labels: [n], of the same.
    image_id: the image's id in the annotations.
    scale: (rows, columns) pixels of the image per pixel of the file. A data set may decode a half, a quarter or an
        eighth, rounded up, of the rows and columns; boxes and masks are then still of the file.
    file_size: (height, width) of the file.
    truth: of all objects, crowds included.
    masks: [n, H, W] uint8, 1 on the object; None where the data set reads none.
    pixels: [3, h, w] uint8, the image as its file has it, where it is wanted.
    """

    image: Image
    boxes: BoundingBoxes
    labels: Tensor
    image_id: int
    scale: tuple[float, float]
    file_size: tuple[int, int]
    truth: Truth
    masks: Mask | None = None
    pixels: Tensor | None = None


def without_slivers(sample: Sample, boxes: Tensor) -> Sample:
    """`sample` with `boxes`, [n, 4] xyxy, without the objects that kept less than a pixel of width or height."""
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    labels, masks = sample.labels, sample.masks
    if not kept.all():
        boxes, labels = boxes[kept], labels[kept]
        masks = masks if masks is None else Mask(masks.as_subclass(Tensor)[kept])
    height, width = sample.image.shape[-2:]
    return replace(sample, boxes=xyxy_boxes(boxes, (height, width)), labels=labels, masks=masks)


def xyxy_boxes(boxes: Tensor, size: tuple[int, int]) -> BoundingBoxes:
    """[n, 4] in pixels of an image of (height, width) `size`."""
    return BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=size)


class DetectionDataset(Dataset[Sample]):
    """Images of the folder `root` with the objects of an annotation file, checked on construction.

    reader: turns the file into COCO's records (see `codetr.data.readers`).
    classes: names of the classes, whose labels are 0, 1, ...; None: all categories in the order of the file.
    absent: classes of which the file knows nothing may be among `classes`, if not all.
    on_error, verify: see `codetr.data.checks`.
    masks, rle: also read the objects' segmentations, for `masks` to train with, or for `rle` of the truth.
    cache: where tables are kept (see `codetr.data.cache`).
    max_pixels: of an image; larger ones are not decoded.

    `class_names` are in the order of the labels, `category_ids` the file's ids of them, -1 where it has none. `report`
    tells what was dropped (see `codetr.data.rules`).

    It is a view of a `Table`, and holds nothing else that grows with the number of objects: processes share it.
    Whether image files are there is asked anew every time, one listing per folder.

    Raises UserError for what `codetr.data.checks` lists; UnreadableImage from indexing.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str | Path,
        *,
        reader: Reader = coco.read,
        classes: Sequence[str] | None = None,
        absent: bool = False,
        on_error: OnError = "stop",
        verify: Verify = "complete",
        masks: bool = False,
        rle: bool = False,
        cache: str | Path | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.max_pixels = max_pixels
        self.root, source = Path(root), Path(annotations)
        folder = Path(cache) if cache else None
        self._table, self.report = open_table(source, reader, masks=masks or rle, cache=folder)
        self._masks, self._rle = masks, rle
        self._select(classes, source, absent)
        usable, found = check_files(self._table, self.root, verify, self.report, max_pixels)
        self._misspelt = np.array(sorted(found), np.int64)
        self._spellings = np.array([os.fsencode(found[row]) for row in sorted(found)], np.bytes_)
        self.report.raise_or_log(on_error)
        if not usable.any():
            raise UserError(f"{source} names no usable image in {self.root}")
        self._images = None if usable.all() else usable.nonzero()[0]

    def _select(self, classes: Sequence[str] | None, source: Path, absent: bool) -> None:
        """The classes are a view: label_of[position of a category] is its label, or -1."""
        table = self._table
        ids = table.category_ids.tolist()
        categories = [{"id": i, "name": n} for i, n in zip(ids, table.category_names, strict=True)]
        there = [c for c in classes if c in table.category_names] if classes is not None and absent else classes
        if classes and not there:
            raise UserError(f"{source} has none of the classes {list(classes)}, only {list(table.category_names)}")
        id_of = {name: i for i, name in select_classes(categories, there, source).items()}
        self.class_names = tuple(id_of if classes is None else classes)
        self.category_ids = tuple(id_of.get(name, -1) for name in self.class_names)
        self._positions = np.array([ids.index(i) if i in ids else -1 for i in self.category_ids], np.int64)
        self._label_of = np.full(len(ids), -1, np.int64)
        self._label_of[self._positions[self._positions >= 0]] = (self._positions >= 0).nonzero()[0]

    @property
    def image_ids(self) -> np.ndarray:
        """[n] int64."""
        return self._of_images(self._table.image_ids)

    @property
    def sizes(self) -> np.ndarray:
        """[n, 2] int32 (height, width)."""
        return self._of_images(self._table.sizes)

    def _of_images(self, column: np.ndarray) -> np.ndarray:
        return column if self._images is None else column[self._images]

    def _row(self, index: int) -> int:
        """The image's place in the table. Raises IndexError."""
        return range(len(self._table))[index] if self._images is None else int(self._images[index])

    @property
    def frequencies(self) -> tuple[str, ...] | None:
        """r, c or f (rare, common, frequent) of each class, where the file tells, as LVIS does."""
        letters = self._table.frequencies
        return letters and tuple(letters[i] if i >= 0 else "f" for i in self._positions)

    @property
    def label_counts(self) -> dict[str, int]:
        """Class name -> number of objects to train on (no crowds, none ignored)."""
        if self._images is None:
            counts = self._counts_of_classes(self._table.counts)
        else:
            counts = np.bincount(self.objects().labels, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    def _counts_of_classes(self, counts: np.ndarray) -> np.ndarray:
        return np.where(self._positions >= 0, counts[self._positions], 0)

    @property
    def others(self) -> dict[str, int]:
        """Name -> number of objects of the categories that are none of the classes."""
        rest = (self._label_of < 0).nonzero()[0].tolist()
        return {self._table.category_names[i]: int(self._table.counts[i]) for i in rest}

    @property
    def image_counts(self) -> dict[str, int]:
        """Class name -> number of images with such an object; LVIS' `image_count`."""
        if self._images is None:
            counts = self._counts_of_classes(self._table.image_counts)
        else:
            _, classes = classes_of_images(*self.objects())
            counts = np.bincount(classes, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    @property
    def fingerprint(self) -> str:
        """A digest of the images and objects in their order, the same only for the same set; pixels do not count."""
        table, digest = self._table, hashlib.blake2b(digest_size=16)
        columns = [table.image_ids, table.sizes, table.names, table.offsets, table.boxes, table.crowd, table.ignore]
        columns += [] if self._images is None else [self._images]
        chunks = range(0, len(table.categories), _CHUNK)
        for column in (*columns, *(self._label_of[table.categories[i : i + _CHUNK]] for i in chunks)):
            digest.update(f"{column.shape}".encode())
            digest.update(np.ascontiguousarray(column).view(np.uint8).data)
        return digest.hexdigest()

    def objects(self) -> Objects:
        """The labels to train on (no crowds, none ignored) of all images, for `codetr.data.sampling`."""
        table = self._table
        labels = self._label_of[table.categories]
        labels[table.crowd | table.ignore] = -1
        offsets = table.offsets
        if self._images is not None:
            labels, offsets = take_lists(labels, offsets, self._images)
        kept = np.concatenate([[0], np.cumsum(labels >= 0)])
        return Objects(kept[offsets], labels[labels >= 0])

    def __len__(self) -> int:
        return len(self._table) if self._images is None else len(self._images)

    def path(self, index: int) -> Path:
        """The image file of one sample."""
        row = self._row(index)
        if len(self._misspelt):
            place = int(np.searchsorted(self._misspelt, row))
            if place < len(self._misspelt) and self._misspelt[place] == row:
                return self.root / os.fsdecode(self._spellings[place])
        return self.root / self._table.name(row)

    def truth(self, index: int) -> Truth:
        """What the evaluator needs to know of one image, without reading the image."""
        image = self._row(index)
        return self._truth(image, self._objects_of(image))

    def _truth(self, image: int, rows: np.ndarray) -> Truth:
        """Of the objects `rows` of the image in row `image` of the table."""
        table = self._table
        truth = Truth(
            boxes=torch.from_numpy(table.boxes[rows]),
            labels=torch.from_numpy(self._label_of[table.categories[rows]]),
            iscrowd=torch.from_numpy(table.crowd[rows]),
            area=torch.from_numpy(table.areas[rows]),
            ignore=torch.from_numpy(table.ignore[rows]),
        )
        if self._rle:
            height, width = table.sizes[image].tolist()
            truth["rle"] = self._segmentations.rle(rows, (height, width))
        if table.is_federated:
            truth["neg_labels"] = self._listed(image, table.negative, table.negative_offsets)
            truth["not_exhaustive_labels"] = self._listed(image, table.not_exhaustive, table.not_exhaustive_offsets)
        return truth

    def _objects_of(self, image: int) -> np.ndarray:
        """The rows of an image's objects in the table, of the selected classes."""
        start, end = self._table.offsets[image : image + 2]
        return start + (self._label_of[self._table.categories[start:end]] >= 0).nonzero()[0]

    def _listed(self, image: int, positions: np.ndarray, offsets: np.ndarray) -> Tensor:
        listed = positions[offsets[image] : offsets[image + 1]] if len(offsets) else positions
        labels = self._label_of[listed]
        return torch.from_numpy(labels[labels >= 0])

    @property
    def _segmentations(self) -> Segmentations:
        return Segmentations(self._table.segmentations, self._table.segmentation_offsets)

    def __getitem__(self, index: int) -> Sample:
        return self.read(index)

    def read(self, index: int, least: tuple[int, int] | None = None) -> Sample:
        """One sample. least: (height, width) that it is to be resized to, so that it may be decoded smaller (see
        `codetr.data.images.read_image`, and `Sample.scale`)."""
        row = self._row(index)
        height, width = self._table.sizes[row].tolist()
        image = read_image(self.path(index), (height, width), self.max_pixels, least)
        rows = self._objects_of(row)
        truth = self._truth(row, rows)
        objects = ~(truth["iscrowd"] | truth["ignore"]).numpy()
        boxes = truth["boxes"].numpy()[objects].astype(np.float32)
        boxes = np.minimum(boxes.clip(min=0), np.array([width, height, width, height], np.float32))
        share = 1 / decoded_factor((height, width), (image.shape[1], image.shape[2]))
        return Sample(
            image=Image(image),
            boxes=xyxy_boxes(torch.from_numpy(boxes), (height, width)),
            labels=truth["labels"][torch.from_numpy(objects)],
            image_id=int(self._table.image_ids[row]),
            scale=(share, share),
            file_size=(height, width),
            truth=truth,
            masks=Mask(self._segmentations.masks(rows[objects], (height, width))) if self._masks else None,
        )
