"""Surfaces: random scalar fields, and two colours blended by one."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter


def noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """[height, width] smooth noise in [0, 1], one random value per `cell` pixels."""
    shape = int(height / cell) + 2, int(width / cell) + 2
    grid = Image.fromarray(rng.random(shape, np.float32))
    return np.clip(np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[height, width] distance in pixels along a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    return np.float32(np.cos(angle)) * (x - width / 2) + np.float32(np.sin(angle)) * (y - height / 2)


def _wave(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    phase = _ramp(rng, height, width) * np.float32(np.pi / cell)
    if rng.random() < 0.4:
        phase += noise(rng, height, width, 3 * cell) * np.float32(rng.uniform(1, 5))
    return np.sin(phase) * np.float32(rng.uniform(1, 6))


def field(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[height, width] float32 in [0, 1]: a gradient, noise, stripes, a checker or blotches, of random scale."""
    cell = np.exp(rng.uniform(np.log(2.5), np.log(max(4.0, max(height, width) / 3))))
    kind = rng.choice(5, p=[0.25, 0.3, 0.15, 0.1, 0.2])
    if kind == 0:
        return 0.5 + _ramp(rng, height, width) / np.float32(1.5 * max(height, width))
    if kind == 1:
        scales = [noise(rng, height, width, max(c, 1.5)) for c in (4 * cell, cell, cell / 3)]
        return (scales[0] + scales[1] + scales[2]) / 3
    if kind == 2:
        return np.clip(0.5 + _wave(rng, height, width, cell), 0, 1)
    if kind == 3:
        return np.clip(0.5 + _wave(rng, height, width, cell) * _wave(rng, height, width, cell), 0, 1)
    steep = np.float32(rng.uniform(4, 12))
    return np.clip(0.5 + steep * (noise(rng, height, width, cell) - 0.5), 0, 1)


def surface(rng: np.random.Generator, height: int, width: int, colour: np.ndarray, contrast: float) -> np.ndarray:
    """[3, height, width] or, without contrast, [3, 1, 1] float32: `colour` [3], varied by up to `contrast`."""
    base = colour.astype(np.float32)[:, None, None]
    if not contrast:
        return base
    other = rng.uniform(-contrast, contrast, 3) + rng.uniform(-contrast, contrast)
    return base + (field(rng, height, width) - np.float32(0.5)) * other.astype(np.float32)[:, None, None]


def background(rng: np.random.Generator, height: int, width: int, texture: float) -> np.ndarray:
    """[3, height, width] float32: two surfaces of contrast `texture`, one laid over parts of the other."""
    first, second = (surface(rng, height, width, rng.random(3), 0.35 * texture) for _ in range(2))
    return first + (second - first) * (field(rng, height, width) * np.float32(rng.uniform(0, 0.8) * texture))


def develop(rng: np.random.Generator, canvas: np.ndarray) -> Image.Image:
    """The finished picture of `canvas` [3, H, W]: exposure, sensor noise, at times a little blur."""
    gain, lift, grain = rng.uniform(0.75, 1.1), rng.uniform(0, 0.1), rng.uniform(0, 0.04)
    exposed = rng.standard_normal(canvas.shape, np.float32) * np.float32(grain)
    exposed += canvas * np.float32(gain) + np.float32(lift)
    pixels = (exposed.clip(0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    blurred = rng.random() < 0.2
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.8))) if blurred else picture
