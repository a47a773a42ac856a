"""What a checkpoint and an exported file have in common: images in, objects out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from codetr.data.images import UnreadableImage
from codetr.data.transforms import Transform
from codetr.errors import UserError
from codetr.inference.result import Result
from codetr.inference.sources import (
    MAX_PIXELS,
    Image,
    Images,
    Pictures,
    Read,
    Source,
    Unreadable,
    collate_items,
    find_sources,
)
from codetr.types import MAIN, Batch, Detections
from codetr.views import Eye, Found, Picture, Pixels, Track, Views, listed, through, untracked


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
    views: by which images are looked at, see `codetr.views`; none: as a whole.
    """

    path: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] | None
    transform: Transform
    size_divisor: int
    config: dict[str, Any]
    step: int
    views: tuple[Views, ...] = field(default=(), kw_only=True)

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

    def look(
        self, picture: Picture, score_threshold: float, views: Sequence[Views], track: Track = untracked
    ) -> Detections:
        """The objects of a picture with at least this score, through views of it, in its pixels, on the CPU.

        track: shows how far it is. Raises UnreadableImage for a part that cannot be read or transformed.
        """
        least = score_threshold
        for own in views:
            least = own.merge.floor(least)

        def find(batch: Batch) -> list[Found]:
            return [{MAIN: found} for found in self.detect(batch, least)]

        eye = Eye(find, self.transform, self.size_divisor, self.device)
        (found,) = through(views, eye, track)([picture])
        return found[MAIN].above(score_threshold)

    def predict(
        self,
        images: Image | Sequence[Image],
        score_threshold: float = 0.3,
        batch_size: int = 4,
        num_workers: int = 0,
        max_pixels: int | None = MAX_PIXELS,
        views: Views | Sequence[Views] | None = None,
    ) -> list[Result]:
        """Find objects in every image; the results come in the order of the images.

        images: a file, a folder, a pattern such as "photos/**/*.jpg", a Pillow image, an array [H, W, 3] or a tensor
            [3, H, W] of uint8 in RGB, or a list of these.
        score_threshold: detections below it are left out.
        batch_size: images that the network sees at once; of views they say themselves how many.
        num_workers: processes that read files.
        max_pixels: larger images are refused before they are decoded; through tiles, TIFF files are read in parts.
        views: `Tiles(...)`, `TTA(...)` of `codetr.views`, or a list of them, each through the next; (): none; None:
            those of the model.

        Raises UserError for names without a file, for what is no image, and for an image that cannot be read.
        """
        results = []
        sources = find_sources(images, max_pixels)
        for one in self.stream(sources, score_threshold, batch_size, num_workers, max_pixels, views=views):
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
        views: Views | Sequence[Views] | None = None,
        track: Track = untracked,
    ) -> Iterator[Result | Unreadable]:
        """As `predict`, one result after the other, each with its pixels: workers read files while the detector runs.

        What cannot be read comes last of its batch, so that who stops at it has what was found beside it. sizes:
        (height, width) of files, where annotations tell them (see `Images`). track: shows how far the views of an image
        are.
        """
        chosen = self.views if views is None else listed(views)
        if chosen:
            pictures = Pictures(sources, max_pixels, sizes)
            yield from self._through(chosen, pictures, score_threshold, num_workers, track)
            return
        loader: Iterable[Read] = DataLoader(
            Images(sources, self.transform, max_pixels, sizes),
            batch_size,
            num_workers=num_workers,
            collate_fn=partial(collate_items, size_divisor=self.size_divisor),
            pin_memory=self.device.type == "cuda",
        )
        for read in loader:
            found = self.detect(read.batch.to(self.device), score_threshold) if read.batch is not None else []
            indices = read.batch.image_ids.tolist() if read.batch is not None else []
            for i, pixels, detections in zip(indices, read.pixels, found, strict=True):
                height, width = pixels.shape[1:]
                yield self._result(sources[i], detections.to("cpu"), (height, width), pixels)
            yield from read.unreadable

    def _through(
        self, views: Sequence[Views], pictures: Pictures, score_threshold: float, num_workers: int, track: Track
    ) -> Iterator[Result | Unreadable]:
        """Image by image: what is wrong with one is not the others' matter."""
        reader = DataLoader(pictures, batch_size=1, num_workers=num_workers, collate_fn=itemgetter(0))
        for i, picture in reader:
            if isinstance(picture, Unreadable):
                yield picture
                continue
            source = pictures.sources[i]
            try:
                found = self.look(picture, score_threshold, views, track)
            except UnreadableImage as error:
                path = source if isinstance(source, Path) else None
                yield Unreadable(path, f"{path or f'images[{i}]'}: {error}")
                continue
            yield self._result(source, found, picture.size, picture.image if isinstance(picture, Pixels) else None)

    def _result(self, source: Source, found: Detections, size: tuple[int, int], pixels: Tensor | None) -> Result:
        ids = self.category_ids or tuple(range(len(self.class_names)))
        path = source if isinstance(source, Path) else None
        return Result(found, size, self.class_names, ids, path, pixels)


_LARGEST_DIVISOR = 4096


def size_divisor(value: object, path: str | Path) -> int:
    """What a file says to be one. Raises UserError where it cannot be."""
    if type(value) is not int or not 0 < value <= _LARGEST_DIVISOR:
        raise UserError(f"{path}: its data.size_divisor is {value}: must be from 1 to {_LARGEST_DIVISOR} pixels")
    return value
