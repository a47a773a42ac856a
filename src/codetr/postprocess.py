"""Predictions -> detections in pixels of the original image."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from codetr.types import Detections, Prediction, box_scale


class PostProcess:
    """The `max_detections` best (query, class) pairs of an image; a query may appear with several classes.

    nms_iou: suppress a detection that overlaps a better one of its class by more than this; None: no suppression, as
    one-to-one matching promises. After a short training the decoder has not yet unlearned its duplicates.
    """

    def __init__(self, max_detections: int, nms_iou: float | None) -> None:
        self.max_detections, self.nms_iou = max_detections, nms_iou

    def __call__(self, prediction: Prediction, original_sizes: Tensor) -> list[Detections]:
        """prediction: one layer, [B, N, ...]. original_sizes: [B, 2] (height, width) in pixels."""
        num_classes = prediction.logits.shape[-1]
        probability = prediction.logits.float().sigmoid().flatten(1)
        scores, index = probability.topk(min(self.max_detections, probability.shape[1]), dim=1)
        scale = box_scale(original_sizes).to(prediction.boxes)[:, None]
        boxes = box_convert(prediction.boxes.float(), "cxcywh", "xyxy") * scale
        query = (index // num_classes)[..., None].expand(-1, -1, 4)
        boxes = boxes.gather(1, query).clamp(min=0).minimum(scale)
        found = [Detections(*one) for one in zip(scores, index % num_classes, boxes, strict=True)]
        return found if self.nms_iou is None else [_suppress(one, self.nms_iou) for one in found]


def _suppress(found: Detections, iou: float) -> Detections:
    keep = batched_nms(found.boxes_xyxy, found.scores, found.labels, iou)
    return Detections(found.scores[keep], found.labels[keep], found.boxes_xyxy[keep])
