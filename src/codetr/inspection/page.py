"""One HTML page that stands alone: numbers, histograms, and every kind of finding with pictures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from codetr.data.findings import Box, Example, Picture
from codetr.data.images import opened
from codetr.data.rules import RULES, SEVERITIES
from codetr.inspection.split import Split
from codetr.inspection.statistics import Statistics
from codetr.inspection.summary import class_names

_SIDE = 240  # pixels of a picture
_AROUND = 1.5  # what is shown around a box, in sides of the box
_MOST_PIXELS = 80_000_000  # of a file that is unpacked for a picture
_LEAST = 48  # pixels of the image that a picture shows at least
_RED, _BLUE = (214, 40, 40), (20, 90, 220)
_STYLE = """
:root {
  --ink:#1f2933; --faint:#7b8794; --line:#e4e7eb; --paper:#fff; --back:#f5f7fa; --train:#2f6fb3; --val:#e08e2b;
  --error:#c62828; --warning:#b26a00; --note:#52606d;
}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0}
h2{font-size:19px;margin:34px 0 10px}
.faint{color:var(--faint)}
.card{background:var(--paper);border:1px solid var(--line);border-radius:8px;padding:14px 18px;margin:12px 0}
.row{display:flex;flex-wrap:wrap;gap:12px}
.row>.card{flex:1 1 330px;margin:0}
.total{font-size:24px;font-weight:600}
.error{color:var(--error)}
.warning{color:var(--warning)}
.note{color:var(--note)}
table{border-collapse:collapse;width:100%}
th,td{padding:5px 10px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{font-weight:600;font-size:13px;color:var(--faint);cursor:pointer;user-select:none;white-space:nowrap}
th:hover{color:var(--ink)}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
.scroll{max-height:560px;overflow:auto}
.badge{display:inline-block;border-radius:4px;padding:0 8px;font-size:13px;font-weight:600;color:#fff}
.badge.error{background:var(--error)}
.badge.warning{background:var(--warning)}
.badge.note{background:var(--note)}
.pictures{display:flex;flex-wrap:wrap;gap:12px;margin:10px 0}
figure{margin:0;width:240px}
figure img{display:block;max-width:240px;border-radius:4px;border:1px solid var(--line)}
figcaption{font-size:12px;line-height:1.35;color:var(--faint);overflow-wrap:anywhere;margin-top:4px}
details{margin-top:6px}
summary{cursor:pointer;color:var(--faint)}
li{overflow-wrap:anywhere;font-size:13px}
h3{font-size:16px;margin:0 0 2px}
h4{font-size:14px;margin:0 0 6px}
.bar{height:11px;border-radius:2px;display:block;min-width:1px;margin:3px 0}
svg text{font:11px system-ui,"DejaVu Sans",sans-serif;fill:var(--ink)}
a{color:inherit}
"""
_SCRIPT = """
document.querySelectorAll("th").forEach(th=>th.addEventListener("click",()=>{
const body=th.closest("table").tBodies[0],i=th.cellIndex,up=th.dataset.up!=="1";th.dataset.up=up?"1":"0";
const value=r=>{const c=r.cells[i];return c.dataset.value??c.textContent};
[...body.rows].sort((a,b)=>{const x=value(a),y=value(b),d=isNaN(x)||isNaN(y)?x.localeCompare(y):x-y;return up?d:-d})
.forEach(r=>body.append(r))}));
"""


def write(path: Path, splits: Sequence[Split], numbers: Sequence[Statistics], pictures: int) -> None:
    """pictures: of each kind, at most. Raises OSError."""
    parts = [
        _head(splits),
        "<h2>Numbers</h2>",
        _counts(splits, numbers),
        _histograms(splits, numbers),
        "<h2>Objects per class</h2>",
        _classes(splits, numbers),
        "<h2>Findings</h2>",
        _overview(splits),
        *(_finding(s, i, kind, pictures) for i, s in enumerate(splits) for kind in s.findings.rules()),
    ]
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Data check</title><style>{_STYLE}</style>"
        f"<main>{''.join(parts)}</main><script>{_SCRIPT}</script></html>"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _head(splits: Sequence[Split]) -> str:
    cards = []
    for severity in SEVERITIES:
        count = sum(s.findings.total(severity) for s in splits)
        meaning = {
            "error": "training would stop, or learn or measure something wrong",
            "warning": "probably not meant",
            "note": "good to know",
        }[severity]
        word = severity if count == 1 else f"{severity}s"
        tone = severity if count else "faint"
        cards.append(f'<div class="card"><div class="total {tone}">{count:,} {word}</div><div>{meaning}</div></div>')
    files = "".join(
        f'<div class="faint">{s.name}: {escape(str(s.findings.source))}, images in {escape(str(s.root))}</div>'
        for s in splits
    )
    return f'<h1>Data check</h1>{files}<div class="row" style="margin-top:16px">{"".join(cards)}</div>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Cells are HTML; columns `numeric` are to the right, and sorted as numbers."""

    def cell(tag: str, i: int, text: str) -> str:
        if i not in numeric:
            return f"<{tag}>{text}</{tag}>"
        value = f' data-value="{text.replace(",", "")}"' if tag == "td" else ""
        return f'<{tag} class="number"{value}>{text}</{tag}>'

    head = "".join(cell("th", i, c) for i, c in enumerate(columns))
    body = "".join(f"<tr>{''.join(cell('td', i, c) for i, c in enumerate(row))}</tr>" for row in rows)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _counts(splits: Sequence[Split], numbers: Sequence[Statistics]) -> str:
    columns = ("split", "images", "without objects", "objects", "small", "medium", "large", "crowds", "categories")
    rows = [
        [s.name] + [f"{v:,}" for v in (n.images, n.empty_images, n.objects, *n.sizes.values(), n.crowds, n.categories)]
        for s, n in zip(splits, numbers, strict=True)
    ]
    sizes = "".join(_image_sizes(s.name, n.image_sizes) for s, n in zip(splits, numbers, strict=True) if n.image_sizes)
    return _table(columns, rows, range(1, len(columns))) + sizes


def _image_sizes(name: str, sizes: dict[str, int]) -> str:
    sides = (
        f"{side} {sizes[f'min {side}']:,} to {sizes[f'max {side}']:,} pixels (median {sizes[f'median {side}']:,})"
        for side in ("width", "height")
    )
    return f'<div class="faint">{name} images: {", ".join(sides)}</div>'


def _histograms(splits: Sequence[Split], numbers: Sequence[Statistics]) -> str:
    titles = {
        "shares": "Size of a box: √(box area / image area)",
        "aspects": "Width / height of a box",
        "crowding": "Objects in an image",
    }
    names = [s.name for s in splits]
    cards = "".join(
        f'<div class="card"><h4>{title}</h4>{_svg([getattr(n, key) for n in numbers], names)}</div>'
        for key, title in titles.items()
    )
    legend = "".join(
        f'<span class="badge" style="background:var(--{name});margin-right:8px">{name}</span>' for name in names
    )
    legend = f'<div style="margin:14px 0 8px">{legend}<span class="faint">in parts of each split</span></div>'
    return f'{legend}<div class="row">{cards}</div>'


def _svg(histograms: Sequence[Sequence[tuple[str, int]]], names: Sequence[str]) -> str:
    """Bars of each split side by side, in parts of that split, so that splits of unequal size compare."""
    labels = [label for label, _ in histograms[0]]
    parts = [[count / max(1, sum(c for _, c in h)) for _, count in h] for h in histograms]
    top = max((p for row in parts for p in row), default=0) or 1
    width, height, below = 330, 130, 60
    step = width / len(labels)
    thick = step * 0.8 / len(parts)
    marks = []
    for i, label in enumerate(labels):
        for j, row in enumerate(parts):
            tall, x = height * row[i] / top, i * step + step * 0.1 + j * thick
            count = histograms[j][i][1]
            marks.append(
                f'<rect x="{x:.1f}" y="{height - tall + 4:.1f}" width="{thick:.1f}" height="{tall:.1f}" '
                f'fill="var(--{names[j]})"><title>{names[j]}, {escape(label)}: {count:,} ({row[i]:.1%})</title></rect>'
            )
        x = i * step + step / 2
        turn = f'transform="rotate(-35 {x:.1f} {height + 16})" text-anchor="end"'
        marks.append(f'<text x="{x:.1f}" y="{height + 16}" {turn}>{escape(label)}</text>')
    marks.append(f'<line x1="0" x2="{width}" y1="{height + 4}" y2="{height + 4}" stroke="var(--faint)"/>')
    return f'<svg viewBox="-34 0 {width + 36} {height + below}" width="100%" role="img">{"".join(marks)}</svg>'


def _classes(splits: Sequence[Split], numbers: Sequence[Statistics]) -> str:
    names = class_names(numbers)
    most = [max(n.classes.values(), default=0) or 1 for n in numbers]
    rows = []
    for name in names:
        counts = [n.classes.get(name, 0) for n in numbers]
        bars = "".join(
            f'<span class="bar" style="width:{100 * c / m:.1f}%;background:var(--{s.name})"></span>'
            for c, m, s in zip(counts, most, splits, strict=True)
        )
        rows.append([escape(name), *(f"{c:,}" for c in counts), bars])
    columns = ["class", *(s.name for s in splits), "share of the most frequent class"]
    return _table(columns, rows, range(1, 1 + len(splits)))


def _overview(splits: Sequence[Split]) -> str:
    rows = [
        [
            f'<span class="badge {severity}">{severity}</span>',
            s.name,
            f"{s.findings.counts[kind]:,}",
            f'<a href="#{_anchor(i, kind)}">{escape(kind)}</a>',
            escape(RULES[kind].mend),
        ]
        for i, s in enumerate(splits)
        for kind in s.findings.rules()
        for severity in (s.findings.severity(kind),)
    ]
    if not rows:
        return '<div class="card">Nothing.</div>'
    return _table(("severity", "split", "count", "finding", "fix=true"), rows, (2,))


def _anchor(split: int, kind: str) -> str:
    return f"f{split}-{list(RULES).index(kind)}"


def _finding(split: Split, number: int, kind: str, pictures: int) -> str:
    severity, examples = split.findings.severity(kind), split.findings.examples[kind]
    seen = ((e, data) for e in examples if e.picture and (data := _thumbnail(e.picture)))
    shown = "".join(
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="">'
        f"<figcaption>{escape(example.record)}</figcaption></figure>"
        for example, data in islice(seen, pictures)
    )
    more = split.findings.counts[kind] - len(examples)
    listed = f"{len(examples)} of {split.findings.counts[kind]:,} records" if more else "Records"
    return (
        f'<div class="card" id="{_anchor(number, kind)}"><h3><span class="badge {severity}">{severity}</span> '
        f"{escape(kind)} <span class='faint'>{split.findings.counts[kind]:,} in {split.name}</span></h3>"
        f"<div>{_sentence(RULES[kind].advice)}</div>"
        f'<div class="pictures">{shown}</div>{_records(examples, listed, opened=not shown)}</div>'
    )


def _sentence(advice: str) -> str:
    """With a capital letter and a full stop, and `words` of files as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(advice[0].upper() + advice[1:])) + "."


def _records(examples: Sequence[Example], title: str, opened: bool) -> str:
    items = "".join(f"<li>{escape(e.record)}</li>" for e in examples)
    return f"<details{' open' if opened else ''}><summary>{title}</summary><ul>{items}</ul></details>"


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
