"""torchmetrics' interface to our evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pycocotools import mask as coco_mask
from torch import Tensor
from torchmetrics import Metric
from torchvision.ops import box_convert

from codetr.evaluation.columns import Columns, columns_of
from codetr.evaluation.engines import ABSENT, Backend, Rules, curves
from codetr.evaluation.metrics import per_class, summarize, together
from codetr.types import Detections


class MeanAveragePrecision(Metric):
    """In place of `torchmetrics.detection.MeanAveragePrecision`, in a fiftieth of its time: the same input and keys.

    Thresholds and results are of 64 bits, so the numbers are pycocotools' own; torchmetrics rounds to 32 bits. Images
    stay on the CPU as arrays and come together on process 0 when `compute` is called, which every process must do; the
    result is on all of them. box_format, iou_type, max_detection_thresholds (three), class_metrics: as in torchmetrics.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = True

    def __init__(
        self,
        box_format: Literal["xyxy", "xywh", "cxcywh"] = "xyxy",
        iou_type: Literal["bbox", "segm"] = "bbox",
        max_detection_thresholds: Sequence[int] = (1, 10, 100),
        class_metrics: bool = False,
        backend: Backend = "hotcoco",
    ) -> None:
        super().__init__(sync_on_compute=False)  # `compute` itself gathers
        self.box_format, self.iou_type, self.backend = box_format, iou_type, backend
        self.rules = Rules(tuple(sorted(max_detection_thresholds)), masks=iou_type == "segm")
        self.class_metrics = class_metrics
        self._parts: list[Columns] = []
        self._seen = 0

    def update(self, preds: Sequence[dict[str, Tensor]], target: Sequence[dict[str, Tensor]]) -> None:
        """preds: per image `boxes` [n, 4], `scores`, `labels` [n], or `masks` [n, H, W]. target: per image `boxes` or
        `masks`, `labels`, and perhaps `iscrowd` and `area` (0: that of the box or mask)."""
        if len(preds) == len(target) > 0:
            self._parts.append(self._columns(preds, target))
        elif len(preds) != len(target):
            raise ValueError(f"preds are of {len(preds)} images, target is of {len(target)}")

    def compute(self) -> dict[str, Tensor]:
        """torchmetrics' keys: `map`, `map_50`, ..., `mar_large`, `map_per_class`, `mar_100_per_class`, `classes`."""
        return together(Columns.joined(self._parts), self._evaluate)

    def reset(self) -> None:
        super().reset()
        self._parts, self._seen = [], 0

    def forward(self, preds: Sequence[dict[str, Tensor]], target: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Adds the batch; returns its own numbers, those of this process."""
        self.update(preds, target)
        return self._evaluate(Columns.joined(self._parts[-1:] if len(preds) else []))

    def _columns(self, preds: Sequence[dict[str, Tensor]], target: Sequence[dict[str, Tensor]]) -> Columns:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # Those of the images that a DistributedSampler deals out, which repeats some at the end.
        ids = range(self._seen * world + rank, (self._seen + len(preds)) * world + rank, world)
        self._seen += len(preds)
        masks = self.rules.masks
        found = [
            Detections(p["scores"], p["labels"], self._boxes(p), _runs(p["masks"]) if masks else None) for p in preds
        ]
        return columns_of(ids, found, [self._truth(t) for t in target], masks, federated=False)

    def _truth(self, target: dict[str, Tensor]) -> dict[str, Any]:
        labels, boxes = target["labels"], self._boxes(target)
        own = target.get("area", torch.zeros(len(labels), device=labels.device))
        if self.rules.masks:
            runs = _runs(target["masks"])
            area = torch.as_tensor(coco_mask.area(runs).astype(float), device=own.device).reshape(-1)
        else:
            runs, area = None, (boxes[:, 2:] - boxes[:, :2]).prod(1)
        crowd = target.get("iscrowd", torch.zeros_like(labels))
        return {"boxes": boxes, "labels": labels, "iscrowd": crowd, "area": own.where(own > 0, area), "runs": runs}

    def _boxes(self, image: dict[str, Tensor]) -> Tensor:
        """[n, 4] xyxy; not needed where masks are evaluated."""
        if self.rules.masks:
            return torch.zeros(len(image["labels"]), 4, device=image["labels"].device)
        return box_convert(image["boxes"].reshape(-1, 4), self.box_format, "xyxy")

    def _evaluate(self, columns: Columns) -> dict[str, Tensor]:
        found, truth = columns.found.rows[:, 5], columns.truth.rows[:, 4]
        classes, dense = np.unique(np.concatenate([found, truth]).astype(np.int64), return_inverse=True)
        columns.found.rows[:, 5], columns.truth.rows[:, 4] = np.split(dense, [len(found)])
        limits = self.rules.limits
        precision, recall = curves(columns, len(classes), self.rules, self.backend)
        result = {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in summarize(precision, recall, limits).items()
        }
        ap, ar = per_class(precision[:, :, :, 0, -1]), per_class(recall[:, :, 0, -1])
        shown = self.class_metrics
        result["map_per_class"] = torch.tensor(ap if shown else ABSENT, dtype=torch.float64)
        result[f"mar_{limits[-1]}_per_class"] = torch.tensor(ar if shown else ABSENT, dtype=torch.float64)
        return result | {"classes": torch.tensor(classes, dtype=torch.int32)}


def _runs(masks: Tensor) -> list[dict[str, Any]]:
    """Of [n, H, W] masks."""
    columns = masks.transpose(1, 2).contiguous().to(torch.uint8).cpu().numpy()
    return coco_mask.encode(columns.transpose(2, 1, 0))
