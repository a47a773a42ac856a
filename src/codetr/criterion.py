"""The training loss: every group, every layer, every auxiliary head (Co-DETR, eq. 6)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from codetr.assign.hungarian import Cost, match
from codetr.errors import UserError
from codetr.losses import ClassLoss, FedLoss, giou_loss
from codetr.nn.boxes import aligned_iou
from codetr.ops.normaliser import normaliser
from codetr.ops.once import once
from codetr.types import Known, Output, Prediction, Problem, QueryGroup, TargetRule, Targets


@dataclass
class Stage:
    """Stacked predictions [L, B, N, ...] of a group's decoder layers, or of its first stage.

    names: of the layers, "group/layer". weight: of their losses.
    """

    names: list[str]
    weight: float
    prediction: Prediction
    targets: TargetRule
    class_agnostic: bool = False
    valid: Tensor | None = None

    @property
    def size(self) -> int:
        """L * B * N."""
        return self.prediction.logits.shape[:3].numel()

    @property
    def num_classes(self) -> int:
        return self.prediction.logits.shape[-1]


class GroupCriterion(nn.Module, ABC):
    """L = sum over decoder layers of (L_dec + lambda_1 L_aux_queries + lambda_2 L_aux_heads).

    The auxiliary heads' losses do not depend on the layer, so their sum over layers is a factor. lambda_1 is the
    `weight` of each collaborative group. lambda_2_by_head: of single heads, by name, in place of `lambda_2`. What
    L_dec is, a subclass says, and for which predictions. fed_loss: see `Criterion`.
    """

    of_masks: bool

    def __init__(
        self, matching_cost: Cost, lambda_2: float, lambda_2_by_head: Mapping[str, float], fed_loss: FedLoss | None
    ) -> None:
        super().__init__()
        self.matching_cost = matching_cost
        self.lambda_2, self.lambda_2_by_head = lambda_2, lambda_2_by_head
        self.fed_loss = fed_loss

    @abstractmethod
    def layer_losses(
        self, stages: list[Stage], stage_targets: list[Known], targets: Targets, weights: Tensor
    ) -> dict[str, Tensor]:
        """By term, [layers of all stages], times `weights` of the same shape."""

    def forward(self, output: Output, targets: Targets) -> dict[str, Tensor]:
        """Returns scalars named group/layer/term and head/term, weighted; their sum is the loss.

        Raises UserError when `lambda_2_by_head` names a head that the detector does not have.
        """
        stages = [stage for name, group in output.groups.items() for stage in _stages(name, group, output)]
        stage_targets = self._stage_targets(stages, targets)
        weights = _numbers(tuple(stage.weight for stage in stages for _ in stage.names), targets.labels.device)
        names = [name for stage in stages for name in stage.names]
        losses = {
            f"{name}/{term}": value
            for term, values in self.layer_losses(stages, stage_targets, targets, weights).items()
            for name, value in zip(names, values.unbind(), strict=True)
        }
        return losses | self._head_losses(output)

    def _head_losses(self, output: Output) -> dict[str, Tensor]:
        """Of the auxiliary heads, and of the mask head, to which the official code gives the same factor."""
        if unknown := self.lambda_2_by_head.keys() - output.head_losses.keys():
            raise UserError(
                f"criterion.lambda_2_by_head names {sorted(unknown)}; the heads are {list(output.head_losses)}"
            )
        num_layers = len(next(iter(output.predictions.values())).logits)
        losses = {
            f"head_{head}/{term}": value * (self.lambda_2_by_head.get(head, self.lambda_2) * num_layers)
            for head, terms in output.head_losses.items()
            for term, value in terms.items()
        }
        masks = {f"masks/{term}": value * (self.lambda_2 * num_layers) for term, value in output.mask_losses.items()}
        return losses | masks

    def _stage_targets(self, stages: list[Stage], targets: Targets) -> list[Known]:
        """Per stage: labels [L, B, N], boxes [L, B, N, 4]."""
        problems = [stage.targets.problems(stage.prediction, stage.class_agnostic) for stage in stages]
        solutions = iter(_solved([problem for own in problems for problem in own], targets, self.matching_cost))
        return [
            stage.targets.known([next(solutions) for _ in own], len(stage.names))
            for stage, own in zip(stages, problems, strict=True)
        ]


class Criterion(GroupCriterion):
    """Losses of classes and boxes.

    focal, l1, giou: weights of the class loss and of the two box losses. fed_loss: the class losses of all layers count
    the classes that it draws for the step; first stages without classes, and the auxiliary heads, are as without it.
    """

    of_masks = False

    def __init__(
        self,
        matching_cost: Cost,
        class_loss: ClassLoss,
        focal: float,
        l1: float,
        giou: float,
        lambda_2: float,
        lambda_2_by_head: Mapping[str, float],
        fed_loss: FedLoss | None = None,
    ) -> None:
        super().__init__(matching_cost, lambda_2, lambda_2_by_head, fed_loss)
        self.class_loss = class_loss
        self.focal, self.l1, self.giou = focal, l1, giou

    def layer_losses(
        self, stages: list[Stage], stage_targets: list[Known], targets: Targets, weights: Tensor
    ) -> dict[str, Tensor]:
        drawn = None if self.fed_loss is None else self.fed_loss(targets.labels, targets.valid)
        terms = self._terms(stages, stage_targets, drawn) * (weights / positives(stage_targets))
        return dict(zip(("class", "l1", "giou"), terms, strict=True))

    def _terms(self, stages: list[Stage], stage_targets: list[Known], drawn: Tensor | None) -> Tensor:
        """[3, layers of all stages] sums of the losses of classes, L1 and GIoU; queries that are not valid, and classes
        that are not drawn ([K] bool), count for nothing.

        All queries of all layers at once: many small tensors cost more than what is computed with them.
        """
        boxes = torch.cat([stage.prediction.boxes.flatten(0, 2) for stage in stages]).float()
        target_boxes = torch.cat([target.boxes.flatten(0, 2) for target in stage_targets])
        labels = torch.cat([target.labels.flatten() for target in stage_targets])
        predicted, truth = (box_convert(x, "cxcywh", "xyxy") for x in (boxes, target_boxes))
        # One IoU per query beside K classes: 1 % of the class loss on 80 classes, so `Focal`, too, is just handed it.
        classes = self._class_losses(stages, labels, aligned_iou(predicted.detach(), truth), drawn) * self.focal
        l1, giou = (boxes - target_boxes).abs().sum(-1) * self.l1, giou_loss(predicted, truth) * self.giou
        terms = torch.cat([classes[None], torch.stack([l1, giou]).where(labels >= 0, 0)])
        layers = zip(terms.split([stage.size for stage in stages], 1), stages, strict=True)
        return torch.cat([own.unflatten(1, (len(stage.names), -1)).sum(2) for own, stage in layers], 1)

    def _class_losses(self, stages: list[Stage], labels: Tensor, quality: Tensor, drawn: Tensor | None) -> Tensor:
        """[n] of all queries, whose labels and qualities are [n]. First stages may have other classes than the rest."""
        sizes = [stage.size for stage in stages]
        of_labels, of_quality = labels.split(sizes), quality.split(sizes)
        parts: dict[int, Tensor] = {}
        for members in _alike([(stage.num_classes, stage.class_agnostic) for stage in stages]):
            own = [stages[i] for i in members]
            logits = torch.cat([stage.prediction.logits.flatten(0, 2) for stage in own]).float()
            own_labels, own_quality = (torch.cat([of[i] for i in members]) for of in (of_labels, of_quality))
            losses = self.class_loss(logits, own_labels, own_quality)
            losses = (losses if drawn is None or own[0].class_agnostic else losses.where(drawn, 0)).sum(-1)
            if any(stage.valid is not None for stage in own):
                losses = losses.where(torch.cat([valid(stage).flatten() for stage in own]), 0)
            parts |= zip(members, losses.split([sizes[i] for i in members]), strict=True)
        return torch.cat([parts[i] for i in range(len(stages))])


def positives(stage_targets: list[Known]) -> Tensor:
    """[layers of all stages] numbers of positive queries, at least 1."""
    return normaliser(torch.cat([(target.labels >= 0).sum((1, 2)) for target in stage_targets])).clamp(min=1)


def _alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal keys, together."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return list(places.values())


def _solved(problems: list[Problem], targets: Targets, cost: Cost) -> list[Known]:
    """The solutions of problems. Costs of those that are alike, such as a group's replicas, are computed as one."""
    together = _alike([(p.prediction.logits.shape[2:], p.repeats, p.class_agnostic) for p in problems])
    stacked = [_stacked([problems[i] for i in members]) for members in together]
    found: dict[int, Known] = {}
    for members, solution in zip(together, match(stacked, targets, cost), strict=True):
        layers = [len(problems[i].prediction.logits) for i in members]
        found |= zip(members, solution.split(layers), strict=True)
    return [found[i] for i in range(len(problems))]


def _stacked(problems: list[Problem]) -> Problem:
    if len(problems) == 1:
        return problems[0]
    return replace(problems[0], prediction=Prediction.joined([problem.prediction for problem in problems], 0))


def _stages(name: str, group: QueryGroup, output: Output) -> list[Stage]:
    prediction = output.predictions[name]
    names = [f"{name}/{layer}" for layer in range(len(prediction.logits))]
    stage = Stage(names, group.weight, prediction, group.targets, valid=group.valid)
    if group.proposals is None:
        return [stage]
    first = group.proposals
    stacked = first.prediction.stacked
    return [stage, Stage([f"{name}/encoder"], group.weight, stacked, first.targets, first.class_agnostic)]


def valid(stage: Stage) -> Tensor:
    """[L, B, N] bool, the queries that are there."""
    shape = stage.prediction.logits.shape[:3]
    if stage.valid is None:
        return torch.ones(shape, dtype=torch.bool, device=stage.prediction.logits.device)
    return stage.valid.expand(shape)


@once
def _numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values).to(device, non_blocking=True)
