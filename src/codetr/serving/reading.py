"""Bodies of requests to images, within limits of bytes, time and pixels."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator

from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from torch import Tensor

from codetr.data.images import pixels_of
from codetr.serving.limits import Refused

# Pillow knows many more, some through programs of the system.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


async def image_file(request: Request, max_bytes: int, seconds: float) -> bytes:
    """What a request brings: its whole body, or the one file of a form.

    Raises Refused for more than `max_bytes`, for what is not here after `seconds`, and for a form without a file.
    """
    try:
        async with asyncio.timeout(seconds):
            if request.headers.get("content-type", "").startswith("multipart/form-data"):
                return await _file_of_form(request, max_bytes)
            return b"".join([chunk async for chunk in _chunks(request, max_bytes)])
    except TimeoutError:
        raise Refused(408, f"the request was not here after {seconds:g} seconds") from None
    except ClientDisconnect:
        raise Refused(400, "the connection ended before the request did") from None


async def _chunks(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    count = int(request.headers.get("content-length", 0))
    if count <= max_bytes:
        count = 0
        async for chunk in request.stream():
            count += len(chunk)
            if count > max_bytes:
                break
            yield chunk
    if count > max_bytes:
        raise Refused(413, f"the request has more than {max_bytes:,} bytes, which is the most; send a smaller file")


async def _file_of_form(request: Request, max_bytes: int) -> bytes:
    try:
        form = await MultiPartParser(request.headers, _chunks(request, max_bytes), max_files=1, max_fields=0).parse()
    except MultiPartException as error:
        raise Refused(
            400, f"the form cannot be read ({error.message}); send one file, and everything else behind /predict?"
        ) from error
    files = [value for value in form.values() if isinstance(value, UploadFile)]
    if not files:
        raise Refused(400, "the form holds no file; send one, -F image=@photo.jpg")
    content = await files[0].read()
    await files[0].close()
    return content


def pixels_in(content: bytes, max_pixels: int) -> Tensor:
    """The image in a file, [3, H, W] uint8 RGB, with the pixels that `codetr predict` sees.

    Raises Refused for what is no image, for one of more than `max_pixels` pixels before it is decoded, and for one that
    does not decode.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(f"{image.width}x{image.height}", max_pixels)
            return pixels_of(image)
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large("far too many", max_pixels) from error
    except UnidentifiedImageError as error:
        raise Refused(422, f"this is no image of a kind that can be read here: {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble on
        raise Refused(422, f"the image cannot be decoded: {error or type(error).__name__}") from error


def _too_large(pixels: str, max_pixels: int) -> Refused:
    return Refused(413, f"the image has {pixels} pixels, and the most are {max_pixels:,}; send a smaller one")
