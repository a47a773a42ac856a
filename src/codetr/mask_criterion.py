"""The training loss of detectors that predict masks (Mask2Former, Cheng et al. 2022, sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from codetr.assign.hungarian import Cost
from codetr.assign.mask_cost import in_pixels, masks_of
from codetr.criterion import GroupCriterion, Stage, positives, valid
from codetr.errors import UserError
from codetr.losses import dice_loss
from codetr.nn.half import without_autocast
from codetr.nn.points import at_points, objects_at_points
from codetr.nn.recompute import recomputed
from codetr.ops.gather import largest
from codetr.ops.normaliser import normaliser
from codetr.types import Known, Pixels, Targets

PER_PASS = 2**25  # cells of masks that exist at a time: 128 MB


class MaskCriterion(GroupCriterion):
    """Losses of classes, and of the masks of positive queries at points alone.

    Masks of other queries are never made, and those of positive ones, a block of layers at a time, are made again for
    the gradient: what is kept are points.

    matching_cost: see `codetr.assign.mask_cost.MaskCost`.
    points: masks [n, h, w] of logits -> where each is compared, [n, P, 2], see `codetr.nn.points.UncertainPoints`.
    no_object: weight of queries without an object in the cross entropy of the classes, which is a weighted mean.
    class_weight, mask_weight, dice_weight: of the three losses.
    lambda_2, lambda_2_by_head: of the auxiliary heads, see `GroupCriterion`.
    """

    of_masks = True

    def __init__(
        self,
        matching_cost: Cost,
        points: Callable[[Tensor], Tensor],
        no_object: float,
        class_weight: float,
        mask_weight: float,
        dice_weight: float,
        lambda_2: float,
        lambda_2_by_head: Mapping[str, float],
    ) -> None:
        super().__init__(matching_cost, lambda_2, lambda_2_by_head, None)
        self.points, self.no_object = points, no_object
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight

    def layer_losses(
        self, stages: list[Stage], stage_targets: list[Known], targets: Targets, weights: Tensor
    ) -> dict[str, Tensor]:
        """Raises UserError for targets, and for groups of queries, that tell nothing of masks."""
        pairs = list(zip(stages, stage_targets, strict=True))
        sums, totals = (torch.cat(parts) for parts in zip(*(self._classes(*pair) for pair in pairs), strict=True))
        classes = sums / normaliser(totals).clamp(min=1e-6)
        with without_autocast(weights.device.type):
            mask, dice = torch.cat([self._masks(*pair, targets) for pair in pairs], 1) / positives(stage_targets)
        return {
            "class": classes * (self.class_weight * weights),
            "mask": mask * (self.mask_weight * weights),
            "dice": dice * (self.dice_weight * weights),
        }

    def _classes(self, stage: Stage, goal: Known) -> tuple[Tensor, Tensor]:
        """[L] the weighted sum of the cross entropies of each layer, and of the weights."""
        labels = goal.labels.where(goal.labels >= 0, stage.num_classes - 1)
        entropy = cross_entropy(stage.prediction.logits.float().flatten(0, 2), labels.flatten(), reduction="none")
        weights = torch.where(goal.labels >= 0, 1.0, self.no_object).where(valid(stage), 0)
        return (entropy.view_as(weights) * weights).sum((1, 2)), weights.sum((1, 2))

    def _masks(self, stage: Stage, goal: Known, targets: Targets) -> Tensor:
        """[2, L] sums of the cross entropies and of the Dice losses of the positive queries."""
        masks = stage.prediction.masks
        if masks is None or goal.objects is None:
            raise UserError(
                f"query group {stage.names[0].rpartition('/')[0]!r} does not tell whose masks it is to learn"
            )
        most = stage.targets.most(targets.labels.shape[1], goal.labels.shape[2])
        chosen = largest((goal.labels >= 0).float(), most)  # positives first: as many places whatever is matched
        positive = goal.labels.gather(2, chosen) >= 0
        objects = goal.objects.gather(2, chosen).where(positive, 0)
        wide = chosen[..., None].expand(-1, -1, -1, masks.embeddings.shape[-1])
        embeddings = masks.embeddings.gather(2, wide).float()
        cells = masks.pixels.maps[:, 0].numel() * most
        block = max(1, PER_PASS // max(1, cells))
        parts = zip(embeddings.split(block), objects.split(block), positive.split(block), strict=True)
        return torch.cat([self._layers(*part, masks.pixels, targets) for part in parts], 1)

    def _layers(
        self, embeddings: Tensor, objects: Tensor, positive: Tensor, pixels: Pixels, targets: Targets
    ) -> Tensor:
        """[2, l]. embeddings: [l, B, R, E]. objects, positive: [l, B, R]."""
        shape = positive.transpose(0, 1).shape
        queries, own = embeddings.transpose(0, 1).flatten(1, 2), objects.transpose(0, 1).flatten(1, 2)
        maps = pixels.maps.float()
        with torch.no_grad():
            points = self.points(_masks(queries, maps).flatten(0, 1)).unflatten(0, own.shape)
            truth = objects_at_points(masks_of(targets), own, in_pixels(points, maps, pixels.stride))
        losses = recomputed(_losses, queries, maps, points, truth, when=True).unflatten(2, shape[1:])
        return losses.where(positive.transpose(0, 1), 0).sum((1, 3))


def _masks(queries: Tensor, maps: Tensor) -> Tensor:
    """[B, n, E], [B, E, h, w] -> [B, n, h, w]."""
    return (queries @ maps.flatten(2)).unflatten(2, maps.shape[2:])


def _losses(queries: Tensor, maps: Tensor, points: Tensor, truth: Tensor) -> Tensor:
    """[2, B, n] cross entropy and Dice loss. queries: [B, n, E]. points: [B, n, P, 2]. truth: [B, n, P]."""
    logits = at_points(_masks(queries, maps).flatten(0, 1)[:, None], points.flatten(0, 1))[:, 0].view_as(truth)
    entropy = binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(-1)
    return torch.stack([entropy, dice_loss(logits, truth)])
