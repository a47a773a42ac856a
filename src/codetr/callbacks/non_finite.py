"""Optimizer steps whose loss or gradient is not finite."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from codetr.errors import UserError
from codetr.types import Seen

_log = logging.getLogger(__name__)
_NAMED = 8  # losses, and images, per batch


@dataclass
class _Verdict:
    """bad: on the CPU, from `ready` on. seen: the batches of the step."""

    step: int
    bad: Tensor
    ready: torch.cuda.Event | None
    seen: Sequence[Seen]


class SkipNonFinite(Callback):
    """Leaves out steps whose gradient is not finite, and says which losses and images they had.

    skip: how many in a row; one more stops the run, 0 at the first one. The task makes the gradient of a loss that is
    not finite not finite either, and so all processes see the same.

    Where the optimizer can, its kernels leave the step out, and the host reads the verdict one step later, when it is
    there, instead of waiting for it. Under a gradient scaler (16-mixed), which leaves such steps out by itself while it
    looks for its scale, only losses that are not finite are worth a word.
    """

    def __init__(self, skip: int) -> None:
        self.skip, self.in_row = skip, 0
        self._verdict: _Verdict | None = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._judge(trainer)
        seen: deque[Seen] = pl_module.seen  # type: ignore[assignment]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = not_finite(gradients)
        ready = None
        on_host = bad.to("cpu", non_blocking=True)
        if bad.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self._verdict = _Verdict(trainer.global_step, on_host, ready, tuple(seen))
        seen.clear()
        fused = all(group.get("fused") for group in optimizer.param_groups)
        if _scaler(trainer) is None and fused and not isinstance(gradients[0], DTensor):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as gradient scalers tell it
            if not bad.is_cuda:
                self._judge(trainer)
        elif _scaler(trainer) is None and self._judge(trainer):
            optimizer.zero_grad()  # no gradients, no step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._judge(trainer)
        checkpoint["skipped_in_row"] = self.in_row

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.in_row = checkpoint.get("skipped_in_row", 0)

    def _judge(self, trainer: Trainer) -> bool:
        """Whether the last step was bad. Raises UserError for one too many."""
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return False
        if verdict.ready is not None:
            verdict.ready.synchronize()
        if not verdict.bad:
            self.in_row = 0
            return False
        self.in_row += 1
        losses = self._losses(trainer, verdict)
        message = f"step {verdict.step}: the loss or its gradient is not finite ({'; '.join(losses)})"
        if self.in_row > self.skip:
            raise UserError(
                f"{message}, {self.in_row} in a row, and callbacks.non_finite.skip={self.skip}: the run stops, and "
                "the last checkpoint stays. Look at these images, lower optimizer.lr, or take trainer.precision=32-true"
            )
        if trainer.is_global_zero and (losses or _scaler(trainer) is None):
            _log.warning("%s; the step is left out, %d of at most %d in a row", message, self.in_row, self.skip)
        return True

    def _losses(self, trainer: Trainer, verdict: _Verdict) -> list[str]:
        """Of every batch of every process, as `describe` has them; all images where all losses are finite."""
        train_set = trainer.datamodule.train_set  # type: ignore[attr-defined]
        own = [(describe(seen), images(seen, train_set)) for seen in verdict.seen]
        every = [own] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(every, own)
        batches = [batch for of_process in every for batch in of_process]
        if not any(losses for losses, _ in batches) and _scaler(trainer) is not None and self.in_row <= self.skip:
            return []
        chosen = [batch for batch in batches if batch[0]] or batches
        return [f"{losses or 'losses are finite'}; images {files}" for losses, files in chosen]


def not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Bool scalar on the tensors' device: whether their norm is infinite or NaN, as it is with one such number."""
    norm = get_total_norm([tensor.detach() for tensor in tensors])
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite().logical_not()


def describe(seen: Seen) -> str:
    """Losses that are not finite, by name; "" where all are."""
    values = dict(zip(seen.names, seen.losses.tolist(), strict=True))
    bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    return ", ".join(bad[:_NAMED]) + (f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")


def images(seen: Seen, train_set: Any) -> str:
    """Their ids, with their files."""
    ids = seen.image_ids.tolist()
    index = {i: int(np.flatnonzero(train_set.image_ids == i)[0]) for i in ids}
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(f"{i} ({train_set.path(index[i])})" for i in ids[:_NAMED]) + more


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)
