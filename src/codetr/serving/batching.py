"""What many ask, answered in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(eq=False)
class _Waiting(Generic[In, Out]):
    """since: by the clock of the event loop."""

    item: In
    kind: Hashable
    since: float
    answer: asyncio.Future[Out]


class Batches(Generic[In, Out]):
    """Gathers what is asked into batches of one kind, the oldest first, and has them answered.

    run: items of a batch -> their answers, in order; called in a thread of its own, for one batch after the other.
    largest: items of a batch, at most.
    wait: seconds that an item waits for others, at most, when nothing is computed.
    coming: how many are on their way here; while there are none, nothing waits.
    """

    def __init__(
        self,
        run: Callable[[list[In]], Sequence[Out]],
        largest: int,
        wait: float,
        coming: Callable[[], int],
    ) -> None:
        self.run, self.largest, self.wait, self.coming = run, largest, wait, coming
        self.held = 0  # asked, and not answered yet
        self._waiting: list[_Waiting[In, Out]] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "batches")

    async def ask(self, item: In, kind: Hashable) -> Out:
        """The answer to `item`, in a batch with others of its kind. Raises what `run` raises for this item alone."""
        loop = asyncio.get_running_loop()
        one: _Waiting[In, Out] = _Waiting(item, kind, loop.time(), loop.create_future())
        self._waiting.append(one)
        self.held += 1
        self._arrived.set()
        try:
            return await one.answer
        finally:
            self.held -= 1
            if one in self._waiting:  # who asked has given up
                self._waiting.remove(one)

    async def work(self) -> None:
        """Answers until it is cancelled: a task beside those that ask."""
        try:
            while True:
                await self._answer(await self._gathered())
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _gathered(self) -> list[_Waiting[In, Out]]:
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            if not self._waiting:
                await self._arrived.wait()
                continue
            first = self._waiting[0]
            batch = [one for one in self._waiting if one.kind == first.kind][: self.largest]
            end = first.since + self.wait
            if len(batch) == self.largest or loop.time() >= end or self.coming() == 0:
                self._waiting = [one for one in self._waiting if one not in batch]
                return batch
            with suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    await self._arrived.wait()

    async def _answer(self, batch: list[_Waiting[In, Out]]) -> None:
        """Where a batch fails, each of its items is tried alone: one that is bad does not spoil the others."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._thread, self.run, [one.item for one in batch])
            pairs = list(zip(batch, found, strict=True))
        except Exception as error:
            for one in batch:
                if len(batch) > 1:
                    await self._answer([one])
                elif not one.answer.done():
                    one.answer.set_exception(error)
            return
        for one, answer in pairs:
            if not one.answer.done():  # nobody waits for those that are
                one.answer.set_result(answer)
