"""The independent table: what the papers' texts and the official files say of every row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

HERE = Path(__file__).parent
PAPERS = ("co_detr", "group_detr", "group_detr_iccv")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Said:
    """A value and who says it. The value may be `unknown`, or {any: [...]} where the sources leave a choice."""

    value: Any
    source: str

    def agrees(self, actual: Any) -> bool:
        if self.value == UNKNOWN:
            return True
        allowed = self.value["any"] if isinstance(self.value, dict) else [self.value]
        return any(_same(value, actual) for value in allowed)


Recipe = dict[str, Said]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if {type(a), type(b)} <= {int, float}:
        return math.isclose(a, b, rel_tol=1e-3)
    return type(a) is type(b) and a == b


def read(name: str) -> Any:
    """Raises for a key that stands twice."""
    return OmegaConf.to_container(OmegaConf.load(HERE / f"{name}.yaml"))


def recipes(*files: str) -> dict[str, Recipe]:
    """By the name of the row, of the given files."""
    detectors, rows = read("detectors"), {}
    for section in [section for file in files for section in read(file)]:
        for name, entry in section["rows"].items():
            if name in rows:
                raise ValueError(f"{name} stands twice in the table")
            rows[name] = _flat(entry, section["source"], detectors)
    return rows


def _flat(entry: Mapping[str, Any], source: str, detectors: Mapping[str, Any]) -> Recipe:
    """What comes later counts: first `like`, then the entry's own values and blocks."""
    said: Recipe = {}
    for name in entry.get("like", ()):
        said |= _flat(detectors[name], name, detectors)
    for key, value in entry.items():
        if isinstance(value, dict) and "any" not in value:
            said |= {inner: Said(given, key) for inner, given in value.items()}
        elif key != "like":
            said[key] = Said(value, source)
    return {key: one for key, one in said.items() if one.value is not None}
