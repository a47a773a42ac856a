"""`data.batch_size=auto`: as many images as a GPU holds. The estimate is where the search begins."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import torch
from omegaconf import DictConfig

from codetr.costs.estimate import Estimator, largest_batches
from codetr.costs.step import Step, draw, without_pretrained
from codetr.errors import UserError

RESERVE = 0.1  # share of the memory for what an estimate does not see: workspaces of kernels, fragments
FEWER = 0.9


def fitting_batch(
    config: DictConfig, classes: int, objects: int, size: tuple[int, int], device: torch.device, memory: int
) -> int:
    """How many images a training step takes on `device`: the most that the estimate allows, or fewer, until two steps
    of random images, objects and weights run.

    objects: of an image, at most. size: (height, width) of a batch, at most. memory: bytes that are free. Random
    states stay as they were. Raises UserError where one image is too much.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        estimator = Estimator(config, classes, objects)
        limit = memory * (1 - RESERVE) - estimator.weights.average  # which the estimate counts, and the trial lacks
        (start,) = largest_batches(lambda n: estimator.training(n, size).memory - estimator.weights.average, [limit])
        found = largest_that_runs(max(start, 1), _Trial(config, classes, objects, size, device).runs)
        _give_back(device)
    if not found:
        raise UserError(
            f"data.batch_size=auto: not even one image of {size[0]} x {size[1]} pixels fits into the free "
            f"{memory / 2**30:.1f} GiB of {device}: take smaller images (augment@data=...) or half precision "
            "(trainer.precision=bf16-mixed)"
        )
    return found


class _Trial:
    def __init__(
        self, config: DictConfig, classes: int, objects: int, size: tuple[int, int], device: torch.device
    ) -> None:
        masks = bool(config.data.masks)
        self._draw = lambda batch: draw(batch, size, objects, classes, device, masks)
        self._step = Step(without_pretrained(copy.deepcopy(config)), self._draw(1), classes, device)

    def runs(self, batch: int) -> bool:
        """Whether two steps do; the second finds the optimizer's state."""
        try:
            self._step.inputs = self._draw(batch)
            for _ in range(2):
                self._step.train()
        except torch.OutOfMemoryError:
            return False
        finally:
            self._step.optimizer.zero_grad(set_to_none=True)
            _give_back(self._step.device)
        return True


def largest_that_runs(start: int, runs: Callable[[int], bool]) -> int:
    """The first of `start` and ever fewer that does; 0 where none does."""
    batch = start
    while batch and not runs(batch):
        batch = min(batch - 1, int(batch * FEWER))
    return batch


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
