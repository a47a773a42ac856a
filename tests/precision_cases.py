"""One training step of every detector in several precisions: with the same images, weights, draws and decisions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

import codetr.criterion
from codetr.criterion import Criterion
from codetr.heads import paa
from codetr.heads.rpn import RPN
from codetr.models.detector import Detector
from codetr.queries import hybrid, two_stage
from codetr.types import Frames, Targets
from toy_model import compose

SIDE, CLASSES, CROWD = 64, 3, 300
HEADS = ("faster_rcnn_small", "atss", "paa", "gfl", "fcos", "retinanet")
MODELS = sorted(p.stem for p in (Path(__file__).parents[1] / "conf/model").glob("*.yaml") if p.stem != "base")
# (model, auxiliary heads)
CASES = [
    *((model, ()) for model in MODELS),
    *((model, HEADS) for model in MODELS if model.startswith("co_")),
]
DECISIONS = (
    (codetr.criterion, "match"),
    (two_stage, "best_tokens"),
    (hybrid, "best_tokens"),
    (RPN, "propose"),
    (paa, "assign_paa"),
)


@dataclass(frozen=True)
class Inputs:
    """images: [B, 3, H, W] uint8. targets: of them. loud: factor of the weights and biases of the neck."""

    images: Tensor
    targets: Targets
    loud: float = 1.0


def build(model: str, heads: tuple[str, ...]) -> tuple[Detector, Criterion]:
    """At toy size, without anything random in training but what a seed fixes.

    Deformable attention begins with offsets of whole cells: its samples lie on the borders between two cells, where
    rounding decides which of two gradients there is. Here they lie elsewhere, as after the first step.
    """
    config = compose(
        f"model={model}",
        f"model/auxiliary_head=[{','.join(heads)}]",
        "model.detector.backbone.name=resnet10t",
        "model.detector.backbone.norm=frozen",
        "model.dropout=0",
        f"model.num_classes={CLASSES}",
    )
    torch.manual_seed(0)
    detector = instantiate(config.model.detector, _convert_="all")
    for name, parameter in detector.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            parameter.data += torch.rand_like(parameter) / 2 + 0.25
    return detector, instantiate(config.criterion, _convert_="all")


def hostile(seed: int = 0) -> dict[str, Inputs]:
    """Two images each, by what is wrong with them; with "usual" nothing is."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    centres, sides = (torch.rand(2, CROWD, 2, generator=generator) for _ in range(2))
    boxes = torch.cat([centres * 0.6 + 0.2, sides * 0.3 + 0.1], -1)
    usual = Inputs(images, _targets(boxes[:, :4]))
    one_pixel = torch.tensor([0.5, 0.5, 1 / SIDE, 1 / SIDE]).expand(2, 1, 4)
    return {
        "usual": usual,
        "all 0": replace(usual, images=torch.zeros_like(images)),
        "all 255": replace(usual, images=torch.full_like(images, 255)),
        "no object": replace(usual, targets=replace(usual.targets, valid=torch.zeros(2, 4, dtype=torch.bool))),
        "1 pixel": replace(usual, targets=_targets(one_pixel)),
        "whole image": replace(usual, targets=_targets(torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(2, 1, 4))),
        f"{CROWD} objects": replace(usual, targets=_targets(boxes)),
        "neck x 100": replace(usual, loud=100.0),
    }


def _targets(boxes: Tensor) -> Targets:
    labels = torch.arange(boxes.shape[1]).expand(len(boxes), -1) % CLASSES
    valid = torch.ones_like(labels, dtype=torch.bool)
    return Targets(boxes.contiguous(), labels, valid, Frames.unscaled(torch.full((len(boxes), 2), SIDE)))


@dataclass
class Decisions:
    """What a step decides from its predictions: matches, proposals, assignments. `made` notes them, in `taken` another
    step takes them over, so that gradients differ by rounding alone."""

    noted: list[Any] = field(default_factory=list)

    @contextmanager
    def made(self) -> Iterator[None]:
        def note(function: Callable, *args: Any) -> Any:
            self.noted.append(function(*args))
            return self.noted[-1]

        with _decided(note):
            yield

    @contextmanager
    def taken(self) -> Iterator[None]:
        left = iter(self.noted)
        with _decided(lambda function, *args: next(left)):
            yield


@contextmanager
def _decided(decide: Callable) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for place, name in DECISIONS:
            function = getattr(place, name)
            patch.setattr(place, name, lambda *args, _function=function: decide(_function, *args))
        yield


def parts(detector: nn.Module) -> dict[str, nn.Module]:
    """Those that have parameters, by name: backbone, neck, ..., heads.atss, queries.main, ..."""
    found: dict[str, nn.Module] = {}
    for name, module in detector.named_children():
        several = isinstance(module, nn.ModuleDict)
        found |= {f"{name}.{key}": child for key, child in module.named_children()} if several else {name: module}
    return {name: module for name, module in found.items() if any(p.requires_grad for p in module.parameters())}


@dataclass(frozen=True)
class Step:
    """loss: of all terms. gradients: of every part, one vector in float64. scale: by which the loss was multiplied in
    the backward pass, and the gradients divided."""

    loss: float
    gradients: dict[str, Tensor]
    scale: float

    @property
    def finite(self) -> bool:
        return bool(torch.tensor(self.loss).isfinite()) and all(g.isfinite().all() for g in self.gradients.values())


def step(
    detector: Detector, criterion: Criterion, inputs: Inputs, dtype: torch.dtype | None, scale: float = 1.0
) -> Step:
    """dtype: of autocast; None: everything in float32. scale: where not all gradients are finite, the next lower power
    of two with which they are is taken, if there is one."""
    torch.manual_seed(0)
    padding = torch.zeros(len(inputs.images), SIDE, SIDE, dtype=torch.bool)
    with loud(detector, inputs.loud):
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            output = detector(inputs.images, padding, inputs.targets)
            loss = torch.stack(list(criterion(output, inputs.targets).values())).sum()
        found = _backward(detector, loss, scale)
        while not found.finite and loss.isfinite() and found.scale > 1:
            found = _backward(detector, loss, found.scale / 2)
    return found


def _backward(detector: Detector, loss: Tensor, scale: float) -> Step:
    detector.zero_grad()
    (loss * scale).backward(retain_graph=True)
    return Step(
        float(loss.detach()), {name: _gradient(module) / scale for name, module in parts(detector).items()}, scale
    )


@contextmanager
def loud(detector: Detector, factor: float) -> Iterator[None]:
    """In which the neck's weights are so many times as large."""
    if factor == 1:
        yield
        return
    before = copy.deepcopy(detector.neck.state_dict())
    detector.neck.load_state_dict({name: value * factor for name, value in before.items()})
    yield
    detector.neck.load_state_dict(before)


def _gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in module.parameters() if p.grad is not None] or [torch.zeros(0)])


def off(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm()) if expected.norm() > 0 else float(found.norm() > 0)
