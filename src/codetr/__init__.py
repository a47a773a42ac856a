"""codetr: Co-DETR and Group DETR."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from codetr.models.detector import Detector


def load(path: str | Path, average: bool = True) -> Detector:
    """The detector of a checkpoint, ready for inference on the CPU; see `codetr.application.load`."""
    from codetr import application

    return application.load(path, average)
