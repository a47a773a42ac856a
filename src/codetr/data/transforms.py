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
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image, KeyPoints, wrap

from codetr.data.copy_paste import CopyPaste
from codetr.data.dataset import DetectionDataset, Sample
from codetr.data.images import UnreadableImage
from codetr.data.sampler import mix_seed
from codetr.types import Truth

_log = logging.getLogger(__name__)

Transform = Callable[[dict[str, Any]], dict[str, Any]]
Unreadable = Literal["stop", "next", "blank"]

# The long side in short sides, at most: a resize to a long side of as many pixels leaves one of the short side.
_THINNEST = 64
_BLANK = 64, 64  # height and width of what takes the place of an image


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
        part = self._call_kernel(F.crop, inpt, **params)
        return _packed(part) if isinstance(part, Image) else part


def _packed(image: Image) -> Image:
    """Channels last and without gaps: torchvision resizes nothing else as fast, nor keeps the layout."""
    return wrap(image.as_subclass(Tensor).permute(1, 2, 0).contiguous().permute(2, 0, 1), like=image)


def _draw(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


class PadTo(v2.Transform):
    """Pad right and below to height = width = `canvas` pixels, the image with the colour `fill`.

    Unlike the padding of a batch this belongs to the image: the network sees it, and boxes are relative to it.
    """

    def __init__(self, canvas: int, fill: int) -> None:
        super().__init__()
        self.canvas, self.fill = canvas, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, self.canvas - width, self.canvas - height]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, Image):
            return self._call_kernel(F.pad, inpt, **params)
        # As F.pad does it, but in the layout of the image.
        channels, height, width = inpt.shape
        padded = inpt.new_full((self.canvas, self.canvas, channels), self.fill).permute(2, 0, 1)
        padded[:, :height, :width] = inpt.as_subclass(Tensor)
        return wrap(padded, like=inpt)


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


def transformed(sample: Sample, transform: Transform) -> Sample:
    """`sample` behind `transform`; boxes are clipped to the image, and those that kept less than a pixel of height or
    width are removed with their labels and masks.

    An image that is more than 64 times as long as wide is first made shorter, or resizing would leave nothing of its
    width (torchvision: int(0.67) pixels), or make a long side of any size.

    scale tells how many pixels of the new image one pixel of the file became, whatever was cropped or padded.
    """
    height, width = sample.image.shape[-2:]
    parts: dict[str, Any] = {"image": sample.image, "boxes": sample.boxes, "labels": sample.labels}
    if sample.masks is not None:
        parts["masks"] = sample.masks
    # They go through the transform with the image and tell how it was scaled. Nothing clips or drops points.
    corners = torch.tensor([[0, 0], [width, height]], dtype=torch.float64)
    parts["corners"] = KeyPoints(corners, canvas_size=(height, width))
    if max(height, width) > _THINNEST * min(height, width):
        most = _THINNEST * min(height, width)
        parts = v2.Resize([min(height, most), min(width, most)])(parts)
    parts = transform(parts)
    scaled_width, scaled_height = parts.pop("corners").diff(dim=0)[0].abs().tolist()
    # A resize has the precision of float32.
    scale = round(scaled_height, 3) / height, round(scaled_width, 3) / width
    return replace(sample, **_tidy(parts), scale=scale)


def _tidy(parts: dict[str, Any]) -> dict[str, Any]:
    """Boxes clipped to the image; objects that kept less than a pixel of width or height removed."""
    height, width = parts["image"].shape[-2:]
    boxes = parts["boxes"].as_subclass(Tensor)
    boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    parts["boxes"] = wrap(boxes[kept], like=parts["boxes"])
    for name in {"labels", "masks"} & parts.keys():
        parts[name] = wrap(parts[name][kept], like=parts[name])
    return parts


class TransformedDataset(Dataset[Sample]):
    """`dataset` behind `transform`, indexed by (epoch, index) as the samplers of `codetr.data.sampler` yield.

    transform: maps a dict of `image`, `boxes`, `labels` and, where the data set reads them, `masks` (see
        `transformed`).
    unreadable: what takes the place of an image that does not decode, or that the transform fails on; "next": the next
        readable one in the order of the data set; "blank": a black image, in which nothing of its truth can be found;
        "stop": nothing, UnreadableImage names the file.
    colour: applied to the image as in the file, before `transform`.
    copy_paste: with another image of the data set behind the same transform, which must make all images of one size;
        needs masks.
    masks: whether samples keep them.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        transform: Transform,
        seed: int,
        unreadable: Unreadable,
        copy_paste: CopyPaste | None = None,
        masks: bool = True,
        colour: Callable[[Image], Image] | None = None,
    ) -> None:
        self.dataset, self.seed, self.unreadable = dataset, seed, unreadable
        self.transform, self.copy_paste, self.masks, self.colour = transform, copy_paste, masks, colour
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
            if self.copy_paste is not None:
                sample = self.copy_paste(sample, self._sample(_draw(0, len(self) - 1)))
        except Exception as error:
            error.add_note(f"while reading and augmenting {self.dataset.path(index)}")
            raise
        finally:
            generator.set_state(before)
        return sample if self.masks else replace(sample, masks=None)

    def _augmented(self, index: int) -> Sample:
        sample = self.dataset[index]
        try:
            if self.colour is not None:
                sample = replace(sample, image=_packed(self.colour(sample.image)))
            return transformed(sample, self.transform)
        except Exception as error:
            raise failed(self.dataset.path(index), sample.file_size, error) from error

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
        return replace(sample, scale=scale, file_size=(height, width))


def without_objects(image: Tensor, image_id: int, truth: Truth | None = None) -> Sample:
    """`image`, [3, H, W] uint8, as a sample without an object to train on. truth: None where nothing is known."""
    height, width = image.shape[-2:]
    no_boxes = BoundingBoxes(torch.zeros(0, 4), format=BoundingBoxFormat.XYXY, canvas_size=(height, width))
    no_labels = torch.zeros(0, dtype=torch.int64)
    if truth is None:
        nothing = torch.zeros(0)
        truth = Truth(boxes=torch.zeros(0, 4), labels=no_labels, iscrowd=nothing.bool(), area=nothing)
    return Sample(Image(image), no_boxes, no_labels, image_id, (1.0, 1.0), (height, width), truth)


def failed(path: Path, size: tuple[int, int], error: Exception) -> UnreadableImage:
    """The error of a transform that fails on the image file `path` of (height, width) `size`."""
    return UnreadableImage(f"{path} ({size[1]}x{size[0]} pixels) cannot be transformed: {error}")
