"""What a model found in one image, and the forms in which others want it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from codetr.data.images import read_image
from codetr.data.large import SUFFIXES, LargeTiff, overview
from codetr.errors import UserError
from codetr.inference.sources import MAX_PIXELS
from codetr.types import Detections
from codetr.views import Picture, Pixels
from codetr.visualize import draw_boxes

if TYPE_CHECKING:
    import supervision

_LONGEST = 8192  # side of the picture of an image that is too large to be drawn as it is


@dataclass(repr=False)
class Result:
    """The n objects that were found in one image, best first; all tensors are on the CPU.

    detections: with boxes in pixels of the image as a viewer shows it (a file's EXIF orientation is applied).
    size: (height, width) of the image.
    class_names: of every label that the model knows.
    category_ids: of each of these classes in its data set.
    path: of the file; None for an image in memory.
    pixels: [3, H, W] uint8 RGB; None: `path` is read where they are needed.
    """

    detections: Detections
    size: tuple[int, int]
    class_names: Sequence[str]
    category_ids: Sequence[int]
    path: Path | None = None
    pixels: Tensor | None = None

    @property
    def boxes_xyxy(self) -> Tensor:
        """[n, 4] float32 (left, top, right, bottom) in pixels."""
        return self.detections.boxes_xyxy

    @property
    def scores(self) -> Tensor:
        """[n] float32, from 0 to 1."""
        return self.detections.scores

    @property
    def labels(self) -> Tensor:
        """[n] int64, positions in `class_names`."""
        return self.detections.labels

    @property
    def names(self) -> list[str]:
        """The n names of classes."""
        return [self.class_names[label] for label in self.labels.tolist()]

    @property
    def masks(self) -> Tensor | None:
        """[n, H, W] bool, or None where the model has no mask head."""
        if self.detections.rle is None:
            return None
        if not self.detections.rle:
            return torch.zeros(0, *self.size, dtype=torch.bool)
        return torch.from_numpy(coco_mask.decode(self.detections.rle)).permute(2, 0, 1).bool()

    @property
    def mask_scores(self) -> Tensor | None:
        """[n] float32: how well each mask fits, times the score of its box; None without masks."""
        return self.detections.mask_scores

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        found = ", ".join(f"{count} {name}" for name, count in Counter(self.names).items()) or "nothing"
        return f"Result({self.path or 'image'}, {self.size[1]}x{self.size[0]} pixels: {found})"

    def above(self, score: float) -> Result:
        """The objects with at least this score."""
        return replace(self, detections=self.detections.above(score))

    def plot(self) -> Image.Image:
        """The image with its boxes, names, scores and masks; a small one is enlarged until its labels are legible. One
        that is too large to be decoded whole is drawn in small, without masks."""
        picture, found = self.picture(), self.detections
        if isinstance(picture, Pixels):
            pixels, scale, rle = picture.image, 1.0, found.rle
        else:
            (pixels, scale), rle = overview(picture, _LONGEST), None
        return draw_boxes(pixels, found.boxes_xyxy * scale, found.labels, self.class_names, found.scores, rle)

    def picture(self) -> Picture:
        """The image, to be read; of a TIFF file that is too large for the memory, window by window."""
        if self.pixels is not None:
            return Pixels(self.pixels)
        assert self.path is not None, "a result without a file keeps its pixels"
        if self.path.suffix.lower() in SUFFIXES and self.size[0] * self.size[1] > MAX_PIXELS:
            return LargeTiff.of(self.path, None)
        return Pixels(read_image(self.path, self.size))

    def _repr_png_(self) -> bytes:
        """The picture that a notebook shows."""
        content = io.BytesIO()
        self.plot().save(content, "PNG")
        return content.getvalue()

    def to_coco(self, image_id: int | str = 0, file_name: str | None = None) -> list[dict[str, Any]]:
        """Records of COCO's results format, with `file_name` and `category_name` beside the ids; boxes are xywh.

        file_name: what the records call the image; by default the name of its file, "" in memory. With masks also
        `segmentation` (compressed run lengths) and `mask_score`.
        """
        name = file_name if file_name is not None else self.path.name if self.path else ""
        found = self.detections
        rows = zip(found.labels.tolist(), found.boxes_xyxy.double().tolist(), found.scores.tolist(), strict=True)
        records: list[dict[str, Any]] = [
            {
                "image_id": image_id,
                "file_name": name,
                "category_id": self.category_ids[label],
                "category_name": self.class_names[label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for label, (x0, y0, x1, y1), score in rows
        ]
        if found.rle is None or found.mask_scores is None:
            return records
        masks = zip(records, found.rle, found.mask_scores.tolist(), strict=True)
        return [record | {"segmentation": rle, "mask_score": score} for record, rle, score in masks]

    def to_supervision(self) -> supervision.Detections:
        """The detections of the library supervision, for its trackers, annotators and converters.

        `data["class_name"]` holds the names.

        Raises UserError where it is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise UserError(
                f"to_supervision needs the package supervision ({error}): pip install 'codetr[supervision]'"
            ) from error
        import numpy as np

        masks = self.masks
        return supervision.Detections(
            xyxy=self.boxes_xyxy.numpy(),
            mask=None if masks is None else masks.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )
