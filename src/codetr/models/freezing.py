"""Which parts of a detector can be frozen, by name."""

from __future__ import annotations

from torch import nn

from codetr.errors import UserError
from codetr.models.backbone import stages


def named_parts(detector: nn.Module, name: str) -> list[nn.Module]:
    """The part of a dotted `name`, as in `Detector.named_modules`, or `backbone.stage0`, `backbone.stage1`, ... (see
    `codetr.models.backbone.stages`).

    Raises UserError with the names that exist, of an unknown one.
    """
    parts = {own: [part] for own, part in detector.named_modules(remove_duplicate=False) if own}
    if "backbone.body" in parts:
        _, *after_stem = by_stage = stages(*parts["backbone.body"])
        parts |= {f"backbone.stage{i}": stage for i, stage in enumerate(by_stage) if after_stem}
    if name in parts:
        return parts[name]
    known = name
    while known and known not in parts:
        known = known.rpartition(".")[0]
    there = [own for own in parts if own.rpartition(".")[0] == known]
    raise UserError(f"freeze: the detector has no part {name!r}; there is {', '.join(there) or f'nothing in {known}'}")
