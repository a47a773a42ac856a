"""Lightning's early stopping, in checkpoints that hold nothing but finite tensors."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping


class EarlyStop(EarlyStopping):
    """Its best score is infinite until there is one; in a checkpoint it is a plain number."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best_score": float(self.best_score)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "best_score": torch.tensor(state_dict["best_score"])})
