"""What the objects are: outlines of 15 shape families, and of the clutter that is none of them.

An outline is a list of closed polygons [n, 2] (x, y): first the border, then the holes. It has no fixed scale until
`deform` has fitted it into the unit box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Outline = list[np.ndarray]


def _polar(radii: np.ndarray | float, angles: np.ndarray) -> np.ndarray:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _turn(points: int) -> np.ndarray:
    return np.linspace(0, 2 * np.pi, points, endpoint=False)


def _disc(rng: np.random.Generator) -> Outline:
    return [_polar(1, _turn(48))]


def _ring(rng: np.random.Generator) -> Outline:
    return [_polar(1, _turn(48)), _polar(rng.uniform(0.4, 0.7), _turn(48))]


def _half_disc(rng: np.random.Generator) -> Outline:
    return [_polar(1, np.linspace(0, np.pi, 28))]


def _crescent(rng: np.random.Generator) -> Outline:
    """The unit disc without a disc of `radius` at (`shift`, 0); the two circles meet at x = `meet`."""
    shift, radius = rng.uniform(0.4, 0.6), rng.uniform(0.75, 0.95)
    meet = (1 + shift**2 - radius**2) / (2 * shift)
    outer, inner = np.arccos(meet), np.arctan2(np.sqrt(1 - meet**2), meet - shift)
    back = _polar(radius, np.linspace(2 * np.pi - inner, inner, 24)) + np.array([shift, 0])
    return [np.concatenate([_polar(1, np.linspace(outer, 2 * np.pi - outer, 36)), back[1:-1]])]


def _rectangle(rng: np.random.Generator) -> Outline:
    return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])]


def _triangle(rng: np.random.Generator) -> Outline:
    return [_polar(1, _turn(3))]


def _hexagon(rng: np.random.Generator) -> Outline:
    return [_polar(1, _turn(6))]


def _star(rng: np.random.Generator) -> Outline:
    tips = int(rng.integers(5, 7))
    return [_polar(np.tile([1, rng.uniform(0.36, 0.5)], tips), _turn(2 * tips))]


def _cross(rng: np.random.Generator) -> Outline:
    w = rng.uniform(0.22, 0.38)
    corner = np.array([[1, -w], [1, w], [w, w]])
    quarter = np.array([[0, 1], [-1, 0]])
    return [np.concatenate([corner @ np.linalg.matrix_power(quarter, k) for k in range(4)])]


def _arrow(rng: np.random.Generator) -> Outline:
    shaft, head, neck = rng.uniform(0.15, 0.28), rng.uniform(0.55, 0.75), rng.uniform(0, 0.3)
    half = np.array([[1, 0], [neck, head], [neck, shaft], [-1, shaft]])
    return [np.concatenate([half, half[:0:-1] * [1, -1]])]


def _heart(rng: np.random.Generator) -> Outline:
    t = _turn(48)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([16 * np.sin(t) ** 3, y], 1)]


def _teardrop(rng: np.random.Generator) -> Outline:
    t = _turn(48)
    return [np.stack([np.cos(t), 0.8 * np.sin(t) * np.sin(t / 2) ** rng.uniform(1.5, 2.5)], 1)]


def _gear(rng: np.random.Generator) -> Outline:
    teeth = int(rng.integers(7, 10))
    base = rng.uniform(0.68, 0.78)
    angles = (np.arange(teeth)[:, None] + [-0.3, -0.19, 0.19, 0.3]).ravel() * 2 * np.pi / teeth
    return [_polar(np.tile([base, 1, 1, base], teeth), angles), _polar(rng.uniform(0.22, 0.38), _turn(24))]


def _l_piece(rng: np.random.Generator) -> Outline:
    w, v, long = rng.uniform(0.3, 0.45), rng.uniform(0.3, 0.45), rng.uniform(1.1, 1.6)
    return [np.array([[0, 0], [1, 0], [1, w], [v, w], [v, long], [0, long]])]


def _bolt(rng: np.random.Generator) -> Outline:
    x = rng.uniform(0.85, 1.2)
    right = np.array([[0.15, -1], [-0.6 * x, 0.18], [0.02, 0.1]])
    return [np.concatenate([right, -right])]


@dataclass(frozen=True)
class Shape:
    """A class of the data set. Category ids have gaps and do not follow the frequency, as COCO's."""

    name: str
    supercategory: str
    category_id: int
    draw: Callable[[np.random.Generator], Outline]


#: From the commonest to the rarest.
SHAPES = (
    Shape("disc", "round", 1, _disc),
    Shape("triangle", "polygon", 13, _triangle),
    Shape("rectangle", "polygon", 11, _rectangle),
    Shape("star", "symbol", 20, _star),
    Shape("half disc", "round", 4, _half_disc),
    Shape("ring", "round", 2, _ring),
    Shape("cross", "symbol", 21, _cross),
    Shape("hexagon", "polygon", 14, _hexagon),
    Shape("arrow", "symbol", 24, _arrow),
    Shape("crescent", "round", 6, _crescent),
    Shape("heart", "symbol", 27, _heart),
    Shape("L-piece", "tool", 35, _l_piece),
    Shape("teardrop", "round", 9, _teardrop),
    Shape("gear", "tool", 31, _gear),
    Shape("bolt", "tool", 33, _bolt),
)


def frequencies(tail: float) -> np.ndarray:
    """[15] probability of each of SHAPES: Zipf's law with exponent `tail`."""
    weights = np.arange(1.0, len(SHAPES) + 1) ** -tail
    return weights / weights.sum()


def blob(rng: np.random.Generator) -> Outline:
    """Clutter: an amoeba with few, uneven, blunt lobes, so that it is like no class."""
    t, order = _turn(48), np.array([[2], [3], [4], [7]])
    height = rng.uniform([[0.15], [0.3], [0.15], [0.06]], [[0.35], [0.45], [0.25], [0.12]])
    return [_polar(1.2 + (height * np.cos(order * t + rng.uniform(0, 2 * np.pi, (4, 1)))).sum(0), t)]


def strand(rng: np.random.Generator, thickness: float) -> Outline:
    """Clutter: a long thin wavy line, `thickness` of its length."""
    x = np.linspace(-0.5, 0.5, 24)
    y = rng.uniform(0, 0.08) * np.sin(rng.uniform(2, 12) * x + rng.uniform(0, 2 * np.pi))
    upper, lower = np.stack([x, y + thickness / 2], 1), np.stack([x, y - thickness / 2], 1)
    return [np.concatenate([upper, lower[::-1]])]


def deform(
    outline: Outline, rng: np.random.Generator, tilt: float, stretch: float = 0.35, shear: float = 0.12
) -> Outline:
    """Mirror left and right, stretch (by up to exp(stretch)), shear, and rotate by up to `tilt` radians.

    Then centre, and scale the longer side to 1.
    """
    angle, aspect = rng.uniform(-tilt, tilt), np.exp(rng.uniform(-stretch, stretch) / 2)
    change = np.array([[rng.choice([-1, 1]) * aspect, rng.uniform(-shear, shear)], [0, 1 / aspect]])
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    turned = [polygon @ change @ rotation for polygon in outline]
    low, high = turned[0].min(0), turned[0].max(0)
    return [(polygon - (low + high) / 2) / (high - low).max() for polygon in turned]
