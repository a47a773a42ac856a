"""Training images that are made of several: what mixes other images in, and two ways beside copy-paste."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torchvision.tv_tensors import Image, Mask

from codetr.data.dataset import Sample, without_slivers
from codetr.data.geometry import random_integer


class Mixer(Protocol):
    """Mixes other images into a sample, whose id, scale and truth stay its own. Random numbers: torch's.

    needs_masks: of the objects.
    """

    needs_masks: ClassVar[bool]

    def __call__(self, sample: Sample, another: Callable[[], Sample]) -> Sample:
        """another: reads a random image of the data set, behind the same transform as `sample`."""

    def most_objects(self, own: int, other: int) -> int:
        """Of what comes out, where a sample has at most `own`, and another at most `other`."""


@dataclass(frozen=True)
class Mosaic:
    """Four images that meet in a random point, in one of the size of the first (Bochkovskiy et al. 2020, YOLOv4).

    Each shows a random window of itself. probability: of doing so. least: share of the height and of the width that
    every image has. fill: grey where an image is smaller than its place.
    """

    needs_masks = False
    probability: float
    least: float
    fill: int

    def __call__(self, sample: Sample, another: Callable[[], Sample]) -> Sample:
        if torch.rand(()) >= self.probability:
            return sample
        height, width = sample.image.shape[-2:]
        y, x = (random_integer(round(self.least * n), n - round(self.least * n)) for n in (height, width))
        places = [(0, 0, y, x), (0, x, y, width - x), (y, 0, height - y, x), (y, x, height - y, width - x)]
        image = sample.image.new_full((height, width, 3), self.fill).permute(2, 0, 1)
        parts = []
        for place, part in zip(places, (sample, *(another() for _ in places[1:])), strict=True):
            parts.append(_windowed(part, place, image))
        return _together(sample, image, parts)

    def most_objects(self, own: int, other: int) -> int:
        return own + 3 * other


@dataclass(frozen=True)
class Mixup:
    """Another image shines through, and the objects of both count (Zhang et al. 2019, Bag of freebies, section 3.1).

    What is smaller is black beyond its border. probability: of doing so. alpha: the shares of both are drawn from
    Beta(alpha, alpha).
    """

    needs_masks = False
    probability: float
    alpha: float

    def __call__(self, sample: Sample, another: Callable[[], Sample]) -> Sample:
        if torch.rand(()) >= self.probability:
            return sample
        other = another()
        share = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        sizes = torch.tensor([part.image.shape[-2:] for part in (sample, other)])
        height, width = sizes.amax(0).tolist()
        canvas = torch.zeros(height, width, 3).permute(2, 0, 1)
        for part, weight in ((sample, share), (other, 1 - share)):
            rows, columns = part.image.shape[-2:]
            canvas[:, :rows, :columns] += weight * part.image.as_subclass(Tensor)
        return _together(sample, canvas.round().to(torch.uint8), [_on(part, 0, 0, canvas) for part in (sample, other)])

    def most_objects(self, own: int, other: int) -> int:
        return own + other


def _windowed(sample: Sample, place: tuple[int, int, int, int], image: Tensor) -> Sample:
    """Paint a random window of `sample` into its `place` (top, left, height, width) of `image`; its objects there."""
    top, left, *size = place
    height, width = (min(side, place) for side, place in zip(sample.image.shape[-2:], size, strict=True))
    y, x = (random_integer(0, n - m) for n, m in zip(sample.image.shape[-2:], (height, width), strict=True))
    window = slice(y, y + height), slice(x, x + width)
    image[:, top : top + height, left : left + width] = sample.image[:, *window]
    boxes = sample.boxes.as_subclass(Tensor) - torch.tensor([x, y, x, y])
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]).float())
    masks = sample.masks if sample.masks is None else Mask(sample.masks.as_subclass(Tensor)[:, *window])
    return _on(replace(sample, boxes=boxes, masks=masks), top, left, image)


def _on(sample: Sample, top: int, left: int, image: Tensor) -> Sample:
    """The objects of `sample` where it lies on `image` with its upper left corner."""
    boxes = sample.boxes.as_subclass(Tensor) + torch.tensor([left, top, left, top])
    masks = sample.masks
    if masks is not None:
        height, width = masks.shape[1:]
        whole = masks.new_zeros(len(masks), *image.shape[1:])
        whole[:, top : top + height, left : left + width] = masks
        masks = Mask(whole)
    return replace(sample, boxes=boxes, masks=masks)


def _together(sample: Sample, image: Tensor, parts: Sequence[Sample]) -> Sample:
    """`sample` with another image, and with the objects of all `parts` of it."""
    masks = [part.masks.as_subclass(Tensor) for part in parts if part.masks is not None]
    mixed = replace(
        sample,
        image=Image(image),
        labels=torch.cat([part.labels for part in parts]),
        masks=Mask(torch.cat(masks)) if masks else None,
    )
    return without_slivers(mixed, torch.cat([part.boxes.as_subclass(Tensor) for part in parts]))
