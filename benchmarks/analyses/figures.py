"""The papers' figures, from checkpoints of a study: what docs/analyses.md shows.

Takes the finished runs of `make compare-heads` and its kin, as many seeds as there are, and writes a table, the numbers
and the pictures of every figure to benchmarks/results/, under the figure's name. A figure whose runs are not there is
left as it is, and named.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.training.compare import STUDIES, result_of, run_name
from codetr import analyse

Numbers = dict[str, Any]


Wanted = Callable[[Path, list[str]], bool]


@dataclass(frozen=True)
class Figure:
    """arguments: of `codetr analyse`. columns: number -> its title in the table. digits: of a number. wanted: whether a
    run with these overrides is for it."""

    arguments: tuple[str, ...]
    columns: dict[str, str]
    digits: int
    wanted: Wanted


def any_run(run: Path, overrides: list[str]) -> bool:
    return True


def with_heads(run: Path, overrides: list[str]) -> bool:
    return any(o.startswith("model/auxiliary_head=[") and not o.endswith("[]") for o in overrides)


def with_groups(run: Path, overrides: list[str]) -> bool:
    return any(o.startswith("model.query_groups=") for o in overrides)


def with_snapshots(run: Path, overrides: list[str]) -> bool:
    return (run / "snapshots").is_dir()


AREA = {"area": "area below the IoF-IoB curve"}
DISTANCES = {
    "positives_per_object": "positives per object",
    "to_original_positive": "distance to the original positive",
    "to_original_negatives": "distance to original negatives",
}
FIGURES = {
    "figure_encoder": Figure(("figure=discriminability",), AREA, 3, any_run),
    "figure_decoder": Figure(("figure=discriminability", "figure.of=decoder"), AREA, 3, any_run),
    "figure_conflict": Figure(("figure=conflict",), {"mean_distance": "average distance of heads"}, 2, with_heads),
    "figure_queries": Figure(("figure=queries",), DISTANCES, 3, with_heads),
    "figure_groups": Figure(("figure=groups",), {"pd": "PD", "md": "MD"}, 3, with_groups),
    "figure_every_group": Figure(
        ("figure=every_group",), {"range_of_map": "mAP of the best group minus that of the worst"}, 4, with_groups
    ),
    "figure_instability": Figure(
        ("figure=instability",), {"mean_instability": "changed queries per image"}, 2, with_snapshots
    ),
}


def runs_of(out: Path, study: str, wanted: Wanted) -> list[tuple[Path, str]]:
    """Finished runs of a study, each with its variant, of the variants that a figure wants."""
    found = []
    for variant, overrides in STUDIES[study].rows.items():
        for run in sorted(out.glob(f"{run_name(overrides, 0)[:-1]}[0-9]*")):
            if run.is_dir() and result_of(run).is_file() and wanted(run, overrides):
                found.append((run, variant))
    return found


def rows_of(numbers: Numbers, figure: Figure) -> list[list[str]]:
    """A row per variant; where a number is told of every head, a row per head and variant."""
    first = numbers[next(iter(figure.columns))]
    flat = {(label,): one for label, one in first.items() if "mean" in one}
    keys = list(flat) or [(label, head) for head, own in first.items() for label in own]
    rows = []
    for key in keys:
        cells = [_at(numbers[column], key) for column in figure.columns]
        rows.append([*key, *(_cell(one, figure.digits) for one in cells), str(cells[0]["runs"])])
    return rows


def _at(numbers: Numbers, key: tuple[str, ...]) -> Numbers:
    return numbers[key[0]] if len(key) == 1 else numbers[key[1]][key[0]]


def _cell(one: Numbers, digits: int) -> str:
    spread = "" if one["spread"] is None else f" ± {one['spread']:.{digits}f}"
    return f"{one['mean']:.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"figures, all if none is given: {', '.join(FIGURES)}")
    parser.add_argument("--study", choices=STUDIES, default="heads")
    parser.add_argument("--runs", type=Path, help="where its runs are; default: outputs/<experiment>")
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    if unknown := set(options.names) - FIGURES.keys():
        parser.error(f"there is no figure {', '.join(sorted(unknown))}")
    out = options.runs or Path("outputs") / STUDIES[options.study].experiment
    for name in options.names or FIGURES:
        figure = FIGURES[name]
        runs = runs_of(out, options.study, figure.wanted)
        if not runs:
            print(f"{name}: no finished run of study {options.study} in {out} is for it")
            continue
        target = Path(os.path.relpath(report.folder / name))
        given = [f"images={options.images}", f"out={target}", f"runs=[{','.join(str(run) for run, _ in runs)}]"]
        labels = ",".join(f"'{variant}'" for _, variant in runs)
        analyse.main([*figure.arguments, *given, f"labels=[{labels}]"])
        numbers = json.loads(target.with_name(f"{name}.json").read_text())
        rows = rows_of(numbers, figure)
        titles = ["variant", *(["head"] if len(rows[0]) > len(figure.columns) + 2 else []), *figure.columns.values()]
        about = f"`python -m benchmarks analyses/figures --study {options.study} --images {options.images}`."
        report.write(name, f"{report.table([*titles, 'seeds'], rows)}\n\n{about}")


if __name__ == "__main__":
    main()
