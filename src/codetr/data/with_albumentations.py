"""Pipelines of albumentations as training transforms."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.tv_tensors import Image, KeyPoints, Mask

from codetr.data.dataset import xyxy_boxes
from codetr.data.geometry import random_integer
from codetr.errors import UserError


class Pipeline:
    """Transforms of albumentations, or one Compose of them, for `codetr.data.transforms.TransformedDataset`.

    Objects that are no longer in the image are removed. Images have to stay uint8 in RGB: they are normalised on the
    device. Of rotated objects albumentations' boxes are those around the rotated boxes. Random numbers follow torch's.

    Raises UserError without the package.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        try:
            import albumentations
        except ImportError as error:
            raise UserError("data.train_transform: pip install 'codetr[albumentations]'") from error
        boxes = albumentations.BboxParams("pascal_voc", label_fields=["rows"], filter_invalid_bboxes=True)
        corners = albumentations.KeypointParams("xy", remove_invisible=False)
        with warnings.catch_warnings():  # of pipelines that only change colours
            warnings.filterwarnings("ignore", "Got processor for .*, but no transform to process it")
            self.compose = albumentations.Compose(list(transforms), bbox_params=boxes, keypoint_params=corners)

    def __call__(self, parts: dict[str, Any]) -> dict[str, Any]:
        # One state for all of its transforms: with one seed for each, flips of both kinds would come together.
        seed = random_integer(0, 2**31 - 1)
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        given = {"image": np.ascontiguousarray(parts["image"].as_subclass(Tensor).permute(1, 2, 0).numpy())}
        if "masks" in parts:
            given["masks"] = parts["masks"].as_subclass(Tensor).numpy()
        boxes, corners = (parts[name].as_subclass(Tensor).numpy() for name in ("boxes", "corners"))
        found = self.compose(**given, bboxes=boxes, rows=np.arange(len(boxes)), keypoints=corners)
        image = found["image"]
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            raise TypeError("the pipeline makes no uint8 images; leave normalisation and tensors to the detector")
        size = image.shape[:2]
        # Its boxes are shares of a side in float32.
        boxes = np.asarray(found["bboxes"], np.float64).reshape(-1, 4).round(3).astype(np.float32)
        rows = torch.as_tensor(np.asarray(found["rows"]).astype(np.int64))
        new = {
            "image": Image(torch.from_numpy(image).permute(2, 0, 1)),
            "boxes": xyxy_boxes(torch.from_numpy(boxes), size),
            "labels": parts["labels"][rows],
            "corners": KeyPoints(torch.as_tensor(np.asarray(found["keypoints"], np.float64)), canvas_size=size),
        }
        if "masks" in parts:
            new["masks"] = Mask(torch.from_numpy(np.asarray(found["masks"], np.uint8).reshape(-1, *size))[rows])
        return new
