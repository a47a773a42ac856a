"""Facts about image files, read by many threads: headers and ends of files, all of it only when asked for."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from codetr.data.images import UnreadableImage, looks_complete, opened, orientation, read_image

_THREADS = 16
_TAIL = 4096
_SUFFIXES = {"JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "PNG": (".png",), "BMP": (".bmp",), "WEBP": (".webp",)}
SUFFIXES = frozenset({s for names in _SUFFIXES.values() for s in names} | {".tif", ".tiff", ".gif"})


@dataclass(frozen=True, slots=True)
class File:
    """One image file. fault: (kind, what is wrong), or None; the rest is known where the header could be read.

    size: (width, height) of the raster as stored. orientation: EXIF's, 1 for upright. ending: hash of the last bytes.
    pixels: hash of the decoded image, where it was decoded.
    """

    path: Path
    fault: tuple[str, str] | None = None
    size: tuple[int, int] = (0, 0)
    type: str = ""
    mode: str = ""
    orientation: int = 1
    frames: int = 1
    length: int = 0
    ending: bytes = b""
    pixels: bytes = b""

    @property
    def misnamed(self) -> bool:
        suffix = self.path.suffix.lower()
        return suffix in SUFFIXES and self.type in _SUFFIXES and suffix not in _SUFFIXES[self.type]


def examine(
    wanted: Iterable[tuple[Path, tuple[int, int]]], decode: bool, max_pixels: int | None = None
) -> Iterator[File]:
    """Facts of each (path, (width, height) as annotated), in their order; decode: read all of every file.
    max_pixels: of an image, see `images.opened`."""
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(lambda w: _examine(w[0], w[1], decode, max_pixels), wanted)


def _examine(path: Path, size: tuple[int, int], decode: bool, max_pixels: int | None) -> File:
    try:
        length = path.stat().st_size
        if path.is_dir():
            return File(path, ("unreadable image file", "is a folder"))
        if length == 0:
            return File(path, ("empty image file", "has 0 bytes"), length=0)
        with path.open("rb") as stream, opened(path, max_pixels) as image:
            turn = _orientation(image, size)
            facts = (image.size, image.format or "", image.mode, turn, getattr(image, "n_frames", 1), length)
            stream.seek(max(0, length - _TAIL))
            ending = _hash(stream.read())
    except (FileNotFoundError, NotADirectoryError):
        return File(path, ("missing image file", "does not exist"))
    except UnidentifiedImageError:
        return File(path, ("unreadable image file", "is not an image"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return File(path, ("unreadable image file", f"cannot be read: {error}"))
    fault, pixels = _content(path, size, facts[0], turn, decode, max_pixels)
    return File(path, fault, *facts, ending, pixels)


def _orientation(image: Image.Image, size: tuple[int, int]) -> int:
    """EXIF's; Pillow decodes all of a PNG to look for one behind the pixels, which is done only where it decides."""
    if image.format == "PNG" and "exif" not in image.info and image.size == size:
        return 1
    return orientation(image)


def _content(
    path: Path,
    size: tuple[int, int],
    stored: tuple[int, int],
    orientation: int,
    decode: bool,
    max_pixels: int | None,
) -> tuple[tuple[str, str] | None, bytes]:
    """What is wrong with a file whose header is good; hash of the pixels, if they had to be read."""
    width, height = size
    shown = stored[::-1] if orientation >= 5 else stored
    if size not in (stored, shown):
        turned = ": width and height are swapped" if size == stored[::-1] else ""
        return ("image of another size", f"holds {stored[0]}x{stored[1]} pixels, not {width}x{height}{turned}"), b""
    if not decode and looks_complete(path, (height, width)):
        return None, b""
    try:
        pixels = read_image(path, (height, width), max_pixels)
    except UnreadableImage as error:
        return ("unreadable image file", str(error).removeprefix(f"{path} ")), b""
    return None, _hash(pixels.numpy().tobytes())


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _hash_file(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest()


def same_content(files: Sequence[File]) -> list[list[int]]:
    """Groups of positions in `files` whose bytes, or whose decoded pixels where known, are the same.

    Whole files are only read where length and last bytes agree.
    """
    likely = _groups([(f.length, f.ending) if f.ending else None for f in files])
    suspects = sorted({f for group in likely for f in group})
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = dict(zip(suspects, pool.map(lambda i: _hash_file(files[i].path), suspects), strict=True))
    keys = [f.pixels or digests.get(i) for i, f in enumerate(files)]
    return _groups(keys)


def _groups(keys: Sequence[object]) -> list[list[int]]:
    found: dict[object, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        if key:
            found[key].append(i)
    return [members for members in found.values() if len(members) > 1]
