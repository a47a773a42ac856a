"""Annotation files of one format each, as records in the words of COCO.

A reader is any callable `read(annotations: Path) -> Document`; the setting `data.reader` names it:

    reader:
      _target_: codetr.data.readers.coco.read
      _partial_: true

Options of a reader are further keyword arguments there. Whatever a reader returns goes through the same checks
(`codetr.data.checks`) into the same table (`codetr.data.table`): a reader only translates. It raises UserError for what
no record can be blamed for (no file, not its format) and hands broken records on as they are, for the checks to name.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict


class Document(TypedDict):
    """What one split's annotations say; every part is a list, or a generator that is read once.

    categories: `id`, `name`, and where known LVIS' `frequency` ("r", "c", "f").
    images: `id`, `file_name` relative to the image folder, `width`, `height`, and where known LVIS' `neg_category_ids`
        and `not_exhaustive_category_ids`.
    annotations: `image_id`, `category_id`, `bbox` [x, y, width, height] in pixels, and where known `id`, `area`,
        `iscrowd`, `ignore`, `segmentation`.
    sources: the files whose content, and the folders whose entries, make a table of this document stale when they
        change; left out: the annotation file alone.

    An image or annotation may carry `where`, such as "a.xml, object 3": messages then name that place.
    """

    categories: Iterable[dict[str, Any]]
    images: Iterable[dict[str, Any]]
    annotations: Iterable[dict[str, Any]]
    sources: NotRequired[Iterable[Path]]


class Reader(Protocol):
    """Reads one annotation file, or what a folder holds where the format is made of many files."""

    def __call__(self, annotations: Path, /) -> Document: ...


def locate(root: str | Path, path: str) -> Path:
    """A path of the settings: below `root`, or from the working directory where only that exists."""
    below = Path(root, path)
    return Path(path) if Path(path).exists() and not below.exists() else below
