"""Pictures: boxes on images, ground truth beside prediction, learning curves, precision-recall curves."""

from __future__ import annotations

import colorsys
import csv
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from codetr.files import atomically
from codetr.names import plotted, shown
from codetr.types import Detections

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]

SMALLEST_SIDE = 512  # pictures with a shorter long side are enlarged until their labels are legible
CROWD = 60  # objects
OPACITY = np.uint8(115)  # of masks, of 255
PAPER, INK, FAINT = (255, 255, 255), (33, 37, 41), (134, 142, 150)
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@cache
def class_color(label: int) -> Color:
    """A colour of its own for every class, the same in every picture; neighbours are far apart in hue."""
    hue = (0.58 + label * GOLDEN_RATIO) % 1
    saturation, value = ((0.80, 0.95), (0.95, 0.72), (0.55, 1.0))[label // 7 % 3]
    color = colorsys.hsv_to_rgb(hue, saturation, value)
    dimming = min(1.0, 0.62 / _luminance(color))  # yellow and lime would vanish on white paper
    red, green, blue = (round(255 * c * dimming) for c in color)
    return red, green, blue


def _luminance(color: tuple[float, float, float]) -> float:
    """Relative luminance (ITU-R BT.709)."""
    return 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    scores: Tensor | None = None,
    rle: Sequence[dict[str, Any]] | None = None,
) -> Image.Image:
    """A picture of `image` with labelled boxes, and masks filled with their colour, enlarged if it is small.

    image: [3, H, W] uint8. boxes: [n, 4] xyxy in pixels of `image`. labels, scores: [n]. rle: n masks as compressed
    COCO run lengths, of what `image` shows in any resolution. Where objects overlap, the first is on top. A caption
    that would hide an object wherever it stood is left out, and more than `CROWD` objects get thin frames alone: the
    colour tells the class.
    """
    picture = to_pil_image(image.cpu())
    scale = max(1.0, SMALLEST_SIDE / max(picture.size))
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    captions = [shown(class_names[i]) for i in labels.tolist()]
    if scores is not None:
        captions = [f"{name} {score:.2f}" for name, score in zip(captions, scores.tolist(), strict=True)]
    entries = list(zip((boxes.float().cpu() * scale).tolist(), labels.tolist(), captions, strict=True))
    unit = max(picture.size) / SMALLEST_SIDE  # lines and letters grow with the picture
    for (_, label, _), mask in zip(reversed(entries), reversed(rle or []), strict=False):
        _fill(picture, mask, class_color(label))
    pen = ImageDraw.Draw(picture)
    crowded = len(entries) > CROWD
    for box, label, _ in reversed(entries):
        _draw_frame(pen, box, class_color(label), max(2, round((1 if crowded else 3) * unit)))
    objects, taken = np.array([box for box, _, _ in entries]).reshape(-1, 4), np.zeros((0, 4))
    for box, label, caption in entries if not crowded else ():
        font = _font(round(13 * unit))
        plate = _place(_plate_size(pen, caption, font), box, picture.size, objects, taken)
        if plate is not None:
            _draw_label(pen, plate, class_color(label), caption, font)
            taken = np.concatenate([taken, [plate]])
    return picture


def _fill(picture: Image.Image, rle: dict[str, Any], color: Color) -> None:
    """Lay a colour over what a mask covers; what is below shines through."""
    opacity = Image.fromarray(coco_mask.decode(rle) * OPACITY)
    picture.paste(color, (0, 0), opacity.resize(picture.size, Image.Resampling.BILINEAR))


def _draw_frame(pen: ImageDraw.ImageDraw, box: Box, color: Color, width: int) -> None:
    """A coloured frame with a thin dark edge, so that it shows on every background."""
    x0, y0, x1, y1 = (round(v) for v in box)
    corners = (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))
    pen.rectangle((corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1), outline=INK)
    pen.rectangle(corners, outline=color, width=width)


def _plate_size(pen: ImageDraw.ImageDraw, caption: str, font: Any) -> tuple[float, float]:
    """Width and height of the coloured plate of a caption."""
    return pen.textlength(caption, font) + font.size * 0.7, font.size * 1.35


def _place(
    plate: tuple[float, float], box: Box, canvas: tuple[int, int], objects: np.ndarray, taken: np.ndarray
) -> Box | None:
    """Where a plate of this width and height hides least: around the box, above it first, else inside of it.

    objects: [n, 4] boxes, of which none may be hidden by more than half. taken: [m, 4] plates, which it may not meet.
    None: nowhere.
    """
    (width, height), (x0, y0, x1, y1) = plate, box
    beside = [(x0, y0 - height), (x1 - width, y0 - height), (x0, y1), (x1 - width, y1), (x1, y0), (x0 - width, y0)]
    corners = np.array([*beside, (x0, y0), (x0, y1 - height)])
    corners = np.clip(corners, 0, np.maximum(np.array(canvas) - plate, 0))
    places = np.concatenate([corners, corners + plate], 1)
    areas = np.maximum((objects[:, 2:] - objects[:, :2]).prod(1), 1)
    hidden = _shared(places, objects) / areas
    free = (hidden.max(1) <= 0.5) & (_shared(places, taken).sum(1) == 0)
    if not free.any():
        return None
    best = np.argmin(np.where(free, hidden.sum(1).round(2), np.inf))  # the first of those that hide as little
    left, top, right, bottom = places[best].tolist()
    return left, top, right, bottom


def _shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area that boxes share: [n, 4], [m, 4] -> [n, m]."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return sides.clip(min=0).prod(2)


def _draw_label(pen: ImageDraw.ImageDraw, plate: Box, color: Color, caption: str, font: Any) -> None:
    """The caption on its coloured plate."""
    pen.rounded_rectangle(plate, radius=font.size * 0.25, fill=color)
    middle = ((plate[0] + plate[2]) / 2, (plate[1] + plate[3]) / 2)
    pen.text(middle, caption, fill=_readable(color), font=font, anchor="mm")


def _readable(background: Color) -> Color:
    """Dark ink on light colours, paper white on dark ones."""
    return INK if _luminance(background) > 125 else PAPER


@cache
def _font(size: int) -> Any:
    """DejaVu Sans, which comes with matplotlib and knows most alphabets."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def side_by_side(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures of equal height in a row, each under its title."""
    first = next(iter(pictures.values()))
    gap, head = round(first.width * 0.02), round(max(first.size) * 0.055)
    width = sum(p.width for p in pictures.values()) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, first.height + head), PAPER)
    pen, x = ImageDraw.Draw(row), 0
    for title, picture in pictures.items():
        pen.text((x + picture.width / 2, head / 2), title, fill=FAINT, font=_font(round(head * 0.6)), anchor="mm")
        row.paste(picture, (x, head))
        x += picture.width + gap
    return row


def compare(
    image: Tensor,
    truth: Mapping[str, Any],
    found: Detections,
    class_names: Sequence[str],
    score_threshold: float,
) -> Image.Image:
    """Ground truth and prediction of one image, side by side.

    truth: `boxes` [m, 4] and `labels` [m]; `rle` if known, as those of `draw_boxes`. All boxes are xyxy in pixels of
    `image`. Detections below the threshold are left out.
    """
    found = found.above(score_threshold)
    expected = draw_boxes(image, truth["boxes"], truth["labels"], class_names, rle=truth.get("rle"))
    predicted = draw_boxes(image, found.boxes_xyxy, found.labels, class_names, found.scores, found.rle)
    return side_by_side({"ground truth": expected, f"prediction (score ≥ {score_threshold:.2f})": predicted})


def grid(pictures: Sequence[Image.Image], columns: int = 2, cell: int = 1000) -> Image.Image:
    """Pictures in rows on white paper, each fitted into the width `cell`; rows are as high as they need be."""
    columns = min(columns, len(pictures))
    fitted = [p.resize((cell, round(p.height * cell / p.width)), Image.Resampling.LANCZOS) for p in pictures]
    gap = cell // 25
    rows = [fitted[i : i + columns] for i in range(0, len(fitted), columns)]
    heights = [max(p.height for p in row) for row in rows]
    paper = Image.new("RGB", (columns * (cell + gap) + gap, sum(heights) + gap * (len(rows) + 1)), PAPER)
    y = gap
    for row, height in zip(rows, heights, strict=True):
        for i, picture in enumerate(row):
            paper.paste(picture, (gap + i * (cell + gap), y))
        y += height + gap
    return paper


def read_metrics_csv(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Lightning's metrics.csv as name -> (steps, values); cells without a number are left out."""
    series: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            for name, cell in row.items():
                if cell and name not in ("step", "epoch"):
                    series.setdefault(name, []).append((float(row["step"]), float(cell)))
    return {name: tuple(np.array(points).T) for name, points in series.items()}


def save_learning_curves(metrics_csv: Path, path: Path, losses: Sequence[str], scores: Sequence[str]) -> None:
    """Two plots over the training step: the named losses (thin: logged, thick: smoothed) and the named scores."""
    series = read_metrics_csv(metrics_csv)
    figure, axes = _figure(2)
    for axis, names, title in zip(axes, (losses, scores), ("loss", "validation"), strict=True):
        present = [name for name in names if name in series]
        for i, name in enumerate(present):
            steps, values = series[name]
            color = _hex(class_color(i))
            smooth = _smooth(values) if names is losses else values
            if names is losses:
                axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(steps, smooth, color=color, linewidth=2, label=name, marker="o" if len(steps) < 30 else "")
        axis.set(title=title, xlabel="step")
        if present:
            axis.legend(frameon=False)
    axes[1].set_ylim(bottom=0)
    with atomically(path) as part:
        figure.savefig(part)


def save_precision_recall(precision: np.ndarray, map_per_class: Mapping[str, float], path: Path) -> None:
    """Precision over recall at IoU 0.50, a line per class and their mean; at most ten classes are named.

    precision: [10 IoU thresholds, 101 recall thresholds, K], -1 where undefined, of `Evaluation`.
    """
    figure, (axis,) = _figure(1)
    recall, curves = np.linspace(0, 1, precision.shape[1]), precision[0]
    present = [(k, name) for k, name in enumerate(map_per_class) if (curves[:, k] > -1).all()]
    named = {k for k, _ in sorted(present, key=lambda one: -map_per_class[one[1]])[:10]}
    for k, name in present:
        text = f"{plotted(name)}  AP₅₀ {curves[:, k].mean():.3f}" if k in named else None
        axis.plot(recall, curves[:, k], color=_hex(class_color(k)), linewidth=1.4, alpha=0.85, label=text)
    if present:
        mean = curves[:, [k for k, _ in present]].mean(1)
        axis.plot(recall, mean, color=_hex(INK), linewidth=3, label=f"all classes  AP₅₀ {mean.mean():.3f}")
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.set(title="precision and recall at IoU 0.50", xlabel="recall", ylabel="precision")
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    with atomically(path) as part:
        figure.savefig(part)


def confusion_figure(counts: np.ndarray, class_names: Sequence[str]) -> Any:
    """A matplotlib figure of the part of each class' objects (rows) that were found as each class (columns).

    counts: [K + 1, K + 1] of `Evaluation`; classes are named where there are not more than 40.
    """
    figure, (axis,) = _figure(1)
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axis.grid(False)
    axis.set(title="confusions", xlabel="found as", ylabel="object")
    if len(class_names) <= 40:
        names = [plotted(name)[:24] for name in class_names]
        axis.set_xticks(range(len(counts)), [*names, "missed"], rotation=90, fontsize=7)
        axis.set_yticks(range(len(counts)), [*names, "nothing"], fontsize=7)
    return figure


def _figure(columns: int) -> tuple[Any, Any]:
    """A figure that belongs to no window and no global state, with quiet axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * columns + 1, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over a twentieth of the points; shorter at both ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    first = np.maximum(np.arange(len(values)) - half, 0)
    return (total[last] - total[first]) / (last - first)


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
