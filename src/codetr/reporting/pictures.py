"""Images of an evaluation with what was right and wrong on them, for a page that shows and hides it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from codetr.data.images import opened, pixels_of
from codetr.reporting.analysis import Analysis
from codetr.reporting.labels import Doubt
from codetr.reporting.matching import NONE

SIDE = 480  # pixels of a picture
_MOST_PIXELS = 80_000_000  # of a file that is unpacked for a picture
_AROUND = 1.0  # what is shown around a box in doubt, in sides of the box
_LEAST = 64  # pixels of the image that a picture shows at least
_OUTLINE = 160  # points along the longer side in which outlines of masks are traced


@dataclass(frozen=True)
class Mark:
    """kind: "found" or "missed" objects; "right" or "wrong" detections. outline: SVG path of a mask, "" without."""

    kind: str
    text: str
    x: float
    y: float
    width: float
    height: float
    outline: str = ""

    @staticmethod
    def of(kind: str, text: str, box: np.ndarray, outline: str = "") -> Mark:
        """box: xywh."""
        x, y, width, height = box.tolist()
        return Mark(kind, text, x, y, width, height, outline)


@dataclass(frozen=True)
class Picture:
    """data: JPEG in base64, "" where the file cannot be shown. window: x, y, width and height of the image in pixels of
    the file, as the marks are. title, caption: above and below it."""

    data: str
    window: tuple[float, float, float, float]
    marks: list[Mark]
    title: str
    caption: str


def costliest(analysis: Analysis, most: int) -> list[Picture]:
    """The images with the largest part of the AP that is lost, the worst first."""
    costs = analysis.image_costs
    order = np.argsort(-costs, kind="stable")[:most]
    return [of_image(analysis, i, f"costs {100 * costs[i]:.2f} points of AP50") for i in order.tolist() if costs[i] > 0]


def of_image(analysis: Analysis, image: int, caption: str) -> Picture:
    """One image with all marks."""
    marks = list(_marks(analysis, image))
    height, width = _size(analysis, image, marks)
    misses = sum(mark.kind == "missed" for mark in marks)
    wrong = sum(mark.kind == "wrong" for mark in marks)
    window = (0.0, 0.0, width, height)
    told = f"{caption}; {_counted(misses, 'miss', 'misses')}, {_counted(wrong, 'false alarm', 'false alarms')}"
    return Picture(_jpeg(_path(analysis, image), window), window, marks, _title(analysis, image), told)


def _counted(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _marks(analysis: Analysis, image: int) -> Iterator[Mark]:
    """Objects, and detections with the score of the analysis at least."""
    matches, scene, names = analysis.matches, analysis.scene, analysis.stored.about.class_names
    mine = np.flatnonzero((matches.image == image) & (matches.score >= analysis.score) & ~matches.ignored[0])
    hit = set(matches.object[0][mine].tolist())
    truth = np.flatnonzero((matches.true_image == image) & matches.counted)
    outlines = _outlines(analysis, image, matches.rows[mine], truth)
    for i in truth.tolist():
        kind = "found" if i in hit else "missed"
        yield Mark.of(kind, f"{names[matches.true_label[i]]} ({kind})", scene.truth.boxes[i], outlines[0].get(i, ""))
    for i in mine.tolist():
        kind = "wrong" if matches.object[0][i] == NONE else "right"
        row = int(matches.rows[i])
        text = f"{names[matches.label[i]]} {matches.score[i]:.2f} ({'false alarm' if kind == 'wrong' else kind})"
        yield Mark.of(kind, text, scene.found.boxes[row], outlines[1].get(row, ""))


def _outlines(
    analysis: Analysis, image: int, found: np.ndarray, truth: np.ndarray
) -> tuple[dict[int, str], dict[int, str]]:
    """Of the scene's rows of the truth, and of what was found; none for boxes."""
    both = ((analysis.scene.truth.rle, truth), (analysis.scene.found.rle, found))
    of_truth, of_found = ({i: outline(rle[i]) for i in rows.tolist()} if rle else {} for rle, rows in both)
    return of_truth, of_found


def outline(rle: dict[str, Any]) -> str:
    """An SVG path around a mask, in pixels of the file."""
    from contourpy import contour_generator

    step = max(1, max(rle["size"]) // _OUTLINE)
    mask = np.pad(coco_mask.decode(rle)[::step, ::step], 1)
    if not mask.any():
        return ""
    lines: Any = contour_generator(z=mask.astype(float)).lines(0.5)
    return "".join(
        "M" + "L".join(f"{(x - 0.5) * step:.0f} {(y - 0.5) * step:.0f}" for x, y in line) + "Z" for line in lines
    )


def doubtful(analysis: Analysis, doubts: Sequence[Doubt]) -> list[Picture]:
    """What is around each label that is probably wrong or missing."""
    scene, names = analysis.scene, analysis.stored.about.class_names
    assert scene.found.scores is not None
    pictures = []
    for doubt in doubts:
        image, box = int(scene.found.image[doubt.found]), scene.found.boxes[doubt.found]
        found = f"{names[scene.found.label[doubt.found]]} {scene.found.scores[doubt.found]:.2f}"
        marks = [Mark.of("right", found, box)]
        caption = f"no label: {found}?"
        if doubt.truth is not None:
            label = names[scene.truth.label[doubt.truth]]
            marks.append(Mark.of("missed", label, scene.truth.boxes[doubt.truth]))
            caption = f"labelled {label}: {found}?"
        window = _around(box, _size(analysis, image, marks))
        data = _jpeg(_path(analysis, image), window)
        pictures.append(Picture(data, window, marks, _title(analysis, image), caption))
    return pictures


def _around(box: np.ndarray, size: tuple[float, float]) -> tuple[float, float, float, float]:
    """A square around a box, xywh, as far as it lies in an image of (height, width)."""
    side = max(_LEAST, (1 + 2 * _AROUND) * box[2:].max())
    low = np.clip(box[:2] + box[2:] / 2 - side / 2, 0, None)
    high = np.minimum(box[:2] + box[2:] / 2 + side / 2, size[::-1])
    x, y, w, h = (float(v) for v in (*low, *(high - low).clip(1)))
    return x, y, w, h


def _size(analysis: Analysis, image: int, marks: Sequence[Mark]) -> tuple[float, float]:
    """(height, width) of the file; where that is not known, of what lies on it."""
    sizes = analysis.stored.about.sizes
    if sizes:
        return float(sizes[image][0]), float(sizes[image][1])
    right = max((m.x + m.width for m in marks), default=1.0)
    return max((m.y + m.height for m in marks), default=1.0), right


def _path(analysis: Analysis, image: int) -> Path | None:
    files = analysis.stored.about.files
    return Path(files[image]) if files else None


def _title(analysis: Analysis, image: int) -> str:
    path = _path(analysis, image)
    return path.name if path else f"image {analysis.stored.columns.ids[image]}"


def _jpeg(path: Path | None, window: tuple[float, float, float, float]) -> str:
    """What lies in a window, at most SIDE pixels wide and high."""
    if path is None:
        return ""
    x, y, width, height = window
    try:
        with opened(path, _MOST_PIXELS) as file:
            scale = min(1.0, 2 * SIDE / max(width, height))
            before = file.size
            file.draft("RGB", (round(file.width * scale), round(file.height * scale)))
            shrunk = file.width / before[0]
            image = Image.fromarray(pixels_of(file).permute(1, 2, 0).numpy())
        box = tuple(round(v * shrunk) for v in (x, y, x + width, y + height))
        image = image.crop((box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1)))
        image.thumbnail((SIDE, SIDE))
    except (OSError, ValueError, SyntaxError, OverflowError):
        return ""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return base64.b64encode(buffer.getvalue()).decode()
