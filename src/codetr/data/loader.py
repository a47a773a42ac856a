"""A DataLoader that knows how far it is, so that training resumes in the middle of an epoch."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from codetr.data.collate import collate, padding_of
from codetr.data.dataset import Sample
from codetr.data.sampler import EvalSampler, TrainSampler
from codetr.errors import UserError
from codetr.types import Batch, Targets

_SMALL = 1 << 20  # bytes


class BatchLoader(DataLoader[Sample]):
    """Yields a `Batch` per list of keys from `sampler`. most_objects: places for objects that it has at least."""

    def __init__(
        self,
        dataset: Dataset[Sample],
        sampler: TrainSampler | EvalSampler,
        *,
        size_divisor: int,
        num_workers: int,
        pin_memory: bool,
        most_objects: int = 1,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=partial(_collate_for_transfer, size_divisor=size_divisor, most_objects=most_objects),
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            # Its own generator: each new iterator draws a number, which would move the global random state on.
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_main_process,
        )


class TrainLoader(BatchLoader):
    """A BatchLoader over a TrainSampler that goes on in the middle of an epoch.

    batches_per_step: of the optimizer. The first batch of each step brings the others along, as its `ahead`.

    `state_dict` tells the epoch and the number of images handed out to all processes, however far the workers have
    read ahead; after `load_state_dict` that epoch goes on with the next image, also in other batches. Lightning
    stores both in its checkpoints, for every loader that has these methods.
    """

    batch_sampler: TrainSampler
    _position = 0

    def __init__(self, *args: Any, batches_per_step: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches_per_step = batches_per_step

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator on purpose: Lightning asks for the iterator before it knows in which epoch it resumes.
        self._position = self.batch_sampler.start
        batches = super().__iter__()
        while step := list(islice(batches, self.batches_per_step)):
            first, *ahead = step
            for batch in (replace(first, ahead=tuple(ahead)), *ahead):
                self._position += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        sampler = self.batch_sampler
        return {"epoch": sampler.epoch, "images": self._position * self._images_per_batch, "order": sampler.order_key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError when the rest of the epoch would not be the rest: other data or another seed."""
        sampler, order = self.batch_sampler, state["order"]
        batch = state["images"] // self._images_per_batch
        changed = [f"{k} {order.get(k)} -> {v}" for k, v in sampler.order_key.items() if order.get(k) != v]
        if changed and batch < len(sampler):
            raise UserError(
                f"the checkpoint lies in the middle of epoch {state['epoch']}, but what decides its order has "
                f"changed: {', '.join(changed)}; resume with the former values or from the end of an epoch"
            )
        sampler.resume(state["epoch"], batch)
        self._position = batch

    @property
    def _images_per_batch(self) -> int:
        """The images of one batch of all processes together."""
        return self.batch_sampler.batch_size * self.batch_sampler.world_size


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A terminal and SLURM send them to all processes, and a run that lost its workers cannot finish its step."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _collate_for_transfer(samples: Sequence[Sample], size_divisor: int, most_objects: int) -> Batch | _Parcel:
    if get_worker_info() is None:
        return collate(samples, size_divisor, most_objects)
    return _Parcel(collate(samples, size_divisor, most_objects, shared=True))


class _Parcel:
    """A batch that becomes one again on arrival, small tensors by value, and the padding from the images' sizes.

    Each tensor from a worker takes a piece of shared memory of its own, a file descriptor to open and to hold for as
    long as someone keeps the tensor; and each page of it costs as much as copying several.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _unpacked, (_as_arrays(replace(self.batch, padding=torch.empty(0))),)


def _unpacked(batch: Any) -> Batch:
    batch = _as_tensors(batch)
    height, width = batch.images.shape[2:]
    return replace(batch, padding=padding_of(batch.targets.frames.sizes, (height, width)))


def _as_arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        # An array would come out with other strides than it had.
        return value.numpy() if value.nbytes < _SMALL and value.is_contiguous() else value
    return _mapped(_as_arrays, value)


def _as_tensors(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else _mapped(_as_tensors, value)


def _mapped(convert: Callable[[Any], Any], value: Any) -> Any:
    """`value` with all that it contains converted."""
    if isinstance(value, dict):
        return {k: convert(v) for k, v in value.items()}
    if isinstance(value, list):
        return [convert(v) for v in value]
    if isinstance(value, (Batch, Targets)):
        return type(value)(**{f.name: convert(getattr(value, f.name)) for f in fields(value)})
    return value
