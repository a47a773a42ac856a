"""What was found in an annotation file, by training, by conversion and by the check of a data set."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from codetr.data.rules import RULES, SEVERITIES, Severity
from codetr.errors import UserError

OnError = Literal["stop", "skip"]
Box = tuple[float, float, float, float]
_log = logging.getLogger(__name__)


class Picture(NamedTuple):
    """What to show of a finding: an image file, and boxes (x0, y0, x1, y1) in its pixels, if there are any.

    other: what `box` is compared with.
    """

    path: Path
    box: Box | None = None
    other: Box | None = None


class Example(NamedTuple):
    """record: which one, and what is wrong with it."""

    record: str
    picture: Picture | None = None


@dataclass
class Findings:
    """Which rules of `codetr.data.rules` the records of one file break, and how often.

    source: the file.
    limit: of each rule, how many records are kept as examples; all are counted.
    masks: whether the masks of this file are read.
    unmended: of each rule, how many `fix=true` leaves as they are.
    """

    source: Path
    limit: int = 3
    masks: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    unmended: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def add(self, rule: str, record: str, picture: Picture | None = None, mended: bool = False) -> None:
        """Count one record, which an example names."""
        self.counts[rule] += 1
        self.unmended[rule] += not mended
        shown = self.examples.setdefault(rule, [])
        if len(shown) < self.limit:
            shown.append(Example(record, picture))

    def add_all(self, rule: str, bad: np.ndarray, name: Callable[[int], str]) -> None:
        """Count every record i where bad[i]; name(i) is asked for those alone that are shown."""
        rows = bad.nonzero()[0]
        if not len(rows):
            return
        self.counts[rule] += len(rows)
        self.unmended[rule] += len(rows)
        shown = self.examples.setdefault(rule, [])
        shown += [Example(name(int(i))) for i in rows[: self.limit - len(shown)]]

    def severity(self, rule: str) -> Severity:
        """A fault of masks is an error only where masks are read."""
        return "warning" if RULES[rule].masks and not self.masks else RULES[rule].severity

    def rules(self) -> list[str]:
        """The rules that are broken, the gravest first."""
        order = list(RULES)
        return sorted(self.counts, key=lambda r: (SEVERITIES.index(self.severity(r)), order.index(r)))

    @property
    def errors(self) -> dict[str, int]:
        """How many records each rule refuses."""
        return {rule: self.counts[rule] for rule in self.rules() if self.severity(rule) == "error"}

    def total(self, severity: Severity, unmended: bool = False) -> int:
        """How many findings there are of a severity; unmended: of those that `fix=true` leaves as they are."""
        counts = self.unmended if unmended else self.counts
        return sum(n for rule, n in counts.items() if self.severity(rule) == severity)

    def __str__(self) -> str:
        lines = []
        for rule in self.rules():
            count, shown = self.counts[rule], ", ".join(e.record for e in self.examples[rule])
            more = ", ..." if count > len(self.examples[rule]) else ""
            lines.append(f"  {count} x {rule}: {shown}{more} ({RULES[rule].advice})")
        return "\n".join(lines)

    def raise_or_log(self, on_error: OnError) -> None:
        """What training and conversion do about it: "stop" on errors, or "skip" those records and log how many.

        Raises UserError on errors where `on_error` is "stop", and on those of the whole file.
        """
        total = self.total("error")
        if any(RULES[rule].whole for rule in self.errors):
            raise UserError(f"{self.source}: nothing can be learned from this file as it is\n{self}")
        if total and on_error == "stop":
            raise UserError(
                f"{self.source}: {total} bad record{'s' * (total > 1)}\n{self}\n"
                "Mend them, or set data.on_error=skip to train without them."
            )
        if total:
            _log.warning("%s: %d bad records dropped\n%s", self.source, total, self)
        elif self.counts:
            level = logging.WARNING if self.total("warning") else logging.INFO
            _log.log(level, "%s:\n%s", self.source, self)
