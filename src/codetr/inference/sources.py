"""Images in the forms that users have them: files, folders, patterns, pictures of Pillow, arrays, tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset

from codetr.data.collate import collate
from codetr.data.dataset import Sample
from codetr.data.images import UnreadableImage, pixels_of, read_image, seen_size, unreadable
from codetr.data.large import SUFFIXES, LargeTiff
from codetr.data.readers.folder import find_images
from codetr.data.transforms import Transform, failed, transformed, without_objects
from codetr.errors import UserError
from codetr.types import Batch
from codetr.views import Picture, Pixels

Image: TypeAlias = str | Path | PIL.Image.Image | np.ndarray | Tensor
Source: TypeAlias = Path | Tensor
"""A file, or the pixels of an image in memory: [3, H, W] uint8 RGB with channels-last strides, as files are read."""

MAX_PIXELS = 80_000_000


def find_sources(images: Image | Sequence[Image], max_pixels: int | None = MAX_PIXELS) -> list[Source]:
    """The single images that `images` stands for, in their order; a name may stand for several (see
    `codetr.data.readers.folder.find_images`).

    Raises UserError for names without a file, and for what is no image: arrays are [H, W, 3], tensors [3, H, W], both
    uint8 RGB; and for pictures of more than `max_pixels` pixels.
    """
    if isinstance(images, (list, tuple)):
        return [s for i, image in enumerate(images) for s in _sources_of(image, f"images[{i}]", max_pixels)]
    return _sources_of(images, "images", max_pixels)


def _sources_of(image: Any, name: str, max_pixels: int | None) -> list[Source]:
    if isinstance(image, (str, Path)):
        return list(find_images(str(image)))
    if isinstance(image, PIL.Image.Image):
        try:
            return [pixels_of(image, max_pixels)]
        except Exception as error:  # Pillow decodes only now
            raise unreadable(Path(getattr(image, "filename", "") or name), error) from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return [torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)]
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
        return [image.cpu().permute(1, 2, 0).clone(memory_format=torch.contiguous_format).permute(2, 0, 1)]
    what = f"{image.dtype} {list(image.shape)}" if isinstance(image, (np.ndarray, Tensor)) else repr(image)[:80]
    raise UserError(
        f"{name} is a {type(image).__name__} ({what}): give a file, a folder, a pattern, a Pillow image, an array "
        "[height, width, 3] or a tensor [3, height, width] of uint8 in RGB, or a list of these"
    )


@dataclass
class Unreadable:
    """An image that does not decode or fit the network, and why; the reason names it. path: None for one in memory."""

    path: Path | None
    reason: str


Item: TypeAlias = tuple[Sample, Tensor] | Unreadable


class Images(Dataset[Item]):
    """Images behind the evaluation transform of a model, each with its own pixels, [3, H, W] uint8.

    What does not decode is an item too, so that the reader decides what to do about it. max_pixels: of a file; larger
    ones are not decoded. sizes: (height, width) of files as annotations tell it, which decides as in
    `codetr.data.images.read_image`; of other files it is what a viewer shows.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        transform: Transform,
        max_pixels: int | None = MAX_PIXELS,
        sizes: Mapping[Path, tuple[int, int]] | None = None,
    ) -> None:
        self.sources, self.transform, self.max_pixels, self.sizes = sources, transform, max_pixels, sizes or {}

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Item:
        source = self.sources[index]
        path = source if isinstance(source, Path) else None
        try:
            image = self._read(source) if isinstance(source, Path) else source
        except (UnreadableImage, OSError) as error:
            return Unreadable(path, str(error))
        try:
            return transformed(without_objects(image, index), self.transform), image
        except Exception as error:
            height, width = image.shape[1:]
            return Unreadable(path, str(failed(path or Path(f"images[{index}]"), (height, width), error)))

    def _read(self, path: Path) -> Tensor:
        return read_image(path, self.sizes.get(path) or seen_size(path), self.max_pixels)


class Pictures(Dataset[tuple[int, Picture | Unreadable]]):
    """Images as they are, to be looked at through views, each with its place among the sources.

    TIFF files of more than `max_pixels` pixels, or of bands that Pillow does not know, are read window by window, when
    views ask for them. sizes, and what is not decoded: see `Images`.
    """

    def __init__(
        self, sources: Sequence[Source], max_pixels: int | None, sizes: Mapping[Path, tuple[int, int]] | None = None
    ) -> None:
        self.sources, self.max_pixels, self.sizes = sources, max_pixels, sizes or {}

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[int, Picture | Unreadable]:
        source = self.sources[index]
        if not isinstance(source, Path):
            return index, Pixels(source)
        try:
            if self._is_large(source):
                return index, LargeTiff.of(source, self.max_pixels)
            size = self.sizes.get(source) or seen_size(source)
            return index, Pixels(read_image(source, size, self.max_pixels))
        except (UnreadableImage, OSError) as error:
            return index, Unreadable(source, str(error))

    def _is_large(self, path: Path) -> bool:
        if path.suffix.lower() not in SUFFIXES:
            return False
        try:
            height, width = seen_size(path)
        except UnreadableImage:  # of more bands than Pillow knows, or damaged: rasterio says which
            return importlib.util.find_spec("rasterio") is not None
        return self.max_pixels is not None and height * width > self.max_pixels


@dataclass
class Read:
    """What was read of some images: a batch of those that can be used (None without any) with their own pixels."""

    batch: Batch | None
    pixels: list[Tensor]
    unreadable: list[Unreadable]


def collate_items(items: Sequence[Item], size_divisor: int) -> Read:
    """Pad the images among `items` to a batch, whose height and width are multiples of `size_divisor`."""
    usable = [item for item in items if not isinstance(item, Unreadable)]
    batch = collate([sample for sample, _ in usable], size_divisor) if usable else None
    return Read(batch, [image for _, image in usable], [item for item in items if isinstance(item, Unreadable)])
