"""The training loss: every group, every layer, every auxiliary head (Co-DETR, eq. 6)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss

from codetr.assign.hungarian import MatchingCost, Problem, match
from codetr.losses import ClassLoss
from codetr.ops.distributed import mean_over_processes
from codetr.types import Known, Matching, Output, Prediction, QueryGroup, Targets


class Criterion(nn.Module):
    """L = sum over decoder layers of (L_dec + lambda_1 L_aux_queries + lambda_2 L_aux_heads).

    The auxiliary heads' losses do not depend on the layer, so their sum over layers is a factor. lambda_1 is the
    `weight` of each collaborative group. focal, l1, giou: weights of the class loss and of the two box losses.
    """

    def __init__(
        self,
        matching_cost: MatchingCost,
        class_loss: ClassLoss,
        focal: float,
        l1: float,
        giou: float,
        lambda_2: float,
    ) -> None:
        super().__init__()
        self.matching_cost, self.class_loss = matching_cost, class_loss
        self.focal, self.l1, self.giou = focal, l1, giou
        self.lambda_2 = lambda_2

    def forward(self, output: Output, targets: Targets) -> dict[str, Tensor]:
        """Returns scalars named group/layer/term and head/term, weighted; their sum is the loss."""
        losses: dict[str, Tensor] = {}
        for group, layer_names, prediction, goal in self._assigned(output, targets):
            terms = self._terms(prediction, goal, group.valid)
            for term, per_layer in terms.items():
                for name, value in zip(layer_names, per_layer.unbind(), strict=True):
                    losses[f"{group.name}/{name}/{term}"] = value * group.weight
        num_layers = len(next(iter(output.predictions.values())).boxes)
        for head, terms in output.head_losses.items():
            for term, value in terms.items():
                losses[f"head_{head}/{term}"] = value * (self.lambda_2 * num_layers)
        return losses

    def _assigned(self, output: Output, targets: Targets) -> list[tuple[QueryGroup, list[str], Prediction, Known]]:
        """Every (group, layer names, stacked predictions, targets [L, B, N]); first stages count as a group."""
        items: list[tuple[QueryGroup, list[str], Prediction, Known | None]] = []
        problems = []
        for group in output.groups:
            prediction = output.predictions[group.name]
            names = [str(layer) for layer in range(len(prediction.boxes))]
            if isinstance(group.targets, Known):
                known = Known(
                    group.targets.labels.expand(len(names), -1, -1),
                    group.targets.boxes.expand(len(names), -1, -1, -1),
                )
                items.append((group, names, prediction, known))
            else:
                items.append((group, names, prediction, None))
                problems.append(Problem(prediction, group.targets.repeats))
            if group.proposals is not None:
                stage = group.proposals.prediction
                stacked = Prediction(stage.logits[None], stage.boxes[None])
                items.append((replace(group, valid=None), ["encoder"], stacked, None))
                problems.append(Problem(stacked, _repeats(group), group.proposals.class_agnostic))
        matched = iter(match(problems, targets, self.matching_cost))
        return [(g, names, p, known or next(matched)) for g, names, p, known in items]

    def _terms(self, prediction: Prediction, goal: Known, valid: Tensor | None) -> dict[str, Tensor]:
        """Losses per layer [L] of stacked predictions; queries that are not valid count for nothing."""
        logits, boxes = prediction.logits.float(), prediction.boxes.float()
        positive = goal.labels >= 0
        count = mean_over_processes(positive.sum((1, 2))).clamp(min=1)
        truth = box_convert(goal.boxes, "cxcywh", "xyxy")
        predicted = box_convert(boxes, "cxcywh", "xyxy")
        # One IoU per query beside K classes: 1 % of the class loss on 80 classes, so `Focal`, too, is just handed it.
        classes = self.class_loss(logits, goal.labels, _aligned_iou(predicted.detach(), truth))
        if valid is not None:
            classes = classes * valid[None, :, :, None]
        l1 = (boxes - goal.boxes).abs().sum(-1)
        giou = generalized_box_iou_loss(predicted, truth)
        return {
            "class": self.focal * classes.sum((1, 2, 3)) / count,
            "l1": self.l1 * l1.where(positive, 0).sum((1, 2)) / count,
            "giou": self.giou * giou.where(positive, 0).sum((1, 2)) / count,
        }


def _repeats(group: QueryGroup) -> int:
    return group.targets.repeats if isinstance(group.targets, Matching) else 1


def _aligned_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of corresponding xyxy boxes: [..., 4], [..., 4] -> [...]."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    return overlap / union.clamp(min=1e-6)
