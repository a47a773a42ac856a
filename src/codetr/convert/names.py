"""Tables of names: pairs of templates in which `*` stands for one dotted component, read in either direction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from torch import Tensor

Rules = Sequence[tuple[str, str]]


class NameTable:
    """theirs <-> ours. A name belongs to the first pair that it fits; the components under the stars move along."""

    def __init__(self, rules: Rules, ignored: Rules = ()) -> None:
        """ignored: templates of their names that have no counterpart, with the reason."""
        self.rules, self._ignored = tuple(rules), tuple(ignored)

    def to_ours(self, name: str) -> str | None:
        return _translate(name, self._forward)

    def to_theirs(self, name: str) -> str | None:
        return _translate(name, self._backward)

    def rename(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of their weights that have a name of ours, under it."""
        return {new: tensor for name, tensor in weights.items() if (new := self.to_ours(name))}

    def reason_to_ignore(self, name: str) -> str | None:
        return next((reason for template, reason in self._ignored if _pattern(template).fullmatch(name)), None)

    @cached_property
    def _forward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(theirs), ours) for theirs, ours in self.rules]

    @cached_property
    def _backward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(ours), theirs) for theirs, ours in self.rules]

    def __add__(self, other: NameTable) -> NameTable:
        return NameTable(self.rules + other.rules, self._ignored + other._ignored)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\*", r"([^.]+)"))


def _translate(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        if found := pattern.fullmatch(name):
            return template.replace("*", "{}").format(*found.groups())
    return None
