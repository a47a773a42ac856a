"""Numbers that a tool wrote as text, or whole ones with a point: what they mean, wherever that is certain."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_WHOLE = re.compile(r"\s*[+-]?\d{1,18}(\.0*)?\s*", re.ASCII)
_FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}


def whole(value: Any) -> int | None:
    """The whole number that `value` is: 640, 640.0, "640" and "640.0"; None for all else."""
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value.partition(".")[0])
    return value if type(value) is int else None


def number(value: Any) -> float | None:
    """The finite number that `value` is, also as text; None for all else."""
    try:
        result = float(value) if type(value) in (int, float, str) else math.nan
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def flag(value: Any) -> int | None:
    """0 or 1, also as truth values and as text; 0 for null; None for all else."""
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    if value is None:
        return 0
    return int(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def mended_image(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an image record that are to be written otherwise, as they should be."""
    return _whole_ones(record, ("id", "width", "height"))


def mended_object(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an annotation record that are to be written otherwise, as they should be."""
    changes = _whole_ones(record, ("id", "image_id", "category_id"))
    for key in ("iscrowd", "ignore"):
        if isinstance(value := record.get(key), str) and (meant := flag(value)) is not None:
            changes[key] = meant
    if isinstance(area := record.get("area"), str) and (meant_area := number(area)) is not None:
        changes["area"] = meant_area
    box = record.get("bbox")
    if isinstance(box, (list, tuple)) and any(isinstance(v, str) for v in box):
        sides = [number(v) for v in box]
        if None not in sides:
            changes["bbox"] = sides
    return changes


def _whole_ones(record: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    meant = {key: whole(record[key]) for key in keys if type(record.get(key)) in (float, str)}
    return {key: value for key, value in meant.items() if value is not None}
