"""What was found in a data set, and what a fix would do about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codetr.data.rules import KINDS, SEVERITIES, Severity

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """What to show of a finding: an image file, and boxes (x0, y0, x1, y1) in its pixels, if there are any.

    other: what `box` is compared with.
    """

    path: Path
    box: Box | None = None
    other: Box | None = None


@dataclass(frozen=True)
class Example:
    """record: which one, and what is wrong with it."""

    record: str
    picture: Picture | None = None


@dataclass
class Repair:
    """What `fix=true` would do to one file: positions in its lists to remove, and keys of its records to set."""

    images: set[int] = field(default_factory=set)
    categories: set[int] = field(default_factory=set)
    annotations: set[int] = field(default_factory=set)
    changes: dict[int, dict[str, Any]] = field(default_factory=dict)
    image_changes: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Findings:
    """What was found in one file. Of each kind the first `limit` are kept as examples, all are counted.

    masks: whether the masks of this file are read. unmended: of each kind, how many `fix=true` leaves as they are.
    """

    source: Path
    limit: int
    masks: bool
    counts: Counter[str] = field(default_factory=Counter)
    unmended: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def add(self, kind: str, record: str, picture: Picture | None = None, mended: bool = False) -> None:
        self.counts[kind] += 1
        self.unmended[kind] += not mended
        shown = self.examples.setdefault(kind, [])
        if len(shown) < self.limit:
            shown.append(Example(record, picture))

    def severity(self, kind: str) -> Severity:
        return "warning" if KINDS[kind].masks and not self.masks else KINDS[kind].severity

    def kinds(self) -> list[str]:
        """What was found, the gravest first."""
        order = list(KINDS)
        return sorted(self.counts, key=lambda k: (SEVERITIES.index(self.severity(k)), order.index(k)))

    def total(self, severity: Severity) -> int:
        return sum(n for kind, n in self.counts.items() if self.severity(kind) == severity)

    def left(self, severity: Severity) -> int:
        """How many of a severity `fix=true` cannot mend."""
        return sum(n for kind, n in self.unmended.items() if self.severity(kind) == severity)
