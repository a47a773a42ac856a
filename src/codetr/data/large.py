"""TIFF files that are too large to be decoded whole, or that Pillow does not know, read by windows with rasterio."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from codetr.data.geometry import Window
from codetr.data.images import UnreadableImage, opened, orientation

if TYPE_CHECKING:
    from codetr.views.view import Picture

SUFFIXES = {".tif", ".tiff"}
_CACHE = 64_000_000  # bytes of decoded blocks, which neighbouring windows share
_PHOTOMETRIC = 262  # a TIFF tag
_SEEN_AS_STORED = (1, 2, 3, 6)  # black is zero, RGB, palette, YCbCr
_STRIP = 2**21  # pixels, about as many of which `overview` reads at once


@dataclass(frozen=True)
class LargeTiff:
    """A `codetr.views.Picture` of a TIFF file, whose windows have at most `most` pixels (None: any number).

    Grey, palette, and the first three bands of any number, in 8 bits or in 16, of which the 8 highest are kept, as
    `codetr.data.images.read_image` does.
    """

    path: Path
    size: tuple[int, int]
    most: int | None
    zoom: float = 1.0

    @classmethod
    def of(cls, path: Path, most: int | None) -> LargeTiff:
        """Raises UnreadableImage for a file that cannot be read by windows: the reason says what to do."""
        if importlib.util.find_spec("rasterio") is None:
            raise _unreadable(path, "window by window needs rasterio: pip install 'codetr[tiff]'")
        _refuse_others(path)
        try:
            with _open(path) as file:
                rows, columns = max(file.block_shapes)
                if most is not None and rows * columns > most:
                    raise _unreadable(path, f"it is stored in blocks of {columns}x{rows} pixels, {_TILED}")
                if file.dtypes[0] not in ("uint8", "uint16"):
                    raise _unreadable(path, f"its values are {file.dtypes[0]}; rescale them to 8 or 16 bits")
                return cls(path, (file.height, file.width), most)
        except UnreadableImage:
            raise
        except Exception as error:  # whatever GDAL stumbles on
            raise _unreadable(path, str(error)) from error

    def read(self, window: Window) -> Tensor:
        top, left, height, width = window
        if self.most is not None and height * width > self.most:
            raise _unreadable(
                self.path,
                f"a view of it has {width}x{height} pixels, more than max_pixels={self.most}; views=tiles divides it "
                "(full=false, and tiles of fewer pixels)",
            )
        from rasterio.windows import Window as Part

        try:
            with _environment():
                pixels = self._file.read(self._bands, window=Part(left, top, width, height))
        except Exception as error:
            raise _unreadable(self.path, f"at row {top}, column {left}: {error}") from error
        if self._palette is not None:
            return torch.from_numpy(self._palette[pixels[0]]).permute(2, 0, 1)
        if pixels.dtype == np.uint16:
            pixels = (pixels >> self._surplus).astype(np.uint8)
        return torch.from_numpy(pixels).expand(3, -1, -1)

    @cached_property
    def _file(self) -> Any:
        """Stays open as long as this lives: what is decoded is shared by neighbouring windows."""
        return _opened(self.path)

    @cached_property
    def _bands(self) -> list[int]:
        return [1, 2, 3] if self._file.count >= 3 else [1]

    @cached_property
    def _palette(self) -> np.ndarray | None:
        """[256, 3] uint8."""
        from rasterio.enums import ColorInterp

        if self._file.colorinterp[0] != ColorInterp.palette:
            return None
        colours = self._file.colormap(1)
        return np.array([colours.get(i, (0, 0, 0))[:3] for i in range(256)], np.uint8)

    @cached_property
    def _surplus(self) -> int:
        """Bits of 16 that are dropped."""
        bits = self._file.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 16)
        return int(bits) - 8


_TILED = "each of which has to be decoded whole: store it in tiles, gdal_translate -co TILED=YES in.tif out.tif"


def _refuse_others(path: Path) -> None:
    """What Pillow's header says that rasterio does not."""
    try:
        with opened(path, None) as image:
            turned, kind = orientation(image) != 1, getattr(image, "tag_v2", {}).get(_PHOTOMETRIC, 1)
    except Exception:  # more bands than Pillow knows, say
        return
    if turned or kind not in _SEEN_AS_STORED:
        raise _unreadable(path, "window by window only upright images in RGB or grey can be read; convert it")


def _environment() -> Any:
    """Settings of GDAL: its cache, and no files beside the one that is opened."""
    import rasterio

    return rasterio.Env(GDAL_CACHEMAX=_CACHE, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR")


def _opened(path: Path) -> Any:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings(), _environment():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path, driver="GTiff")  # other formats' files may name further files


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        yield file


def _unreadable(path: Path, reason: str) -> UnreadableImage:
    return UnreadableImage(f"{path} cannot be decoded: {reason}")


def overview(picture: Picture, longest: int) -> tuple[Tensor, float]:
    """A picture in small, [3, h, w] uint8, no side of which has more than `longest` pixels, and how many of its pixels
    one of the picture is. Each is the mean of a square of the picture, which is read in strips."""
    height, width = picture.size
    factor = math.ceil(max(height, width) / longest)
    rows = max(1, _STRIP // (width * factor)) * factor
    strips = []
    for top in range(0, height, rows):
        strip = picture.read(Window(top, 0, min(rows, height - top), width))
        strips.append(avg_pool2d(strip.float(), factor, ceil_mode=True).round().byte())
    return torch.cat(strips, 1), 1 / factor
