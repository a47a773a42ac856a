"""Instance masks of detections, from the detector's mask head to run lengths."""

from __future__ import annotations

from dataclasses import replace

from codetr.data.segmentations import encode
from codetr.heads.paste import paste_masks
from codetr.models.detector import Detector
from codetr.types import Detections, Frames, Masks, Memory


def with_masks(detector: Detector, memory: Memory, detections: list[Detections], frames: Frames) -> list[Detections]:
    """Detections in network pixels -> in pixels of the files, with the run lengths and scores of their masks.

    Raises ValueError when the detector has no mask head.
    """
    return pasted(detections, detector.segment(memory, detections), frames)


def pasted(detections: list[Detections], masks: list[Masks], frames: Frames) -> list[Detections]:
    """Detections in network pixels, and their masks -> in pixels of the files, with run lengths and scores of masks."""
    in_files = zip(frames.to_files(detections), masks, frames.file_sizes.tolist(), strict=True)
    return [
        replace(found, rle=encode(paste_masks(own.inside, found.boxes_xyxy, (height, width))), mask_scores=own.scores)
        for found, own, (height, width) in in_files
    ]
