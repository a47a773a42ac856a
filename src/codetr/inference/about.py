"""What an exported file says of itself: JSON under the name `codetr` in its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codetr.errors import UserError

KEY = "codetr"
FORM = 1  # of the entries
BOXES, MASKS = ("boxes", "scores", "labels"), ("masks", "mask_ious")  # outputs of a graph; the latter with a mask head


@dataclass(frozen=True)
class About:
    """form: of these entries.
    class_names: of label 0, 1, ...; category_ids: of each class in its data set, None where nobody knows.
    size_divisor: batches are padded to multiples of so many pixels, of at least `least_side`.
    size: (height, width) where the graph takes no others.
    precision: fp32, fp16 or int8.
    max_detections: of an image.
    score_threshold: below which detections are no use, unless the user says otherwise.
    step: of the optimizer, when the checkpoint was saved.
    config: the parts `postprocess` and `data` of the checkpoint's; data.val_transform is what images go through.
    """

    form: int
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] | None
    size_divisor: int
    least_side: int
    size: tuple[int, int] | None
    precision: str
    max_detections: int
    score_threshold: float
    step: int
    config: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which a batch of so many pixels is padded; a fixed one may be smaller."""
        if self.size is not None:
            return self.size
        units = (-(-side // self.size_divisor) * self.size_divisor for side in (height, width))
        rows, columns = (max(side, self.least_side) for side in units)
        return rows, columns

    def inputs(self, images: np.ndarray, sizes: np.ndarray, path: Path) -> dict[str, np.ndarray]:
        """What the graph takes: the images, padded further where it needs that.

        images: [B, 3, H, W] uint8. sizes: [B, 2] int64 (height, width) without padding. path: of the file, for the
        message. Raises UserError for images that are larger than the graph's.
        """
        height, width = images.shape[2:]
        rows, columns = self.canvas(height, width)
        if height > rows or width > columns:
            raise UserError(
                f"{path} takes images of {columns}x{rows} pixels, and behind its resize one has {width}x{height}: "
                "export it with size=null, or with a size into which all of them fit"
            )
        beyond = ((0, 0), (0, 0), (0, rows - height), (0, columns - width))
        return {"images": np.ascontiguousarray(np.pad(images, beyond)), "sizes": sizes}

    @classmethod
    def from_json(cls, text: str | None, path: Path) -> About:
        """Raises UserError for what is no such description."""
        if not text:
            raise UserError(f"{path}: does not say which classes and images it takes; give a file of codetr export")
        try:
            said = json.loads(text)
            if said.get("form") != FORM:
                raise UserError(f"{path}: its metadata have form {said.get('form')}, not {FORM}: export it again")
            return cls(
                form=FORM,
                class_names=tuple(_of(str, name) for name in said["class_names"]),
                category_ids=said["category_ids"] and tuple(_of(int, i) for i in said["category_ids"]),
                size_divisor=_of(int, said["size_divisor"]),
                least_side=_of(int, said["least_side"]),
                size=said["size"] and (_of(int, said["size"][0]), _of(int, said["size"][1])),
                precision=_of(str, said["precision"]),
                max_detections=_of(int, said["max_detections"]),
                score_threshold=float(said["score_threshold"]),
                step=_of(int, said["step"]),
                config=_of(dict, said["config"]),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: its metadata cannot be read ({error!r:.80}); export it again") from error


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value
