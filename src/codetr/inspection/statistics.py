"""Numbers of a split: how much there is of what, and how large."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from codetr.inspection.split import Split
from codetr.inspection.whole import object_counts

SMALL, LARGE = 32**2, 96**2  # pixels of area, COCO's borders between small, medium and large
SHARES = (0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)  # sqrt(box area / image area)
ASPECTS = (1 / 8, 1 / 4, 1 / 2, 1 / 1.25, 1.25, 2, 4, 8)  # width / height
CROWDING = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # objects in an image


@dataclass
class Statistics:
    """Of the objects with a box, without crowds and what is ignored. Histograms are [(label, count), ...]."""

    images: int
    annotations: int
    objects: int
    crowds: int
    categories: int
    empty_images: int
    sizes: dict[str, int]
    classes: dict[str, int]
    shares: list[tuple[str, int]]
    aspects: list[tuple[str, int]]
    crowding: list[tuple[str, int]]
    image_sizes: dict[str, int]


def statistics(split: Split) -> Statistics:
    objects = object_counts(split)
    rows = [(i, split.image_of(i)) for i in split.boxes if split.is_object(i)]
    boxes = np.array([split.boxes[i] for i, _ in rows]).reshape(-1, 4)
    owner = [image for _, image in rows if image is not None]
    extent = np.array([split.size(i) for i in owner], np.float64).reshape(-1, 2)
    area = boxes[:, 2] * boxes[:, 3]
    per_image = np.bincount(owner, minlength=len(split.images))[list(split.usable.values())]
    small, large = int((area < SMALL).sum()), int((area > LARGE).sum())
    sizes = np.array([split.size(i) for i in split.usable.values()]).reshape(-1, 2)
    return Statistics(
        images=len(split.images),
        annotations=len(split.annotations),
        objects=len(rows),
        crowds=sum(bool(a.get("iscrowd", 0)) for a in split.annotations),
        categories=len(split.categories),
        empty_images=int((per_image == 0).sum()),
        sizes={"small": small, "medium": len(rows) - small - large, "large": large},
        classes={str(c.get("name")): objects[c["id"]] for c in split.categories if type(c.get("id")) is int},
        shares=_histogram(np.sqrt(area / np.prod(extent, 1)), SHARES, "{:.0%}"),
        aspects=_histogram(boxes[:, 2] / np.maximum(boxes[:, 3], 1e-9), (0, *ASPECTS, np.inf), "{:.3g}"),
        crowding=_histogram(per_image, (*CROWDING, np.inf), "{:.0f}", whole=True),
        image_sizes=_extremes(sizes),
    )


def _histogram(values: np.ndarray, edges: tuple[float, ...], form: str, whole: bool = False) -> list[tuple[str, int]]:
    """[low, high) for each pair of edges, with labels; the last takes what lies above. whole: label whole numbers."""
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    labels = []
    for low, high in pairwise(edges):
        if whole and high - low == 1:
            labels.append(form.format(low))
        elif high == np.inf:
            labels.append(f"≥ {form.format(low)}")
        elif low == 0:
            labels.append(f"< {form.format(high)}")
        else:
            labels.append(f"{form.format(low)}–{form.format(high - whole)}")
    return list(zip(labels, counts.tolist(), strict=True))


def _extremes(sizes: np.ndarray) -> dict[str, int]:
    """Smallest, middle and largest sides of the images, in pixels."""
    if not len(sizes):
        return {}
    width, height = sizes.T
    return {
        "min width": int(width.min()),
        "median width": int(np.median(width)),
        "max width": int(width.max()),
        "min height": int(height.min()),
        "median height": int(np.median(height)),
        "max height": int(height.max()),
    }
