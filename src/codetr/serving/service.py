"""A model for many that ask at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import NamedTuple

import torch
from starlette.requests import Request
from torch import Tensor

from codetr.inference import Exported, Model, Result
from codetr.serving.batching import Batches
from codetr.serving.limits import Places, Refused
from codetr.serving.metrics import Metrics
from codetr.serving.reading import image_file, pixels_in
from codetr.serving.settings import Settings
from codetr.views import Views


class Asked(NamedTuple):
    """An image, [3, H, W] uint8 RGB, the least score of its objects, and names of views."""

    pixels: Tensor
    threshold: float
    views: tuple[str, ...]


class Service:
    """Requests in, results out; the model runs in one thread, and images are decoded in others.

    Images share a batch only where they have the same height, width, threshold and views: then none is padded more than
    alone, and an answer does not depend on who else asks. No more images are decoded than two batches hold; the others
    wait as files.

    views: from which requests choose, by their names.
    """

    def __init__(self, model: Model | Exported, settings: Settings, views: Mapping[str, Views]) -> None:
        self.model, self.settings, self.views = model, settings, views
        self.places = Places(settings.max_requests)
        self.metrics = Metrics(lambda: self.places.taken)
        self._decoded = asyncio.Semaphore(2 * settings.batch_size)
        self._readers = ThreadPoolExecutor(settings.readers, "readers")
        self._batches = Batches[Asked, Result](self._detect, settings.batch_size, settings.batch_wait, self._coming)
        self._work: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """In which requests are answered; at its end nobody may be waiting."""
        self._work = asyncio.create_task(self._batches.work())
        try:
            yield
        finally:
            self._work.cancel()
            self._readers.shutdown(wait=False, cancel_futures=True)

    @property
    def works(self) -> bool:
        return self._work is not None and not self._work.done()

    def warm_up(self) -> None:
        """Detect in a blank image, for what is compiled or allocated at the first time."""
        self.model.predict(torch.zeros(3, 64, 64, dtype=torch.uint8))

    async def answer(self, request: Request, threshold: float, views: tuple[str, ...]) -> Result:
        """What the model finds in the image of a request, with at least the score `threshold`, through the named views.

        Raises Refused, and UserError where the model cannot take the image.
        """
        with self.places.one():
            content = await image_file(request, self.settings.max_bytes, self.settings.read_seconds)
            try:
                async with asyncio.timeout(self.settings.answer_seconds):
                    return await self._detected(content, threshold, views)
            except TimeoutError:
                reason = f"there was no answer within {self.settings.answer_seconds:g} seconds; try again later"
                raise Refused(503, reason, self.places.retry) from None

    async def _detected(self, content: bytes, threshold: float, views: tuple[str, ...]) -> Result:
        loop = asyncio.get_running_loop()
        async with self._decoded:
            pixels = await loop.run_in_executor(self._readers, pixels_in, content, self.settings.max_pixels)
            return await self._batches.ask(Asked(pixels, threshold, views), kind=(pixels.shape, threshold, views))

    def _coming(self) -> int:
        return self.places.taken - self._batches.held

    def _detect(self, asked: list[Asked]) -> list[Result]:
        """Of one height, width, threshold and choice of views."""
        start = time.perf_counter()
        images, (_, threshold, names) = [one.pixels for one in asked], asked[0]
        views = [self.views[name] for name in names] or None
        found = self.model.predict(images, threshold, batch_size=len(asked), max_pixels=None, views=views)
        self.metrics.images.observe(len(asked))
        self.metrics.model_seconds.observe(time.perf_counter() - start)
        return found
