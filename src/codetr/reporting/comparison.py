"""Several runs beside each other: numbers, convergence, what is noise, what was gained and lost."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codetr.errors import UserError
from codetr.names import shown
from codetr.reporting import bootstrap, charts, html, pictures, settings, stored
from codetr.reporting.analysis import analyse
from codetr.reporting.bootstrap import Difference, Progress
from codetr.reporting.page import KINDS, PAGE, Run
from codetr.reporting.pictures import Picture
from codetr.reporting.stored import Stored

SHOWN_IMAGES = 9
_SEED = "seed"


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed. label: in which settings they differ from other groups.

    mean, spread: number -> over the runs; the spread is the standard deviation of a sample, None of one run.
    """

    label: str
    runs: list[int]
    mean: dict[str, float]
    spread: dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """names: of the runs, no two alike. numbers: name -> value of every run, NaN where one has none. differences:
    setting -> its value in every run. noise: of every run but the first and of boxes or masks, the difference from the
    first, or why there is none."""

    runs: list[Run]
    names: list[str]
    numbers: dict[str, dict[str, list[float]]]
    classes: dict[str, dict[str, list[float]]]
    differences: dict[str, list[str]]
    groups: list[Group]
    noise: dict[str, list[Difference | str]]


def compare(runs: Sequence[Run], rounds: int, progress: Progress) -> Comparison:
    kinds = [kind for kind in KINDS if any(run.numbers(kind) for run in runs)]
    return Comparison(
        runs=list(runs),
        names=unlike([run.folder for run in runs]),
        numbers={kind: side_by_side([run.numbers(kind) for run in runs]) for kind in kinds},
        classes={kind: side_by_side([run.classes(kind) for run in runs]) for kind in kinds},
        differences=settings.differences([run.config for run in runs]),
        groups=groups(runs),
        noise={kind: _noise(runs, kind, rounds, progress) for kind in kinds},
    )


def unlike(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({i})" for i, path in enumerate(paths, 1)]


def side_by_side(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key, float("nan")) for row in rows] for key in keys}


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs whose settings are the same but for their seeds; [] where none of them has a companion."""
    found: dict[tuple[tuple[str, str], ...], list[int]] = {}
    differing = settings.differences([run.config for run in runs])
    keys = [key for key in differing if key != _SEED and not key.endswith("." + _SEED)]
    for i, run in enumerate(runs):
        found.setdefault(tuple((key, run.config.get(key, settings.ABSENT)) for key in keys), []).append(i)
    if not any(len(members) > 1 for members in found.values()) or not all(run.config for run in runs):
        return []
    labels = _labels(list(found), [runs[members[0]] for members in found.values()])
    return [_group(label, members, runs) for label, members in zip(labels, found.values(), strict=True)]


def _labels(configs: Sequence[Sequence[tuple[str, str]]], runs: Sequence[Run]) -> list[str]:
    """Of groups: in which overrides they differ; where that does not tell them apart, in which settings."""
    given = settings.differences([dict(run.overrides) for run in runs])
    rows = [[(key, values[i]) for key, values in given.items() if key != _SEED] for i in range(len(runs))]
    own = [", ".join(f"{key}={value}" for key, value in row if value != settings.ABSENT) for row in rows]
    if len(set(own)) < len(own):
        own = [", ".join(f"{key}={value}" for key, value in config) for config in configs]
    return [label or "nothing given" for label in own] if len(own) > 1 else ["all runs"]


def _group(label: str, members: list[int], runs: Sequence[Run]) -> Group:
    values = side_by_side([runs[i].numbers("bbox") for i in members])
    several = len(members) > 1
    return Group(
        label,
        members,
        {name: float(np.mean(v)) for name, v in values.items()},
        {name: float(np.std(v, ddof=1)) if several else None for name, v in values.items()},
    )


def _noise(runs: Sequence[Run], kind: str, rounds: int, progress: Progress) -> list[Difference | str]:
    every = [stored.load(run.folder, kind) for run in runs]
    found: list[Difference | str] = []
    first = None if every[0] is None else bootstrap.rankings(every[0])
    for own in every[1:]:
        if every[0] is None or own is None or first is None:
            found.append("what was detected is not stored; evaluate it again: codetr eval")
            continue
        try:
            bootstrap.require_same(every[0], own)
        except UserError as error:
            found.append(str(error))
            continue
        other = bootstrap.rankings(own)
        found.append(bootstrap.compare(first, other, len(own.columns.ids), rounds, 0, progress))
    return found


def write(path: Path, comparison: Comparison) -> None:
    """One page. Raises UserError where it cannot be written."""
    kinds = {kind: _kind(comparison, kind) for kind in comparison.numbers}
    drawn = {"convergence": _convergence(comparison)}
    values = {
        "own": comparison,
        "kinds": kinds,
        "titles": KINDS,
        "pages": [_link(run, path) for run in comparison.runs],
        "charts": {name: chart.__dict__ for name, chart in drawn.items() if chart},
        "axes": _axes(comparison),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    html.write(path, "compare.html", values, advice="choose another --out FILE")


def _link(run: Run, path: Path) -> str:
    page = run.folder / PAGE
    return Path(os.path.relpath(page, path.resolve().parent)).as_posix() if page.is_file() else ""


def _axes(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(axis for run in comparison.runs for axis in run.history.axes(np.zeros(1))))


def _convergence(comparison: Comparison) -> charts.Chart:
    """Every logged number of the validation, a line per run."""
    every = [name for run in comparison.runs for name in run.history.series if name.startswith("val/")]
    first = ["val/map", "val/map_50", "val/map_75"]
    names = [n for n in first if n in every] + sorted(set(every) - set(first), key=every.index)
    names = [n for n in names if not n.startswith("val/ap/")] + [n for n in names if n.startswith("val/ap/")]
    variants = {
        name.removeprefix("val/"): [
            charts.line(run.history, *run.history.series[name], shown(label), markers=True)
            for label, run in zip(comparison.names, comparison.runs, strict=True)
            if name in run.history.series
        ]
        for name in names
    }
    return charts.Chart("Convergence", variants)


def _kind(comparison: Comparison, kind: str) -> dict[str, Any]:
    first, last = (stored.load(comparison.runs[i].folder, kind) for i in (0, -1))
    gained, lost = _images(first, last) if first and last else ([], [])
    classes = {name: (values, values[-1] - values[0]) for name, values in comparison.classes[kind].items()}
    return {"numbers": comparison.numbers[kind], "classes": classes, "gained": gained, "lost": lost}


def _images(first: Stored, last: Stored) -> tuple[list[Picture], list[Picture]]:
    """Images that cost less AP in the last run, and more: as that run sees them."""
    try:
        bootstrap.require_same(first, last)
    except UserError:
        return [], []
    seen = analyse(last)
    gain = 100 * (analyse(first).image_costs - seen.image_costs)
    best, worst = np.argsort(-gain, kind="stable"), np.argsort(gain, kind="stable")

    def shown_of(images: np.ndarray) -> list[Picture]:
        chosen = images[:SHOWN_IMAGES].tolist()
        return [pictures.of_image(seen, i, f"{gain[i]:+.2f} points of AP50") for i in chosen]

    return shown_of(best[gain[best] > 0]), shown_of(worst[gain[worst] < 0])
