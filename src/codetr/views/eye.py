"""From a detector of batches to one of pictures, and through views to one of larger pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from codetr.data.collate import collate
from codetr.data.dataset import Sample
from codetr.data.geometry import draw, is_geometric
from codetr.data.transforms import Transform, failed, placed, transformed, without_objects
from codetr.errors import UserError
from codetr.types import Batch
from codetr.views.kinds import Track, Views, untracked
from codetr.views.view import Found, Picture, See, whole


@dataclass(frozen=True)
class Eye:
    """Looks at pictures as a prediction does: each is transformed, and all are padded to one batch.

    find: a batch -> what is found in each of its images, in pixels of what the batch calls their files.
    transform, size_divisor: of the model.
    device: where `find` wants its batches.
    """

    find: Callable[[Batch], Sequence[Found]]
    transform: Transform
    size_divisor: int
    device: torch.device

    def __call__(self, pictures: Sequence[Picture]) -> list[Found]:
        """Raises UnreadableImage for a picture that cannot be read or transformed."""
        samples = [self._sample(picture, i) for i, picture in enumerate(pictures)]
        found = self.find(collate(samples, self.size_divisor).to(self.device))
        return [{name: own.to("cpu") for name, own in one.items()} for one in found]

    def _sample(self, picture: Picture, number: int) -> Sample:
        sample = without_objects(picture.read(whole(picture)), number)
        if picture.zoom != 1 and not is_geometric(self.transform):
            raise UserError(
                "views: scales other than 1 need a transform of resizes and canvases alone, and the model's has other "
                "parts; scales=[1]"
            )
        try:
            if picture.zoom == 1:
                return transformed(sample, self.transform)
            return placed(sample, draw(self.transform, picture.size).zoomed(picture.zoom))
        except Exception as error:
            raise failed(Path("a view"), picture.size, error) from error


def through(views: Sequence[Views], see: See, track: Track = untracked) -> See:
    """`see` through all these views, the first of which divides the picture: with [tiles, tta] each tile is augmented.

    track: shows how far the first is.
    """
    for number, own in reversed(list(enumerate(views))):
        see = partial(own, see, track=track if number == 0 else untracked)
    return see


def made(config: Mapping[str, Any], build: Callable[[Any], Any]) -> dict[str, Views]:
    """The views of a configuration's group `views`, by their names; those that are null are left out. build: makes an
    object of each. Raises UserError for what is none."""
    if not isinstance(config, Mapping):
        raise UserError(f"views={config!r:.40}: give names of the group, views=tiles or views=[tiles,tta]")
    found = {name: build(part) for name, part in config.items() if part is not None}
    for name, one in found.items():
        if not isinstance(one, Views):
            raise UserError(f"views.{name} is a {type(one).__name__}, which is no codetr.views.Views")
    return found


def listed(views: Views | Sequence[Views]) -> tuple[Views, ...]:
    """Raises UserError for what are no views."""
    given = tuple(views) if isinstance(views, (list, tuple)) else (views,)
    if not all(isinstance(one, Views) for one in given):
        raise UserError(f"views={views!r:.60}: give codetr.views.Tiles(...), TTA(...), or a list of such")
    return given
