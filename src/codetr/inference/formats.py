"""Detections in further formats, beside predictions.json: CSV, YOLO's and Pascal VOC's labels, Parquet, crops."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
import yaml

from codetr.data.geometry import Window
from codetr.data.writers import voc_xml, yolo_box
from codetr.errors import UserError
from codetr.files import atomically, cannot_write
from codetr.inference.growing import Growing
from codetr.inference.result import Result
from codetr.names import tags

COLUMNS = ("image_id", "file_name", "category_id", "category_name", "score", "x_min", "y_min", "x_max", "y_max")
_GROUP = 100_000  # rows of Parquet that are in memory at once


class Format(Protocol):
    """Files of one kind, made with the folder of the run, and the names of all its images below their common folder.

    targets: files that it may write over. Raises UserError where it cannot be written.
    """

    targets: Sequence[Path]

    def __init__(self, out: Path, names: Sequence[Path]) -> None: ...

    def add(self, result: Result, image_id: int | str, name: Path) -> None: ...

    def close(self) -> None:
        """Behind the last image, or where an error ends the run."""
        ...


def rows(result: Result, image_id: int | str, name: Path) -> list[tuple[Any, ...]]:
    """Of each detection the values of COLUMNS, corners in pixels of the file; best first."""
    found = result.detections
    parts = zip(found.labels.tolist(), found.scores.tolist(), found.boxes_xyxy.tolist(), strict=True)
    file = name.as_posix()
    return [
        (image_id, file, result.category_ids[label], result.class_names[label], score, *box)
        for label, score, box in parts
    ]


class Csv:
    """predictions.csv, a row for every detection."""

    def __init__(self, out: Path, names: Sequence[Path]) -> None:
        self.targets: Sequence[Path] = [out / "predictions.csv"]
        self._file: Growing | None = None

    def add(self, result: Result, image_id: int | str, name: Path) -> None:
        if self._file is None:
            self._file = Growing(self.targets[0], _lines([COLUMNS]))
        self._file.grow(_lines(rows(result, image_id, name)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _lines(table: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue().encode()


class Parquet:
    """predictions.parquet, the same columns, written in groups of rows: for millions of detections."""

    def __init__(self, out: Path, names: Sequence[Path]) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError("formats=[parquet] needs pyarrow: pip install 'codetr[parquet]'")
        self.targets: Sequence[Path] = [out / "predictions.parquet"]
        self._partial = out / f".predictions.parquet.{os.getpid()}.part"
        self._waiting: list[tuple[Any, ...]] = []
        self._writer: Any = None

    def add(self, result: Result, image_id: int | str, name: Path) -> None:
        if self._writer is None:
            self._open(textual=isinstance(image_id, str))
        self._waiting += rows(result, image_id, name)
        if len(self._waiting) >= _GROUP:
            self._write()

    def _open(self, textual: bool) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        kinds = (pa.string() if textual else pa.int64(), pa.string(), pa.int64(), pa.string(), *[pa.float32()] * 5)
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._writer = ParquetWriter(self._partial, pa.schema(list(zip(COLUMNS, kinds, strict=True))))
        except OSError as error:
            raise cannot_write(self.targets[0], error) from error

    def _write(self) -> None:
        import pyarrow as pa

        columns = list(zip(*self._waiting, strict=True)) or [()] * len(COLUMNS)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, self._writer.schema, strict=True)]
        try:
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._writer.schema))
        except OSError as error:
            raise cannot_write(self.targets[0], error) from error
        self._waiting = []

    def close(self) -> None:
        if self._writer is None:
            return
        self._write()
        try:
            self._writer.close()
            self._partial.replace(self.targets[0])
        except OSError as error:
            raise cannot_write(self.targets[0], error) from error


class Yolo:
    """yolo/labels/NAME.txt, boxes as labels of a data set, without scores; yolo/data.yaml names the classes."""

    def __init__(self, out: Path, names: Sequence[Path]) -> None:
        self._files = _by_stem(out / "yolo" / "labels", names, ".txt", "yolo")
        self._settings = out / "yolo" / "data.yaml"
        self.targets: Sequence[Path] = [*self._files.values(), self._settings]
        self._named = False

    def add(self, result: Result, image_id: int | str, name: Path) -> None:
        if not self._named:
            about = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(result.class_names))}
            _write(self._settings, yaml.safe_dump(about, sort_keys=False, allow_unicode=True))
            self._named = True
        size = {"height": result.size[0], "width": result.size[1]}
        boxes = zip(result.labels.tolist(), result.to_coco(), strict=True)
        _write(self._files[name], "".join(f"{label} {yolo_box(one['bbox'], size)}\n" for label, one in boxes))

    def close(self) -> None:
        pass


class Voc:
    """voc/NAME.xml, annotations of Pascal VOC, without scores."""

    def __init__(self, out: Path, names: Sequence[Path]) -> None:
        self._files = _by_stem(out / "voc", names, ".xml", "voc")
        self.targets: Sequence[Path] = [*self._files.values()]

    def add(self, result: Result, image_id: int | str, name: Path) -> None:
        classes = dict(zip(result.category_ids, result.class_names, strict=True))
        size = {"height": result.size[0], "width": result.size[1]}
        with atomically(self._files[name]) as part:
            voc_xml(name.name, size, result.to_coco(), classes).write(part, encoding="utf-8")

    def close(self) -> None:
        pass


class Crops:
    """crops/LABEL_CLASS/NAME_i.jpg: what the box of each detection shows, the best of an image as 0."""

    def __init__(self, out: Path, names: Sequence[Path]) -> None:
        self._folder = out / "crops"
        self.targets: Sequence[Path] = [*self._folder.rglob("*")]

    def add(self, result: Result, image_id: int | str, name: Path) -> None:
        if not len(result):
            return
        picture, called = result.picture(), tags(result.class_names)
        height, width = result.size
        for i, (label, (x0, y0, x1, y1)) in enumerate(
            zip(result.labels.tolist(), result.boxes_xyxy.tolist(), strict=True)
        ):
            left, top = min(max(int(x0), 0), width - 1), min(max(int(y0), 0), height - 1)
            right, bottom = min(max(round(x1), left + 1), width), min(max(round(y1), top + 1), height)
            pixels = picture.read(Window(top, left, bottom - top, right - left))
            folder = self._folder / f"{label}_{called[result.class_names[label]]}"
            with atomically(folder / name.with_name(f"{name.stem}_{i}.jpg")) as part:
                PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(part, quality=95)

    def close(self) -> None:
        pass


def _by_stem(folder: Path, names: Sequence[Path], suffix: str, what: str) -> dict[Path, Path]:
    """A file in `folder` for each name. Raises UserError for two images that would share one."""
    found: dict[str, Path] = {}
    for name in names:
        other = found.setdefault(str(name.with_suffix("")).casefold(), name)
        if other != name:
            raise UserError(f"formats=[{what}]: {other} and {name} would share a file of labels: rename one of them")
    return {name: folder / name.with_suffix(suffix) for name in names}


def _write(path: Path, text: str) -> None:
    with atomically(path) as part:
        part.write_text(text, encoding="utf-8")


FORMATS: dict[str, type[Format]] = {"csv": Csv, "yolo": Yolo, "voc": Voc, "parquet": Parquet, "crops": Crops}


def made(names: Sequence[str], out: Path, images: Sequence[Path]) -> list[Format]:
    """names: of formats. images: names of the images, none twice. Raises UserError for a format that there is not."""
    if wrong := [name for name in names if name not in FORMATS]:
        raise UserError(f"formats={list(names)}: {wrong[0]} is none of {', '.join(FORMATS)}")
    return [FORMATS[name](out, images) for name in names]
