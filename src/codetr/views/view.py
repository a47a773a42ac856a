"""A view of a picture: a part of it, mirrored, at another scale, and the way back for what was found in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from codetr.data.geometry import Window
from codetr.data.segmentations import placed
from codetr.types import Detections

Box = tuple[float, float, float, float]
EVERYWHERE: Box = (-torch.inf, -torch.inf, torch.inf, torch.inf)


class Picture(Protocol):
    """An image that is read part by part, so that it need not be in memory.

    size: (height, width) in pixels.
    zoom: network pixels, times those that a model's transform makes of it.
    """

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def zoom(self) -> float: ...

    def read(self, window: Window) -> Tensor:
        """[3, h, w] uint8 RGB of a window within the picture. Raises UnreadableImage."""
        ...


Found = dict[str, Detections]
"""What was found in a picture, in its pixels, by the name of who found it."""

See = Callable[[Sequence[Picture]], list[Found]]
"""Finds the objects of each picture."""


@dataclass(frozen=True)
class Pixels:
    """An image in memory: [3, H, W] uint8 RGB."""

    image: Tensor
    zoom: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[-2], self.image.shape[-1]

    def read(self, window: Window) -> Tensor:
        return self.image[:, window.top : window.top + window.height, window.left : window.left + window.width]


def whole(picture: Picture) -> Window:
    return Window(0, 0, *picture.size)


@dataclass(frozen=True)
class View:
    """How to look at a picture.

    window: what is seen of it, in its pixels.
    flip, vertical_flip: left and right, top and bottom change places.
    zoom: times as many rows and columns for the network.
    core: (left, top, right, bottom) in pixels of the picture: what has its centre elsewhere is left to other views.
    """

    window: Window
    flip: bool = False
    vertical_flip: bool = False
    zoom: float = 1.0
    core: Box = EVERYWHERE

    @property
    def box(self) -> Box:
        """The window as (left, top, right, bottom)."""
        top, left, height, width = self.window
        return left, top, left + width, top + height

    @property
    def flips(self) -> tuple[int, ...]:
        """The mirrored dimensions: 0 for rows, 1 for columns."""
        return (0,) * self.vertical_flip + (1,) * self.flip

    def back(self, found: Detections, size: tuple[int, int]) -> Detections:
        """Detections in pixels of the view -> in pixels of the picture, of (height, width) `size`."""
        top, left, height, width = self.window
        x0, y0, x1, y1 = found.boxes_xyxy.unbind(1)
        if self.flip:
            x0, x1 = width - x1, width - x0
        if self.vertical_flip:
            y0, y1 = height - y1, height - y0
        boxes = torch.stack([x0 + left, y0 + top, x1 + left, y1 + top], 1)
        if found.rle is None or (self.window == Window(0, 0, *size) and not self.flips):
            return replace(found, boxes_xyxy=boxes)
        rle = [placed(one, (top, left), size, self.flips) for one in found.rle]
        return replace(found, boxes_xyxy=boxes, rle=rle)


@dataclass(frozen=True)
class Part:
    """What a view shows of a picture, itself a picture."""

    of: Picture
    view: View

    @property
    def size(self) -> tuple[int, int]:
        return self.view.window.height, self.view.window.width

    @property
    def zoom(self) -> float:
        return self.of.zoom * self.view.zoom

    def read(self, window: Window) -> Tensor:
        top, left, height, width = window
        if self.view.vertical_flip:
            top = self.size[0] - top - height
        if self.view.flip:
            left = self.size[1] - left - width
        outer = self.view.window
        pixels = self.of.read(Window(outer.top + top, outer.left + left, height, width))
        return pixels.flip([dimension + 1 for dimension in self.view.flips]) if self.view.flips else pixels
