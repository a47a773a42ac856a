"""The rows as tables: on the terminal, and as the page of the documentation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from codetr.papers.recipe import departures, recipe
from codetr.papers.rows import SCORES, Row, read, tables

WIDE = 160  # columns where there is no terminal


def show(rows: Mapping[str, Row]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    for heading, group in tables(rows):
        scores = _given(group)
        table = Table(title=heading, title_justify="left", title_style="bold")
        table.add_column("name", no_wrap=True)
        table.add_column("row")
        for label in ("epochs", *(SCORES[key][0] for key in scores)):
            table.add_column(label, justify="right", no_wrap=True)
        needs = any(row.needs for row in group)
        if needs:
            table.add_column("cannot run yet, needs", style="yellow")
        for row in group:
            numbers = [_number(row.scores.get(key)) for key in scores]
            table.add_row(row.name, row.row, str(row.epochs), *numbers, *([row.needs] if needs else []))
        console.print(table, "")


def _given(group: Sequence[Row]) -> list[str]:
    """The scores that at least one row has, and AP."""
    return [key for key in SCORES if key == "ap" or any(key in row.scores for row in group)]


def describe(row: Row, config: DictConfig) -> Iterator[str]:
    """The recipe with the source of each value, and what departs from the paper."""
    scores = ", ".join(f"{SCORES[key][0]} {_number(value)}" for key, value in row.scores.items()) or "AP not known"
    yield f"{row.paper}, {row.table}, {row.row}: {row.epochs} epochs, batch {row.batch}, {scores}"
    values = recipe(row, config)
    width = max(len(value.subject) for value in values)
    for value in values:
        yield f"  {value.subject:<{width}}  {value.value}  [{value.source}]"
    departed = departures(row, [value.subject for value in values])
    yield from (f"departs in {subject}: {text}" for subject, text in departed.items())
    if row.note:
        yield f"note: {row.note}"


def markdown(rows: Mapping[str, Row], results: Path) -> str:
    """The reproduction page.

    results: the folder with `rows.json`, what every row says and costs (`python -m benchmarks papers/rows`), and in
        `rows` the `metrics.json` of finished rows, as NAME.json.
    """
    counted = json.loads((results / "rows.json").read_text())
    vit = _number(counted["co_detr_t5_vit_l_val"]["parameters"]["backbone"])
    swin = _number(counted["co_detr_t4_co_dino_swin_l_36e"]["parameters"]["inference"])
    lines = [
        *(line.format(vit=vit, swin=swin) for line in _HEAD),
        "## What differs from the papers",
        "",
        "| rows | value | what the paper says, and why ours is another |",
        "|---|---|---|",
        *_departures(rows.values(), counted),
        "",
        "## Where the values come from",
        "",
        "A row has the values of its experiment, but for those of its own line in the table.",
        "",
        *_sources(),
    ]
    for heading, group in tables(rows):
        lines += ["", f"## {heading}", "", *_table(group, counted, results / "rows")]
        lines += [f"\nNote: {note}." for note in dict.fromkeys(row.note for row in group if row.note)]
    return "\n".join(lines) + "\n"


_HEAD = [
    "# Every row of the papers",
    "",
    "Written by `make readme`. `codetr papers NAME` prints the command of a row, and every value of its recipe with "
    "its source; `--run` launches it. Ours: from `benchmarks/results/rows/NAME.json`, the `metrics.json` of the run; "
    "empty: not run. A row that needs something is refused.",
    "",
    "M: millions of parameters, in training and at inference. G: billions of multiply-adds of the forward pass, in "
    "training and at inference, for one image of 800 x 1333 pixels with 7 objects "
    "(`python -m benchmarks papers/rows`). "
    'Tables 5 and 6 of Co-DETR ("enc. #params") count the backbone of ViT-L, 304 (ours {vit}), and the whole deployed '
    "detector of Swin-L, 218 (ours, with COCO's classes, {swin}).",
    "",
]


def _table(group: Sequence[Row], counted: Mapping[str, Any], finished: Path) -> Iterator[str]:
    scores = _given(group)
    paper = [f"paper {SCORES[key][0]}" for key in scores]
    costs = {"memory": "paper MB", "hours": "paper GPU h"}
    costs = {key: label for key, label in costs.items() if any(getattr(row, key) for row in group)}
    columns = ["row", "epochs", *paper, *costs.values(), "ours AP", "M", "G", "command"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in group:
        numbers = [_number(row.scores.get(key)) for key in scores]
        how = f"needs {row.needs}" if row.needs else f"`codetr papers {row.name} --run`"
        pairs = [_pair(counted.get(row.name, {}), key) for key in ("parameters", "multiply_adds")]
        given = [str(getattr(row, key) or "") for key in costs]
        cells = [row.row, str(row.epochs), *numbers, *given, _number(measured(row, finished)), *pairs, how]
        yield f"| {' | '.join(cells)} |"


def _pair(record: Mapping[str, Any], key: str) -> str:
    return f"{record[key]['training']:.1f}, {record[key]['inference']:.1f}" if record else ""


def _departures(rows: Iterable[Row], counted: Mapping[str, Any]) -> Iterator[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for subject, text in departures(row, counted.get(row.name, {}).get("recipe", {})).items():
            found.setdefault((subject, text), []).append(row.name)
    for (subject, text), names in found.items():
        yield f"| {_briefly(names)} | {subject} | {text} |"


def _briefly(names: Sequence[str]) -> str:
    if len(names) <= 3:
        return ", ".join(f"`{name}`" for name in names)
    return f"{len(names)} rows, `{names[0]}` to `{names[-1]}`"


def _sources() -> Iterator[str]:
    for name, entry in read("sources").items():
        said: dict[str, list[str]] = {}
        for subject, value in entry.items():
            if subject != "like":
                source = value if isinstance(value, str) else value["source"]
                said.setdefault(source, []).append("all else" if subject == "recipe" else subject)
        parts = [f"{', '.join(subjects)}: {source}" for source, subjects in said.items()]
        head = f"- **{name}**, as {', '.join(entry['like'])}." if "like" in entry else f"- **{name}**."
        yield f"{head} {'; '.join(parts)}".rstrip()


def measured(row: Row, results: Path) -> float | None:
    """Our AP of the row in percent, if it was run."""
    path = results / f"{row.name}.json"
    if not path.is_file():
        return None
    numbers = json.loads(path.read_text())
    numbers = numbers["branches"][row.branch] if row.branch else numbers["segm"] if row.masks else numbers
    return 100 * float(numbers["map"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
