"""The annotations of one split as columns in a file, mapped into the memory of every process that reads them.

No image and no object is a Python object: nothing is copied into worker processes, and nothing there is touched by a
reference count. Processes share the pages through the system's page cache.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_ALIGNMENT = 64


class Table:
    """n images with m objects, sorted by image, of k categories, as read-only arrays:

    image_ids: [n] int64.
    sizes: [n, 2] int32 (height, width).
    offsets: [n + 1] int64; the objects of image i are the rows offsets[i] to offsets[i + 1].
    boxes: [m, 4] float64 xyxy in pixels, not clipped.
    categories: [m] int32, positions in `category_ids`.
    crowd, ignore: [m] bool.
    areas: [m] float64.
    names, name_offsets: bytes, every file name with a zero behind it, and [n + 1].
    folders: bytes, the folders in these names, each once, with a zero behind it.
    segmentations, segmentation_offsets: bytes (see `codetr.data.segmentations`), and [m + 1]; empty in a table without
        masks.
    negative, not_exhaustive: LVIS' lists of categories per image, as positions; *_offsets: [n + 1]; empty in other
        sets.
    category_ids: [k] int64.
    counts: [k] objects that are neither crowd nor ignored.
    image_counts: [k] images with such an object.

    `category_names` has k strings, `frequencies` k of LVIS' letters r, c and f, or is None. A table travels to other
    processes as the name of its file.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    categories: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray
    areas: np.ndarray
    names: np.ndarray
    name_offsets: np.ndarray
    folders: np.ndarray
    segmentations: np.ndarray
    segmentation_offsets: np.ndarray
    negative: np.ndarray
    negative_offsets: np.ndarray
    not_exhaustive: np.ndarray
    not_exhaustive_offsets: np.ndarray
    category_ids: np.ndarray
    counts: np.ndarray
    image_counts: np.ndarray

    def __init__(self, path: Path, layout: Mapping[str, Any]) -> None:
        """Map the file `path`; `layout`: what `write` returned. Raises ValueError when they do not fit."""
        self.path, self.layout = path, layout
        self.category_names: tuple[str, ...] = tuple(layout["category_names"])
        self.frequencies: tuple[str, ...] | None = layout["frequencies"] and tuple(layout["frequencies"])
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != layout["size"]:
                raise ValueError(f"{size} bytes, not {layout['size']}")
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, (dtype, shape, offset) in layout["columns"].items():
            # Arrays proper, on the mapping: each slice of a numpy.memmap would be one, at ten times the price.
            column = np.frombuffer(pages, dtype, count=int(np.prod(shape)), offset=offset).reshape(shape)
            setattr(self, name, column)
        if self.offsets[-1] != len(self.boxes):
            raise ValueError(f"{self.offsets[-1]} objects, not {len(self.boxes)}")

    def __reduce__(self) -> Any:
        return Table, (self.path, self.layout)

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def has_masks(self) -> bool:
        return len(self.segmentation_offsets) > 0

    @property
    def is_federated(self) -> bool:
        """Whether images list the categories that were looked for, as in LVIS."""
        return len(self.negative_offsets) > 0

    def name(self, image: int) -> str:
        """The file of one image."""
        start, end = self.name_offsets[image : image + 2]
        return os.fsdecode(self.names[start : end - 1].tobytes())

    def names_from(self, image: int, count: int) -> list[str]:
        """The files of up to `count` images, in a fraction of the time that asking one by one takes."""
        ends = self.name_offsets[[image, min(image + count, len(self))]]
        return texts(self.names[slice(*ends)])


def texts(packed: np.ndarray) -> list[str]:
    """The texts that `packed` holds, each with a zero behind it."""
    return os.fsdecode(packed.tobytes()).split("\0")[:-1]


def write(
    path: Path, columns: Mapping[str, np.ndarray], category_names: list[str], frequencies: list[str] | None
) -> dict[str, Any]:
    """Write the columns of a `Table` to the file `path`; its layout, which JSON can hold."""
    places: dict[str, tuple[str, tuple[int, ...], int]] = {}
    with path.open("wb") as file:
        for name, column in columns.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            places[name] = (column.dtype.str, column.shape, file.tell())
            column.tofile(file)
        file.write(bytes(_ALIGNMENT))  # an empty column at the end lies within the file, too
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "columns": places, "category_names": category_names, "frequencies": frequencies}
