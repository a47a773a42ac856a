"""Sine encodings of pixels and of boxes (Attention is all you need, sec. 3.5; DETR, supplement)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from codetr.ops.once import once
from codetr.types import Memory, Shapes


def _waves(angles: Tensor) -> Tensor:
    """[..., n] angles -> [..., 2 n], their sine on even, their cosine on odd channels."""
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


@once
def _wavelengths(num_features: int, temperature: float, device: torch.device) -> Tensor:
    """One for every two features."""
    return temperature ** (2 * torch.arange(num_features // 2, device=device) / num_features)


@dataclass(frozen=True)
class Cells:
    """Where the cells of all levels lie, S of them. level: [S]. place: [S, 2] (row, column). centre: [S, 2] (x, y) as
    shares of the level."""

    level: Tensor
    place: Tensor
    centre: Tensor


@once
def cells(shapes: Shapes, device: torch.device) -> Cells:
    """shapes: (height, width) per level."""
    places, centres = [], []
    for height, width in shapes:
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        places.append(torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1))
        x, y = (columns + 0.5) / width, (rows + 0.5) / height
        centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
    level = [torch.full((place.shape[0],), index, device=device) for index, place in enumerate(places)]
    return Cells(torch.cat(level), torch.cat(places), torch.cat(centres))


def sine_position(shapes: Shapes, valid_sizes: Tensor, width: int, temperature: float, offset: float) -> Tensor:
    """Encode the position of every cell within the unpadded part of its level.

    shapes: (height, width) per level.
    valid_sizes: [B, L, 2] (height, width) of the unpadded parts.
    offset: added to the cell's row and column, counted from 1, before normalising (-0.5: cell centres).

    Returns [B, S, width], the y half first.
    """
    where = cells(shapes, valid_sizes.device)
    sizes = valid_sizes[:, where.level].float()  # [B, S, 2]
    place = where.place + 1.0
    # As officially, a row is counted along each column, and a column in the padding has none.
    counted = (place <= sizes).flip(-1)
    index, last = torch.minimum(place, sizes) * counted, sizes * counted
    angle = (index + offset) / (last + 1e-6) * (2 * math.pi)
    wavelengths = _wavelengths(width // 2, temperature, valid_sizes.device)
    return _waves(angle[..., None] / wavelengths).flatten(-2)


def sine_reference(reference: Tensor, features_per_coordinate: int, temperature: float, order: str) -> Tensor:
    """Encode normalised coordinates.

    reference: [..., 2 or 4] in (cx, cy[, w, h]).
    order: the coordinates to encode, e.g. "xywh" or "yxwh".

    Returns [..., len(order) * features_per_coordinate].
    """
    columns = reference
    if order != "xywh"[: reference.shape[-1]]:
        columns = torch.stack([reference[..., "xywh".index(c)] for c in order], -1)
    wavelengths = _wavelengths(features_per_coordinate, temperature, reference.device)
    angles = columns.float()[..., None] * (2 * math.pi) / wavelengths
    return _waves(angles).flatten(-2).to(reference.dtype)


def cell_centres(memory: Memory) -> Tensor:
    """Centre (x, y) of every token, normalised to the unpadded image; beyond 1 on the padding. [B, S, 2]."""
    where = cells(memory.spatial_shapes, memory.padding.device)
    return where.centre / memory.valid_ratios[:, where.level]
