"""Augmentation whose randomness is a function of (seed, epoch, index) alone.

The transforms are those of torchvision.transforms.v2, composed in conf/augment; images stay uint8 and are
normalised on the device, in the backbone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, KeyPoints, Mask

from codetr.data.dataset import DetectionDataset, Sample, without_slivers, xyxy_boxes
from codetr.data.geometry import (
    Colour,
    Geometry,
    PadTo,
    RandomScaledCrop,
    RandomSizeCrop,
    RandomTurn,
    draw,
    is_geometric,
    random_integer,
)
from codetr.data.images import UnreadableImage
from codetr.data.mixing import Mixer
from codetr.data.sampler import mix_seed
from codetr.types import Truth

_log = logging.getLogger(__name__)

Transform = Callable[[dict[str, Any]], dict[str, Any]]
Unreadable = Literal["stop", "next", "blank"]

_BLANK = 64, 64  # height and width of what takes the place of an image


def fit_canvas(canvas: int, fill: int) -> v2.Transform:
    """Resize an image as large as fits onto a square canvas of `canvas` pixels, in its upper left corner."""
    return v2.Compose([v2.Resize(None, max_size=canvas), PadTo(canvas, fill)])


def large_scale_jitter(canvas: int, scale_range: tuple[float, float], flip: float, fill: int) -> v2.Transform:
    """A factor of `scale_range` times the size that fits onto the canvas; what is larger is cropped somewhere.

    Source: Ghiasi et al. 2021, section 3.
    """
    return v2.Compose(
        [
            v2.ScaleJitter((canvas, canvas), tuple(scale_range)),
            RandomSizeCrop(canvas, canvas),
            v2.RandomHorizontalFlip(flip),
            PadTo(canvas, fill),
        ]
    )


def aerial(
    crop: int, scale_range: tuple[float, float], flip: float, vertical_flip: float, turn: float, fill: int
) -> v2.Transform:
    """For pictures that have no up and down: a square of `crop` pixels somewhere, at a scale drawn from `scale_range`
    (pixels per pixel of the file), flipped and turned by quarters.

    flip, vertical_flip, turn: how often. fill: grey of the rest of the square, where the picture is smaller.
    """
    return v2.Compose(
        [
            RandomScaledCrop(crop, (scale_range[0], scale_range[1])),
            PadTo(crop, fill),
            v2.RandomHorizontalFlip(flip),
            v2.RandomVerticalFlip(vertical_flip),
            v2.RandomApply([RandomTurn()], turn),
        ]
    )


def multiscale(
    short_sides: Sequence[int],
    long_side: int,
    flip: float,
    crop: float,
    crop_short_sides: Sequence[int],
    crop_long_side: int | None,
    crop_window: tuple[int, int],
) -> v2.Transform:
    """Flip, perhaps cut out a window, and resize to a short side drawn from `short_sides`, a long side of at most
    `long_side` pixels.

    flip, crop: how often.
    crop_short_sides, crop_long_side: what an image is resized to before a window is cut out of it.
    crop_window: least and greatest height and width of the window, each drawn on its own.

    Source: the training recipe of DETR (arXiv 2005.12872, appendix A.4).
    """
    window = [v2.RandomShortestSize(list(crop_short_sides), crop_long_side), RandomSizeCrop(*crop_window)]
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(flip),
            v2.RandomApply(window, crop),
            v2.RandomShortestSize(list(short_sides), long_side),
        ]
    )


def transformed(sample: Sample, transform: Transform, colour: Colour | None = None) -> Sample:
    """`sample` behind `transform`; boxes are clipped to the image, and those that kept less than a pixel of height or
    width are removed with their labels and masks.

    scale tells how many pixels of the new image one pixel of the file became, whatever was cropped or padded.
    colour: see `Geometry.image`; draws behind the geometry, where that is known before.
    """
    height, width = sample.image.shape[-2:]
    if is_geometric(transform):
        return placed(sample, draw(transform, (height, width)), colour)
    return _through(sample, transform, colour)


def placed(sample: Sample, geometry: Geometry, colour: Colour | None = None) -> Sample:
    """`sample`, as it is in its file, where `geometry` puts it; else as `transformed`.

    The image may have been decoded smaller than its file: see `Sample.scale`. colour: see `Geometry.image`.
    """
    sample, boxes = _moved(sample, geometry, colour)
    return without_slivers(sample, boxes)


def _moved(sample: Sample, geometry: Geometry, colour: Colour | None = None) -> tuple[Sample, Tensor]:
    """With the boxes [n, 4] of all objects apart."""
    image = geometry.image(sample.image.as_subclass(Tensor), round(1 / sample.scale[0]), colour)
    masks = sample.masks if sample.masks is None else Mask(geometry.masks(sample.masks.as_subclass(Tensor)))
    boxes = geometry.boxes(sample.boxes.as_subclass(Tensor))
    return replace(sample, image=Image(image), masks=masks, scale=geometry.scale), boxes


def _through(sample: Sample, transform: Transform, colour: Colour | None) -> Sample:
    """As `transformed`, of a transform that may do anything."""
    height, width = sample.image.shape[-2:]
    sample, boxes = _moved(sample, Geometry.of_file((height, width)), colour)
    height, width = sample.image.shape[-2:]
    parts: dict[str, Any] = {
        "image": sample.image,
        "boxes": xyxy_boxes(boxes, (height, width)),
        "labels": sample.labels,
    }
    if sample.masks is not None:
        parts["masks"] = sample.masks
    # They go through the transform with the image and tell how it was scaled. Nothing clips or drops points.
    corners = torch.tensor([[0, height], [0, 0], [width, 0]], dtype=torch.float64)
    parts["corners"] = KeyPoints(corners, canvas_size=(height, width))
    parts = transform(parts)
    left, top = parts.pop("corners").diff(dim=0)  # of the file, (x, y) from end to end
    # A resize has the precision of float32.
    rows = round(float(left.norm()), 3) / height * sample.scale[0]
    columns = round(float(top.norm()), 3) / width * sample.scale[1]
    scale = (columns, rows) if abs(top[1]) > abs(top[0]) else (rows, columns)  # the former where it was turned
    height, width = parts["image"].shape[-2:]
    boxes = parts.pop("boxes").as_subclass(Tensor)
    boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
    return without_slivers(replace(sample, **parts, scale=scale), boxes)


class TransformedDataset(Dataset[Sample]):
    """`dataset` behind `transform`, indexed by (epoch, index) as the samplers of `codetr.data.sampler` yield.

    transform: maps a dict of `image`, `boxes`, `labels` and, where the data set reads them, `masks` (see
        `transformed`).
    unreadable: what takes the place of an image that does not decode, or that the transform fails on; "next": the next
        readable one in the order of the data set; "blank": a black image, in which nothing of its truth can be found;
        "stop": nothing, UnreadableImage names the file.
    colour: applied to the image before `transform`, or to the window that it cuts out first.
    mixers: applied one after the other behind the transform.
    masks: whether samples keep them.
    scaled_decoding: JPEGs which the transform makes much smaller are decoded at a fraction of their size (see
        `codetr.data.images.read_image`); of a transform that `codetr.data.geometry` knows.
    pixels: samples also keep the image as its file has it.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        transform: Transform,
        seed: int,
        unreadable: Unreadable,
        mixers: Sequence[Mixer] = (),
        masks: bool = True,
        colour: Colour | None = None,
        scaled_decoding: bool = False,
        pixels: bool = False,
    ) -> None:
        self.dataset, self.seed, self.unreadable, self.pixels = dataset, seed, unreadable, pixels
        self.transform, self.mixers, self.masks, self.colour = transform, mixers, masks, colour
        self.scaled_decoding = scaled_decoding
        # Workers set what the process of the loader reads.
        self._unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def unreadable_files(self) -> list[Path]:
        """The files that did not decode so far, in all workers of this process."""
        return [self.dataset.path(i) for i in self._unreadable.nonzero().flatten().tolist()]

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(mix_seed(self.seed, epoch, index))
        try:
            sample = self._sample(index)
            for mixer in self.mixers:
                sample = mixer(sample, lambda: self._sample(random_integer(0, len(self) - 1)))
        except Exception as error:
            error.add_note(f"while reading and augmenting {self.dataset.path(index)}")
            raise
        finally:
            generator.set_state(before)
        return sample if self.masks else replace(sample, masks=None)

    def _augmented(self, index: int) -> Sample:
        geometry = self._drawn_before(index)
        sample = self.dataset.read(index, None if geometry is None else geometry.first_size)
        if self.pixels:
            sample = replace(sample, pixels=sample.image.as_subclass(Tensor))
        try:
            if geometry is None:
                return transformed(sample, self.transform, self.colour)
            return placed(sample, geometry, self.colour)
        except Exception as error:
            raise failed(self.dataset.path(index), sample.file_size, error) from error

    def _drawn_before(self, index: int) -> Geometry | None:
        """The geometry of an image that need not be decoded whole."""
        if not self.scaled_decoding or not is_geometric(self.transform):
            return None
        height, width = self.dataset.sizes[index].tolist()
        return draw(self.transform, (height, width))

    def _sample(self, index: int) -> Sample:
        for step in range(len(self)):
            position = (index + step) % len(self)
            try:
                return self._augmented(position)
            except UnreadableImage as error:
                if self.unreadable == "stop":
                    raise
                if not self._unreadable[position]:
                    what = "the next image" if self.unreadable == "next" else "a black image"
                    _log.warning("%s; %s takes its place", error, what)
                self._unreadable[position] = True
                if self.unreadable == "blank":
                    return self._blank(position)
        raise UnreadableImage(f"none of the {len(self)} images in {self.dataset.root} can be used")

    def _blank(self, index: int) -> Sample:
        """Drawn small, whatever size the file claims to have, and then said to be of that size."""
        height, width = map(int, self.dataset.sizes[index])
        image_id, truth = int(self.dataset.image_ids[index]), self.dataset.truth(index)
        black = torch.zeros(*_BLANK, 3, dtype=torch.uint8).permute(2, 0, 1)
        sample = transformed(without_objects(black, image_id, truth), self.transform)
        rows, columns = sample.scale
        scale = rows * _BLANK[0] / height, columns * _BLANK[1] / width
        pixels = black[:, :1, :1].expand(3, height, width) if self.pixels else None  # takes no memory
        return replace(sample, scale=scale, file_size=(height, width), pixels=pixels)


def without_objects(image: Tensor, image_id: int, truth: Truth | None = None) -> Sample:
    """`image`, [3, H, W] uint8, as a sample without an object to train on. truth: None where nothing is known."""
    height, width = image.shape[-2:]
    no_boxes = xyxy_boxes(torch.zeros(0, 4), (height, width))
    no_labels = torch.zeros(0, dtype=torch.int64)
    if truth is None:
        nothing = torch.zeros(0)
        truth = Truth(boxes=torch.zeros(0, 4), labels=no_labels, iscrowd=nothing.bool(), area=nothing)
    return Sample(Image(image), no_boxes, no_labels, image_id, (1.0, 1.0), (height, width), truth)


def failed(path: Path, size: tuple[int, int], error: Exception) -> UnreadableImage:
    """The error of a transform that fails on the image file `path` of (height, width) `size`."""
    return UnreadableImage(f"{path} ({size[1]}x{size[0]} pixels) cannot be transformed: {error}")
