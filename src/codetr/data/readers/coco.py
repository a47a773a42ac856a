"""COCO instances files and their kin: LVIS v1 and Objects365 v2."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from codetr.data.readers import Document
from codetr.data.readers.json_stream import read_pieces, scan_lists
from codetr.errors import UserError

_LISTS = ("images", "annotations", "categories")
_WHOLE = 8 << 20  # bytes; smaller files are read at once, with Python's precise messages
_PIECE = 1 << 16  # larger ones take twice as long: their records leave the caches of the processor


def read(
    annotations: Path,
    *,
    name_parts: int | None = None,
    annotated: bool = True,
    whole: int = _WHOLE,
    piece: int = _PIECE,
) -> Document:
    """Files above `whole` bytes are decoded `piece` bytes at a time, as they are iterated over.

    name_parts: how many parts of a file name count, from its end; None: all. Objects365 v2 names
    images/v2/patch16/objects365_v2_00908726.jpg what lies in patch16 of its folder of a split: 2. An image without
    `file_name` has that of the last two parts of its `coco_url`, as LVIS v1 needs: train2017/000000391895.jpg.

    annotated: False takes a file without `annotations`, too, such as COCO's image_info_test-dev2017.json.

    Raises UserError when there is no such file, or it is not JSON, or not COCO.
    """
    try:
        small = annotations.stat().st_size <= whole
        document = _read_whole(annotations) if small else _read_pieces(annotations, piece)
    except FileNotFoundError as error:
        raise UserError(f"annotation file {annotations} does not exist: check the paths under `data`") from error
    except OSError as error:
        raise UserError(f"annotation file {annotations} cannot be read: {error.strerror}") from error
    if not annotated:
        document.setdefault("annotations", [])
    if wrong := [k for k in _LISTS if k not in document]:
        raise UserError(f"{annotations} is not a COCO instances file: no list of objects under {', '.join(wrong)}")
    return Document(
        categories=document["categories"],
        images=(_with_file_name(image, name_parts) for image in document["images"]),
        annotations=document["annotations"],
    )


def _read_whole(path: Path) -> dict[str, Iterable[Any]]:
    """Those of the three lists that are lists of objects."""
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): give a COCO instances file") from error
    if not isinstance(document, dict):
        return {}
    return {k: v for k in _LISTS if isinstance(v := document.get(k), list) and all(isinstance(r, dict) for r in v)}


def _read_pieces(path: Path, piece: int) -> dict[str, Iterable[Any]]:
    return {key: _records(path, key, spans) for key, spans in scan_lists(path, piece).items()}


def _records(path: Path, key: str, spans: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for records in read_pieces(path, spans):
        if not all(isinstance(r, dict) for r in records):
            raise UserError(f"{path} is not a COCO instances file: no list of objects under {key}")
        yield from records


def _with_file_name(image: dict[str, Any], parts: int | None) -> dict[str, Any]:
    name, url = image.get("file_name"), image.get("coco_url")
    if name is None and isinstance(url, str):
        return {**image, "file_name": "/".join(url.split("/")[-2:])}
    if parts is not None and isinstance(name, str):
        return {**image, "file_name": "/".join(name.split("/")[-parts:])}
    return image
