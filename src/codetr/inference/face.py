"""What a checkpoint and an exported file have in common: images in, objects out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from codetr.data.transforms import Transform
from codetr.errors import UserError
from codetr.inference.result import Result
from codetr.inference.sources import MAX_PIXELS, Image, Images, Read, Source, Unreadable, collate_items, find_sources
from codetr.tiles import Tiles
from codetr.types import Batch, Detections


@dataclass
class Face(ABC):
    """A detector that is ready for images.

    path: of the file.
    class_names: of label 0, 1, ...
    category_ids: of each class in the data set that it was trained on; None where the file does not tell.
    transform: the preprocessing of an image.
    size_divisor: batches are padded to multiples of so many pixels.
    config: what the file says of how it was made, in plain containers; only what may be built (see `codetr.trust`).
    step: of the optimizer, when it was saved.
    tiles: how images are cut, see `codetr.tiles`; None: they are not.
    """

    path: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] | None
    transform: Transform
    size_divisor: int
    config: dict[str, Any]
    step: int
    tiles: Tiles | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def finds_masks(self) -> bool: ...

    @abstractmethod
    def detect(self, batch: Batch, score_threshold: float) -> list[Detections]:
        """The objects of a batch with at least this score, in pixels of the original images; with their masks if it
        finds some."""

    def predict(
        self,
        images: Image | Sequence[Image],
        score_threshold: float = 0.3,
        batch_size: int = 4,
        num_workers: int = 0,
        max_pixels: int | None = MAX_PIXELS,
    ) -> list[Result]:
        """Find objects in every image; the results come in the order of the images.

        images: a file, a folder, a pattern such as "photos/**/*.jpg", a Pillow image, an array [H, W, 3] or a tensor
            [3, H, W] of uint8 in RGB, or a list of these.
        score_threshold: detections below it are left out.
        batch_size: images that the network sees at once.
        num_workers: processes that read files.
        max_pixels: larger images are refused before they are decoded.

        Raises UserError for names without a file, for what is no image, and for an image that cannot be read.
        """
        results = []
        for one in self.stream(find_sources(images, max_pixels), score_threshold, batch_size, num_workers, max_pixels):
            if isinstance(one, Unreadable):
                raise UserError(one.reason)
            results.append(one if one.path is None else replace(one, pixels=None))  # a folder may not fit into memory
        return results

    def stream(
        self,
        sources: Sequence[Source],
        score_threshold: float,
        batch_size: int,
        num_workers: int,
        max_pixels: int | None,
        sizes: Mapping[Path, tuple[int, int]] | None = None,
    ) -> Iterator[Result | Unreadable]:
        """As `predict`, one result after the other, each with its pixels: workers read files while the detector runs.

        What cannot be read comes last of its batch, so that who stops at it has what was found beside it. sizes:
        (height, width) of files, where annotations tell them (see `Images`).
        """
        loader: Iterable[Read] = DataLoader(
            Images(sources, self.transform, max_pixels, sizes),
            batch_size,
            num_workers=num_workers,
            collate_fn=partial(collate_items, size_divisor=self.size_divisor),
            pin_memory=self.device.type == "cuda",
        )
        ids = self.category_ids or tuple(range(len(self.class_names)))
        for read in loader:
            found = self.detect(read.batch.to(self.device), score_threshold) if read.batch is not None else []
            indices = read.batch.image_ids.tolist() if read.batch is not None else []
            for i, pixels, detections in zip(indices, read.pixels, found, strict=True):
                path = source if isinstance(source := sources[i], Path) else None
                height, width = pixels.shape[1:]
                yield Result(detections.to("cpu"), (height, width), self.class_names, ids, path, pixels)
            yield from read.unreadable


_LARGEST_DIVISOR = 4096


def size_divisor(value: object, path: str | Path) -> int:
    """What a file says to be one. Raises UserError where it cannot be."""
    if type(value) is not int or not 0 < value <= _LARGEST_DIVISOR:
        raise UserError(f"{path}: its data.size_divisor is {value}: must be from 1 to {_LARGEST_DIVISOR} pixels")
    return value
