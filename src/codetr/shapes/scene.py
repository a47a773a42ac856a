"""One picture: background, clutter and objects on top of one another, and who owns which pixel."""

from __future__ import annotations

from colorsys import hsv_to_rgb
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from codetr.shapes.outlines import SHAPES, Outline, Shape, blob, deform, frequencies, strand
from codetr.shapes.textures import background, develop, surface

Window = tuple[slice, slice]

_FINE = 3  # supersampling of the outlines
_LEAST_SHARE, _LEAST_PIXELS = 0.3, 12  # what stays visible of every object
_LEAST_CROWD = 0.7  # and of every crowd
_SMALLEST = 8.0  # pixels, longer side of an object
_TRIES = 6


@dataclass(frozen=True)
class Difficulty:
    """How hard the pictures are.

    objects: mean number of objects of an image, beside the first; 10 at the most. sizes: parameters of the beta
    distribution of an object's size, from 0 for 8 pixels to 1 for the whole image, on a logarithmic scale. typical:
    share of objects in the typical hue of their class, as bananas are mostly yellow; of the others only the shape
    tells the class. tilt: radians that an object may lean to either side, pi for any rotation. camouflage: share of
    the other objects whose colour is close to what is around them. clutter: mean number of things that belong to no
    class. texture: contrast of all surfaces, 1 at the most. tail: exponent of Zipf's law, so the rarest of n classes
    is n ** tail times rarer than the commonest.
    """

    objects: float
    sizes: tuple[float, float]
    typical: float
    tilt: float
    camouflage: float
    clutter: float
    texture: float
    tail: float


@dataclass
class Instance:
    """An object, or a crowd of one class. least: how many of its pixels must stay visible."""

    shape: Shape
    crowd: bool
    least: float


@dataclass
class Scene:
    """What is painted so far.

    canvas: [3, H, W] float32 in about [0, 1]. owner: [H, W], 1 + index of the instance seen there, 0 for none.
    light: [2] float32, the direction (x, y) it comes from.
    """

    canvas: np.ndarray
    owner: np.ndarray
    light: np.ndarray
    shadows: bool
    difficulty: Difficulty
    instances: list[Instance] = field(default_factory=list)

    def mask(self, index: int) -> np.ndarray:
        """[H, W] bool: the visible part of one instance."""
        return self.owner == index + 1

    def hides_too_much(self, window: Window, solid: np.ndarray) -> bool:
        """Whether something on the pixels `solid` of `window` would leave too little of what is there now."""
        below = np.bincount(self.owner[window][solid], minlength=len(self.instances) + 1)[1:]
        return any(self.mask(i).sum() - below[i] < self.instances[i].least for i in below.nonzero()[0].tolist())

    def add(self, outline: Outline, shape: Shape | None, rng: np.random.Generator) -> bool:
        """Paint an outline [pixels] on top; shape None: clutter. False, and nothing painted, where it cannot be."""
        origin, coverage, rim = rasterise(outline)
        least = max(_LEAST_PIXELS, _LEAST_SHARE * float((coverage >= 0.5).sum()))
        window, inner = clip(origin, coverage.shape, self.owner.shape)
        coverage, rim = coverage[inner], rim[inner]
        solid = coverage >= 0.5
        invisible = not coverage.any() or (shape is not None and solid.sum() < least)
        if invisible or self.hides_too_much(window, solid):
            return False
        if self.shadows:
            self.cast_shadow(origin, coverage, rng)
        self.paint(window, coverage, rim, shape, rng)
        if shape is not None:
            self.instances.append(Instance(shape, False, least))
        self.owner[window][solid] = 0 if shape is None else len(self.instances)
        return True

    def paint(
        self, window: Window, coverage: np.ndarray, rim: np.ndarray, shape: Shape | None, rng: np.random.Generator
    ) -> None:
        below = self.canvas[:, *window]
        height, width = coverage.shape
        around = (below * coverage).sum((1, 2)) / coverage.sum()
        if shape is not None and rng.random() < self.difficulty.typical:
            colour = typical_colour(rng, shape)
        else:
            colour = pick_colour(rng, around, self.difficulty.camouflage)
        colours = surface(rng, height, width, colour, rng.choice([0.0, 0.25, 0.5]) * self.difficulty.texture)
        x = np.linspace(-1, 1, width, dtype=np.float32) * self.light[0]
        y = np.linspace(-1, 1, height, dtype=np.float32) * self.light[1]
        shade = 1 + np.float32(rng.uniform(0, 0.35)) * (x + y[:, None])
        shade -= np.float32(rng.choice([0, 0.6], p=[0.6, 0.4])) * rim
        below += (colours * shade - below) * coverage

    def cast_shadow(self, origin: tuple[int, int], coverage: np.ndarray, rng: np.random.Generator) -> None:
        """Darken beside the object, away from the light."""
        reach = 0.06 * max(coverage.shape) + 1
        dy, dx = (-self.light[::-1] * reach).round().astype(int)
        window, inner = clip((max(origin[0], 0) + dy, max(origin[1], 0) + dx), coverage.shape, self.owner.shape)
        soft = Image.fromarray((coverage * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(reach / 3))
        dark = np.asarray(soft, np.float32)[inner] / 255 * np.float32(rng.uniform(0.2, 0.5))
        self.canvas[:, *window] *= 1 - dark


def typical_colour(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """[3] a colour of the hue of a class; neighbours on the colour wheel overlap."""
    hue = (SHAPES.index(shape) + rng.normal(0, 0.4)) / len(SHAPES) % 1
    return np.array(hsv_to_rgb(hue, rng.uniform(0.5, 1), rng.uniform(0.5, 1)), np.float32)


def pick_colour(rng: np.random.Generator, around: np.ndarray, camouflage: float) -> np.ndarray:
    """[3] a colour that stands out from `around` [3], or with probability `camouflage` one that hardly does."""
    if rng.random() < camouflage:
        step = rng.standard_normal(3)
        return (around + step * rng.uniform(0.12, 0.2) / np.linalg.norm(step)).astype(np.float32)
    candidates = rng.random((4, 3))
    distance = np.linalg.norm(candidates - around, axis=1)
    far = distance > 0.3
    return candidates[far.argmax() if far.any() else distance.argmax()].astype(np.float32)


def rasterise(outline: Outline) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """Origin (y, x) of a tight window, and in it [h, w] float32: how much of each pixel is inside, and on the rim."""
    low = np.floor(outline[0].min(0)).astype(int) - 1
    width, height = np.ceil(outline[0].max(0)).astype(int) + 1 - low
    inside, rim = (Image.new("L", (int(width) * _FINE, int(height) * _FINE)) for _ in range(2))
    thick = max(1, round(0.05 * float(max(width, height)) * _FINE))
    for polygon, fill in zip(outline, [255] + [0] * (len(outline) - 1), strict=True):
        points = [tuple(p) for p in ((polygon - low) * _FINE - 0.5).tolist()]
        ImageDraw.Draw(inside).polygon(points, fill=fill)
        ImageDraw.Draw(rim).line([*points, points[0]], fill=255, width=thick)
    coverage, edge = (np.asarray(i.reduce(_FINE), np.float32) / 255 for i in (inside, rim))
    return (int(low[1]), int(low[0])), coverage, edge


def clip(origin: tuple[int, int], size: tuple[int, ...], bounds: tuple[int, ...]) -> tuple[Window, Window]:
    """The part of a window inside an image of `bounds`: as slices of the image and as slices of the window."""
    start = [min(max(o, 0), b) for o, b in zip(origin, bounds, strict=True)]
    stop = [min(max(o + s, a), b) for o, s, a, b in zip(origin, size, start, bounds, strict=True)]
    outer = [slice(a, b) for a, b in zip(start, stop, strict=True)]
    inner = [slice(a - o, b - o) for a, b, o in zip(start, stop, origin, strict=True)]
    return (outer[0], outer[1]), (inner[0], inner[1])


def draw(rng: np.random.Generator, height: int, width: int, difficulty: Difficulty) -> tuple[Image.Image, Scene]:
    """A picture and its scene."""
    angle = rng.uniform(0, 2 * np.pi)
    scene = Scene(
        background(rng, height, width, difficulty.texture),
        np.zeros((height, width), np.int16),
        np.array([np.cos(angle), np.sin(angle)], np.float32),
        bool(rng.random() < 0.4),
        difficulty,
    )
    empty = rng.random() < 0.04
    if not empty and rng.random() < 0.045:
        add_crowd(scene, rng)
    objects = 0 if empty else min(1 + rng.poisson(difficulty.objects), 10)
    clutter = rng.poisson(difficulty.clutter)
    largest = 1.1 * min(height, width)
    sizes = np.concatenate(
        [
            _SMALLEST * (largest / _SMALLEST) ** rng.beta(*difficulty.sizes, objects),
            _SMALLEST * (largest / 2 / _SMALLEST) ** rng.random(clutter),
        ]
    )
    labels = np.concatenate([rng.choice(len(SHAPES), objects, p=frequencies(difficulty.tail)), np.full(clutter, -1)])
    # Mostly the large below the small: the other way round, little would stay visible.
    for i in np.argsort(-sizes * rng.lognormal(0, 0.5, len(sizes))):
        place(scene, float(sizes[i]), SHAPES[labels[i]] if labels[i] >= 0 else None, rng)
    return develop(rng, scene.canvas), scene


def place(scene: Scene, size: float, shape: Shape | None, rng: np.random.Generator) -> None:
    """Add an object, or clutter, of about `size` pixels where it hides no other too much; none if there is no room."""
    extent = np.array(scene.owner.shape[::-1])
    for _ in range(_TRIES):
        if shape is not None:
            outline = deform(shape.draw(rng), rng, scene.difficulty.tilt)
        elif rng.random() < 0.4:
            outline = deform(blob(rng), rng, np.pi)
        else:
            size = float(extent.max() * rng.uniform(0.3, 1))
            outline = deform(strand(rng, rng.uniform(1, 3.5) / size), rng, np.pi, stretch=0, shear=0)
        margin = np.minimum(size * rng.uniform(-0.1, 0.5), extent / 2)
        centre = rng.uniform(margin, extent - margin)
        if scene.add([polygon * size + centre for polygon in outline], shape, rng):
            return


def add_crowd(scene: Scene, rng: np.random.Generator) -> None:
    """Many tiny objects of one class; the region around them is one instance."""
    height, width = scene.owner.shape
    shape = SHAPES[rng.choice(len(SHAPES), p=frequencies(scene.difficulty.tail))]
    count, size = int(rng.integers(16, 45)), rng.uniform(5, 8)
    spread = size * np.sqrt(count) * rng.uniform(0.25, 0.45, 2)
    centres = rng.uniform(0.2, 0.8, 2) * [width, height] + rng.standard_normal((count, 2)) * spread
    region = Image.new("1", (width, height))
    for x, y in centres:
        scene.add(
            [polygon * size + (x, y) for polygon in deform(shape.draw(rng), rng, scene.difficulty.tilt)], None, rng
        )
        ImageDraw.Draw(region).ellipse((x - size, y - size, x + size, y + size), fill=1)
    mask = np.array(region)
    scene.instances.append(Instance(shape, True, _LEAST_CROWD * float(mask.sum())))
    scene.owner[mask] = len(scene.instances)
