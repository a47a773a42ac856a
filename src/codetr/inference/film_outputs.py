"""What comes of a film: a line of JSON for every frame, and the film with what was found drawn in, and its sound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from codetr.files import cannot_write, part_of
from codetr.inference.film import Film, Frame, opened
from codetr.inference.growing import Growing
from codetr.inference.outputs import refuse_inputs
from codetr.inference.result import Result
from codetr.visualize import draw_boxes

_TICKS = 90_000  # of a second, in which the times of frames are written
_IN_MP4 = {"aac", "mp3", "ac3", "eac3", "alac", "opus"}  # other sound goes into Matroska
_QUALITY = {"crf": "20", "preset": "veryfast"}


def name_of(source: str) -> str:
    """Of the files about a film: its own without the suffix; of what is no file, camera_0 or stream."""
    if source.isdecimal():
        return f"camera_{source}"
    return "stream" if "://" in source else Path(source).stem


class FilmWriter:
    """NAME.jsonl, a line for every frame, and, with `pictures`, NAME.mp4 or NAME.mkv, in the folder `out`; a context.

    The lines are complete after every frame, and both files are there from the end of the context on, however it comes.
    Raises UserError where an input would be overwritten, and for what cannot be written.
    """

    def __init__(self, out: Path, film: Film, pictures: bool, inputs: Sequence[Path]) -> None:
        name = name_of(film.source)
        suffix = ".mp4" if not film.sound or _sound_of(film.source) in _IN_MP4 else ".mkv"
        lines, self.film_path = out / f"{name}.jsonl", out / f"{name}{suffix}" if pictures else None
        targets = [lines, *([self.film_path, part_of(self.film_path)] if self.film_path else [])]
        refuse_inputs(targets, [*inputs, *([] if film.live else [Path(film.source)])])
        self._lines, self._film = Growing(lines), film
        self._drawn: _Drawn | None = None
        self.frames = self.objects = 0

    @property
    def path(self) -> Path:
        return self._lines.path

    def __enter__(self) -> FilmWriter:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._lines.close()
        if self._drawn is not None:
            self._drawn.close()

    def add(self, frame: Frame, result: Result, tracks: Sequence[int] | None) -> None:
        """tracks: of each object the number of its track, -1 for none."""
        objects = [{key: one[key] for key in one if key not in ("image_id", "file_name")} for one in result.to_coco()]
        for record, track in zip(objects, tracks or (), strict=tracks is not None):
            record["track_id"] = track
        line = {"frame": frame.number, "time": round(frame.time, 6), "objects": objects}
        self._lines.grow((json.dumps(line) + "\n").encode())
        self.frames, self.objects = self.frames + 1, self.objects + len(objects)
        if self.film_path is not None:
            picture = _picture(result, tracks)
            if self._drawn is None:
                self._drawn = _Drawn(self.film_path, self._film, picture.size)
            self._drawn.add(frame, picture)


def _picture(result: Result, tracks: Sequence[int] | None) -> Image.Image:
    """With the numbers of tracks behind the names, and a colour for each track in place of that for the class."""
    if tracks is None:
        return result.plot()
    assert result.pixels is not None, "a frame has its pixels"
    found = result.detections
    labels = torch.tensor([max(track, 0) for track in tracks], dtype=torch.long)
    names = {label: f"{name} {label}" for label, name in zip(labels.tolist(), result.names, strict=True)}
    called = [names.get(label, "") for label in range(int(labels.max()) + 1 if len(labels) else 0)]
    return draw_boxes(result.pixels, found.boxes_xyxy, labels, called, found.scores, found.rle)


def _sound_of(source: str) -> str:
    with opened(source) as container:
        return container.streams.audio[0].codec_context.name


class _Drawn:
    """A film that is being encoded, of pictures of (width, height) `size`, even numbers as encoders want them."""

    def __init__(self, path: Path, film: Film, size: tuple[int, int]) -> None:
        import av

        self.path, self._start, self._step = path, film.start, film.every / film.rate
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._output = av.open(str(part_of(path)), "w")
        except OSError as error:
            raise cannot_write(path, error) from error
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        rate = Fraction(film.rate).limit_denominator(1001)
        stream = self._output.add_stream(codec, rate=rate, options=_QUALITY if codec == "libx264" else {})
        assert isinstance(stream, av.VideoStream), "its codec is one of pictures"
        self._stream = stream
        self._stream.width, self._stream.height = (side - side % 2 or 2 for side in size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _TICKS)
        self._sound = _Sound(film, self._output) if film.sound else None
        self._last = -1

    def add(self, frame: Frame, picture: Image.Image) -> None:
        import av

        size = (self._stream.width, self._stream.height)
        if not all(0 <= own - side <= 1 for own, side in zip(picture.size, size, strict=True)):
            picture = picture.resize(size)  # a stream may change its size on the way
        pixels = np.asarray(picture.crop((0, 0, *size)))
        drawn = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self._last = drawn.pts = max(round((frame.time - self._start) * _TICKS), self._last + 1)
        drawn.time_base = Fraction(1, _TICKS)
        if self._sound is not None:
            self._sound.until(frame.time)
        self._mux(self._stream.encode(drawn))

    def _mux(self, packets: Any) -> None:
        try:
            self._output.mux(packets)
        except OSError as error:  # PyAV's are some, too
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        try:
            self._mux(self._stream.encode(None))
            if self._sound is not None:
                self._sound.until(self._start + self._last / _TICKS + self._step)
                self._sound.close()
        finally:
            self._output.close()
        part_of(self.path).replace(self.path)


class _Sound:
    """The sound of a film, as it is, moved to where the pictures begin."""

    def __init__(self, film: Film, output: Any) -> None:
        self._container = opened(film.source)
        source = self._container.streams.audio[0]
        self._stream = output.add_stream_from_template(source)
        self._output, self._base = output, float(source.time_base)
        pictures = self._container.streams.video[0]
        self._begin = float((pictures.start_time or 0) * (pictures.time_base or 0)) + film.start
        self._shift = round(self._begin / self._base)
        if film.start:
            self._container.seek(int(self._begin * 1e6))
        self._packets = self._container.demux(source)
        self._waiting: Any = None
        self._start = film.start

    def until(self, seconds: float) -> None:
        """Write what is heard until then."""
        import av

        end = self._begin + seconds - self._start
        while True:
            try:
                packet = self._waiting or next(self._packets)
            except (StopIteration, av.error.FFmpegError):
                return
            self._waiting = None
            if packet.dts is None:
                continue
            if packet.dts * self._base > end:
                self._waiting = packet
                return
            if packet.pts is not None and (packet.pts >= self._shift or not self._start):
                packet.pts, packet.dts = packet.pts - self._shift, packet.dts - self._shift
                packet.stream = self._stream
                self._output.mux(packet)

    def close(self) -> None:
        self._container.close()
