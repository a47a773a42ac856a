"""How Lightning runs a training: its precision and its strategy, as far as they are ours."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.connector import _convert_precision_to_unified_args
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from omegaconf import DictConfig
from torch import nn

from codetr.errors import UserError
from codetr.nn.half import halve


class TrueHalf(HalfPrecision):
    """Parameters, gradients and the optimizer's state in half precision; coordinates and losses in float32.

    The forward pass runs under autocast, as in mixed precision: convolutions, products of matrices and deformable
    attention are of half precision, boxes, references, matching and losses of float32. Lightning's own also rounds the
    batch and every number that the model makes.
    """

    def __init__(self, precision: Any, device: str) -> None:
        super().__init__(precision)
        self.device = device

    def convert_module(self, module: nn.Module) -> nn.Module:
        return halve(module, self._desired_input_dtype)

    def convert_input(self, data: Any) -> Any:
        return data

    def tensor_init_context(self) -> AbstractContextManager:
        return nullcontext()

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        # Without a cache: under FSDP a weight's storage is freed and filled again between two uses.
        with torch.autocast(self.device, dtype=self._desired_input_dtype, cache_enabled=False):
            yield


class FullyShardedStrategy(ModelParallelStrategy):
    """Every process holds one shard of parameters, gradients and optimizer state (FSDP2); checkpoints hold them whole.

    process_group_backend: None for nccl on GPUs and gloo on CPUs.
    """

    def __init__(self, process_group_backend: str | None) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self._process_group_backend = process_group_backend

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Through the checkpoint plugin, as everywhere else: Lightning's own passes it no options."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)


def build_trainer(config: DictConfig, **arguments: Any) -> Trainer:
    """The Trainer of `config` with further arguments.

    Raises UserError for a combination of device, precision and strategy that Lightning refuses, or replaces.
    """
    try:
        trainer: Trainer = instantiate(config, **arguments)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (MisconfigurationException, ValueError)):
            raise UserError(f"trainer: {cause}") from error
        raise
    device = trainer.strategy.root_device.type
    if trainer.precision != _convert_precision_to_unified_args(config.precision):
        raise UserError(f"trainer.precision={config.precision} does not run on {device}; set {trainer.precision}")
    if isinstance(trainer.precision_plugin, HalfPrecision):
        trainer.strategy.precision_plugin = TrueHalf(trainer.precision, device)
    return trainer


def fused_optimizer(trainer: Trainer) -> bool:
    """Whether the optimizer may be fused: Lightning's mixed precision does not clip gradients before an optimizer that
    could unscale them by itself, be there a scale or not."""
    return not (isinstance(trainer.precision_plugin, MixedPrecision) and trainer.gradient_clip_val)
