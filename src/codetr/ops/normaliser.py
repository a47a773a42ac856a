"""What losses are divided by: numbers of positives, sums of their weights. Means over everything that makes a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from codetr.ops.distributed import mean_over_processes

Answer = Callable[[Tensor], Tensor]
_answer: ContextVar[Answer] = ContextVar("_answer", default=mean_over_processes)


def normaliser(value: Tensor) -> Tensor:
    """The mean of `value` over all processes, and over the batches of an optimizer step inside `normalised_by`.

    Detached, of float32 at least; without a host synchronisation. Every process, in every batch, must ask for equally
    many, of the same shapes and in the same order.
    """
    value = value.detach()
    return _answer.get()(value.to(torch.promote_types(value.dtype, torch.float32)))


def measure(batches: Iterable[Callable[[], object]]) -> list[Tensor]:
    """The means over the batches of a step, and all processes, of what they ask for, in its order.

    batches: each computes the losses of one batch. Processes exchange all means at once. Raises ValueError where one
    batch asks for more than another.
    """
    asked = [_asked(batch) for batch in batches]
    means = [torch.stack(same).mean(0) for same in zip(*asked, strict=True)]
    if not means:
        return []
    flat = mean_over_processes(torch.cat([mean.flatten() for mean in means]))
    parts = flat.split([mean.numel() for mean in means])
    return [part.view_as(mean) for part, mean in zip(parts, means, strict=True)]


@contextmanager
def normalised_by(means: Sequence[Tensor] | None) -> Iterator[None]:
    """In which the losses of one batch get the means that `measure` has found; None: those of the batch alone."""
    if means is None:
        yield
        return
    with _answered_by(_InOrder(means)):
        yield


class _InOrder:
    """Answers with one after the other. No iterator: `torch.compile` does not follow those."""

    def __init__(self, answers: Sequence[Tensor]) -> None:
        self.answers, self.asked = answers, 0

    def __call__(self, value: Tensor) -> Tensor:
        self.asked += 1
        return self.answers[self.asked - 1]


def _asked(batch: Callable[[], object]) -> list[Tensor]:
    values: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        values.append(value)
        return value

    with _answered_by(note):
        batch()
    return values


@contextmanager
def _answered_by(answer: Answer) -> Iterator[None]:
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)
