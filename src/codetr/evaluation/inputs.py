"""What `MeanAveragePrecision` takes: checked, made of a batch of ours, or read from COCO's files."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor

from codetr.types import Detections, Truth

SHAPES = {"bbox": "boxes", "segm": "masks"}
COLUMNS = {  # of COCO's files
    "category_id": ("labels", torch.int32),
    "score": ("scores", torch.float32),
    "iscrowd": ("iscrowd", torch.int32),
    "area": ("area", torch.float32),
}
Inputs = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def inputs(
    image_ids: Tensor | Sequence[int],
    detections: Sequence[Detections],
    truth: Sequence[Truth],
    masks: bool = False,
) -> Inputs:
    """`preds` and `target` of a batch. masks: with the run lengths of both, and the scores of the masks.

    detections: with boxes in pixels of the files, as those of `truth`.
    """
    ids = torch.as_tensor(image_ids).tolist()
    preds: list[dict[str, Any]] = [{"boxes": d.boxes_xyxy, "scores": d.scores, "labels": d.labels} for d in detections]
    target = [{**own, "image_id": i} for i, own in zip(ids, truth, strict=True)]
    if masks:
        for own, found in zip(preds, detections, strict=True):
            own |= {"masks": found.rle or []}
            if found.mask_scores is not None:
                own["scores"] = found.mask_scores
        for own in target:
            own["masks"] = own["rle"]
    return preds, target


def validate(preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]], iou_types: Sequence[str]) -> None:
    """Raises ValueError for what `MeanAveragePrecision.update` cannot take."""
    shapes = [SHAPES[iou_type] for iou_type in iou_types]
    both = (("preds", preds, (*shapes, "scores", "labels")), ("target", target, (*shapes, "labels")))
    for name, images, _ in both:
        if not isinstance(images, Sequence):
            raise ValueError(f"Expected argument `{name}` to be of type Sequence, but got {images}")
    if len(preds) != len(target):
        raise ValueError(
            f"Expected argument `preds` and `target` to have the same length, but got {len(preds)} and {len(target)}"
        )
    for name, images, keys in both:
        for key in keys:
            if any(key not in image for image in images):
                raise ValueError(f"Expected all dicts in `{name}` to contain the `{key}` key")
    for name, images, keys in both:
        for key in keys:
            kinds = (Tensor, list) if key == "masks" else Tensor
            if not all(isinstance(image[key], kinds) for image in images):
                raise ValueError(f"Expected all {key} in `{name}` to be of type Tensor")
        for i, image in enumerate(images):
            lengths = {key: len(image[key]) for key in keys}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"Expected as many of each in sample {i} of `{name}`, but got {lengths}")


def read_coco(preds: str | Path, target: str | Path, iou_types: Sequence[str]) -> Inputs:
    """`preds` and `target` of every image of a data set in COCO's format, in its order; boxes are xywh.

    Raises ValueError for results of an image that the data set does not have.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        dataset = COCO(str(target))
    found: dict[int, list[dict[str, Any]]] = {image: [] for image in dataset.imgs}
    for entry in json.loads(Path(preds).read_text()):
        if entry["image_id"] not in found:
            raise ValueError(f"{preds} has results of image {entry['image_id']}, which {target} does not have")
        found[entry["image_id"]].append(entry)
    return (
        [_tensors(dataset, own, ("score", "category_id"), iou_types) for own in found.values()],
        [_tensors(dataset, dataset.imgToAnns[image], ("category_id", "iscrowd", "area"), iou_types) for image in found],
    )


def _tensors(
    dataset: COCO, entries: list[dict[str, Any]], keys: Sequence[str], iou_types: Sequence[str]
) -> dict[str, Tensor]:
    own = {COLUMNS[key][0]: torch.tensor([one[key] for one in entries], dtype=COLUMNS[key][1]) for key in keys}
    if "bbox" in iou_types:
        own["boxes"] = torch.tensor([one["bbox"] for one in entries], dtype=torch.float32).reshape(-1, 4)
    if "segm" in iou_types:
        own["masks"] = torch.from_numpy(np.array([dataset.annToMask(one) for one in entries], np.uint8))
    return own
