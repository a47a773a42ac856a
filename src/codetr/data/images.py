"""Image files to uint8 RGB tensors, and the cheap question whether a file can be one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
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
# What shows an image of each EXIF orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RANGES = {"I": "0..65535", "F": "0..1 or 0..255"}  # of what has no depth
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags


_LIFTING = Lock()  # Pillow's limit is one for the whole process
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of half that limit: `max_pixels` is ours


class UnreadableImage(UserError):
    """An image file that cannot be decoded, or is not the image that the annotations describe.

    rule: which of `codetr.data.rules` it breaks.
    """

    rule = "unreadable image file"


@contextmanager
def opened(path: Path, max_pixels: int | None) -> Iterator[Image.Image]:
    """An image file, of which only the header is read. Raises ValueError for one of more than `max_pixels` pixels."""
    with _open(path) as image:
        _refuse_more(image, max_pixels)
        yield image


def _refuse_more(image: Image.Image, max_pixels: int | None) -> None:
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(
            f"it has {image.width}x{image.height} pixels, more than max_pixels={max_pixels}; give a larger one (in "
            "a data set: data.max_pixels) if such images are meant"
        )


def _open(path: Path) -> Image.Image:
    """`Image.open` without Pillow's limit on pixels, which one cannot set for one file, and which decodes nothing."""
    try:
        return Image.open(path)
    except Image.DecompressionBombError:
        pass
    with _LIFTING:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def read_image(
    path: Path, size: tuple[int, int], max_pixels: int | None = None, least: tuple[int, int] | None = None
) -> Tensor:
    """[3, H, W] uint8 RGB with channels-last strides, whatever the file holds (grey, palette, CMYK, alpha, 16 bit,
    floats: see `_to_rgb`).

    `size` is (height, width) as the annotations say. The EXIF orientation is applied, unless only the raster as
    stored has that size: then it is what was annotated.

    A JPEG of that size, in grey or RGB and not turned, goes through simplejpeg, libjpeg-turbo's shortest path to an
    array. Everything else, and every JPEG that is not flawless, is Pillow's, which also decides what is an error. Both
    give the same pixels.

    least: (height, width) that the image will be resized to. Such a JPEG may then come with a half, a quarter or an
    eighth of its rows and columns, rounded up, where these are still twice as many (see `factor_of`): libjpeg-turbo
    then computes fewer pixels, a little other than those of resizing.

    Raises UnreadableImage when the file does not decode, has another size, or more than
    `max_pixels` pixels (see `opened`): from its header, before anything is decoded.
    """
    try:
        factor = 1 if least is None else factor_of(size, least)
        plain = max_pixels is None or size[0] * size[1] <= max_pixels
        pixels = _decode_jpeg(path, size, factor) if plain else None
        if pixels is None:
            factor, pixels = 1, _decode(path, size, max_pixels)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble on
        raise unreadable(path, error) from error
    if pixels.shape[:2] != fraction(size, factor):
        raise _of_another_size(path, pixels.shape[1], pixels.shape[0], size)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def factor_of(size: tuple[int, int], least: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 of which a fraction of (height, width) `size` still is twice `least` or more.

    Twice: with fewer pixels the difference to resizing all of them grows to several levels (docs/log.md).
    """
    room = min(size[0] / least[0], size[1] / least[1]) / 2
    return max((factor for factor in (2, 4, 8) if factor <= room), default=1)


def decoded_factor(size: tuple[int, int], decoded: tuple[int, int]) -> int:
    """The factor at which an image of (height, width) `size` came from `read_image` with `decoded`."""
    return next(factor for factor in (1, 2, 4, 8) if fraction(size, factor) == decoded)


def fraction(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """(height, width) of `size` decoded at 1 / factor."""
    return -(-size[0] // factor), -(-size[1] // factor)


def _of_another_size(path: Path, width: int, height: int, size: tuple[int, int]) -> UnreadableImage:
    error = UnreadableImage(f"{path} holds {width}x{height} pixels, but the annotations say {size[1]}x{size[0]}")
    error.rule = "image of another size"
    return error


def unreadable(path: Path, error: Exception) -> UnreadableImage:
    """The error that names the file, which Pillow's own messages seldom do."""
    unknown = isinstance(error, UnidentifiedImageError)
    reason = "not an image of a kind that can be read here; convert it to JPEG or PNG" if unknown else str(error)
    result = UnreadableImage(f"{path} cannot be decoded: {reason or type(error).__name__}")
    if unknown and path.is_file() and path.stat().st_size == 0:
        result.rule = "empty image file"
    return result


def _decode_jpeg(path: Path, size: tuple[int, int], factor: int) -> np.ndarray | None:
    """[H / factor, W / factor, 3] uint8, or None for what is not an upright, plain JPEG of (height, width) `size`
    without a fault."""
    data = path.read_bytes()
    if not data.startswith(_JPEG):
        return None
    if _METADATA.search(data, 0, data.find(_SCAN)):
        with _open(path) as image:
            if orientation(image) != 1:
                return None
    try:
        *found, colors, _ = simplejpeg.decode_jpeg_header(data)
        if tuple(found) != size or colors not in _COLORS:
            return None
        height, width = fraction(size, factor)
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
    except ValueError:
        return None


def _decode(path: Path, size: tuple[int, int], max_pixels: int | None) -> np.ndarray:
    """[H, W, 3] uint8, the right way up. What is of another size either way is not decoded."""
    with opened(path, max_pixels) as image:
        if size not in (image.size, image.size[::-1]):
            raise _of_another_size(path, *image.size, size)
        turn = _TURNS.get(orientation(image))
        rgb = _to_rgb(image)
        turned = rgb if turn is None else rgb.transpose(turn)
        return np.array(turned if turned.size == size[::-1] else rgb)


def pixels_of(image: Image.Image, max_pixels: int | None = None) -> Tensor:
    """[3, H, W] uint8 RGB of a Pillow image, with the pixels and the strides that `read_image` gives to its file: the
    right way up by its EXIF orientation, whatever its mode.

    Raises ValueError for more than `max_pixels` pixels, and what Pillow raises where the image does not decode.
    """
    _refuse_more(image, max_pixels)
    turn = _TURNS.get(orientation(image))
    rgb = _to_rgb(image)
    return torch.from_numpy(np.array(rgb if turn is None else rgb.transpose(turn))).permute(2, 0, 1)


def orientation(image: Image.Image) -> int:
    """The orientation of EXIF: 2 to 8 for what has to be turned to be seen upright, else 1.

    Text, numbers out of range and damaged EXIF count as 1: viewers show such files as they are stored.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except OSError:  # of the pixels, which Pillow decodes to find the EXIF of a PNG
        raise
    except Exception:
        return 1
    return next((turn for turn in _TURNS if value == turn), 1)


def seen_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file as a viewer shows it: after the EXIF orientation, without decoding.

    Raises FileNotFoundError, and UnreadableImage for what does not open.
    """
    try:
        with _open(path) as image:
            width, height = image.size
            on_its_side = orientation(image) >= 5
    except FileNotFoundError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error
    return (width, height) if on_its_side else (height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB. Alpha is dropped, and 16 bit colour keeps its high bytes, as Pillow does it. Grey of more than 8 bits,
    which Pillow would clip, is scaled by its depth (see `_to_grey`)."""
    if image.mode[0] in "IF":
        image = Image.fromarray(_to_grey(image))
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_grey(image: Image.Image) -> np.ndarray:
    """[H, W] uint8 of integers of more than 8 bits, or of floats.

    Integers of 9 to 16 bits (a TIFF says how many) keep their 8 highest. Integers of 32 bits and floats say no range:
    integers up to 65,535 count as of 16 bits; floats up to 1 as from 0 to 1, up to 255 as from 0 to 255. Raises
    ValueError for other values, and for integers that are all so small that nothing but black would be left.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    top = {"F": 1 if high <= 1 else 255}.get(image.mode, 65535)
    if image.mode.startswith("I;16"):
        bits = tags.get(_BITS_PER_SAMPLE, 16)
        top = 2 ** int(bits[0] if isinstance(bits, tuple) else bits) - 1
    if not 0 <= low <= high <= top:  # also of what is not a number
        raise ValueError(f"it holds values from {low:g} to {high:g}; rescale them to {_RANGES[image.mode[0]]}")
    if image.mode != "F" and 0 < high <= top >> 8:
        raise ValueError(f"its values reach from {low} to {high} of {top}, which is black; rescale them to 0..{top}")
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        values = top - values
    if image.mode == "F":
        return np.rint(values * (255 / top)).astype(np.uint8)
    return (values.astype(np.int64) >> (top.bit_length() - 8)).astype(np.uint8)


def looks_complete(path: Path, size: tuple[int, int]) -> bool:
    """Whether header and last bytes are those of a whole JPEG or PNG of (height, width) `size`; never decodes.

    False does not prove that the file is bad: only `read_image` can tell.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            kind, (width, height) = image.format, image.size
            turned = size == (width, height) != (height, width) and orientation(image) >= 5
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL))
            tail = file.read()
    except Exception:  # as in `read_image`, which says what it is
        return False
    return (turned or size == (height, width)) and kind in _END and _END[kind] in tail
