"""The training loss: every group, every layer, every auxiliary head (Co-DETR, eq. 6)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from codetr.assign.hungarian import MatchingCost, match
from codetr.errors import UserError
from codetr.losses import ClassLoss, FedLoss, giou_loss
from codetr.nn.boxes import aligned_iou
from codetr.ops.normaliser import normaliser
from codetr.types import Known, Output, Prediction, QueryGroup, TargetRule, Targets


@dataclass
class _Stage:
    """Stacked predictions [L, B, N, ...] of a group's decoder layers, or of its first stage.

    names: of the layers, "group/layer". weights: of their losses.
    """

    names: list[str]
    weights: list[float]
    prediction: Prediction
    targets: TargetRule
    class_agnostic: bool = False
    valid: Tensor | None = None


class Criterion(nn.Module):
    """L = sum over decoder layers of (L_dec + lambda_1 L_aux_queries + lambda_2 L_aux_heads).

    The auxiliary heads' losses do not depend on the layer, so their sum over layers is a factor. lambda_1 is the
    `weight` of each collaborative group. lambda_2_by_head: of single heads, by name, in place of `lambda_2`. focal, l1,
    giou: weights of the class loss and of the two box losses. fed_loss: the class losses of all layers count the
    classes that it draws for the step; first stages without classes, and the auxiliary heads, are as without it.
    """

    def __init__(
        self,
        matching_cost: MatchingCost,
        class_loss: ClassLoss,
        focal: float,
        l1: float,
        giou: float,
        lambda_2: float,
        lambda_2_by_head: Mapping[str, float],
        fed_loss: FedLoss | None = None,
    ) -> None:
        super().__init__()
        self.matching_cost, self.class_loss = matching_cost, class_loss
        self.focal, self.l1, self.giou = focal, l1, giou
        self.lambda_2, self.lambda_2_by_head = lambda_2, lambda_2_by_head
        self.fed_loss = fed_loss

    def forward(self, output: Output, targets: Targets) -> dict[str, Tensor]:
        """Returns scalars named group/layer/term and head/term, weighted; their sum is the loss.

        Raises UserError when `lambda_2_by_head` names a head that the detector does not have.
        """
        losses: dict[str, Tensor] = {}
        stages = _merged([stage for name, group in output.groups.items() for stage in _stages(name, group, output)])
        stage_targets = self._stage_targets(stages, targets)
        positives = normaliser(torch.cat([(target.labels >= 0).sum((1, 2)) for target in stage_targets])).clamp(min=1)
        counts = positives.split([len(stage.names) for stage in stages])
        drawn = None if self.fed_loss is None else self.fed_loss(targets.labels, targets.valid)
        for stage, target, count in zip(stages, stage_targets, counts, strict=True):
            for term, per_layer in self._terms(stage, target, count, drawn).items():
                for name, weight, value in zip(stage.names, stage.weights, per_layer.unbind(), strict=True):
                    losses[f"{name}/{term}"] = value * weight
        return losses | self._head_losses(output)

    def _head_losses(self, output: Output) -> dict[str, Tensor]:
        """Of the auxiliary heads, and of the mask head, to which the official code gives the same factor."""
        if unknown := self.lambda_2_by_head.keys() - output.head_losses.keys():
            raise UserError(
                f"criterion.lambda_2_by_head names {sorted(unknown)}; the heads are {list(output.head_losses)}"
            )
        num_layers = len(next(iter(output.predictions.values())).boxes)
        losses = {
            f"head_{head}/{term}": value * (self.lambda_2_by_head.get(head, self.lambda_2) * num_layers)
            for head, terms in output.head_losses.items()
            for term, value in terms.items()
        }
        masks = {f"masks/{term}": value * (self.lambda_2 * num_layers) for term, value in output.mask_losses.items()}
        return losses | masks

    def _stage_targets(self, stages: list[_Stage], targets: Targets) -> list[Known]:
        """Per stage: labels [L, B, N], boxes [L, B, N, 4]."""
        problems = [stage.targets.problems(stage.prediction, stage.class_agnostic) for stage in stages]
        solutions = iter(match([problem for own in problems for problem in own], targets, self.matching_cost))
        return [
            stage.targets.known([next(solutions) for _ in own], len(stage.names))
            for stage, own in zip(stages, problems, strict=True)
        ]

    def _terms(self, stage: _Stage, target: Known, count: Tensor, drawn: Tensor | None) -> dict[str, Tensor]:
        """Losses [L] of a stage; queries that are not valid, and classes that are not drawn, count for nothing.

        count: [L] positives. drawn: [K] bool.
        """
        logits, boxes = stage.prediction.logits.float(), stage.prediction.boxes.float()
        positive = target.labels >= 0
        truth = box_convert(target.boxes, "cxcywh", "xyxy")
        predicted = box_convert(boxes, "cxcywh", "xyxy")
        # One IoU per query beside K classes: 1 % of the class loss on 80 classes, so `Focal`, too, is just handed it.
        classes = self.class_loss(logits, target.labels, aligned_iou(predicted.detach(), truth))
        if stage.valid is not None:
            classes = classes * stage.valid[None, :, :, None]
        if drawn is not None and not stage.class_agnostic:
            classes = classes.where(drawn, 0)
        l1 = (boxes - target.boxes).abs().sum(-1)
        giou = giou_loss(predicted, truth)
        return {
            "class": self.focal * classes.sum((1, 2, 3)) / count,
            "l1": self.l1 * l1.where(positive, 0).sum((1, 2)) / count,
            "giou": self.giou * giou.where(positive, 0).sum((1, 2)) / count,
        }


def _stages(name: str, group: QueryGroup, output: Output) -> list[_Stage]:
    prediction = output.predictions[name]
    names = [f"{name}/{layer}" for layer in range(len(prediction.boxes))]
    stage = _Stage(names, [group.weight] * len(names), prediction, group.targets, valid=group.valid)
    if group.proposals is None:
        return [stage]
    first = group.proposals
    stacked = Prediction(first.prediction.logits[None], first.prediction.boxes[None])
    return [stage, _Stage([f"{name}/encoder"], [group.weight], stacked, first.targets, first.class_agnostic)]


def _merged(stages: list[_Stage]) -> list[_Stage]:
    """Stages that are alike, such as the replicas of a group, become one: costs and losses are computed in one go."""
    alike: dict[object, list[_Stage]] = defaultdict(list)
    for index, stage in enumerate(stages):
        key: object = index
        if stage.targets.alike is not None and stage.valid is None:
            key = (stage.prediction.logits.shape[2:], stage.targets.alike, stage.class_agnostic)
        alike[key].append(stage)
    return [_stacked(members) if len(members) > 1 else members[0] for members in alike.values()]


def _stacked(stages: list[_Stage]) -> _Stage:
    return replace(
        stages[0],
        names=[name for stage in stages for name in stage.names],
        weights=[weight for stage in stages for weight in stage.weights],
        prediction=Prediction(
            torch.cat([stage.prediction.logits for stage in stages]),
            torch.cat([stage.prediction.boxes for stage in stages]),
        ),
    )
