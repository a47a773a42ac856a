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
from typing import Any, Protocol, TypedDict


class Document(TypedDict):
    """What one split's annotations say; every part is a list, or a generator that is read once, in any order.

    categories: `id`, `name`, and where known LVIS' `frequency` ("r", "c", "f"). images: `id`, `file_name` relative to
    the image folder, `width`, `height`, and where known LVIS' `neg_category_ids` and `not_exhaustive_category_ids`.
    annotations: `image_id`, `category_id`, `bbox` [x, y, width, height] in pixels, and where known `id`, `area`,
    `iscrowd`, `ignore`, `segmentation`. An image or annotation may carry `where`, such as "a.xml, object 3": messages
    then name that place in front of its ids.
    """

    categories: Iterable[dict[str, Any]]
    images: Iterable[dict[str, Any]]
    annotations: Iterable[dict[str, Any]]


class Reader(Protocol):
    """Reads one annotation file, or a folder or list of files where the format is made of many.

    sources (optional attribute): `sources(annotations) -> Iterable[Path]`, the files and folders whose change makes a
    table of them stale; by default `annotations` alone, and every file below it where it is a folder.
    """

    def __call__(self, annotations: Path, /) -> Document: ...
