"""TIFF files read window by window: the pixels of reading them whole, and no more memory than a window takes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codetr.data.geometry import Window
from codetr.data.images import UnreadableImage, read_image, seen_size
from codetr.data.large import LargeTiff, overview
from codetr.errors import UserError
from codetr.inference.result import Result
from codetr.types import Detections
from codetr.views import Pixels

rasterio = pytest.importorskip("rasterio", reason="not installed: codetr[tiff]")

HEIGHT, WIDTH = 90, 130
WINDOWS = [(0, 0, HEIGHT, WIDTH), (0, 0, 16, 16), (13, 40, 50, 33), (HEIGHT - 7, WIDTH - 5, 7, 5)]


def write(path: Path, pixels: np.ndarray, **more: Any) -> Path:
    """pixels: [bands, H, W]."""
    bands, height, width = pixels.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        about = {"driver": "GTiff", "count": bands, "height": height, "width": width, "dtype": pixels.dtype} | more
        palette = about.pop("palette", None)
        with rasterio.open(path, "w", **about) as file:
            if palette is not None:
                file.write_colormap(1, {i: tuple(row) for i, row in enumerate(palette.tolist())})
            file.write(pixels)
    return path


def drawn(bands: int, dtype: type = np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(bands).integers(0, top, (bands, HEIGHT, WIDTH), dtype, endpoint=True)


ONE_STRIP = {"photometric": "rgb", "blockysize": HEIGHT}
TILED = {"tiled": True, "blockxsize": 32, "blockysize": 16}
KINDS = {
    "RGB in tiles": (drawn(3), {**TILED, "photometric": "rgb", "compress": "deflate"}),
    "RGB in strips": (drawn(3), {"photometric": "rgb", "interleave": "pixel", "compress": "lzw"}),
    "grey": (drawn(1), TILED),
    "grey of 16 bits": (drawn(1, np.uint16), TILED),
    "alpha": (drawn(4), {**TILED, "photometric": "rgb", "alpha": "yes"}),
    "palette": (
        drawn(1) // 16,
        {**TILED, "photometric": "palette", "palette": np.random.default_rng(1).integers(0, 256, (16, 3))},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_windows_show_what_reading_the_whole_shows(tmp_path: Path, kind: str) -> None:
    pixels, more = KINDS[kind]
    path = write(tmp_path / "a.tif", pixels, **more)
    expected = read_image(path, seen_size(path))
    picture = LargeTiff.of(path, most=None)
    assert picture.size == (HEIGHT, WIDTH)
    for top, left, height, width in WINDOWS:
        part = picture.read(Window(top, left, height, width))
        assert torch.equal(part, expected[:, top : top + height, left : left + width])


def test_bands_that_pillow_does_not_know(tmp_path: Path) -> None:
    pixels = drawn(7, np.uint16)
    path = write(tmp_path / "a.tif", pixels, **TILED)
    with pytest.raises(UnreadableImage):
        seen_size(path)
    part = LargeTiff.of(path, None).read(Window(3, 4, 20, 30))
    assert np.array_equal(part.numpy(), (pixels[:3, 3:23, 4:34] >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("pixels", "more", "most", "words"),
    [
        (drawn(1).astype(np.float32), {}, None, "its values are float32"),
        (drawn(3), {**ONE_STRIP, "compress": "deflate"}, 5000, "blocks of 130x90 pixels.*TILED=YES"),
    ],
)
def test_what_cannot_be_read_so_is_named(
    tmp_path: Path, pixels: np.ndarray, more: dict[str, Any], most: int | None, words: str
) -> None:
    path = write(tmp_path / "a.tif", pixels, **more)
    with pytest.raises(UserError, match=rf"a\.tif cannot be decoded: .*{words}"):
        LargeTiff.of(path, most)


def test_turned_damaged_and_too_large_ones_are_named(tmp_path: Path) -> None:
    turned = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    turned.save(tmp_path / "turned.tif", tiffinfo={274: 6})
    with pytest.raises(UserError, match=r"turned\.tif .*upright"):
        LargeTiff.of(tmp_path / "turned.tif", None)
    path = write(tmp_path / "a.tif", drawn(3), photometric="rgb", **TILED)
    with pytest.raises(UserError, match=r"more than max_pixels=1000; views=tiles"):
        LargeTiff.of(path, 1000).read(Window(0, 0, 40, 40))
    (tmp_path / "half.tif").write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"half\.tif cannot be decoded"):
        LargeTiff.of(tmp_path / "half.tif", None).read(Window(60, 60, 30, 30))


@pytest.mark.parametrize("longest", [130, 65, 50, 7])
def test_an_overview_has_the_mean_of_squares(longest: int) -> None:
    image = torch.from_numpy(drawn(3))
    small, scale = overview(Pixels(image), longest)
    factor = round(1 / scale)
    assert max(small.shape[1:]) <= longest
    assert (factor - 1) * longest < WIDTH
    means = [
        image[:, y : y + factor, x : x + factor].double().mean((1, 2))
        for y in range(0, HEIGHT, factor)
        for x in range(0, WIDTH, factor)
    ]
    expected = torch.stack(means, 1).view(small.shape)
    assert (small.double() - expected).abs().max() <= 0.5 + 1e-4


def test_a_large_one_is_drawn_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codetr.inference.result.MAX_PIXELS", 5000)
    monkeypatch.setattr("codetr.inference.result._LONGEST", 65)
    path = write(tmp_path / "a.tif", drawn(3), photometric="rgb", **TILED)
    found = Detections(torch.ones(1), torch.zeros(1).long(), torch.tensor([[20.0, 20.0, 80.0, 60.0]]))
    picture = Result(found, (HEIGHT, WIDTH), ["a"], [1], path).plot()
    assert picture.size == (512, round(512 * 45 / 65))


SCRIPT = """
import sys
import torch
from torchvision.transforms import v2
from codetr.data.large import LargeTiff
from codetr.types import Detections
from codetr.views import Eye, Tiles

def find(batch):
    found = []
    for image in batch.images:
        bright = image[0] > 127
        rows, columns = bright.nonzero(as_tuple=True)
        boxes = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]] if len(rows) else []
        boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
        found.append(Detections(torch.ones(len(boxes)), torch.zeros(len(boxes)).long(), boxes))
    return [{"main": one} for one in found]

def peak():  # of this process alone, in MiB
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024

def look(path, size):
    eye = Eye(find, v2.Identity(), 32, torch.device("cpu"))
    (found,) = Tiles(size=512)(eye, [LargeTiff.of(path, 80_000_000)])
    return found["main"]

look(sys.argv[1], 512)
before = peak()
found = look(sys.argv[2], 512)
print(peak() - before)
print(sorted(tuple(map(int, box)) for box in found.boxes_xyxy.tolist()))
"""


@pytest.mark.slow
def test_memory_is_that_of_tiles_whatever_the_size(tmp_path: Path) -> None:
    """10,000 x 10,000 pixels, 286 MiB, in a process that takes no more than GDAL's cache and a few tiles on top of what
    it takes for 600 x 600."""
    small = write(tmp_path / "small.tif", np.zeros((3, 600, 600), np.uint8), photometric="rgb", **TILED)
    side, boxes = (
        10_000,
        [(100, 200, 160, 280), (4990, 5100, 5100, 5190), (300, 8000, 900, 9700), (9900, 9900, 10_000, 10_000)],
    )
    large = tmp_path / "large.tif"
    about = {"driver": "GTiff", "count": 3, "height": side, "width": side, "dtype": np.uint8, "compress": "deflate"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(large, "w", tiled=True, blockxsize=256, blockysize=256, photometric="rgb", **about) as file:
            for x0, y0, x1, y1 in boxes:
                window = rasterio.windows.Window(x0, y0, x1 - x0, y1 - y0)
                file.write(np.full((3, y1 - y0, x1 - x0), 255, np.uint8), window=window)
    command = [sys.executable, "-c", SCRIPT, small, large]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "32768",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # docs/predict.md
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    more, found = done.stdout.splitlines()
    assert found == str(sorted(boxes))
    assert float(more) < 110, f"{more} MiB more"
