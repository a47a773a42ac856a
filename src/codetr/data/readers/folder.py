"""Image files alone: which there are, and how large they are. Annotated sets of loose files start here too."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from codetr.data.images import UnreadableImage, seen_size
from codetr.data.readers import Document
from codetr.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Named, when they lie among images to predict, instead of passed over. Pillow reads some of them.
_OTHERS = "heic heif avif jp2 j2k jxl jfif jpe tga ppm pgm pbm psd svg exr hdr dcm dng cr2 cr3 nef arw raw"
_VIDEOS = "mp4 m4v mov avi mkv webm wmv mpg mpeg"
_OTHER_SUFFIXES = {f".{kind}" for kind in f"{_OTHERS} {_VIDEOS}".split()}
_THREADS = 16
_WORTH_A_BAR = 2000

In = TypeVar("In")
Out = TypeVar("Out")


def read(annotations: Path) -> Document:
    """The images of a folder and of the folders in it, without objects and classes.

    Raises UserError when there is no image. What does not open is an image without a size, for the checks to name.
    """
    paths = images_below(annotations)
    if not paths:
        raise UserError(f"{annotations}: no image in this folder (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    sizes = in_threads(header, paths, "image sizes")
    images = [
        {"id": number, "file_name": path.relative_to(annotations).as_posix(), **size}
        for number, (path, size) in enumerate(zip(paths, sizes, strict=True), start=1)
    ]
    return {"categories": [], "images": images, "annotations": [], "sources": [annotations]}


def is_image(path: Path) -> bool:
    """Whether a file is an image, by its name; hidden files (such as the ._a.jpg of macOS) are none."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def images_below(folder: Path) -> list[Path]:
    """The image files in `folder` and the folders in it, sorted."""
    return sorted(p for p in folder.rglob("*") if is_image(p))


def find_images(patterns: str | Sequence[str]) -> list[Path]:
    """The files that each of `patterns` means, in their order, none twice: one file, the images of a folder (not of
    folders in it), sorted, or a glob, sorted. A folder's images that cannot be read, and videos, are among them.

    Raises UserError when a pattern means none.
    """
    every = [patterns] if isinstance(patterns, str) else patterns
    found = [path for pattern in every for path in _files_of(str(pattern))]
    if not found:
        raise UserError("images=[] names no image; give files, folders or patterns, images=[photos,'more/*.jpg']")
    once: dict[str, Path] = {}
    for path in found:
        once.setdefault(os.path.abspath(path), path)
    return list(once.values())


def _files_of(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        suffixes = IMAGE_SUFFIXES | _OTHER_SUFFIXES
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
        if not files:
            kinds = " ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(
                f"images={pattern}: no image in this folder (looked for {kinds}); see its subfolders with "
                f"images='{path}/**/*.jpg'"
            )
        return files
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    files = [p for p in files if p.is_file()]
    if not files:
        raise UserError(
            f"images={pattern}: no such file, and no file matches it as a pattern; give a file, a folder "
            "or a quoted pattern such as images='photos/*.jpg'"
        )
    return files


def header(path: Path) -> dict[str, int | str]:
    """`width` and `height` for an image's record; only `where`, with the reason, if the file does not open."""
    try:
        height, width = seen_size(path)
    except FileNotFoundError:
        return {"where": f"{path}: no such file"}
    except UnreadableImage as error:
        return {"where": str(error)}
    return {"width": width, "height": height}


def in_threads(read: Callable[[In], Out], items: Sequence[In], what: str) -> list[Out]:
    """`read` of all `items` in their order: files are waited for, not computed. Shows progress if there are many."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(progress(pool.map(read, items), len(items), what))


def progress(items: Iterator[Out], total: int, what: str) -> Iterator[Out]:
    """The same items, behind a bar on the terminal that is gone at the end, if there are many."""
    bar = Console(stderr=True)
    yield from track(items, f"Reading {what}", total, console=bar, transient=True, disable=total < _WORTH_A_BAR)
