"""Exponential moving average of the detector."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class EMA(Callback):
    """Averages all parameters and floating-point buffers of `module.detector` after every optimizer step.

    average <- d average + (1 - d) live with d = decay (1 - exp(-updates / warmup_updates)), so that early averages
    forget the initial weights. Validation during a fit sees the average in the detector's place; checkpoints hold
    both, the average under "ema". Sharded parameters (FSDP2) are averaged shard by shard. The average is of float32 at
    least: in bfloat16 steps of 1 - d < 1/256 would be lost.
    """

    def __init__(self, decay: float, warmup_updates: float) -> None:
        self.decay, self.warmup_updates = decay, warmup_updates
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._step = 0

    def decay_at(self, updates: int) -> float:
        return self.decay * (1 - math.exp(-updates / self.warmup_updates))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = pl_module.get_submodule("detector").state_dict()
        self._live = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        if self.average:
            self.average = {name: _like(self.average[name], live) for name, live in self._live.items()}
        else:
            self.average = {name: live.detach().to(_precise(live), copy=True) for name, live in self._live.items()}
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        self.updates += 1
        weight = 1 - self.decay_at(self.updates)
        averages = _local(self.average)
        live = [own.to(average.dtype) for own, average in zip(_local(self._live), averages, strict=True)]
        torch._foreach_lerp_(averages, live, weight)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._live and trainer.state.fn == "fit":
            self._kept = {name: live.clone() for name, live in self._live.items()}
            self._show(pl_module, self.average)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._kept:
            self._show(pl_module, self._kept)
            self._kept = {}

    @torch.no_grad()
    def _show(self, pl_module: LightningModule, weights: dict[str, Tensor]) -> None:
        for live, value in zip(_local(self._live), _local(weights), strict=True):
            live.copy_(value)
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # forget the whole weights that the last forward pass has left there

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        weights = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in self.average.items()}
        checkpoint["ema"] = {"updates": self.updates, "weights": weights}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "ema" in checkpoint:  # else the run had no average so far: begin with the loaded weights
            self.updates = checkpoint["ema"]["updates"]
            self.average = checkpoint["ema"]["weights"]


def _local(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]


def _like(value: Tensor, live: Tensor) -> Tensor:
    """value where and as `live` lies: device, sharding; its dtype or float32."""
    value = value.to(live.device, _precise(live))
    if isinstance(live, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, live.device_mesh, live.placements)
    return value


def _precise(live: Tensor) -> torch.dtype:
    return torch.promote_types(live.dtype, torch.float32)
