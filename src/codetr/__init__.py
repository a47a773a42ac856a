"""codetr: Co-DETR and Group DETR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load(path: str | Path, average: bool = True, trust: Sequence[str] = ()) -> nn.Module:
    """The `Detector` of a checkpoint, ready for inference on the CPU; see `codetr.application.load`."""
    # By name: nothing below the entry points shall depend on them through this file.
    from importlib import import_module

    return import_module("codetr.application").load(path, average, trust)
