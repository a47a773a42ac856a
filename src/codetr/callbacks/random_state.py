"""Random states in the checkpoint, so that a resumed run draws what the uninterrupted one would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

State = dict[str, Any]


class RandomState(Callback):
    """Saves the generators of every process, restores them when training starts.

    In a fresh run each process draws from a seed of its own, and so do processes that a resume adds.
    """

    def __init__(self) -> None:
        self._states: list[State] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[State] = [capture()] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(states, capture())
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._states = checkpoint.get("random_states", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank < len(self._states):
            restore(self._states[trainer.global_rank])
        elif trainer.global_rank:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        self._states = []


def capture() -> State:
    """Of PyTorch (CPU and current GPU), NumPy and Python; tensors and plain containers only."""
    kind, keys, *position = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *position),
        "python": random.getstate(),
    }


def restore(state: State) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *position))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
