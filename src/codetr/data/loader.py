"""A DataLoader that knows how far it is, so that training resumes in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from codetr.data.coco import Sample
from codetr.data.collate import collate
from codetr.data.sampler import EvalSampler, TrainSampler
from codetr.errors import UserError
from codetr.types import Batch


class BatchLoader(DataLoader[Sample]):
    """Yields a `Batch` per list of keys from `sampler`."""

    def __init__(
        self,
        dataset: Dataset[Sample],
        sampler: TrainSampler | EvalSampler,
        *,
        size_divisor: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=partial(_collate_for_transfer, size_divisor=size_divisor),
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            # Its own generator: each new iterator draws a number, which would move the global random state on.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            batch.truth = [
                {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in truth.items()}
                for truth in batch.truth
            ]
            yield batch


class TrainLoader(BatchLoader):
    """A BatchLoader over a TrainSampler that goes on in the middle of an epoch.

    `state_dict` tells the epoch and the number of batches handed out, however far the workers have read ahead;
    after `load_state_dict` that epoch begins with the next batch. Lightning stores both in its checkpoints, for
    every loader that has these methods.
    """

    batch_sampler: TrainSampler
    _position = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator on purpose: Lightning asks for the iterator before it knows in which epoch it resumes.
        self._position = self.batch_sampler.start
        for batch in super().__iter__():
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        sampler = self.batch_sampler
        return {"epoch": sampler.epoch, "batch": self._position, "order": sampler.order_key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError when the rest of the epoch would not be the rest: other data, batch size or seed."""
        sampler, order = self.batch_sampler, state["order"]
        changed = [f"{k} {order.get(k)} -> {v}" for k, v in sampler.order_key.items() if order.get(k) != v]
        if changed and state["batch"] < len(sampler):
            raise UserError(
                f"the checkpoint lies in the middle of epoch {state['epoch']}, but what decides its order has "
                f"changed: {', '.join(changed)}; resume with the former values or from the end of an epoch"
            )
        sampler.resume(state["epoch"], state["batch"])
        self._position = state["batch"]


def _collate_for_transfer(samples: Sequence[Sample], size_divisor: int) -> Batch:
    """`truth` as arrays: each tensor from a worker would hold a file descriptor as long as someone keeps it."""
    batch = collate(samples, size_divisor)
    batch.truth = [{k: v.numpy() if isinstance(v, Tensor) else v for k, v in truth.items()} for truth in batch.truth]
    return batch
