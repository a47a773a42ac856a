"""Instance masks of detections, from the detector's mask head to run lengths."""

from __future__ import annotations

from dataclasses import replace

from codetr.data.segmentations import encode
from codetr.models.detector import Detector
from codetr.types import Batch, Detections, Memory


def with_masks(detector: Detector, memory: Memory, detections: list[Detections], batch: Batch) -> list[Detections]:
    """The detections of a batch with the run lengths and scores of their masks, in pixels of the files.

    Raises ValueError when the detector has no mask head.
    """
    masks = detector.segment(memory, detections, batch.shown_sizes, batch.file_sizes)
    return [
        replace(found, runs=encode(own.masks), mask_scores=own.scores)
        for found, own in zip(detections, masks, strict=True)
    ]
