"""`report.html`, a page on one run: everything that its directory says, written again after every validation."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codetr.errors import UserError
from codetr.evaluation.summary import FREQUENCIES
from codetr.names import tags
from codetr.reporting import charts, history, html, pictures, settings, stored
from codetr.reporting.analysis import Analysis, analyse

PAGE, METRICS = "report.html", "metrics.json"
PICTURES = 24
KINDS = {"bbox": "boxes", "segm": "masks"}
_SAME = 1e-6  # logged numbers are of 32 bits


@dataclass(frozen=True)
class Run:
    """What the directory of a run says. metrics: metrics.json, {} where there is none yet."""

    folder: Path
    metrics: dict[str, Any]
    history: history.History
    overrides: list[tuple[str, str]]
    config: dict[str, str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def numbers(self, kind: str) -> dict[str, float]:
        """COCO's and LVIS' numbers of the last evaluation of boxes or masks."""
        own = self.metrics if kind == "bbox" else self.metrics.get("segm", {})
        return {name: v for name, v in own.items() if name.startswith(("map", "mar_")) and isinstance(v, float | int)}

    def classes(self, kind: str) -> dict[str, float]:
        """AP of every class."""
        own = self.metrics if kind == "bbox" else self.metrics.get("segm", {})
        return own.get("map_per_class", {})


def read(folder: Path) -> Run:
    """Raises UserError for a folder that is none of a run, and for files in it that codetr did not write."""
    path = folder / METRICS
    if not path.is_file() and not (folder / history.LOG).is_file():
        raise UserError(f"{folder} is no run: it has neither {METRICS} nor {history.LOG}; give its directory")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is no JSON, as codetr writes it: {error}") from error
    return Run(folder, metrics, history.read(folder), settings.overrides(folder), settings.flat(folder))


def write(folder: Path, running: bool = False) -> Path:
    """Write the page of the run in `folder`; where it is.

    running: the page loads itself again every minute. Raises UserError as `read`, and where it cannot be written.
    """
    run = read(folder)
    found = {kind: stored.load(folder, kind) for kind in KINDS if run.numbers(kind)}
    analyses = {kind: analyse(own) for kind, own in found.items() if own is not None}
    about = next(iter(analyses.values())).stored.about if analyses else None
    drawn = {"run": charts.history_charts(run.history, _scores(run))}
    drawn |= {kind: charts.analysis_charts(own) for kind, own in analyses.items()}
    values = {
        "run": run,
        "running": running,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "kinds": {kind: _kind(run, kind, analyses.get(kind)) for kind in found},
        "charts": {f"{part}-{name}": chart.__dict__ for part, own in drawn.items() for name, chart in own.items()},
        "axes": list(run.history.axes(np.zeros(1))) if run.history.series else [],
        "machine": about.machine if about else {},
        "lasted": _last(run.history, history.HOURS),
        "seen": _last(run.history, history.IMAGES),
    }
    html.write(folder / PAGE, "report.html", values)
    return folder / PAGE


def _scores(run: Run) -> dict[str, str]:
    """Lines of the first chart: boxes, masks, and the heads on their own."""
    names = {"AP": "val/map", "AP50": "val/map_50", "AP75": "val/map_75", "AP of masks": "val/segm/map"}
    branches = [name for name in run.history.series if name.startswith("val/branch/") and name.endswith("/map")]
    return names | {f"AP of {name.split('/')[2]} alone": name for name in branches}


def _last(own: history.History, name: str) -> float | None:
    return float(values[-1]) if len(values := own.values(name)) else None


def _kind(run: Run, kind: str, analysis: Analysis | None) -> dict[str, Any]:
    """What the page says of boxes or masks."""
    prefix = "val/" if kind == "bbox" else "val/segm/"
    numbers = run.numbers(kind)
    content: dict[str, Any] = {
        "title": KINDS[kind],
        "numbers": [(name, value, _change(run, prefix + name, value)) for name, value in numbers.items()],
        "classes": _classes(run, kind, analysis),
        "images": run.metrics.get("images"),
        "analysis": analysis,
        "sampled": 0,
    }
    if analysis is not None:
        there, every = len(analysis.stored.columns.ids), analysis.stored.about.images
        content |= {
            "costly": pictures.costliest(analysis, PICTURES),
            "doubtful": pictures.doubtful(analysis, analysis.doubts),
            "sampled": there if there < every else 0,
        }
    return content


def _change(run: Run, name: str, value: float) -> float | None:
    """To the validation before; None where there was none, or where there is nothing to compare."""
    before = run.history.values(name)
    if len(before) > 1 and abs(before[-1] - value) < _SAME:  # this one is logged already
        before = before[:-1]
    elif len(before) == 1 and abs(before[-1] - value) < _SAME:
        return None
    return float(value - before[-1]) if len(before) and before[-1] >= 0 and value >= 0 else None


def _classes(run: Run, kind: str, analysis: Analysis | None) -> list[dict[str, Any]]:
    """A row for every class."""
    objects, ap = run.metrics.get("objects_per_class", {}), run.classes(kind)
    logged = tags(ap)
    rows = [
        {
            "name": name,
            "ap": value,
            "change": _change(run, f"val/ap/{logged[name]}", value) if kind == "bbox" else None,
            "objects": objects.get(name),
        }
        for name, value in ap.items()
    ]
    if analysis is None or [row["name"] for row in rows] != analysis.stored.about.class_names:
        return rows
    for k, row in enumerate(rows):
        row |= _of_class(analysis, k)
    return rows


def _of_class(analysis: Analysis, k: int) -> dict[str, Any]:
    own, about = analysis.operating, analysis.stored.about
    letters: Mapping[str, str] = {letter: name for name, letter in FREQUENCIES.items()}
    return {
        "ap50": float(analysis.ap[k]),
        "train": about.train_objects[k] if about.train_objects else None,
        "frequency": letters[about.frequency[k]] if about.frequency else None,
        "threshold": float(own.best[k]),
        "precision": float(own.best_precision[k]),
        "recall": float(own.best_recall[k]),
        "f1": float(own.best_f1[k]),
        "cost": 100 * float(analysis.class_costs[k]),
    }
