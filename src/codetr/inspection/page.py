"""One HTML page that stands alone: numbers, histograms, and every kind of finding with pictures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from markupsafe import Markup, escape
from PIL import Image, ImageDraw, ImageOps

from codetr.data.findings import Box, Picture
from codetr.data.images import opened
from codetr.data.rules import RULES, SEVERITIES
from codetr.inspection.split import Split
from codetr.inspection.statistics import Statistics
from codetr.inspection.summary import class_names
from codetr.reporting import html

_SIDE = 240  # pixels of a picture
_AROUND = 1.5  # what is shown around a box, in sides of the box
_MOST_PIXELS = 80_000_000  # of a file that is unpacked for a picture
_LEAST = 48  # pixels of the image that a picture shows at least
_RED, _BLUE = (214, 40, 40), (20, 90, 220)
_WIDE, _HIGH = 330, 130  # of a chart
_MEANINGS = {
    "error": "training would stop, or learn or measure something wrong",
    "warning": "probably not meant",
    "note": "good to know",
}
_CHARTS = {
    "shares": "Size of a box: √(box area / image area)",
    "aspects": "Width / height of a box",
    "crowding": "Objects in an image",
}


def write(path: Path, splits: Sequence[Split], numbers: Sequence[Statistics], pictures: int) -> None:
    """pictures: of each kind, at most. Raises OSError."""
    values = {
        "splits": splits,
        "names": [s.name for s in splits],
        "pairs": list(zip(splits, numbers, strict=True)),
        "totals": {s: (sum(p.findings.total(s) for p in splits), _MEANINGS[s]) for s in SEVERITIES},
        "charts": [(t, *_chart([getattr(n, key) for n in numbers], splits)) for key, t in _CHARTS.items()],
        "classes": _classes(numbers),
        "findings": [_finding(s, i, rule, pictures) for i, s in enumerate(splits) for rule in s.findings.rules()],
    }
    html.write(path, "check.html", values, advice="choose another page=FILE")


@dataclass(frozen=True)
class _Bar:
    """Of a chart: the part of `split` in one class of a histogram, in pixels."""

    split: str
    title: str
    x: str
    y: str
    width: str
    height: str


def _chart(
    histograms: Sequence[Sequence[tuple[str, int]]], splits: Sequence[Split]
) -> tuple[list[_Bar], list[tuple[str, str]]]:
    """Bars of each split side by side, in parts of that split, so that splits of unequal size compare; (x, label)."""
    parts = [[count / max(1, sum(c for _, c in h)) for _, count in h] for h in histograms]
    top = max((p for row in parts for p in row), default=0) or 1
    step = _WIDE / len(histograms[0])
    thick = step * 0.8 / len(parts)
    bars = []
    for j, (split, histogram) in enumerate(zip(splits, histograms, strict=True)):
        for i, (label, count) in enumerate(histogram):
            tall, x = _HIGH * parts[j][i] / top, i * step + step * 0.1 + j * thick
            title = f"{split.name}, {label}: {count:,} ({parts[j][i]:.1%})"
            places = (f"{v:.1f}" for v in (x, _HIGH - tall + 4, thick, tall))
            bars.append(_Bar(split.name, title, *places))
    return bars, [(f"{i * step + step / 2:.1f}", label) for i, (label, _) in enumerate(histograms[0])]


def _classes(numbers: Sequence[Statistics]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Of each class and split, the objects, and these in per cent of the split's most frequent class."""
    most = [max(n.classes.values(), default=0) or 1 for n in numbers]
    counts = {name: [n.classes.get(name, 0) for n in numbers] for name in class_names(numbers)}
    return [(name, [(c, 100 * c / m) for c, m in zip(row, most, strict=True)]) for name, row in counts.items()]


def _finding(split: Split, number: int, rule: str, pictures: int) -> dict[str, object]:
    """What the page shows of one rule in one split."""
    examples, count = split.findings.examples[rule], split.findings.counts[rule]
    seen = ((e.record, data) for e in examples if e.picture and (data := _thumbnail(e.picture)))
    return {
        "rule": rule,
        "split": split.name,
        "severity": split.findings.severity(rule),
        "count": count,
        "mend": RULES[rule].mend,
        "anchor": f"f{number}-{list(RULES).index(rule)}",
        "advice": _sentence(RULES[rule].advice),
        "pictures": list(islice(seen, pictures)),
        "listed": f"{len(examples)} of {count:,} records" if count > len(examples) else "Records",
        "records": [e.record for e in examples],
    }


def _sentence(advice: str) -> Markup:
    """With a capital letter and a full stop, and `words` of files as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(advice[0].upper() + advice[1:]))) + ".")


def _thumbnail(picture: Picture) -> str | None:
    """JPEG in base64 of the box and what is around it; None where the file cannot be shown."""
    try:
        with opened(picture.path, _MOST_PIXELS) as image:
            if picture.box is None:
                image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
            pixels = image.convert("RGB")
        shown = _crop(pixels, picture.box, picture.other) if picture.box else ImageOps.contain(pixels, (_SIDE, _SIDE))
    except (OSError, ValueError, SyntaxError, OverflowError, Image.DecompressionBombError):
        return None
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _crop(image: Image.Image, box: Box, other: Box | None) -> Image.Image:
    """The box in red, the other in blue, with what is around them; parts outside the image are grey."""
    boxes = [_ordered(b, 4.0 * max(image.size)) for b in (other, box) if b]
    inside = box[0] < image.width and box[1] < image.height and box[2] > 0 and box[3] > 0
    window = boxes if inside else [*boxes, (0, 0, *image.size)]  # else show where the image is
    x0, y0 = (min(b[i] for b in window) for i in (0, 1))
    x1, y1 = (max(b[i] for b in window) for i in (2, 3))
    side = max(_LEAST, (1 + _AROUND if inside else 1.1) * max(x1 - x0, y1 - y0))
    left, top = (x0 + x1 - side) / 2, (y0 + y1 - side) / 2
    scale = _SIDE / side
    shown = Image.new("RGB", (_SIDE, _SIDE), (203, 210, 217))
    right, bottom = min(image.width, int(left + side) + 1), min(image.height, int(top + side) + 1)
    seen = (max(0, int(left)), max(0, int(top)), right, bottom)
    if seen[0] < seen[2] and seen[1] < seen[3]:
        part = image.crop(seen)
        size = max(1, round(part.width * scale)), max(1, round(part.height * scale))
        shown.paste(part.resize(size), (round((seen[0] - left) * scale), round((seen[1] - top) * scale)))
    pen = ImageDraw.Draw(shown)
    for (a0, b0, a1, b1), color in zip(boxes[::-1], (_RED, _BLUE), strict=False):
        frame = ((a0 - left) * scale, (b0 - top) * scale, (a1 - left) * scale, (b1 - top) * scale)
        pen.rectangle(
            tuple(v + d for v, d in zip(frame, (-2, -2, 2, 2), strict=True)), outline=(255, 255, 255), width=4
        )
        pen.rectangle(tuple(v + d for v, d in zip(frame, (-1, -1, 1, 1), strict=True)), outline=color, width=2)
    return shown


def _ordered(box: Box, limit: float) -> Box:
    """Upper left corner first, within `limit` pixels of the origin."""
    x0, y0, x1, y1 = (max(-limit, min(limit, v)) for v in box)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
