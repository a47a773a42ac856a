"""Augmentation whose randomness is a function of (seed, epoch, index) alone.

The transforms are those of torchvision.transforms.v2, composed in conf/augment; images stay uint8 and are
normalised on the device, in the backbone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from codetr.data.coco import CocoDetection, Sample
from codetr.data.images import UnreadableImage
from codetr.data.sampler import mix_seed

_log = logging.getLogger(__name__)


class RandomSizeCrop(v2.Transform):
    """Crop a window whose height and width are drawn, each on its own, from min_size..max_size pixels.

    Never larger than the image. Source: the training recipe of DETR (arXiv 2005.12872, appendix A.4).
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        super().__init__()
        self.min_size, self.max_size = min_size, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        canvas = v2.query_size(flat_inputs)
        window = [_draw(min(self.min_size, side), min(self.max_size, side)) for side in canvas]
        top, left = (_draw(0, side - part) for side, part in zip(canvas, window, strict=True))
        return {"top": top, "left": left, "height": window[0], "width": window[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


def _draw(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


class TransformedDataset(Dataset[Sample]):
    """`dataset` behind `transform`, indexed by (epoch, index) as the samplers of `codetr.data.sampler` yield.

    transform: maps a dict of `image`, `boxes`, `labels` and, where the data set reads them, `masks`; boxes are
    afterwards clipped to the image, and those that kept less than a pixel of height or width are removed with their
    labels and masks. replace_unreadable: take the
    next readable image, in the order of the data set, for one that does not decode.

    Raises UnreadableImage, which names the file.
    """

    def __init__(
        self,
        dataset: CocoDetection,
        transform: Callable[[dict[str, Any]], dict[str, Any]],
        seed: int,
        replace_unreadable: bool,
    ) -> None:
        self.dataset, self.seed, self.replace_unreadable = dataset, seed, replace_unreadable
        # Clipping comes first: a box on the border may reach out of it by a rounding error of the resize.
        self.transform = v2.Compose([transform, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        sample = self._read(index)
        parts: dict[str, Any] = {"image": sample.image, "boxes": sample.boxes, "labels": sample.labels}
        if sample.masks is not None:
            parts["masks"] = sample.masks
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(mix_seed(self.seed, epoch, index))
        try:
            parts = self.transform(parts)
        finally:
            generator.set_state(before)
        return replace(sample, **parts)

    def _read(self, index: int) -> Sample:
        for step in range(len(self)):
            try:
                return self.dataset[(index + step) % len(self)]
            except UnreadableImage as error:
                if not self.replace_unreadable:
                    raise
                _log.warning("%s; the next image takes its place", error)
        raise UnreadableImage(f"none of the {len(self)} images in {self.dataset.root} can be decoded")
