"""What a run has logged, as lines for charts: `csv/metrics.csv` of its directory."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

LOG = Path("csv") / "metrics.csv"
STEP, HOURS, IMAGES, EPOCH = "step", "run/hours", "run/images", "epoch"
POINTS = 300  # of a line
AXES = {"steps": STEP, "epochs": EPOCH, "hours": HOURS, "images seen": IMAGES}
_LOSS = "train/"
_NO_LOSS = {"loss", "lr", "gradient_norm"}


@dataclass(frozen=True)
class History:
    """series: name -> steps and values [n], ascending; values that are not finite stay."""

    series: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def values(self, name: str) -> np.ndarray:
        return self.series[name][1] if name in self.series else np.empty(0)

    def axes(self, steps: np.ndarray) -> dict[str, np.ndarray]:
        """Where steps are on each axis that the run has logged."""
        places = {"steps": steps}
        for axis, name in AXES.items():
            if name in self.series:
                places[axis] = np.interp(steps, *self.series[name])
        return places


def read(folder: Path) -> History:
    """An empty one where the run has no such file."""
    path = folder / LOG
    if not path.is_file():
        return History()
    points: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            step = _number(row.get("step"))
            if step is None:
                continue
            for name, cell in row.items():
                if name and name != "step" and (value := _number(cell)) is not None:
                    points.setdefault(name, []).append((step, value))
    return History({name: _ascending(own) for name, own in points.items()})


def _number(cell: object) -> float | None:
    """None for what a process that was killed has written half."""
    try:
        return float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _ascending(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.array(points).T
    order = np.argsort(steps, kind="stable")
    return steps[order], values[order]


def thinned(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, so that a line has at most so many points; a value that is not finite is no part of one,
    unless all its neighbours are like it."""
    size = -(-len(steps) // points)
    if size <= 1:
        return steps, values
    parts = np.arange(0, len(steps), size)
    finite = np.isfinite(values)
    total = np.add.reduceat(np.where(finite, values, 0.0), parts)
    count = np.add.reduceat(finite.astype(float), parts)
    with np.errstate(invalid="ignore"):
        return np.maximum.reduceat(steps, parts), total / count


def losses(history: History) -> dict[str, tuple[str, str, str]]:
    """Name -> (group, layer, term) of every logged loss; "" for what one has not."""
    found = {}
    for name in history.series:
        own = name.removeprefix(_LOSS)
        if name.startswith(_LOSS) and own not in _NO_LOSS:
            group, *rest = own.split("/")
            layer, term = (rest[0], rest[-1]) if len(rest) > 1 else ("", rest[0] if rest else "")
            found[name] = (group, layer, term)
    return found


def summed(history: History, names: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """The sum of losses at the steps where the first one is logged; NaN where another is not."""
    first, *others = names
    steps, total = history.series[first]
    total = total.copy()
    for name in others:
        at, values = history.series[name]
        place = np.searchsorted(at, steps).clip(max=len(at) - 1)
        total += np.where(at[place] == steps, values[place], np.nan)
    return steps, total
