"""Charts as plotly's own plain containers. A chart has variants to choose from, and lines may have several x axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codetr.evaluation.engines import CONFUSION_SCORE
from codetr.names import shown
from codetr.reporting.analysis import Analysis
from codetr.reporting.history import POINTS, History, losses, summed, thinned
from codetr.reporting.tide import KINDS

CONFUSED = 50  # classes of the confusion matrix: those that are confused most
ALL = "all classes"
_RECALL = np.linspace(0, 1, 101)

Trace = dict[str, Any]


@dataclass
class Chart:
    """variants: name -> lines or bars; layout: of all of them. An `xs` of a trace has its x of every axis."""

    title: str
    variants: dict[str, list[Trace]]
    layout: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.variants.values())


def rounded(values: Iterable[float], digits: int = 4) -> list[float | None]:
    """As JSON has them, which knows no NaN; to so many significant digits."""
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in np.asarray(values, float).tolist()]


def history_charts(history: History, scores: Mapping[str, str]) -> dict[str, Chart]:
    """scores: label -> logged name, of the first chart; further ones, where they are logged."""
    charts = {
        "scores": Chart("Average precision", {"": _lines(history, scores, markers=True)}),
        "losses": Chart("Losses", _loss_variants(history)),
        "rate": Chart("Learning rate", {"": _lines(history, {"learning rate": "train/lr"})}),
        "gradient": Chart("Norm of the gradient", {"": _lines(history, {"norm": "train/gradient_norm"})}),
        "speed": Chart("Images per second", {"": _lines(history, {"images/s": "run/images_per_second"})}),
        "memory": Chart("Memory, GB", {"": _lines(history, {"memory": "run/memory_gb"})}),
    }
    return {name: chart for name, chart in charts.items() if chart}


def _lines(history: History, names: Mapping[str, str], markers: bool = False) -> list[Trace]:
    return [
        line(history, *history.series[name], label, markers) for label, name in names.items() if name in history.series
    ]


def line(history: History, steps: np.ndarray, values: np.ndarray, name: str, markers: bool = False) -> Trace:
    """A line over every axis of the run."""
    steps, values = thinned(steps, values)
    mode = "lines+markers" if markers and len(steps) <= POINTS // 3 else "lines"
    xs = {axis: rounded(at, 7) for axis, at in history.axes(steps).items()}
    return {"xs": xs, "y": rounded(values), "name": name, "mode": mode}


def _loss_variants(history: History) -> dict[str, list[Trace]]:
    """All losses by groups; of every group its layers and its terms."""
    every = losses(history)
    groups = dict.fromkeys(group for group, _, _ in every.values())
    total = _lines(history, {"all together": "train/loss"})
    variants = {"groups": total + _sums(history, {g: [n for n, k in every.items() if k[0] == g] for g in groups})}
    for group in groups:
        for place, what in ((1, "layers"), (2, "terms")):
            own: dict[str, list[str]] = {}
            for name, keys in every.items():
                if keys[0] == group:
                    own.setdefault(keys[place], []).append(name)
            if len(own) > 1:
                variants[f"{group}: {what}"] = _sums(history, own)
    return variants


def _sums(history: History, names: Mapping[str, Sequence[str]]) -> list[Trace]:
    return [line(history, *summed(history, own), label) for label, own in names.items()]


def analysis_charts(analysis: Analysis) -> dict[str, Chart]:
    charts = {
        "curves": _curves(analysis),
        "mistakes": _mistakes(analysis),
        "calibration": _calibration(analysis),
        "confusion": _confusion(analysis),
    }
    return {name: chart for name, chart in charts.items() if chart}


def _curves(analysis: Analysis) -> Chart:
    """Precision over recall, and precision, recall and F1 over the score: of the mean, and of every class."""
    own, names = analysis.operating, analysis.stored.about.class_names
    there = np.flatnonzero(analysis.objects).tolist()
    if not there:
        return Chart("", {})
    every = [(ALL, there)] + [(shown(names[k]), [k]) for k in there]
    variants: dict[str, list[Trace]] = {}
    for name, classes in every:
        precision = _mean(analysis.precision[:, classes])
        over_score = (own.precision, own.recall, own.f1)
        traces = [
            {"x": rounded(_RECALL), "y": rounded(precision), "name": "precision over recall", "showlegend": False}
        ]
        for label, values in zip(("precision", "recall", "F1"), over_score, strict=True):
            y = rounded(_mean(values[:, classes]))
            traces.append({"x": rounded(own.scores), "y": y, "name": label, "xaxis": "x2", "yaxis": "y2"})
        variants[name if name not in variants else f"{name} ({len(variants)})"] = traces
    layout = {
        "grid": {"rows": 1, "columns": 2, "pattern": "independent"},
        "xaxis": {"title": "recall", "range": [0, 1]},
        "yaxis": {"title": "precision", "range": [0, 1.02]},
        "xaxis2": {"title": "score", "range": [0, 1]},
        "yaxis2": {"range": [0, 1.02]},
    }
    return Chart("Precision and recall at IoU 0.5", variants, layout)


def _mean(values: np.ndarray) -> np.ndarray:
    """[S] of [S, K], over the classes that have a number; NaN where none has."""
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0.0).sum(1) / there.sum(1)


def _mistakes(analysis: Analysis) -> Chart:
    tide = analysis.tide.errors
    if all(np.isnan(lost) for lost, _ in tide.values()):
        return Chart("", {})
    kinds = list(KINDS)[::-1]
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": rounded([tide[kind][0] for kind in kinds]),
        "y": [KINDS[kind][0] for kind in kinds],
        "hovertext": [f"{KINDS[kind][1]}; {tide[kind][1]:,} times" for kind in kinds],
        "marker": {"color": ["#98a6b5" if kind in ("FP", "FN") else "#2f6fb3" for kind in kinds]},
    }
    layout = {"xaxis": {"title": "AP50 gained without it", "rangemode": "tozero"}}
    return Chart("What costs the most (TIDE)", {"": [bar]}, layout)


def _calibration(analysis: Analysis) -> Chart:
    own = analysis.calibration
    bars = {
        "type": "bar",
        "x": rounded((own.edges[1:] + own.edges[:-1]) / 2),
        "y": rounded(own.right),
        "hovertext": [f"{n:,} detections" for n in own.number.tolist()],
        "name": "part that is right",
        "marker": {"color": "#2f6fb3"},
    }
    ideal = {"x": [0, 1], "y": [0, 1], "name": "what the score says", "mode": "lines", "line": {"dash": "dot"}}
    layout = {"xaxis": {"title": "score", "range": [0, 1]}, "yaxis": {"range": [0, 1.02]}, "bargap": 0.05}
    return Chart(f"Calibration: expected error {own.error:.3f}", {"": [bars, ideal]}, layout)


def _confusion(analysis: Analysis) -> Chart:
    """Parts of each class' objects; of false alarms, of all of them."""
    counts, names = analysis.confusion, analysis.stored.about.class_names
    if not counts.any():
        return Chart("", {})
    k = len(names)
    off = counts[:-1, :-1].sum(0) + counts[:-1, :-1].sum(1) - 2 * counts[:-1, :-1].diagonal()
    chosen = np.sort(np.argsort(-off, kind="stable")[:CONFUSED])
    rows = np.append(chosen, k)
    part = counts[np.ix_(rows, rows)]
    share = part / np.maximum(1, counts[rows].sum(1, keepdims=True))
    labels = [shown(names[i])[:24] for i in chosen.tolist()]
    unlike = [f"{name} " if name in labels[:i] else name for i, name in enumerate(labels)]
    heat = {
        "type": "heatmap",
        "z": [rounded(row, 3) for row in share],
        "text": part.tolist(),
        "x": [*unlike, "missed"],
        "y": [*unlike, "nothing"],
        "hovertemplate": "%{y} found as %{x}: %{text} (%{z:.1%})<extra></extra>",
        "colorscale": [[0, "#ffffff"], [1, "#1b4f8a"]],
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
    }
    some = f", the {CONFUSED} classes that are confused most" if k > CONFUSED else ""
    axis = {"type": "category", "automargin": True, "showgrid": False}
    layout = {"xaxis": {**axis, "tickangle": -60}, "yaxis": {**axis, "autorange": "reversed"}, "tall": len(rows)}
    return Chart(f"Confusions at scores of {CONFUSION_SCORE} and more{some}", {"": [heat]}, layout)
