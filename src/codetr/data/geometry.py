"""Where the pixels of an image go, drawn before there are any.

A transform that is made of flips, turns, resizes, windows and canvases alone becomes a few steps for an image of known
size. It draws the numbers that it would draw itself, and images and masks get the same pixels; but boxes go through all
steps at once, and of an image that is made much smaller the decoder need not make every pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Image, wrap


class RandomSizeCrop(v2.Transform):
    """Crop a window whose height and width are drawn, each on its own, from min_size..max_size pixels.

    Never larger than the image. Source: the training recipe of DETR (arXiv 2005.12872, appendix A.4).
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        super().__init__()
        self.min_size, self.max_size = min_size, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        canvas = v2.query_size(flat_inputs)
        window = [random_integer(min(self.min_size, side), min(self.max_size, side)) for side in canvas]
        top, left = (random_integer(0, side - part) for side, part in zip(canvas, window, strict=True))
        return {"top": top, "left": left, "height": window[0], "width": window[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        part = self._call_kernel(F.crop, inpt, **params)
        return wrap(packed(part.as_subclass(Tensor)), like=part) if isinstance(part, Image) else part


def packed(image: Tensor) -> Tensor:
    """Channels last and without gaps: torchvision resizes nothing else as fast, nor keeps the layout."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def random_integer(low: int, high: int) -> int:
    """Of low..high, both included. Random numbers: torch's."""
    return int(torch.randint(low, high + 1, ()))


class RandomScaledCrop(v2.Transform):
    """Draw a factor of `scale_range`, cut out a window that fills `side` x `side` pixels at that scale, and resize it.

    What is smaller than the window is taken whole, so that fewer pixels come out. Only the window is resized: of a
    large picture this costs what it costs of a small one. Factors of doubling and of halving are as frequent.
    """

    interpolation = v2.InterpolationMode.BILINEAR
    antialias = True

    def __init__(self, side: int, scale_range: tuple[float, float]) -> None:
        super().__init__()
        self.side, self.scale_range = side, scale_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        canvas = v2.query_size(flat_inputs)
        low, high = map(math.log, self.scale_range)
        factor = math.exp(low + (high - low) * float(torch.rand(())))
        window = [min(max(round(self.side / factor), 1), side) for side in canvas]
        top, left = (random_integer(0, side - part) for side, part in zip(canvas, window, strict=True))
        size = [min(max(round(part * factor), 1), self.side) for part in window]
        return {"top": top, "left": left, "height": window[0], "width": window[1], "size": size}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        how = {"interpolation": self.interpolation, "antialias": self.antialias}
        return self._call_kernel(F.resized_crop, inpt, **params, **how)


class RandomTurn(v2.Transform):
    """Turn by 90, 180 or 270 degrees, each as often."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"quarters": random_integer(1, 3)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, BoundingBoxes) and not len(inpt) and params["quarters"] != 2:
            # torchvision 0.30 leaves the canvas of no boxes as it was.
            return BoundingBoxes(inpt, format=inpt.format, canvas_size=inpt.canvas_size[::-1])
        return self._call_kernel(F.rotate, inpt, 90 * params["quarters"], expand=True)


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
        return wrap(_on_canvas(inpt.as_subclass(Tensor), self.canvas, self.fill), like=inpt)


def _on_canvas(image: Tensor, canvas: int, fill: int) -> Tensor:
    """As F.pad does it, but in the layout of the image."""
    channels, height, width = image.shape
    padded = image.new_full((canvas, canvas, channels), fill).permute(2, 0, 1)
    padded[:, :height, :width] = image
    return padded


_BILINEAR = v2.InterpolationMode.BILINEAR
# The long side in short sides, at most: a resize to a long side of as many pixels leaves one of the short side.
_THINNEST = 64


class Flip(NamedTuple):
    """Left becomes right (dimension -1), or top becomes bottom (-2)."""

    dimension: int


class Transpose(NamedTuple):
    """Rows become columns."""


class Resize(NamedTuple):
    """To (height, width) pixels."""

    height: int
    width: int
    interpolation: v2.InterpolationMode | str
    antialias: bool | None


class Window(NamedTuple):
    """Rows top..top + height and columns left..left + width."""

    top: int
    left: int
    height: int
    width: int


class Canvas(NamedTuple):
    """The image in the upper left corner of height = width = `side` pixels of the colour `fill`."""

    side: int
    fill: int


Colour = Callable[[Image], Image]  # changes pixels where they are
Step = Flip | Transpose | Resize | Window | Canvas


class Axis(NamedTuple):
    """Rows or columns of an image, and where those of its file went.

    side: pixels. scale, shift: what lies at x in the file lies at scale * x + shift.
    low, high: where what is seen of the file begins and ends.
    """

    side: int
    scale: float
    shift: float
    low: float
    high: float

    def mirrored(self) -> Axis:
        return Axis(self.side, -self.scale, self.side - self.shift, self.side - self.high, self.side - self.low)

    def resized(self, side: int) -> Axis:
        return Axis(side, *(value * side / self.side for value in self[1:]))

    def cut(self, start: int, side: int) -> Axis:
        seen = max(self.low - start, 0), min(self.high - start, side)
        return Axis(side, self.scale, self.shift - start, *seen)

    def extended(self, side: int) -> Axis:
        return self._replace(side=side)


class Geometry(NamedTuple):
    """Steps that were drawn for an image, and where they put its rows and columns.

    rows, columns: of the image; where it is `transposed`, of columns and rows of the file.
    """

    file_size: tuple[int, int]
    rows: Axis
    columns: Axis
    steps: tuple[Step, ...] = ()
    transposed: bool = False

    @classmethod
    def of_file(cls, size: tuple[int, int]) -> Geometry:
        """Nothing done yet to an image of (height, width) `size`, except that one which is more than 64 times as long
        as wide is made shorter: or resizing would leave nothing of its width (torchvision: int(0.67) pixels), or make
        a long side of any size."""
        rows, columns = (Axis(side, 1.0, 0.0, 0.0, float(side)) for side in size)
        geometry, most = cls(size, rows, columns), _THINNEST * min(size)
        if max(size) <= most:
            return geometry
        return geometry.then(Resize(min(size[0], most), min(size[1], most), _BILINEAR, True))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) behind all steps."""
        return self.rows.side, self.columns.side

    @property
    def scale(self) -> tuple[float, float]:
        """(rows, columns) pixels per pixel of the file."""
        return abs(self.rows.scale), abs(self.columns.scale)

    @property
    def first_size(self) -> tuple[int, int] | None:
        """(height, width) that all of the file is resized to, smoothly, before anything but a flip; else None."""
        first = next((step for step in self.steps if not isinstance(step, Flip)), None)
        smooth = isinstance(first, Resize) and first.antialias and first.interpolation in (_BILINEAR, _BILINEAR.value)
        return (first.height, first.width) if isinstance(first, Resize) and smooth else None

    def then(self, step: Step) -> Geometry:
        rows, columns = self.rows, self.columns
        match step:
            case Flip(dimension=-1):
                columns = columns.mirrored()
            case Flip():
                rows = rows.mirrored()
            case Transpose():
                rows, columns = columns, rows
            case Resize():
                rows, columns = rows.resized(step.height), columns.resized(step.width)
            case Window():
                rows, columns = rows.cut(step.top, step.height), columns.cut(step.left, step.width)
            case Canvas():
                rows, columns = rows.extended(step.side), columns.extended(step.side)
        transposed = self.transposed != isinstance(step, Transpose)
        return Geometry(self.file_size, rows, columns, (*self.steps, step), transposed)

    def zoomed(self, factor: float) -> Geometry:
        """The same with `factor` times as many rows and columns, of which no pixels are made in between."""
        steps: list[Step] = list(self.steps)
        if not any(isinstance(step, Resize) for step in steps):
            steps.insert(0, Resize(*self.file_size, _BILINEAR, True))
        first = next(place for place, step in enumerate(steps) if isinstance(step, Resize))
        rows, columns = (Axis(side, 1.0, 0.0, 0.0, float(side)) for side in self.file_size)
        found = Geometry(self.file_size, rows, columns)
        for place, step in enumerate(steps):
            found = found.then(step if place < first else _zoomed(step, factor))
        return found

    def boxes(self, boxes: Tensor) -> Tensor:
        """xyxy [n, 4] in pixels of the file -> float32 in pixels of the image, of what is seen of them."""
        x, y = self.columns, self.rows
        moved = boxes.numpy()[:, [1, 0, 3, 2]] if self.transposed else boxes.numpy()
        moved = moved * np.array([x.scale, y.scale] * 2) + np.array([x.shift, y.shift] * 2)
        if x.scale < 0:
            moved = moved[:, [2, 1, 0, 3]]
        if y.scale < 0:
            moved = moved[:, [0, 3, 2, 1]]
        seen = np.minimum(np.maximum(moved, np.array([x.low, y.low] * 2)), np.array([x.high, y.high] * 2))
        return torch.from_numpy(seen.astype(np.float32))

    def masks(self, masks: Tensor) -> Tensor:
        """[n, H, W] of the file -> of the image."""
        for step in self.steps:
            match step:
                case Flip():
                    masks = masks.flip(step.dimension)
                case Transpose():
                    masks = masks.transpose(1, 2)
                case Resize():
                    masks = F.resize_mask(masks, [step.height, step.width], step.interpolation)
                case Window():
                    masks = _window(masks, step)
                case Canvas():
                    masks = F.pad_mask(masks, [0, 0, step.side - masks.shape[2], step.side - masks.shape[1]])
        return masks

    def image(self, image: Tensor, factor: int = 1, colour: Colour | None = None) -> Tensor:
        """[3, H, W] uint8 of the file -> of the image, channels last.

        factor: the image has a `factor`-th of the file's pixels per side, rounded up, which `first_size` must allow.
        colour: applied to the image as in the file, but where a window of it is cut out first, to the window alone.
        """
        steps = list(self.steps)
        if steps and isinstance(steps[0], Window):
            image = _changed(image, steps.pop(0))
        if colour is not None:
            image = packed(colour(Image(image)).as_subclass(Tensor))
        if factor > 1:
            # Before all flips, which change nothing but the side on which the last pixel is partly beyond the file.
            resize = next(step for step in steps if isinstance(step, Resize))
            steps.remove(resize)
            image = _resized_part(image, resize, (self.file_size[0] / factor, self.file_size[1] / factor))
        for step in steps:
            image = _changed(image, step)
        return image


def _zoomed(step: Step, factor: float) -> Step:
    match step:
        case Resize():
            return step._replace(height=_times(step.height, factor), width=_times(step.width, factor))
        case Canvas():
            return step._replace(side=_times(step.side, factor))
        case Window():
            return Window(
                *(round(value * factor) for value in step[:2]), *(_times(value, factor) for value in step[2:])
            )
    return step


def _times(side: int, factor: float) -> int:
    return max(1, round(side * factor))


def _changed(image: Tensor, step: Step) -> Tensor:
    match step:
        case Flip():
            return image.flip(step.dimension)
        case Transpose():
            return packed(image.transpose(1, 2))
        case Resize():
            size = [step.height, step.width]
            return F.resize_image(packed(image), size, step.interpolation, antialias=step.antialias)
        case Window():
            return _window(image, step)
        case Canvas():
            return _on_canvas(image, step.side, step.fill)


def _window(pixels: Tensor, step: Window) -> Tensor:
    return pixels[:, step.top : step.top + step.height, step.left : step.left + step.width]


def _resized_part(image: Tensor, step: Resize, part: tuple[float, float]) -> Tensor:
    """As `F.resize_image` with antialiasing, but of the first `part` (rows, columns) of the pixels, fractions of a
    pixel included, which no public function resizes."""
    scale = step.height / part[0], step.width / part[1]
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return torch.ops.aten._upsample_bilinear2d_aa(batch, [step.height, step.width], False, *scale)[0]


_GROUPS = v2.Compose, v2.RandomApply
_FLIPS = {v2.RandomHorizontalFlip: Flip(-1), v2.RandomVerticalFlip: Flip(-2)}
_SOMETIMES = v2.RandomApply, v2.RandomHorizontalFlip, v2.RandomVerticalFlip
_TURNS: dict[int, tuple[Step, ...]] = {  # by the number of quarters, to the left
    1: (Transpose(), Flip(-2)),
    2: (Flip(-1), Flip(-2)),
    3: (Transpose(), Flip(-1)),
}
_SINGLE = (
    *(v2.Identity, *_FLIPS, v2.RandomShortestSize, v2.ScaleJitter, v2.Resize),
    *(RandomSizeCrop, RandomScaledCrop, RandomTurn, PadTo),
)


def is_geometric(transform: Any) -> bool:
    """Whether `draw` knows all of its parts. Subclasses may do anything."""
    if type(transform) in _GROUPS:
        return all(map(is_geometric, transform.transforms))
    return type(transform) in _SINGLE


def draw(transform: Any, size: tuple[int, int]) -> Geometry:
    """What a transform that `is_geometric` does to an image of (height, width) `size`. Random numbers: torch's."""
    return _drawn(transform, Geometry.of_file(size))


def _drawn(transform: Any, before: Geometry) -> Geometry:
    if isinstance(transform, _SOMETIMES) and torch.rand(1) >= transform.p:
        return before
    if isinstance(transform, _GROUPS):
        for part in transform.transforms:
            before = _drawn(part, before)
        return before
    for step in _steps(transform, before.size):
        before = before.then(step)
    return before


def _steps(transform: Any, size: tuple[int, int]) -> tuple[Step, ...]:
    """Of a single transform, on an image of (height, width) `size`."""
    empty = torch.empty(0, *size)  # no channel: what has a size costs nothing
    if type(transform) in _FLIPS:
        return (_FLIPS[type(transform)],)
    if isinstance(transform, RandomTurn):
        return _TURNS[transform.make_params([empty])["quarters"]]
    if isinstance(transform, RandomSizeCrop):
        return (Window(**transform.make_params([empty])),)
    if isinstance(transform, PadTo):
        return (Canvas(transform.canvas, transform.fill),)
    if isinstance(transform, v2.Identity):
        return ()
    if isinstance(transform, v2.Resize):
        height, width = F.resize(empty, transform.size, max_size=transform.max_size).shape[1:]
        return (Resize(height, width, transform.interpolation, transform.antialias),)
    params = transform.make_params([empty])
    height, width = params.pop("size")
    resize = Resize(height, width, transform.interpolation, transform.antialias)
    return (Window(**params), resize) if isinstance(transform, RandomScaledCrop) else (resize,)
