"""Predictions -> detections in pixels of the original image."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import box_convert

from codetr.types import Detections, Prediction, box_scale


class PostProcess:
    """The `max_detections` best (query, class) pairs of an image; a query may appear with several classes."""

    def __init__(self, max_detections: int) -> None:
        self.max_detections = max_detections

    def __call__(self, prediction: Prediction, original_sizes: Tensor) -> list[Detections]:
        """prediction: one layer, [B, N, ...]. original_sizes: [B, 2] (height, width) in pixels."""
        num_classes = prediction.logits.shape[-1]
        probability = prediction.logits.float().sigmoid().flatten(1)
        scores, index = probability.topk(min(self.max_detections, probability.shape[1]), dim=1)
        scale = box_scale(original_sizes).to(prediction.boxes)[:, None]
        boxes = box_convert(prediction.boxes.float(), "cxcywh", "xyxy") * scale
        query = (index // num_classes)[..., None].expand(-1, -1, 4)
        boxes = boxes.gather(1, query).clamp(min=0).minimum(scale)
        return [Detections(*one) for one in zip(scores, index % num_classes, boxes, strict=True)]
