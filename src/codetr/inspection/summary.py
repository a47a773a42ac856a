"""Findings and numbers as tables for the terminal, and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from codetr.data.rules import RULES, SEVERITIES
from codetr.inspection.split import Split
from codetr.inspection.statistics import Statistics
from codetr.names import shown

COLORS = {"error": "bold red", "warning": "yellow", "note": "dim"}
_CLASSES, _BAR = 30, 20
_RECORDS = {"error": 3, "warning": 2, "note": 1}


def tables(splits: Sequence[Split], numbers: Sequence[Statistics]) -> RenderableType:
    parts: list[RenderableType] = [_counts(splits, numbers), _classes(splits, numbers)]
    parts += [_findings(s) for s in splits if s.findings.counts]
    return Group(*parts)


def _counts(splits: Sequence[Split], numbers: Sequence[Statistics]) -> Table:
    table = Table("split", title="Data set", title_justify="left")
    for column in ("images", "empty", "objects", "small", "medium", "large", "crowds", "classes"):
        table.add_column(column, justify="right")
    for split, n in zip(splits, numbers, strict=True):
        row = (n.images, n.empty_images, n.objects, *n.sizes.values(), n.crowds, n.categories)
        table.add_row(split.name, *(f"{v:,}" for v in row))
    return table


def _classes(splits: Sequence[Split], numbers: Sequence[Statistics]) -> Table:
    names = class_names(numbers)
    table = Table("class", title="Objects per class", title_justify="left")
    for split in splits:
        table.add_column(split.name, justify="right")
    table.add_column("")
    most = max((n.classes.get(names[0], 0) for n in numbers), default=0) if names else 0
    for name in names[:_CLASSES]:
        counts = [n.classes.get(name, 0) for n in numbers]
        bar = "█" * round(_BAR * counts[0] / most) if most else ""
        table.add_row(Text(shown(name)), *(f"{c:,}" for c in counts), bar)
    if len(names) > _CLASSES:
        table.add_row(f"... {len(names) - _CLASSES} more", *("" for _ in splits), "")
    return table


def class_names(numbers: Sequence[Statistics]) -> list[str]:
    """Of all splits, the most frequent in the first split first."""
    names = {name: 0 for n in numbers for name in n.classes}
    return sorted(names, key=lambda name: [-n.classes.get(name, 0) for n in numbers])


def _findings(split: Split) -> Table:
    table = Table("", "", "what, where, and what to do", title_justify="left", show_header=False, show_lines=True)
    table.title = f"Findings in {split.findings.source} ({split.name})"
    table.columns[1].justify = "right"
    for kind in split.findings.rules():
        severity = split.findings.severity(kind)
        text = Text(kind, "bold")
        shown = split.findings.examples[kind][: _RECORDS[severity]]
        for example in shown:
            text.append(f"\n  {example.record}", "none")
        if split.findings.counts[kind] > len(shown):
            text.append(f"\n  ... {split.findings.counts[kind] - len(shown):,} more", "dim")
        text.append(f"\n  → {RULES[kind].advice}", "italic")
        table.add_row(Text(severity, COLORS[severity]), f"{split.findings.counts[kind]:,}", text)
    return table


def verdict(splits: Sequence[Split]) -> str:
    counts = {s: sum(split.findings.total(s) for split in splits) for s in SEVERITIES}
    return ", ".join(f"{n:,} {severity}{'s' * (n != 1)}" for severity, n in counts.items())


def as_data(splits: Sequence[Split], numbers: Sequence[Statistics]) -> dict[str, Any]:
    """For JSON: of every finding its kind, severity, count, advice and the first records."""
    return {
        split.name: {
            "file": str(split.findings.source),
            "statistics": asdict(n),
            "findings": [
                {
                    "kind": kind,
                    "severity": split.findings.severity(kind),
                    "count": split.findings.counts[kind],
                    "advice": RULES[kind].advice,
                    "records": [e.record for e in split.findings.examples[kind]],
                }
                for kind in split.findings.rules()
            ],
        }
        for split, n in zip(splits, numbers, strict=True)
    }
