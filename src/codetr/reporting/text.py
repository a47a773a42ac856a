"""Reports for a terminal: what the pages say, in a screen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from codetr.names import shown
from codetr.reporting import history, stored
from codetr.reporting.analysis import Analysis, analyse
from codetr.reporting.comparison import Comparison
from codetr.reporting.html import decimals, signed
from codetr.reporting.page import KINDS, Run
from codetr.reporting.tide import KINDS as ERRORS

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDE = 40  # columns of a curve
_CLASSES = 10
_IMAGES = 5


def of_run(run: Run) -> RenderableType:
    """One run: numbers, how mAP and loss went, the worst classes, what costs the most."""
    parts: list[RenderableType] = [Text(shown(run.name), style="bold")]
    parts += [_numbers(run, kind) for kind in KINDS if run.numbers(kind)] or [Text("no validation yet")]
    parts += [_curve(run, label, name) for label, name in {"mAP": "val/map", "loss": "train/loss"}.items()]
    for kind in KINDS:
        own = stored.load(run.folder, kind)
        if own is not None:
            analysis = analyse(own)
            parts += [_mistakes(analysis, KINDS[kind]), _worst(run, kind, analysis), _images(analysis)]
    return Group(*(part for one in parts for part in (one, "")))


def _numbers(run: Run, kind: str) -> Table:
    table = Table(title=f"{KINDS[kind]}, {run.metrics.get('images')} images", title_justify="left", title_style="bold")
    numbers = list(run.numbers(kind).items())
    half = -(-len(numbers) // 2)
    for _ in range(2):
        table.add_column("number", style="dim")
        table.add_column("value", justify="right")
    for i in range(half):
        pairs = [numbers[i], numbers[i + half] if i + half < len(numbers) else ("", float("nan"))]
        table.add_row(*(cell for name, value in pairs for cell in (name, decimals(value) if name else "")))
    return table


def _curve(run: Run, label: str, name: str) -> Text:
    if name not in run.history.series:
        return Text(f"{label}: not logged")
    steps, values = history.thinned(*run.history.series[name], _WIDE)
    return Text(f"{label:5}{curve(values)}  {values[0]:.3g} to {values[-1]:.3g}, step {steps[-1]:.0f}")


def curve(values: np.ndarray) -> str:
    """A character per value, the lowest and the highest of them at the ends of the scale; a blank for no number."""
    finite = values[np.isfinite(values)]
    low, span = (finite.min(), np.ptp(finite) or 1.0) if len(finite) else (0.0, 1.0)
    return "".join(_BLOCKS[round((v - low) / span * 7)] if np.isfinite(v) else " " for v in values.tolist())


def _mistakes(analysis: Analysis, title: str) -> Table:
    table = Table(title=f"AP50 lost, {title}", title_justify="left", title_style="bold", show_header=False)
    for kind, (lost, count) in analysis.tide.errors.items():
        table.add_row(ERRORS[kind][0], decimals(lost), f"{count:,} times" if kind not in ("FP", "FN") else "")
    return table


def _worst(run: Run, kind: str, analysis: Analysis) -> Table:
    table = Table(title="classes that cost the most", title_justify="left", title_style="bold")
    for name in ("class", "points", "AP", "objects", "best score"):
        table.add_column(name, justify="left" if name == "class" else "right", max_width=28, no_wrap=True)
    names, ap = analysis.stored.about.class_names, run.classes(kind)
    for k in np.argsort(-analysis.class_costs, kind="stable")[:_CLASSES].tolist():
        if analysis.objects[k]:
            cells = (f"{100 * analysis.class_costs[k]:.2f}", decimals(ap.get(names[k])), f"{analysis.objects[k]:.0f}")
            table.add_row(Text(shown(names[k])), *cells, decimals(analysis.operating.best[k], 2))
    return table


def _images(analysis: Analysis) -> Text:
    costs, files = analysis.image_costs, analysis.stored.about.files
    worst = [i for i in np.argsort(-costs, kind="stable")[:_IMAGES].tolist() if costs[i] > 0]
    named = [f"{shown(files[i] if files else analysis.stored.columns.ids[i])} ({100 * costs[i]:.2f})" for i in worst]
    return Text("images that cost the most points: " + (", ".join(named) or "none"))


def of_runs(comparison: Comparison) -> RenderableType:
    """Several runs side by side, with what is noise."""
    parts: list[RenderableType] = []
    for kind, numbers in comparison.numbers.items():
        parts += [_side_by_side(comparison.names, numbers, KINDS[kind])]
        for name, own in zip(comparison.names[1:], comparison.noise[kind], strict=True):
            parts.append(Text(f"{shown(name)}: {_sentence(own)}"))
    for group in comparison.groups:
        spread = group.spread.get("map")
        more = f" ± {decimals(spread)}" if spread is not None else ""
        parts.append(Text(f"{shown(group.label)}: mAP {decimals(group.mean.get('map'))}{more}, {len(group.runs)} runs"))
    parts += [Text(f"{shown(key)}: {', '.join(map(shown, row))}") for key, row in comparison.differences.items()]
    return Group(*parts)


def _side_by_side(names: Sequence[str], numbers: dict[str, list[float]], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("number", *names):
        table.add_column(Text(shown(name)), justify="left" if name == "number" else "right")
    for name, values in numbers.items():
        table.add_row(name, *map(decimals, values))
    return table


def _sentence(own: object) -> str:
    from codetr.reporting.bootstrap import Difference

    if not isinstance(own, Difference):
        return f"not to be compared: {own}"
    interval = f"{signed(own.low)} to {signed(own.high)}"
    draws = f"{interval} with 95 %; better in {own.better:.0%} of {own.rounds} draws"
    return f"{signed(own.value)} mAP ({draws}): {own.verdict}"
