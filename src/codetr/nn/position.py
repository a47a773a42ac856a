"""Sine encodings of pixels and of boxes (Attention is all you need, sec. 3.5; DETR, supplement)."""

import math

import torch
from torch import Tensor

from codetr.types import Memory


def _interleave(angles: Tensor) -> Tensor:
    """[..., n] angles, each frequency twice -> sine on even, cosine on odd channels."""
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), -1).flatten(-2)


def _frequencies(num_features: int, temperature: float, device: torch.device) -> Tensor:
    exponent = 2 * torch.div(torch.arange(num_features, device=device), 2, rounding_mode="floor") / num_features
    return temperature**exponent


def sine_position(padding: Tensor, width: int, temperature: float, offset: float) -> Tensor:
    """Encode the position of every cell within the unpadded part of its map.

    padding: [B, H, W] bool.
    offset: added to the cell index before normalising (-0.5: cell centres).

    Returns [B, H, W, width], the y half first.
    """
    valid = (~padding).float()
    frequencies = _frequencies(width // 2, temperature, padding.device)
    parts = []
    for axis in (1, 2):
        index = valid.cumsum(axis)
        last = index.narrow(axis, index.shape[axis] - 1, 1)
        angle = (index + offset) / (last + 1e-6) * (2 * math.pi)
        parts.append(_interleave(angle[..., None] / frequencies))
    return torch.cat(parts, -1)


def sine_reference(reference: Tensor, features_per_coordinate: int, temperature: float, order: str) -> Tensor:
    """Encode normalised coordinates.

    reference: [..., 2 or 4] in (cx, cy[, w, h]).
    order: the coordinates to encode, e.g. "xywh" or "yxwh".

    Returns [..., len(order) * features_per_coordinate].
    """
    frequencies = _frequencies(features_per_coordinate, temperature, reference.device)
    columns = torch.stack([reference[..., "xywh".index(c)] for c in order], -1)
    angles = columns.float()[..., None] * (2 * math.pi) / frequencies
    return _interleave(angles).flatten(-2).to(reference.dtype)


def cell_centres(memory: Memory) -> Tensor:
    """Centre (x, y) of every token, normalised to the unpadded image; beyond 1 on the padding. [B, S, 2]."""
    device, parts = memory.padding.device, []
    for level, (height, width) in enumerate(memory.spatial_shapes):
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # [H*W, 2]
        parts.append(grid / memory.valid_ratios[:, None, level])
    return torch.cat(parts, 1)
