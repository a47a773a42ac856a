"""Masks of regions as masks of the image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

PIXELS_PER_PASS = 2**26  # bounds the memory of an accelerator: 12 bytes each


@torch.no_grad()
def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether the mask, stretched over its box and read bilinearly, is at least 1/2 at the centre of a pixel.

    masks: [n, s, s] in 0..1.
    boxes: [n, 4] xyxy in pixels of an image of (height, width) `size`.

    Returns [n, height, width] bool; a box without area gives an empty mask.
    """
    result = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    # One by one on a CPU, which then visits the pixels of the box alone; an accelerator is faster with few large steps.
    masks_per_pass = 1 if masks.device.type == "cpu" else max(1, PIXELS_PER_PASS // (size[0] * size[1]))
    for start in range(0, len(masks), masks_per_pass):
        part = slice(start, start + masks_per_pass)
        _paste(masks[part].float(), boxes[part].float(), result[part])
    return result


def _paste(masks: Tensor, boxes: Tensor, result: Tensor) -> None:
    """Fill `result` [n, height, width] within what encloses all boxes, beyond which nothing reaches 1/2."""
    height, width = result.shape[1:]
    x1, y1 = boxes[:, :2].amin(0).floor().long().tolist()
    x2, y2 = boxes[:, 2:].amax(0).ceil().long().tolist()
    ys = slice(min(max(y1, 0), height), min(max(y2, 0), height))
    xs = slice(min(max(x1, 0), width), min(max(x2, 0), width))
    rows, columns = _position(ys, boxes[:, 1], boxes[:, 3]), _position(xs, boxes[:, 0], boxes[:, 2])
    grid = torch.stack(torch.broadcast_tensors(columns[:, None], rows[:, :, None]), -1)
    result[:, ys, xs] = grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5


def _position(pixels: slice, low: Tensor, high: Tensor) -> Tensor:
    """Centres of the pixels between the sides of each box, as -1..1: [n], [n] -> [n, pixels]."""
    centers = torch.arange(pixels.start, pixels.stop, device=low.device) + 0.5
    return (centers - low[:, None]) / (high - low)[:, None].clamp(min=1e-6) * 2 - 1
