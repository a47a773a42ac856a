"""What a configuration costs, from a training step on tensors without content."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from codetr.costs.pretended import CPU, Pretence, without_content
from codetr.costs.step import Inputs, Step, draw, without_pretrained
from codetr.derived import learns_from_regions, read_needed_masks
from codetr.errors import UserError

LEAP = 8  # times as many images are asked for next, at most


@dataclass(frozen=True)
class Weights:
    """parameters, trained, at_inference: numbers, of all parts, of those that learn, and of those that detect. bytes:
    of parameters and buffers. state: bytes of the optimizer. average: bytes of the moving average (EMA)."""

    parameters: int
    trained: int
    at_inference: int
    bytes: int
    state: int
    average: int


@dataclass(frozen=True)
class Cost:
    """Of a training step, or of inference. memory: bytes at the highest point, with weights, and in training with
    gradients, the optimizer's state and the average. kept: bytes of activations that wait for the backward pass.
    flops: a product and a sum are two."""

    memory: int
    kept: int
    flops: float


class Estimator:
    """Of a configuration for training, which stays as it is. classes: that it detects. objects: of an image.

    Queries and objects fill all the places that they have with `static_shapes=true`, whatever images show.
    Raises UserError for detectors that learn from masks of regions, which are as many as the images show.
    """

    def __init__(self, config: DictConfig, classes: int, objects: int) -> None:
        config = copy.deepcopy(config)
        read_needed_masks(config)
        if learns_from_regions(config):
            raise UserError(
                "a detector that learns from masks of regions cannot be estimated: measure it, codetr benchmark step"
            )
        config.static_shapes, config.model.num_classes = True, classes
        self._pretence = Pretence()
        self._classes, self._objects, self._masks = classes, objects, bool(config.data.masks)
        build = without_content(without_pretrained(config))
        with self._pretence() as ledger:
            inputs = self._draw(1, (64, 64), 1)
            before = ledger.current
            self._step = Step(config, inputs, self._classes, CPU, build)
            built = ledger.current
            self._fill_optimizer()
            averaged = _averaged(self._step.detector) if "ema" in config.callbacks else []
            self._average = [torch.empty_like(tensor, dtype=torch.float32) for tensor in averaged]
            average = _bytes(self._average)
            state = ledger.current - built - average
        detector = self._step.detector
        left_out = detector.training_only_prefixes()
        self.weights = Weights(
            parameters=sum(p.numel() for p in detector.parameters()),
            trained=sum(p.numel() for p in detector.parameters() if p.requires_grad),
            at_inference=sum(p.numel() for name, p in detector.named_parameters() if not name.startswith(left_out)),
            bytes=built - before,
            state=state,
            average=average,
        )

    def _draw(self, batch: int, size: tuple[int, int], objects: int) -> Inputs:
        return draw(batch, size, objects, self._classes, CPU, self._masks)

    def _fill_optimizer(self) -> None:
        """The state that a first step makes, which every later one finds."""
        for parameter in self._step.detector.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        self._step.optimizer.step()
        self._step.optimizer.zero_grad(set_to_none=True)

    def training(self, batch: int, size: tuple[int, int]) -> Cost:
        """Of a step with a batch of (height, width) `size`."""
        with self._pretence() as ledger:
            self._step.inputs = self._draw(batch, size, self._objects)
            start, flops = ledger.current, ledger.flops
            ledger.peak = start
            loss = self._step.loss()
            kept = ledger.current - start
            loss.backward()
            del loss
            self._step.update()
            return Cost(ledger.peak, kept, ledger.flops - flops)

    def inference(self, batch: int, size: tuple[int, int]) -> Cost:
        """Of the detector, with all its parts in memory."""
        step = self._step
        with self._pretence() as ledger:
            step.inputs = self._draw(batch, size, self._objects)
            ledger.peak, flops = ledger.current, ledger.flops
            step.detector.eval()
            with torch.no_grad(), step.autocast():  # not in inference mode, which hides the operators within operators
                step.detector.detect(step.inputs.images, step.inputs.padding)
            step.detector.train()
            return Cost(ledger.peak - self.weights.state - self.weights.average, 0, ledger.flops - flops)


def largest_batches(memory_of: Callable[[int], int], limits: Sequence[float]) -> list[int]:
    """The most images whose `memory_of` is within each limit, both in bytes; 0 where one image is too much.

    The memory of every moment of a step is linear in the images, so that the highest is convex: between two batches
    that were asked it is at most what lies on the line between them. That line is taken: never too many images.
    """
    known = {batch: memory_of(batch) for batch in (1, 2)}
    while (highest := known[last := max(known)]) < max(limits):
        before = max(batch for batch in known if batch < last)
        slope = max((highest - known[before]) / (last - before), 1.0)
        more = last + 1 + int((max(limits) - highest) / slope)
        more = min(more, LEAP * last)  # the slope may grow: lines stay near what they stand for
        known[more] = memory_of(more)
    batches, memories = zip(*sorted(known.items()), strict=True)
    return [int(np.interp(limit, memories, batches)) if limit >= memories[0] else 0 for limit in limits]


def _averaged(detector: torch.nn.Module) -> list[Tensor]:
    return [tensor for tensor in detector.state_dict().values() if tensor.is_floating_point()]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
