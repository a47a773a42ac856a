"""Instability of matching, logged while a run trains."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from codetr.analyses.instability import changed
from codetr.analyses.matched import objects_of_queries
from codetr.types import MAIN, Batch


class Instability(Callback):
    """`val/instability`: queries of an image that are matched to another object than at the validation before, or to
    none any more, or to one for the first time (Co-DETR, fig. 5; see `codetr.analyses.instability`).

    images: so many of the first of the validation set, of process 0, which the detector sees once more for it.
    layer: of the decoder, whose predictions are matched; -1: the last.

    A resumed run goes on with what its checkpoint has. The module is a `DetectionTask`.
    """

    def __init__(self, images: int, layer: int) -> None:
        self.images, self.layer = images, layer
        self._before: list[Tensor] = []
        self._now: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._now = []

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or len(self._now) >= self.images:
            return
        output = pl_module.detector(batch.images, batch.padding)  # type: ignore[operator]
        cost = pl_module.criterion.matching_cost  # type: ignore[union-attr]
        matched = objects_of_queries(output, MAIN, batch.targets, cost, self.layer)  # type: ignore[arg-type]
        self._now = [*self._now, *matched.cpu()][: self.images]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._now:
            return
        if len(self._before) == len(self._now):
            value = changed(self._before, self._now)
            pl_module.log("val/instability", value, rank_zero_only=True)
        self._before = self._now

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["before"]
