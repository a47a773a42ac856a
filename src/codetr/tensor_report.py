"""What became of every tensor on its way from a file into a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from codetr.errors import UserError
from codetr.names import shown

_SHOWN_NAMES = 8


@dataclass
class TensorReport:
    """Names of tensors, by what became of them; every tensor of the file and of the model is in one of the lists.

    taken: tensors that the model takes as they are.
    special: what else may rightly happen to a tensor, in words, and the names that it happened to.
    missing: names of the model that the file has no tensor for.
    unexpected: names of the file that have no place in the model.
    misshapen: names whose shape in the file is not the model's, with both shapes.
    """

    taken: list[str] = field(default_factory=list)
    special: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def note(self, outcome: str, name: str) -> None:
        """Add a name to those of `special`."""
        self.special.setdefault(outcome, []).append(name)

    def table(self, source: str | Path) -> Table:
        """For `rich.print`; source: the file, which the title names."""
        table = Table(title=Text(f"Weights from {shown(source)}"), title_justify="left")
        for column in ("tensors", "number", "names"):
            table.add_column(column, justify="right" if column == "number" else "left")
        if self.taken:
            table.add_row("taken as they are", str(len(self.taken)), "")
        faults = {f"[red]{label}": names for label, names in self._faults().items()}
        for label, names in (self.special | faults).items():
            table.add_row(label, str(len(names)), Text(shown(_abridged(names))))
        return table

    def require_fit(self, source: str | Path, advice: str = "") -> None:
        """Raises UserError where a tensor is missing, unexpected or misshapen. advice: what to do then."""
        if faults := self._faults():
            lines = [f"  {label} ({len(names)}): {_abridged(names)}" for label, names in faults.items()]
            raise UserError("\n".join([f"{source}: these weights do not fit the model", *lines, advice]).rstrip())

    def _faults(self) -> dict[str, list[str]]:
        every = {"missing": self.missing, "unexpected": self.unexpected, "misshapen": self.misshapen}
        return {label: names for label, names in every.items() if names}


def misshapen(name: str, given: Sequence[int], wanted: Sequence[int]) -> str:
    """How a tensor of another shape is called in `TensorReport.misshapen`."""
    return f"{name} {list(given)} for {list(wanted)}"


def _abridged(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more
