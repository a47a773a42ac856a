"""A detector that watches a film, with a bar on the terminal."""

from __future__ import annotations

from time import perf_counter

import numpy as np
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from codetr.errors import UserError
from codetr.inference.face import Face
from codetr.inference.film import Ahead, Film
from codetr.inference.film_outputs import FilmWriter
from codetr.inference.result import Result


def watch(
    model: Face, film: Film, writer: FilmWriter, tracks: Tracks | None, score_threshold: float, batch_size: int
) -> str:
    """Find the objects of all frames, write them, and say how it went. Ctrl-C ends it, with all that was seen."""
    frames, begin = Ahead(film, drop=film.live), perf_counter()
    columns = TextColumn("frames"), BarColumn(), _Speed(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=film.total)
        try:
            for batch in frames.batches(batch_size):
                pixels = [frame.pixels for frame in batch]
                results = model.stream(pixels, score_threshold, batch_size, 0, None)
                for frame, result in zip(batch, results, strict=True):
                    if not isinstance(result, Result):
                        raise UserError(f"{film.source}, at {frame.time:.2f} s: {result.reason}")
                    writer.add(frame, result, tracks.follow(result, frame.time) if tracks else None)
                progress.advance(bar, len(batch))
        except KeyboardInterrupt:
            film.broken = "stopped by hand"
    return _summary(film, writer, frames, perf_counter() - begin)


def _summary(film: Film, writer: FilmWriter, frames: Ahead, seconds: float) -> str:
    late = f"; {frames.dropped} came while it was busy, and were left out" if film.live else ""
    text = (
        f"{writer.objects} objects in {writer.frames} frames, {writer.frames / seconds:.1f} frames a second, "
        f"{100 * frames.waited / seconds:.0f} % of the time waiting for frames{late}: {writer.path}"
    )
    if film.broken:
        text += f"\n{film.source} broke off ({film.broken}): what was seen until then is saved"
    return text


class _Speed(ProgressColumn):
    """Frames a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.0f} at {task.speed or 0:.1f}/s")


class Tracks:
    """Follows objects from frame to frame: ByteTrack (Zhang et al. 2022), of the package trackers.

    rate: frames per second. least: the least score of a new track.
    """

    def __init__(self, rate: float, least: float) -> None:
        try:
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise UserError(f"track=true needs the package trackers ({error}): pip install 'codetr[video]'") from error
        self._tracker = ByteTrackTracker(
            frame_rate=rate,
            track_activation_threshold=least,
            high_conf_det_threshold=least,
            minimum_consecutive_frames=1,
        )

    def follow(self, result: Result, time: float) -> list[int]:
        """Of each object the number of its track, -1 for none."""
        found = result.to_supervision()
        found.data = {"place": np.arange(len(result))}
        found.mask = None
        tracked = self._tracker.update(found, timestamp=time)
        tracks = [-1] * len(result)
        numbers = () if tracked.tracker_id is None else tracked.tracker_id
        for place, track in zip(tracked.data.get("place", ()), numbers, strict=True):
            tracks[int(place)] = int(track)
        return tracks
