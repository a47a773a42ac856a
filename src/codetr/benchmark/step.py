"""A training step, and inference, on random images and objects with random weights."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor, nn

from codetr.errors import UserError
from codetr.types import Frames, Targets

WARMUP = 2
AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Inputs:
    """images: [B, 3, H, W] uint8. padding: [B, H, W] bool."""

    images: Tensor
    padding: Tensor
    targets: Targets


def draw(batch: int, size: tuple[int, int], objects: int, classes: int, device: torch.device) -> Inputs:
    """Random images and objects. All images but the first are an eighth less wide, and have three objects less."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[height, width], *[[height, width - width // 8]] * (batch - 1)])
    places, sides = (torch.rand(batch, objects, 2, generator=generator) for _ in range(2))
    valid = torch.arange(objects) < torch.tensor([objects, *[max(1, objects - 3)] * (batch - 1)])[:, None]
    labels = torch.randint(classes, (batch, objects), generator=generator).where(valid, 0)
    targets = Targets(torch.cat([places * 0.6 + 0.2, sides * 0.3 + 0.05], -1), labels, valid, Frames.unscaled(sizes))
    images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    padding = torch.arange(width).expand(batch, height, -1) >= sizes[:, 1, None, None]
    return Inputs(images.to(device), padding.to(device), targets.to(device))


class Measured(Protocol):
    """What can be timed: ours, and what other libraries have."""

    def train(self) -> None:
        """One step: forward, losses, backward, clipping, optimizer."""
        ...

    def infer(self) -> None: ...


class Step:
    """Our detector of a configuration. Raises UserError for a precision that is not measured."""

    def __init__(self, config: DictConfig, inputs: Inputs, classes: int, device: torch.device) -> None:
        if config.trainer.precision not in AUTOCAST:
            raise UserError(f"trainer.precision={config.trainer.precision}: give one of {', '.join(AUTOCAST)}")
        self.precision = AUTOCAST[config.trainer.precision]
        self.inputs, self.device = inputs, device
        config.model.num_classes = classes
        torch.manual_seed(0)
        self.detector: nn.Module = instantiate(config.model.detector, _convert_="all").to(device)
        self.criterion = instantiate(config.criterion, _convert_="all").to(device)
        if self.criterion.fed_loss is not None:
            self.criterion.fed_loss.weigh([1] * classes)
        self.optimizer = instantiate(config.optimizer)(self.detector, fused=True)
        self.clip = config.trainer.gradient_clip_val

    def loss(self) -> Tensor:
        with self._autocast():
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
        with torch.inference_mode(), self._autocast():
            self.detector.detect(self.inputs.images, self.inputs.padding)  # type: ignore[operator]
        self.detector.train()

    def _autocast(self) -> AbstractContextManager:
        return nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)


def with_classes(config: DictConfig) -> int:
    """The number of classes that a configuration has, or `classes`."""
    missing = OmegaConf.is_missing(config.model, "num_classes") or config.model.num_classes is None
    return int(config.classes if missing else config.model.num_classes)


def in_turns(
    cases: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, title: str
) -> dict[str, list[float]]:
    """Seconds of every call, without those that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in track(range(repeats + WARMUP), title):
        for name, call in cases.items():
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            if number >= WARMUP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arithmetic(device: torch.device, precision: torch.dtype | None) -> float:
    """Operations a second that products of matrices reach here, the best of some: the limit of all arithmetic."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=precision or torch.float32)
    return max(2 * size**3 / seconds for seconds in in_turns({"": lambda: a @ a}, 5, device, "Arithmetic")[""])


def medians(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    return {
        name: {"seconds": statistics.median(own), "least": min(own, default=math.nan)} for name, own in seconds.items()
    }
