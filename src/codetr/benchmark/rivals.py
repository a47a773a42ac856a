"""Detectors of other libraries, built as they come, with random weights, for a step beside ours.

Each brings its own losses; clipping and AdamW are PyTorch's, fused, as for ours.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from codetr.costs.step import Inputs
from codetr.errors import UserError

C3_TO_C5 = ("stage2", "stage3", "stage4")  # of a ResNet, in transformers' words


class Rival:
    """losses: (model, inputs) -> the loss of a training step. predict: (model, inputs) -> anything."""

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[[nn.Module, Inputs], Tensor],
        predict: Callable[[nn.Module, Inputs], object],
        inputs: Inputs,
        precision: torch.dtype | None,
    ) -> None:
        self.device = inputs.images.device
        self.model = model.to(self.device).train()
        self.losses, self.predict, self.inputs, self.precision = losses, predict, inputs, precision
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-5, fused=True)

    def train(self) -> None:
        with self._autocast():
            loss = self.losses(self.model, self.inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def infer(self) -> None:
        self.model.eval()
        with torch.inference_mode(), self._autocast():
            self.predict(self.model, self.inputs)
        self.model.train()

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, self.precision or torch.bfloat16, enabled=self.precision is not None)


def build(name: str, inputs: Inputs, classes: int, precision: torch.dtype | None, dropout: float) -> Rival:
    """dropout: of ours, for a DETR: as they come, those of transformers drop elsewhere than the papers' code does, and
    no attention weights, which are the most.

    Raises UserError for a name that is none, and for a library that is not installed.
    """
    if name not in RIVALS:
        raise UserError(f"against={name}: give some of {', '.join(['reference', *RIVALS])}")
    library = name.partition("/")[0]
    if importlib.util.find_spec(library) is None:
        raise UserError(f"against={name}: {library} is not installed; pip install {library}")
    logging.getLogger(library).setLevel(logging.ERROR)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they start from random weights
        model, losses, predict = RIVALS[name](classes)
    _train_as_ours(model)
    _drop_as_ours(model, dropout)
    return Rival(model, losses, predict, inputs, precision)


def _train_as_ours(model: nn.Module) -> None:
    """Of a ResNet of transformers, which comes wholly frozen with some detectors and wholly trained with others, the
    stem and the first stage are frozen, as in the papers."""
    for name, parameter in model.named_parameters():
        if re.search(r"backbone.*\.(embedder|stages)\.", name):
            parameter.requires_grad_(re.search(r"\.stages\.[123]\.", name) is not None)


def _drop_as_ours(model: nn.Module, dropout: float) -> None:
    """In the layers of a DETR of transformers that name a probability."""
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, dropout)


def _pixels(inputs: Inputs) -> Tensor:
    images = inputs.images.float() / 255
    mean, std = ((images.new_tensor(x)[:, None, None]) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / std


def _labels(inputs: Inputs, label_key: str) -> list[dict[str, Tensor]]:
    targets = inputs.targets
    rows = zip(targets.labels, targets.boxes, targets.valid, strict=True)
    return [{label_key: labels[valid], "boxes": boxes[valid]} for labels, boxes, valid in rows]


# -- transformers


def _of_transformers(
    name: str, classes: int, task: str = "ObjectDetection", stages: Sequence[str] = (), **arguments: Any
) -> tuple[nn.Module, Callable, Callable]:
    """name, task: of the model's class. stages: of a ResNet-50 in place of the model's own backbone."""
    import transformers

    if stages:
        resnet = transformers.ResNetConfig(out_features=list(stages))  # type: ignore[call-arg]
        arguments |= {"backbone": None, "backbone_config": resnet}
    config = getattr(transformers, f"{name}Config")(num_labels=classes, **arguments)

    def losses(model: nn.Module, inputs: Inputs) -> Tensor:
        return model(_pixels(inputs), pixel_mask=~inputs.padding, labels=_labels(inputs, "class_labels")).loss

    def predict(model: nn.Module, inputs: Inputs) -> object:
        return model(_pixels(inputs), pixel_mask=~inputs.padding)

    return getattr(transformers, f"{name}For{task}")(config), losses, predict


def _mask2former(classes: int) -> tuple[nn.Module, Callable, Callable]:
    model, _, predict = _of_transformers("Mask2Former", classes, "UniversalSegmentation", ("stage1", *C3_TO_C5))

    def losses(model: nn.Module, inputs: Inputs) -> Tensor:
        own = _labels(inputs, "class_labels")
        labels = [one["class_labels"] for one in own]
        masks = [_boxes_as_masks(one["boxes"], inputs) for one in own]
        return model(_pixels(inputs), pixel_mask=~inputs.padding, mask_labels=masks, class_labels=labels).loss

    return model, losses, predict


def _boxes_as_masks(boxes: Tensor, inputs: Inputs) -> Tensor:
    """[m, 4] cxcywh -> [m, H, W] of 0 and 1."""
    height, width = inputs.images.shape[-2:]
    x, y = torch.arange(width, device=boxes.device) / width, torch.arange(height, device=boxes.device) / height
    cx, cy, w, h = boxes[:, :, None].unbind(1)
    inside = ((y - cy).abs() < h / 2)[:, :, None] & ((x - cx).abs() < w / 2)[:, None]
    return inside.float()


# -- rf-detr


def _of_rfdetr(variant: str, classes: int) -> tuple[nn.Module, Callable, Callable]:
    from rfdetr import config
    from rfdetr.models.lwdetr import build_criterion_from_config, build_model_from_config
    from rfdetr.utilities.tensors import NestedTensor

    own = getattr(config, f"RFDETR{variant}Config")(pretrain_weights=None, device="cpu", num_classes=classes)
    model = build_model_from_config(own)
    criterion, _ = build_criterion_from_config(own, config.TrainConfig(dataset_dir=".", output_dir="."))

    def losses(model: nn.Module, inputs: Inputs) -> Tensor:
        found = criterion(outputs(model, inputs), _labels(inputs, "labels"))
        weights = criterion.weight_dict
        return torch.stack([value * weights[name] for name, value in found.items() if name in weights]).sum()

    def outputs(model: nn.Module, inputs: Inputs) -> Any:
        return model(NestedTensor(_pixels(inputs), inputs.padding))

    return model, losses, outputs


DETR: dict[str, Any] = {"use_timm_backbone": False, "auxiliary_loss": True}
RIVALS: dict[str, Callable[[int], tuple[nn.Module, Callable, Callable]]] = {
    "transformers/deformable_detr": partial(
        _of_transformers, "DeformableDetr", stages=C3_TO_C5, two_stage=True, with_box_refine=True, **DETR
    ),
    "transformers/conditional_detr": partial(_of_transformers, "ConditionalDetr", stages=C3_TO_C5[-1:], **DETR),
    "transformers/dab_detr": partial(_of_transformers, "DabDetr", stages=C3_TO_C5[-1:], **DETR),
    "transformers/rt_detr": partial(_of_transformers, "RTDetr"),
    "transformers/mask2former": _mask2former,
    "rfdetr/nano": partial(_of_rfdetr, "Nano"),
    "rfdetr/small": partial(_of_rfdetr, "Small"),
    "rfdetr/medium": partial(_of_rfdetr, "Medium"),
}
