"""Predictions -> detections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torchvision.ops import box_iou

from codetr.nn.boxes import best_pairs, clip, tight_boxes
from codetr.ops.gather import take
from codetr.ops.nms import best_after_nms
from codetr.types import CellMasks, Detections, Prediction


class Suppression(Protocol):
    """Thins out overlapping detections of one class.

    boxes: [B, n, 4] xyxy. scores, labels: [B, n]. Returns scores, index and whether it is kept of the `count` best
    that are left, [B, min(count, n)] each, best first.
    """

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class NMS:
    """Drops a detection that overlaps a better one of its class by more than `iou`."""

    iou: float

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        everything = torch.ones_like(labels, dtype=torch.bool)
        index, kept = best_after_nms(boxes, scores, labels, everything, self.iou, count)
        return scores.gather(1, index), index, kept


@dataclass(frozen=True)
class SoftNMS:
    """Lowers the score of a detection that overlaps a better one of its class (Bodla et al. 2017, eq. 3 and 4).

    linear: times 1 - IoU, from an IoU of `iou` on. gaussian: times exp(-IoU^2 / sigma), at any IoU. What falls below
    `min_score` is dropped.
    """

    method: Literal["linear", "gaussian"]
    iou: float
    sigma: float
    min_score: float

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        factor = self.factor(box_iou(boxes, boxes).where(labels[:, :, None] == labels[:, None], 0))
        image = torch.arange(len(scores), device=scores.device)
        left, final, order = scores.clone(), [], []
        for _ in range(min(count, scores.shape[1])):  # each detection depends on all better ones
            score, best = left.max(1)
            final.append(score)
            order.append(best)
            left = (left * factor[image, best]).index_put((image, best), left.new_tensor(-torch.inf))
        ranked = torch.stack(final, 1)
        return ranked, torch.stack(order, 1), ranked >= self.min_score

    def factor(self, iou: Tensor) -> Tensor:
        if self.method == "gaussian":
            return torch.exp(-(iou**2) / self.sigma)
        return torch.where(iou >= self.iou, 1 - iou, 1)


class PostProcess:
    """The `max_detections` best (query, class) pairs of an image; a query may appear with several classes.

    suppression: applied to as many pairs as there are queries; None: none, as one-to-one matching promises.
    """

    of_masks = False

    def __init__(self, max_detections: int, suppression: Suppression | None) -> None:
        self.max_detections, self.suppression = max_detections, suppression

    def __call__(self, prediction: Prediction, sizes: Tensor) -> list[Detections]:
        """The boxes come in pixels of the images of these sizes, cut off at the image.

        prediction: one layer, [B, N, ...]. sizes: [B, 2] (height, width); those of `Frames` make them network pixels.
        """
        return self.thinned(*self.pairs(prediction, sizes))

    def pairs(self, prediction: Prediction, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first half, which a graph can hold: scores, labels [B, n] and boxes [B, n, 4], best first."""
        count = self.max_detections if self.suppression is None else prediction.logits.shape[-2]
        return best_pairs(prediction, sizes, count)

    def thinned(self, scores: Tensor, labels: Tensor, boxes: Tensor) -> list[Detections]:
        """The second half: what suppression leaves of the pairs."""
        if self.suppression is None:
            return [Detections(*one) for one in zip(scores, labels, boxes, strict=True)]
        chosen = zip(self.chosen(scores, labels, boxes), labels, boxes, strict=True)
        return [Detections(score, label[index], box[index]) for (score, index), label, box in chosen]

    def chosen(self, scores: Tensor, labels: Tensor, boxes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each image the scores of the pairs that suppression leaves, as it lowers them, and their places, best
        first."""
        if self.suppression is None:
            return [(one, torch.arange(len(one), device=one.device)) for one in scores]
        scores, index, kept = self.suppression(boxes, scores, labels, self.max_detections)
        return [(score[k], i[k]) for score, i, k in zip(scores, index, kept, strict=True)]


class MaskPostProcess:
    """The `max_detections` best (query, class) pairs of an image with the masks of their queries, for decoders that
    predict masks (Mask2Former); a query may appear with several classes.

    How sure a mask is joins the score where the mask gets the pixels of the file, in `codetr.instances`.
    """

    of_masks = True

    def __init__(self, max_detections: int) -> None:
        self.max_detections = max_detections

    def __call__(self, prediction: Prediction, sizes: Tensor) -> list[Detections]:
        """prediction: one layer, [B, N, ...]. sizes: [B, 2] (height, width) of the images in the network."""
        assert prediction.masks is not None, "DetectionTask compares it with the detector"
        pixels = prediction.masks.pixels
        scores = prediction.logits.float().softmax(-1)[..., :-1]
        num_classes = scores.shape[-1]
        scores, index = scores.flatten(1).topk(min(self.max_detections, scores[0].numel()), dim=1)
        queries = take(prediction.masks.embeddings.float(), index // num_classes)
        logits = (queries @ pixels.maps.float().flatten(2)).unflatten(2, pixels.maps.shape[2:])
        boxes = tight_boxes((logits > 0).flatten(0, 1).to(torch.uint8)).unflatten(0, index.shape) * pixels.stride
        parts = zip(scores, index % num_classes, clip(boxes, sizes), logits, strict=True)
        return [
            Detections(score, label, box, cells=CellMasks(masks, pixels.stride)) for score, label, box, masks in parts
        ]
