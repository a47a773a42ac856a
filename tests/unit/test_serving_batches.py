"""Many askers, one model: batches are of one kind and not too large, and everybody gets their own answer, once."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from codetr.serving.batching import Batches


class Squares:
    """Takes the place of a model. seen: the batches that it was given."""

    def __init__(self, bad: tuple[int, ...] = (), seconds: float = 0.0) -> None:
        self.seen: list[list[int]] = []
        self.bad, self.seconds = bad, seconds

    def __call__(self, items: list[int]) -> list[int]:
        self.seen.append(items)
        time.sleep(self.seconds)
        if set(items) & set(self.bad):
            raise ValueError(f"bad: {items}")
        return [item**2 for item in items]


def asked(
    run: Callable[[list[int]], list[int]],
    questions: Callable[[Batches[int, int]], Awaitable[list]],
    largest: int = 4,
    wait: float = 60.0,
    coming: int = 99,
) -> list:
    """The answers to `questions`; none may take longer than ten seconds."""

    async def main() -> list:
        batches = Batches(run, largest, wait, lambda: coming)
        work = asyncio.create_task(batches.work())
        try:
            async with asyncio.timeout(10):
                return await questions(batches)
        finally:
            work.cancel()

    return asyncio.run(main())


def test_everybody_gets_their_own_answer_once() -> None:
    """200 of three kinds at random moments."""
    model, draw = Squares(seconds=0.001), random.Random(0)

    async def one(batches: Batches[int, int], i: int) -> int:
        await asyncio.sleep(draw.random() / 5)
        return await batches.ask(i, kind=i % 3)

    async def questions(batches: Batches[int, int]) -> list[int]:
        return await asyncio.gather(*(one(batches, i) for i in range(200)))

    assert asked(model, questions, wait=0.01) == [i**2 for i in range(200)]
    assert Counter(i for batch in model.seen for i in batch) == Counter(range(200))
    assert {len({i % 3 for i in batch}) for batch in model.seen} == {1}
    assert 1 < max(map(len, model.seen)) <= 4


def test_a_full_batch_does_not_wait() -> None:
    model = Squares()

    async def questions(batches: Batches[int, int]) -> list[int]:
        return await asyncio.gather(*(batches.ask(i, "a") for i in range(8)))

    assert asked(model, questions) == [i**2 for i in range(8)]
    assert model.seen == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_who_is_alone_does_not_wait() -> None:
    async def questions(batches: Batches[int, int]) -> list[int]:
        return [await batches.ask(3, "a")]

    assert asked(Squares(), questions, coming=0) == [9]


def test_nobody_waits_longer_than_said() -> None:
    async def questions(batches: Batches[int, int]) -> list[float]:
        start = time.perf_counter()
        await batches.ask(3, "a")
        return [time.perf_counter() - start]

    (lasted,) = asked(Squares(), questions, wait=0.2)
    assert lasted >= 0.2


def test_the_oldest_kind_comes_first() -> None:
    """Of a kind that many ask for there is always a full batch; the other still gets its turn."""
    model = Squares(seconds=0.01)

    async def questions(batches: Batches[int, int]) -> list[int]:
        return await asyncio.gather(*(batches.ask(i, "rare" if i == 2 else "common") for i in range(20)))

    asked(model, questions, wait=0.0)
    assert [2] in model.seen[:2]


def test_one_bad_item_does_not_spoil_its_batch() -> None:
    async def questions(batches: Batches[int, int]) -> list:
        return await asyncio.gather(*(batches.ask(i, "a") for i in range(4)), return_exceptions=True)

    found = asked(Squares(bad=(2,)), questions)
    assert [*found[:2], found[3]] == [0, 1, 9]
    assert isinstance(found[2], ValueError)
    assert str(found[2]) == "bad: [2]"


def test_answers_that_are_missing_are_a_failure_and_not_a_shift() -> None:
    """One item gets too few answers in company, and right ones alone."""

    async def questions(batches: Batches[int, int]) -> list[int]:
        return await asyncio.gather(*(batches.ask(i, "a") for i in range(4)))

    def forgets(items: list[int]) -> list[int]:
        return [item**2 for item in items[:1]]

    assert asked(forgets, questions) == [0, 1, 4, 9]


def test_who_gives_up_is_not_computed() -> None:
    model, going, begun = Squares(), threading.Event(), threading.Event()

    def held(items: list[int]) -> list[int]:
        begun.set()
        assert going.wait(5)
        return model(items)

    async def questions(batches: Batches[int, int]) -> list[int]:
        first, second, third = (asyncio.create_task(batches.ask(i, i)) for i in range(3))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        second.cancel()
        await asyncio.sleep(0.01)
        going.set()
        return [await first, await third]

    assert asked(held, questions, wait=0.0) == [0, 4]
    assert model.seen == [[0], [2]]


def test_who_gives_up_while_computed_leaves_the_others_their_answers() -> None:
    async def questions(batches: Batches[int, int]) -> list[int]:
        tasks = [asyncio.create_task(batches.ask(i, "a")) for i in range(4)]
        await asyncio.sleep(0.05)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        return await asyncio.gather(tasks[0], *tasks[2:], batches.ask(5, "a"))

    assert asked(Squares(seconds=0.2), questions, wait=0.0) == [0, 4, 9, 25]
