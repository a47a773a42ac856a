"""Films: frames at their times, boxes in their pixels, annotated films with their sound, tracks, broken streams."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_inference import model

from codetr.errors import UserError
from codetr.inference import Result
from codetr.inference.film import Ahead, Film, is_film
from codetr.inference.film_outputs import FilmWriter, name_of
from codetr.inference.film_run import Tracks, watch
from codetr.types import Detections

av = pytest.importorskip("av", reason="not installed: codetr[video]")

RATE, COUNT, SIZE = 10, 30, (128, 96)  # frames per second, frames, (width, height)


def box_at(number: int) -> tuple[int, int, int, int]:
    """Of a white square that moves to the right."""
    return 8 + 2 * number, 20, 40 + 2 * number, 52


def film(path: Path, sound: bool = True) -> Path:
    """Three seconds, as a camera writes them: H.264, with a tone in AAC."""
    with av.open(str(path), "w") as output:
        pictures = output.add_stream("libx264", rate=RATE, options={"crf": "10", "g": "5"})
        pictures.width, pictures.height = SIZE
        pictures.pix_fmt = "yuv420p"
        tone = output.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number in range(COUNT):
            pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
            x0, y0, x1, y1 = box_at(number)
            pixels[y0:y1, x0:x1] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            output.mux(pictures.encode(frame))
        output.mux(pictures.encode(None))
        if tone is not None:
            wave = np.sin(np.arange(16000 * COUNT // RATE) / 5).astype(np.float32)
            for begin in range(0, len(wave), 1024):
                part = av.AudioFrame.from_ndarray(wave[None, begin : begin + 1024], format="fltp", layout="mono")
                part.sample_rate, part.pts, part.time_base = 16000, begin, Fraction(1, 16000)
                output.mux(tone.encode(part))
            output.mux(tone.encode(None))
    return path


def sound_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.dts is not None]


def run(out: Path, source: Path, track: bool = False, **given: Any) -> tuple[list[dict[str, Any]], str]:
    seen = Film(str(source), **given)
    with FilmWriter(out, seen, True, []) as writer:
        said = watch(model(), seen, writer, Tracks(seen.rate, 0.5) if track else None, 0.5, 4)
    return [json.loads(line) for line in writer.path.read_text().splitlines()], said


def test_every_frame_has_a_line_and_the_film_keeps_its_sound(tmp_path: Path) -> None:
    source = film(tmp_path / "film.mp4")
    lines, said = run(tmp_path / "out", source, track=True)
    assert [line["frame"] for line in lines] == list(range(COUNT))
    assert [line["time"] for line in lines] == pytest.approx([i / RATE for i in range(COUNT)], abs=1e-4)
    for i, line in enumerate(lines):
        (one,) = line["objects"]
        x0, y0, x1, y1 = box_at(i)
        assert one["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=4)
        assert one["category_name"] == "dog"
    assert len({one["track_id"] for line in lines for one in line["objects"]} - {-1}) == 1
    assert f"{COUNT} objects in {COUNT} frames" in said
    with av.open(str(tmp_path / "out" / "film.mp4")) as made:
        frames = list(made.decode(video=0))
        assert [frame.time for frame in frames] == pytest.approx([i / RATE for i in range(COUNT)], abs=0.02)
        assert max(frames[0].width, frames[0].height) == 512
        drawn = frames[3].to_ndarray(format="rgb24")
    colours = drawn.reshape(-1, 3).astype(int)
    assert (np.ptp(colours, axis=1) > 60).sum() > 200  # the frame of the box, on black and white
    original, kept = sound_of(source), sound_of(tmp_path / "out" / "film.mp4")
    assert len(original) > 20
    assert kept == original[: len(kept)]
    assert len(kept) >= len(original) - 2


def test_a_part_of_the_frames(tmp_path: Path) -> None:
    source = film(tmp_path / "film.mp4")
    lines, _ = run(tmp_path / "out", source, every=3, start=1.0, end=2.2)
    assert [line["frame"] for line in lines] == [10, 13, 16, 19]
    for line in lines:
        assert line["objects"][0]["bbox"][0] == pytest.approx(box_at(line["frame"])[0], abs=4)
    assert Film(str(source), every=3, start=1.0, end=2.2).total == 4
    with av.open(str(tmp_path / "out" / "film.mp4")) as made:
        assert [frame.time for frame in made.decode(video=0)] == pytest.approx([0, 0.3, 0.6, 0.9], abs=0.02)
    kept = sound_of(tmp_path / "out" / "film.mp4")
    assert kept
    assert set(kept) <= set(sound_of(source))


def test_a_film_that_breaks_off_leaves_what_was_seen(tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.mkv", sound=False)
    source = tmp_path / "film.mkv"
    source.write_bytes(whole.read_bytes()[: int(0.6 * whole.stat().st_size)])
    lines, _ = run(tmp_path / "out", source)
    assert 5 < len(lines) < COUNT
    with av.open(str(tmp_path / "out" / "film.mp4")) as made:
        assert len(list(made.decode(video=0))) == len(lines)


def test_an_error_of_the_decoder_ends_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = film(tmp_path / "film.mp4", sound=False)
    frames = Film._frames

    def breaks(self: Film) -> Any:
        for i, frame in enumerate(frames(self)):
            if i == 7:
                raise av.error.InvalidDataError(1094995529, "Invalid data found when processing input")
            yield frame

    monkeypatch.setattr(Film, "_frames", breaks)
    lines, said = run(tmp_path / "out", source)
    assert len(lines) == 7
    assert "broke off (" in said
    assert (tmp_path / "out" / "film.mp4").is_file()


def test_what_comes_too_fast_is_dropped_and_counted() -> None:
    def source() -> Any:
        for i in range(60):
            time.sleep(0.002)
            yield i

    hurried = Ahead(source(), size=4, drop=True)
    seen = []
    for batch in hurried.batches(2):
        time.sleep(0.02)
        seen += batch
    assert hurried.dropped > 10
    assert len(seen) + hurried.dropped == 60
    assert seen == sorted(seen)
    assert seen[-1] == 59
    patient = Ahead(source(), size=4)
    assert [len(batch) for batch in patient.batches(7)] == [7] * 8 + [4]
    assert patient.dropped == 0


def test_who_stops_early_stops_the_decoder_and_hears_its_errors() -> None:
    made: list[int] = []

    def endless() -> Any:
        while True:
            made.append(1)
            yield 1

    for _ in Ahead(endless(), size=3).batches(1):
        break
    count = len(made)
    time.sleep(0.3)
    assert len(made) == count

    def fails() -> Any:
        yield 1
        raise RuntimeError("of the decoder")

    with pytest.raises(RuntimeError, match="of the decoder"):
        list(Ahead(fails()).batches(1))


def test_tracks_keep_their_numbers_where_objects_cross() -> None:
    tracks = Tracks(30.0, 0.5)
    numbers = []
    for i in range(40):
        boxes = torch.tensor([[10.0 + 4 * i, 10, 40 + 4 * i, 40], [170.0 - 4 * i, 60, 200 - 4 * i, 90]])
        order = [0, 1] if i % 2 else [1, 0]
        found = Detections(torch.tensor([0.9, 0.8]), torch.zeros(2).long(), boxes[order])
        own = tracks.follow(Result(found, (100, 210), ["a"], [1]), i / 30)
        numbers.append([own[order.index(0)], own[order.index(1)]])
    assert numbers[5:] == [numbers[5]] * 35
    assert len(set(numbers[5])) == 2
    assert min(numbers[5]) >= 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"start": 2.0, "end": 1.0}, "start before end"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    source = film(tmp_path / "film.mp4", sound=False)
    with pytest.raises(UserError, match=words):
        Film(str(source), **given)
    with pytest.raises(UserError, match=r"absent\.mp4 cannot be opened as a film"):
        Film(str(tmp_path / "absent.mp4"))
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(UserError, match=r"text\.mp4 cannot be opened as a film"):
        Film(str(tmp_path / "text.mp4"))
    with pytest.raises(UserError, match="would be overwritten"):
        FilmWriter(tmp_path, Film(str(source)), True, [])


def test_what_a_film_is_called() -> None:
    assert [name_of(s) for s in ("0", "rtsp://a:b@host/x.mp4", "a/film.mov")] == ["camera_0", "stream", "film"]
    assert [is_film(s) for s in (0, "rtsp://host/x", "a.MP4", "photos", "a.jpg", ["a.mp4"])] == [True] * 3 + [False] * 3
