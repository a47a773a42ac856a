"""Image files to uint8 RGB tensors, and the cheap question whether a file can be one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor

from codetr.errors import UserError

# What the last bytes of a complete file hold; some cameras append a little padding, hence the search window.
_END = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL = 4096
_ORIENTATION = 0x0112  # the EXIF tag
_JPEG = b"\xff\xd8"
_SCAN = b"\xff\xda"  # where the pixels begin
# Segments of metadata that may tell an orientation, or hold another JPEG whose scan comes before such a segment.
_METADATA = re.compile(rb"\xff[\xe1-\xed\xef]|JFXX")
_COLORS = ("YCbCr", "RGB", "Gray")  # others are inks, or cannot be shown


class UnreadableImage(UserError):
    """An image file that cannot be decoded, or is not the image that the annotations describe."""


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """[3, H, W] uint8 RGB with channels-last strides, whatever the file holds (grey, palette, CMYK, alpha, 16 bit).

    `size` is (height, width) as the annotations say. The EXIF orientation is applied, unless only the raster as
    stored has that size: then it is what was annotated.

    A JPEG of that size, in grey or RGB and not turned, goes through simplejpeg, libjpeg-turbo's shortest path to an
    array. Everything else, and every JPEG that is not flawless, is Pillow's, which also decides what is an error. Both
    give the same pixels. Raises UnreadableImage when the file does not decode or has another size.
    """
    try:
        pixels = _decode_jpeg(path, size)
        if pixels is None:
            pixels = _decode(path, size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path} cannot be decoded: {error}") from error
    if pixels.shape[:2] != size:
        raise UnreadableImage(
            f"{path} holds {pixels.shape[1]}x{pixels.shape[0]} pixels, but the annotations say {size[1]}x{size[0]}"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(path: Path, size: tuple[int, int]) -> np.ndarray | None:
    """[H, W, 3] uint8, or None for what is not an upright, plain JPEG of (height, width) `size` without a fault."""
    data = path.read_bytes()
    if not data.startswith(_JPEG):
        return None
    if _METADATA.search(data, 0, data.find(_SCAN)):
        with Image.open(path) as image:
            if _orientation(image) != 1:
                return None
    try:
        *found, colors, _ = simplejpeg.decode_jpeg_header(data)
        return simplejpeg.decode_jpeg(data) if tuple(found) == size and colors in _COLORS else None
    except ValueError:
        return None


def _decode(path: Path, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8, the right way up."""
    with Image.open(path) as image:
        turned = _orientation(image) != 1 and ImageOps.exif_transpose(image)
        return _to_rgb(turned if turned and turned.size == size[::-1] else image)


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(_ORIENTATION, 1)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8; 16 bit grey is scaled, which Pillow would clip."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def looks_complete(path: Path, size: tuple[int, int]) -> bool:
    """Whether header and last bytes are those of a whole JPEG or PNG of (height, width) `size`; never decodes.

    False does not prove that the file is bad: only `read_image` can tell.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            kind, (width, height) = image.format, image.size
            turned = size == (width, height) != (height, width) and _orientation(image) >= 5
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL))
            tail = file.read()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return (turned or size == (height, width)) and kind in _END and _END[kind] in tail
