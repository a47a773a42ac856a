"""Objects on the borders of views: of one that a view cuts off, its neighbours see the rest.

A detection that ends where its window ends, though the picture goes on, is of a part. It belongs together with the
detection of another view that looks the same where both see, each the likest of the other among those of its view. Of
such a group the detections of the whole object stay; where all are parts, their union takes their place.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from pycocotools import mask as coco_mask
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from codetr.types import Detections
from codetr.views.seen import Pairs, Seen, meeting, together

_AGREE = 0.5  # IoU of two detections where both views see, at least, to be of one object
_EDGE = 64  # a detection is cut off where it ends within this part of its window's side from it: boxes are not exact


def joined(seen: Seen) -> Seen:
    """`seen` without the parts of objects of which there is more."""
    cut = cut_off(seen)
    if not cut.any():
        return seen
    groups = _groups(_likest(seen, meeting(seen, _AGREE), cut), len(cut))
    dropped = torch.zeros_like(cut)
    unions: list[Detections] = []
    windows: list[Tensor] = []
    for group in groups:
        parts = group[cut[group]]
        dropped[parts] = True
        if len(parts) == len(group):
            unions.append(_union(seen.found.at(group)))
            windows.append(_around(seen.windows[seen.view[group]]))
    left = seen.at((~dropped).nonzero()[:, 0])
    if not unions:
        return left
    count = len(seen.windows)
    nowhere = torch.tensor([torch.inf, torch.inf, -torch.inf, -torch.inf]).double()  # they are no views of their own
    return replace(
        left,
        found=together([left.found, *unions]),
        view=torch.cat([left.view, torch.arange(count, count + len(unions))]),
        windows=torch.cat([seen.windows, torch.stack(windows)]),
        cores=torch.cat([seen.cores, nowhere.expand(len(unions), 4)]),
    ).sorted()


def cut_off(seen: Seen) -> Tensor:
    """[n] bool: whether each ends at a side of its window that is none of the picture's."""
    height, width = seen.size
    windows = seen.windows[seen.view]
    edge = (windows[:, 2:] - windows[:, :2]).repeat(1, 2) / _EDGE
    inner = torch.cat([windows[:, :2] > 0, windows[:, 2:] < windows.new_tensor([width, height])], 1)
    return (inner & ((seen.found.boxes_xyxy - windows).abs() <= edge)).any(1)


def _likest(seen: Seen, pairs: Pairs, cut: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The pairs with a part in it, each of whose detections is the likest to the other among those of its view."""
    chosen = (cut[pairs.better] | cut[pairs.worse]).nonzero()[:, 0]
    order = chosen[pairs.iou[chosen].argsort(descending=True, stable=True)]
    a, b = pairs.better[order].numpy(), pairs.worse[order].numpy()
    view, count = seen.view.numpy(), len(seen.windows)
    of_a, of_b = (np.unique(own * count + view[other], return_index=True)[1] for own, other in ((a, b), (b, a)))
    mutual = np.intersect1d(of_a, of_b)
    return a[mutual], b[mutual]


def _groups(edges: tuple[np.ndarray, np.ndarray], count: int) -> list[Tensor]:
    """Places of detections that are connected, of groups of two and more."""
    graph = coo_array((np.ones(len(edges[0])), edges), shape=(count, count))
    _, label = connected_components(graph, directed=False)
    order = label.argsort(kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(label))[:-1])
    return [torch.from_numpy(group) for group in groups if len(group) > 1]


def _around(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])


def _union(parts: Detections) -> Detections:
    """One detection of all parts, of the score of the best, which comes first."""
    rle = parts.rle
    if rle is not None:
        one = coco_mask.merge(rle)
        rle = [{**one, "counts": one["counts"].decode()}]
    best = parts.at(torch.zeros(1, dtype=torch.long))
    return replace(best, boxes_xyxy=_around(parts.boxes_xyxy)[None], rle=rle)
