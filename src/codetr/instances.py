"""Instance masks of detections, from the detector to run lengths: of its mask head, or of its queries."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from codetr.data.segmentations import encode
from codetr.heads.paste import PIXELS_PER_PASS, paste_masks
from codetr.models.detector import Detector
from codetr.nn.boxes import tight_boxes
from codetr.types import CellMasks, Detections, Frames, Masks, Memory


def with_masks(detector: Detector, memory: Memory, detections: list[Detections], frames: Frames) -> list[Detections]:
    """Detections in network pixels -> in pixels of the files, with the run lengths and scores of their masks.

    Raises ValueError when the detector finds no masks.
    """
    if any(found.cells is not None for found in detections):
        return of_queries(detections, frames)
    return pasted(detections, detector.segment(memory, detections), frames)


def pasted(detections: list[Detections], masks: list[Masks], frames: Frames) -> list[Detections]:
    """Detections in network pixels, and their masks -> in pixels of the files, with run lengths and scores of masks."""
    in_files = zip(frames.to_files(detections), masks, frames.file_sizes.tolist(), strict=True)
    return [
        replace(found, rle=encode(paste_masks(own.inside, found.boxes_xyxy, (height, width))), mask_scores=own.scores)
        for found, own, (height, width) in in_files
    ]


def of_queries(detections: list[Detections], frames: Frames) -> list[Detections]:
    """Detections with the masks of their queries on cells -> in pixels of the files, best first.

    Boxes enclose the masks, and scores are multiplied by the mean probability of the pixels of the mask (Mask2Former's
    instance inference).
    """
    within = (frames.file_sizes * frames.scale).round().long()  # a canvas may surround the image
    within = within.minimum(frames.sizes).clamp(min=1)
    return [
        _in_file(found, (height, width), (file_height, file_width))
        for found, (height, width), (file_height, file_width) in zip(
            detections, within.tolist(), frames.file_sizes.tolist(), strict=True
        )
    ]


def _in_file(found: Detections, size: tuple[int, int], file_size: tuple[int, int]) -> Detections:
    """size: (height, width) of the image in the network; file_size: in its file."""
    assert found.cells is not None
    at_once = max(1, PIXELS_PER_PASS // (8 * max(size[0] * size[1], file_size[0] * file_size[1])))
    rle, boxes, sure = [], [found.boxes_xyxy[:0]], [found.scores[:0]]
    for logits in found.cells.logits.split(at_once):
        in_file = _resized(CellMasks(logits, found.cells.stride), size, file_size)
        inside = in_file > 0
        rle += encode(inside)
        boxes.append(tight_boxes(inside.view(torch.uint8)))
        sure.append((in_file.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6))
    scores = found.scores * torch.cat(sure)
    order = scores.argsort(descending=True, stable=True)
    ranked = [rle[i] for i in order.tolist()]
    return Detections(scores[order], found.labels[order], torch.cat(boxes)[order], ranked, scores[order])


def _resized(cells: CellMasks, size: tuple[int, int], file_size: tuple[int, int]) -> Tensor:
    """[n, *file_size] logits; by way of the network's pixels, as the original does it."""
    height, width = (side * cells.stride for side in cells.logits.shape[1:])
    whole = interpolate(cells.logits[:, None], (height, width), mode="bilinear", align_corners=False)
    image = whole[..., : size[0], : size[1]]
    return interpolate(image, file_size, mode="bilinear", align_corners=False)[:, 0]
