"""What every implementation takes, checked once: kernels check nothing, and what does not fit must not reach them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Regions(NamedTuple):
    """Which regions of which maps, and how they are cut up.

    images: [R] int64. boxes: [R, 4] xyxy in pixels. level_of: [R] int64, the level of each region; of a negative one
    there is nothing, zeros. strides: pixels per cell of each level. size: cells per side of the result.
    sampling_ratio: samples per cell and axis, 0: as many as the pixels beneath.
    """

    images: Tensor
    boxes: Tensor
    level_of: Tensor
    strides: tuple[int, ...]
    size: int
    sampling_ratio: int


def check(levels: list[Tensor], regions: Regions) -> None:
    """Raises ValueError where shapes contradict each other or a region is of no image or level, TypeError for a dtype
    that no kernel computes in."""
    images, boxes, level_of, strides, size, sampling_ratio = regions
    for tensor in (*levels, boxes):
        if tensor.dtype not in NARROW:
            raise TypeError(f"{tensor.dtype}: the kernels compute in float32; use the reference instead")
    if images.dtype != torch.int64 or level_of.dtype != torch.int64:
        raise TypeError(f"images are {images.dtype} and level_of {level_of.dtype} instead of int64")
    shapes = [tuple(level.shape) for level in levels]
    maps = levels and all(level.ndim == 4 and level.shape[:2] == levels[0].shape[:2] for level in levels)
    R = len(images)
    fit = boxes.shape == (R, 4) and images.shape == level_of.shape == (R,) and len(strides) == len(levels)
    if not (maps and fit and size > 0 and sampling_ratio >= 0):
        raise ValueError(
            f"maps {shapes} at strides {strides}, images {tuple(images.shape)}, boxes {tuple(boxes.shape)}, level_of "
            f"{tuple(level_of.shape)}, {size} cells and {sampling_ratio} samples do not fit together"
        )
    if R and not (images.min() >= 0 and images.max() < len(levels[0]) and level_of.max() < len(levels)):
        raise ValueError(f"a region is of none of the {len(levels[0])} images or {len(levels)} levels")
