"""AP and recall of parts of the data: objects by their shape and place, images by what is on them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from codetr.evaluation.engines import Scene
from codetr.reporting.curves import Ranking, mean_ap
from codetr.reporting.matching import NONE, Matches

SIZES = (16, 32, 96, 256)  # pixels: square root of the area
ASPECTS = (1 / 3, 2 / 3, 3 / 2, 3)  # width / height
NUMBERS = (1, 4, 9, 19)  # objects of an image, at most
OVERLAPS = (0.0, 0.2, 0.5)  # of an image: the highest IoU of two of its objects, at most
_EDGE = 1.0  # pixels


class Slice(NamedTuple):
    """objects: that count. ap: at IoU 0.5, -1 without objects. recall: the part that was found at all."""

    by: str
    name: str
    objects: int
    ap: float
    recall: float


def slices(scene: Scene, matches: Matches, classes: int, sizes: np.ndarray | None) -> list[Slice]:
    """sizes: [I, 2] (height, width) of the images; None: not known, and nothing is said of their borders.

    An object belongs to one part, and so does a detection: to that of the object it found, a false alarm to that of
    its own box. Then a part has an AP of its own, where the rest counts neither as right nor as wrong, as in COCO's AP
    of small, medium and large objects. Images belong to a part as a whole.
    """
    found, truth = scene.found.boxes[matches.rows], scene.truth.boxes
    images = max(matches.image.max(initial=-1), matches.true_image.max(initial=-1)) + 1
    whole = [_by("size", _sizes(SIZES), matches, classes, *(_binned(_side(b), SIZES) for b in (found, truth)))]
    aspects = ("narrow", "high", "square", "wide", "flat")
    own = (_binned(_aspect(b), ASPECTS) for b in (found, truth))
    whole.append(_by("aspect ratio", _named(aspects, ASPECTS), matches, classes, *own))
    if sizes is not None and len(sizes):
        cut = (_touches(b, sizes[i]) for b, i in ((found, matches.image), (truth, matches.true_image)))
        whole.append(_by("border", ("inside", "at the border"), matches, classes, *(c.astype(int) for c in cut)))
    counted = matches.true_image[matches.counted]
    number = np.bincount(counted, minlength=images)
    overlap = _crowding(truth[matches.counted], counted, images)
    for by, names, bins in (
        (
            "objects in the image",
            ("1 or none", "2 to 4", "5 to 9", "10 to 19", "20 and more"),
            _binned(number, NUMBERS, True),
        ),
        ("crowding", ("apart", "IoU to 0.2", "IoU to 0.5", "IoU above 0.5"), _binned(overlap, OVERLAPS, True)),
    ):
        whole.append(_by(by, names, matches, classes, bins[matches.image], bins[matches.true_image]))
    return [one for part in whole for one in part]


def _by(
    by: str, names: Sequence[str], matches: Matches, classes: int, found: np.ndarray, truth: np.ndarray
) -> list[Slice]:
    """found, truth: [n], [m] the parts that they belong to."""
    one = matches.object[:1]
    own = np.where(one == NONE, found, truth[one] if len(truth) else 0)
    parts = []
    for i, name in enumerate(names):
        counted = matches.counted & (truth == i)
        part = matches._replace(object=one, ignored=matches.ignored[:1] | (own != i), counted=counted)
        objects, hit = int(np.count_nonzero(counted)), int(np.count_nonzero(part.right))
        ap = mean_ap(Ranking(part, classes).average_precision())
        parts.append(Slice(by, name, objects, ap, hit / objects if objects else -1.0))
    return parts


def _binned(values: np.ndarray, edges: Sequence[float], inclusive: bool = False) -> np.ndarray:
    """inclusive: an edge belongs to the part below it."""
    return np.searchsorted(edges, values, side="left" if inclusive else "right")


def _sizes(edges: Sequence[float]) -> list[str]:
    between = [f"{a} to {b} px" for a, b in pairwise(edges)]
    return [f"below {edges[0]} px", *between, f"{edges[-1]} px and more"]


def _named(names: Sequence[str], edges: Sequence[float]) -> list[str]:
    shown = [f"{e:.2g}" for e in edges]
    ranges = [
        f"below {shown[0]}",
        *(f"{a} to {b}" for a, b in pairwise(shown)),
        f"{shown[-1]} and more",
    ]
    return [f"{name}, {of}" for name, of in zip(names, ranges, strict=True)]


def _side(boxes: np.ndarray) -> np.ndarray:
    return np.sqrt(boxes[:, 2:].prod(1).clip(0))


def _aspect(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, 2].clip(1e-9) / boxes[:, 3].clip(1e-9)


def _touches(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[n] bool: whether a box comes within a pixel of the border. sizes: [n, 2] (height, width)."""
    return (boxes[:, :2] < _EDGE).any(1) | (boxes[:, :2] + boxes[:, 2:] > sizes[:, ::-1] - _EDGE).any(1)


def _crowding(boxes: np.ndarray, image: np.ndarray, images: int) -> np.ndarray:
    """[I]: the highest IoU of two objects of an image. boxes: [m, 4] xywh."""
    from hotcoco.mask import iou

    most = np.zeros(images)
    order = np.argsort(image, kind="stable")
    ends = np.searchsorted(image[order], np.arange(images + 1))
    for i in np.flatnonzero(np.diff(ends) > 1).tolist():
        own = boxes[order[ends[i] : ends[i + 1]]]
        both = np.array(iou(own, own, [False] * len(own)))
        np.fill_diagonal(both, 0)
        most[i] = both.max()
    return most
