"""What it costs that a query's mask serves an object (Mask2Former, Cheng et al. 2022, sec. 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from codetr.errors import UserError
from codetr.nn.half import without_autocast
from codetr.nn.points import at_points, objects_at_points
from codetr.types import Prediction, Problem, Targets

PER_PASS = 2**25  # logits at points that exist at a time: 128 MB


@dataclass(frozen=True)
class MaskCost:
    """Weights of minus the probability of the class, the cross entropy and the Dice loss of the masks.

    num_points: of an image, drawn anew for every step, at which all masks of the image are compared.
    """

    class_weight: float
    mask_weight: float
    dice_weight: float
    num_points: int

    @torch.no_grad()
    def of(self, problem: Problem, targets: Targets) -> list[Tensor]:
        """See `codetr.assign.hungarian.Cost`. Raises UserError for targets without masks."""
        prediction = problem.prediction
        assert prediction.masks is not None, "DetectionTask compares the losses with the detector"
        pixels, device = prediction.masks.pixels, prediction.logits.device
        points = torch.rand(len(targets.labels), self.num_points, 2, device=device)
        with without_autocast(device.type):
            found = at_points(pixels.maps.float(), points)
            truth = truth_at(points, pixels.maps, pixels.stride, targets)
            block = max(1, PER_PASS // (prediction.logits[0, ..., 0].numel() * self.num_points))
            return [self._costs(part, found, truth, targets.labels) for part in prediction.split(block, 0)]

    def _costs(self, prediction: Prediction, found: Tensor, truth: Tensor, labels: Tensor) -> Tensor:
        """prediction: [l, B, N, ...]. found: [B, E, P]. truth: [B, M, P]. labels: [B, M]. Returns [l, B, M, N].

        -log p = softplus(-x) = softplus(x) - x and -log(1 - p) = softplus(x): of the cross entropy only the product
        with x depends on both.
        """
        assert prediction.masks is not None
        layers, _, queries = prediction.logits.shape[:3]
        own = prediction.masks.embeddings.float().transpose(0, 1).flatten(1, 2)  # images first: no copies of `found`
        logits, wanted = own @ found, truth.transpose(1, 2)
        entropy = (softplus(logits).sum(-1, keepdim=True) - logits @ wanted) / self.num_points
        inside = logits.sigmoid()
        both = inside.sum(-1, keepdim=True) + truth.sum(-1)[:, None]
        dice = 1 - (2 * (inside @ wanted) + 1) / (both + 1)
        masks = (self.mask_weight * entropy + self.dice_weight * dice).unflatten(1, (layers, queries)).transpose(0, 1)
        columns = labels[None, :, None].expand(*prediction.logits.shape[:3], -1)
        classes = prediction.logits.float().softmax(-1).gather(-1, columns)
        return (masks - self.class_weight * classes).transpose(-1, -2).contiguous()


def truth_at(points: Tensor, maps: Tensor, stride: int, targets: Targets) -> Tensor:
    """What the masks of all objects are at points [B, P, 2], shares of the maps [B, E, h, w]: [B, M, P].

    stride: pixels per cell of the maps. Raises UserError for targets without masks.
    """
    batch, count = targets.labels.shape
    objects = torch.arange(count, device=points.device).expand(batch, -1)
    return objects_at_points(
        masks_of(targets), objects, in_pixels(points, maps, stride)[:, None].expand(-1, count, -1, -1)
    )


def in_pixels(points: Tensor, maps: Tensor, stride: int) -> Tensor:
    """[..., 2] shares of maps [..., h, w] -> (x, y) in pixels of the images."""
    height, width = maps.shape[-2:]
    return torch.stack([points[..., 0] * (width * stride), points[..., 1] * (height * stride)], -1)


def masks_of(targets: Targets) -> Tensor:
    """Raises UserError where there are none."""
    if targets.masks is None:
        raise UserError("a detector that predicts masks needs the objects' masks: set data.masks=true")
    return targets.masks
