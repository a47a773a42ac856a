"""Requests that are refused, and how many are served at one time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Refused(Exception):
    """A request that gets no detections. status: of HTTP. retry: seconds after which it may be worth another try."""

    def __init__(self, status: int, reason: str, retry: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.retry = status, retry


class Places:
    """For requests that are read, wait or are computed: each holds one until it is answered.

    most: how many there are. taken: how many are held.
    """

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self._seconds = 1.0  # that an answer took lately

    @property
    def retry(self) -> int:
        """Seconds after which a place should be free: those that an answer took lately."""
        return max(1, math.ceil(self._seconds))

    @contextmanager
    def one(self) -> Iterator[None]:
        """Raises Refused when all are taken."""
        if self.taken >= self.most:
            raise Refused(429, f"{self.taken} requests are being served, which is all; try again later", self.retry)
        self.taken += 1
        start = time.monotonic()
        try:
            yield
            self._seconds += (time.monotonic() - start - self._seconds) / 16
        finally:
            self.taken -= 1
