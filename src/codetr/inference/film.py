"""Films and cameras: their frames, decoded in a thread of its own while the detector works on earlier ones."""

from __future__ import annotations

import importlib.util
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from codetr.errors import UserError

SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg", ".ts"}
_ADDRESS = re.compile(r"(rtsp|rtsps|rtmp|http|https|udp|tcp)://")
_AHEAD = 16  # frames that wait, at most, beyond those of a batch
_PATIENCE = 10.0  # seconds until an address or a camera that is silent counts as broken off

T = TypeVar("T")


def is_film(images: Any) -> bool:
    """Whether `images` of a prediction names a film, an address of a stream, or the number of a camera."""
    text = str(images)
    camera = text.isdecimal() and not Path(text).exists()
    return camera or bool(_ADDRESS.match(text)) or Path(text).suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class Frame:
    """number: among all frames of the film, by its time and rate. time: seconds from the beginning of the film.
    pixels: [3, H, W] uint8 RGB, upright."""

    number: int
    time: float
    pixels: Tensor


class Film:
    """Every `every`-th frame of a film, from `start` to `end` seconds.

    rate: frames per second. live: an address or a camera, which waits for nobody. total: how many frames will come, as
    far as that is known. sound: whether it has some. broken: why it ended before its end; None: it did not.

    Raises UserError for what cannot be opened, and for values that make no sense.
    """

    def __init__(self, source: str, every: int = 1, start: float | None = None, end: float | None = None) -> None:
        if importlib.util.find_spec("av") is None:
            raise UserError(f"images={source}: films need PyAV: pip install 'codetr[video]'")
        if every < 1 or (start or 0) < 0 or (end is not None and end <= (start or 0)):
            raise UserError(f"every={every}, start={start}, end={end}: give every=1 or more, and start before end")
        self.source, self.every, self.start, self.end = source, every, start or 0.0, end
        self.live = source.isdecimal() or bool(_ADDRESS.match(source))
        if self.live and start:
            raise UserError(f"start={start}: {source} has no beginning to count from; end=SECONDS ends it")
        self.broken: str | None = None
        self._container = opened(source)
        if not self._container.streams.video:
            raise UserError(f"{source}: has no pictures")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.sound = bool(self._container.streams.audio) and not self.live

    @property
    def total(self) -> int | None:
        duration = None if self.live else self._container.duration
        if duration is None:
            return None
        seconds = min(duration / 1e6, self.end or np.inf) - self.start
        return max(1, round(seconds * self.rate / self.every))

    def __iter__(self) -> Iterator[Frame]:
        import av

        try:
            yield from self._frames()
        except (av.error.FFmpegError, OSError) as error:
            if not isinstance(error, av.error.EOFError):
                self.broken = " ".join(str(error).split())[:200] or type(error).__name__

    def _frames(self) -> Iterator[Frame]:
        begin = float((self._stream.start_time or 0) * (self._stream.time_base or 0))
        if self.start:
            self._container.seek(int((self.start + begin) * 1e6))
        count = -1
        for frame in self._container.decode(self._stream):
            if self.live and count < 0:
                begin = frame.time or 0.0  # a camera counts from when it was switched on
            seconds = (frame.time or 0.0) - begin
            if seconds < self.start - 0.5 / self.rate:
                continue
            if self.end is not None and seconds >= self.end:
                return
            count += 1
            if count % self.every == 0:
                yield Frame(round(seconds * self.rate), seconds, _pixels(frame))

    def close(self) -> None:
        self._container.close()


def opened(source: str) -> Any:
    """An input of PyAV. Raises UserError for what it cannot open."""
    import av

    try:
        if source.isdecimal():
            return av.open(f"/dev/video{source}", format="v4l2", timeout=_PATIENCE)
        if _ADDRESS.match(source):
            options = {"rtsp_transport": "tcp"} if source.startswith("rtsp") else {}
            return av.open(source, options=options, timeout=_PATIENCE)
        # A playlist may name files and addresses, of which a film in a file has no need.
        return av.open(source, options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{source} cannot be opened as a film: {getattr(error, 'strerror', None) or error}") from error


def _pixels(frame: Any) -> Tensor:
    """Upright, with the strides of an image that was read from a file."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


class Ahead(Generic[T]):
    """Items that a thread makes before they are asked for, at most `size` of them.

    drop: where nobody takes them in time, new ones take the place of old ones. dropped: how many. waited: seconds for
    which the one who takes them had none.
    """

    def __init__(self, items: Iterable[T], size: int = _AHEAD, drop: bool = False) -> None:
        self._items, self._drop = items, drop
        self._queue: Queue[T | BaseException | None] = Queue(size)
        self._stop = threading.Event()
        self.dropped, self.waited = 0, 0.0

    def batches(self, size: int) -> Iterator[list[T]]:
        """Up to `size` at once: so many where they need not be hurried, else those that are there."""
        thread = threading.Thread(target=self._work, daemon=True, name="decoder")
        thread.start()
        try:
            more = True
            while more:
                batch: list[T] = []
                while more and len(batch) < size and not (self._drop and batch and self._queue.empty()):
                    item = self._next()
                    more = item is not None
                    batch += [] if item is None else [item]
                if batch:
                    yield batch
        finally:
            self._stop.set()
            thread.join(_PATIENCE)

    def _next(self) -> T | None:
        begin = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - begin
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        last: BaseException | None = None
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:  # the one who takes them raises it
            last = error
        self._put(last, drop=False)

    def _put(self, item: T | BaseException | None, drop: bool | None = None) -> bool:
        """False: nobody takes them any more."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.001 if self._drop and drop is None else 0.1)
                return True
            except Full:
                if self._drop and drop is None:
                    self._discard()
        return False

    def _discard(self) -> None:
        try:
            self._queue.get_nowait()
            self.dropped += 1
        except Empty:  # it was taken after all
            pass
