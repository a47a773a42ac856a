"""Which images make up which batch, on which process. Both samplers yield lists of (visit, index)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from codetr.data.sampling import Order, batches_of_one_group, nth_visit

Keys = list[tuple[int, int]]
_EPOCHS = 2**16  # more than any training has; visits beyond an image's first are counted above it


def mix_seed(seed: int, epoch: int, index: int = -1) -> int:
    """A 63-bit seed in which neighbouring arguments share nothing, unlike their sum (SplitMix64's finaliser)."""
    mask = 2**64 - 1
    x = (seed * 0x9E3779B97F4A7C15 + (epoch << 32) + index + 1) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 1


class TrainSampler(Sampler[Keys]):
    """Batches of the images that `order` draws, which depend on (seed, epoch) alone.

    Step n of all processes together takes the n-th `world_size * batch_size` images of the order, so that the split
    into processes does not change what a step sees. Every process has equally many batches, in every epoch: the
    remainder, fewer images than one step takes, is left out and differs by epoch.

    groups: one number per image (see `codetr.data.sampling.orientations`); a process's batch holds images of one
    group. The sequence of batches does not depend on the number of processes: step n takes the next `world_size`.

    Keys are (visit, index). visit is the epoch, or, where an image comes again within one, a number of its own: no
    two visits are augmented alike. `resume(epoch, batch)` lets that epoch begin at that batch; other epochs begin at
    their first.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        groups: np.ndarray | None = None,
    ) -> None:
        self.order, self.batch_size, self.seed = order, batch_size, seed
        self.rank, self.world_size, self.groups = rank, world_size, groups
        self.epoch = 0
        self._resumed = (0, 0)

    @property
    def sampler(self) -> TrainSampler:
        """Lightning calls `set_epoch` on the batch sampler's `sampler`."""
        return self

    @property
    def order_key(self) -> dict[str, Any]:
        """Everything but the epoch that decides in which order all processes together see the images."""
        return {
            "images": self.order.length,
            "seed": self.seed,
            "batches_of_one_group": None if self.groups is None else self.batch_size,
            **self.order.key,
        }

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume(self, epoch: int, batch: int) -> None:
        self._resumed = (epoch, batch)

    @property
    def start(self) -> int:
        """The batch at which the current epoch begins."""
        epoch, batch = self._resumed
        return batch if epoch == self.epoch else 0

    def __len__(self) -> int:
        """The number of batches of a whole epoch."""
        return self.order.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Keys]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = self.order.draw(generator)[: self.order.length]
        if self.groups is not None:
            order = batches_of_one_group(order, self.groups[order], self.batch_size, generator)
        order = order[: len(self) * self.batch_size * self.world_size]
        visits = self.epoch + nth_visit(order) * _EPOCHS
        steps = np.stack([visits, order], axis=1).reshape(-1, self.world_size, self.batch_size, 2)
        for batch in steps[self.start :, self.rank]:
            yield [(visit, index) for visit, index in batch.tolist()]


class EvalSampler(Sampler[Keys]):
    """Every image over all processes, in ascending order on each, in equally many batches; the last may be smaller.

    Processes that have too few images for as many batches as process 0 end with a batch of its first image: sharded
    models exchange their weights in every batch. An evaluation counts that image once, as process 0 saw it.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size
        self.batches = -(-length // (world_size * batch_size))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Keys]:
        for i in range(self.batches):
            own = self.indices[i * self.batch_size : (i + 1) * self.batch_size]
            yield [(0, index) for index in own or (0,)]
