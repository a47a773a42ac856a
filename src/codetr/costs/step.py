"""A training step, and inference, on random images and objects with random weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from codetr.criterion import Criterion
from codetr.errors import UserError
from codetr.models.detector import Detector
from codetr.types import Frames, Targets

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
Build = Callable[[DictConfig, torch.device], tuple[Detector, Criterion]]


@dataclass(frozen=True)
class Inputs:
    """images: [B, 3, H, W] uint8. padding: [B, H, W] bool."""

    images: Tensor
    padding: Tensor
    targets: Targets


def draw(
    batch: int, size: tuple[int, int], objects: int, classes: int, device: torch.device, masks: bool = False
) -> Inputs:
    """Random images and objects. All images but the first are an eighth less wide, and have three objects less.

    masks: the objects have some, which fill their boxes.
    """
    height, width = size
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[height, width], *[[height, width - width // 8]] * (batch - 1)])
    places, sides = (torch.rand(batch, objects, 2, generator=generator) for _ in range(2))
    valid = torch.arange(objects) < torch.tensor([objects, *[max(1, objects - 3)] * (batch - 1)])[:, None]
    labels = torch.randint(classes, (batch, objects), generator=generator).where(valid, 0)
    targets = Targets(torch.cat([places * 0.6 + 0.2, sides * 0.3 + 0.05], -1), labels, valid, Frames.unscaled(sizes))
    images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    padding = torch.arange(width).expand(batch, height, -1) >= sizes[:, 1, None, None]
    if masks:
        targets.masks = _filled(targets, height, width)
    return Inputs(images.to(device), padding.to(device), targets.to(device))


def _filled(targets: Targets, height: int, width: int) -> Tensor:
    """[B, M, height, width] bool, the boxes; none in the places without an object."""
    x1, y1, x2, y2 = targets.boxes_xyxy[..., None, None].unbind(2)
    x, y = torch.arange(width) + 0.5, (torch.arange(height) + 0.5)[:, None]
    return (x > x1) & (x < x2) & (y > y1) & (y < y2) & targets.valid[..., None, None]


def built(config: DictConfig, device: torch.device) -> tuple[Detector, Criterion]:
    """The detector and its losses, as a configuration with a number of classes has them."""
    torch.manual_seed(0)
    detector: Detector = instantiate(config.model.detector, _convert_="all")
    detector.freeze([config.freeze] if isinstance(config.freeze, str) else config.freeze)
    criterion: Criterion = instantiate(config.criterion, _convert_="all")
    if criterion.fed_loss is not None:
        criterion.fed_loss.weigh([1] * config.model.num_classes)
    return detector.to(device), criterion.to(device)


class Step:
    """Our detector of a configuration. Raises UserError for a precision that is not measured."""

    def __init__(
        self, config: DictConfig, inputs: Inputs, classes: int, device: torch.device, build: Build = built
    ) -> None:
        if config.trainer.precision not in AUTOCAST:
            raise UserError(f"trainer.precision={config.trainer.precision}: give one of {', '.join(AUTOCAST)}")
        self.precision = AUTOCAST[config.trainer.precision]
        self.inputs, self.device = inputs, device
        config.model.num_classes = classes
        self.detector, self.criterion = build(config, device)
        self.clip = config.trainer.gradient_clip_val
        fused = self.precision is None or not self.clip  # as in training, see `codetr.trainer.fused_optimizer`
        self.optimizer = instantiate(config.optimizer)(self.detector, fused=fused)

    def loss(self) -> Tensor:
        with self.autocast():
            output = self.detector(self.inputs.images, self.inputs.padding, self.inputs.targets)
            return torch.stack(list(self.criterion(output, self.inputs.targets).values())).sum()

    def update(self) -> None:
        """Clipping and the optimizer."""
        if self.clip:
            nn.utils.clip_grad_norm_(self.detector.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self) -> None:
        self.loss().backward()
        self.update()

    def infer(self) -> None:
        self.detector.eval()
        with torch.inference_mode(), self.autocast():
            self.detector.detect(self.inputs.images, self.inputs.padding)
        self.detector.train()

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)


def with_classes(config: DictConfig) -> int:
    """The number of classes that a configuration has, or `classes`."""
    missing = OmegaConf.is_missing(config.model, "num_classes") or config.model.num_classes is None
    return int(config.classes if missing else config.model.num_classes)


def without_pretrained(config: DictConfig) -> DictConfig:
    """`config`, whose backbone begins with random weights: nothing is read or fetched."""
    backbone = config.model.detector.backbone
    if "pretrained" in backbone:
        backbone.pretrained = False
    return config
