"""What the auxiliary heads share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from codetr.assign import BACKGROUND
from codetr.assign.atss import assign_atss
from codetr.nn.anchors import AnchorGrid
from codetr.ops.gather import largest, take
from codetr.ops.once import once
from codetr.types import Detections, Positives, Pyramid, Shapes, Targets

PRIOR = 0.01  # probability of every class at the start of training (Focal loss, sec. 3.3)


def flatten(maps: list[Tensor], per_cell: int) -> Tensor:
    """Feature maps [B, A * D, H_j, W_j], D values for each of A anchors -> [B, N, D], all levels."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, m.shape[1] // per_cell) for m in maps], 1)


def assigned_boxes(boxes: Tensor, matched_index: Tensor) -> Tensor:
    """The objects' boxes [B, M, 4] for every candidate [B, N, 4]; the first object's where it has none."""
    return take(boxes, matched_index.clamp(min=0))


def assigned_labels(labels: Tensor, matched_index: Tensor) -> Tensor:
    """The objects' labels [B, M] for every candidate [B, N]; -1 where it has none."""
    return labels.gather(1, matched_index.clamp(min=0)).masked_fill(matched_index < 0, -1)


def assigned(candidates: Tensor, features: Tensor, matched_index: Tensor, targets: Targets) -> Positives:
    """Candidates [B, N, 4] xyxy in pixels with their features [B, N, C] and matched indices [B, N] from an assigner."""
    return Positives(
        boxes_xyxy=candidates,
        features=features,
        labels=assigned_labels(targets.labels, matched_index),
        target_boxes_xyxy=assigned_boxes(targets.boxes_xyxy, matched_index),
        positive=matched_index >= 0,
        negative=matched_index == BACKGROUND,
        objects=matched_index.clamp(min=0),
    )


def assigned_by_atss(grid: AnchorGrid, pyramid: Pyramid, targets: Targets, topk: int) -> Positives:
    """The anchors of a grid with one of them per cell, assigned by ATSS, with the pyramid's features at their cells."""
    anchors = grid(pyramid)
    inside = grid.valid(pyramid, targets.frames.sizes)
    matched_index = assign_atss(anchors, inside, targets.boxes_xyxy, targets.valid, topk)
    every = grid.every(pyramid).expand(len(matched_index), -1, -1)
    return assigned(every, flatten(pyramid.levels, 1), matched_index, targets)


def cell_strides(pyramid: Pyramid) -> Tensor:
    """[cells of all levels] network pixels per cell."""
    return _cell_strides(pyramid.shapes, pyramid.strides, pyramid.device)


@once
def _cell_strides(shapes: Shapes, strides: tuple[int, ...], device: torch.device) -> Tensor:
    levels = zip(shapes, strides, strict=True)
    return torch.cat(
        [torch.full((height * width,), float(stride), device=device) for (height, width), stride in levels]
    )


def top_per_level(scores: Tensor, sizes: list[int], count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of each level. scores: [B, sum(sizes)]. Returns (index, level), both [B, n]."""
    index, levels, start = [], [], 0
    for number, level in enumerate(scores.split(sizes, 1)):
        best = largest(level, count)
        index.append(best + start)
        levels.append(torch.full_like(best, number))
        start += level.shape[1]
    return torch.cat(index, 1), torch.cat(levels, 1)


def detections(scores: Tensor, labels: Tensor, boxes: Tensor, valid: Tensor) -> list[Detections]:
    """The valid ones of each image. scores, labels, valid: [B, n]. boxes: [B, n, 4]."""
    return [Detections(s[v], k[v], b[v]) for s, k, b, v in zip(scores, labels, boxes, valid, strict=True)]


def tower(width: int, num_convs: int, num_groups: int) -> nn.Sequential:
    """3x3 convolutions, each with a group norm of `num_groups` and ReLU."""
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(num_groups, width), nn.ReLU(True)]
    return nn.Sequential(*layers)


def weighted(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Multiply every term by its weight."""
    return {term: value * weights[term] for term, value in losses.items()}


def init_normal(module: nn.Module, std: float) -> None:
    """Normal weights and zero biases, in all layers of `module` (RetinaNet, sec. 4.1)."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
