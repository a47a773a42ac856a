"""The ids that an annotation file gives to image files and classes: what judges of predictions go by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from codetr.data.checks import select_classes
from codetr.data.image_records import JudgedImage, judge_images
from codetr.data.names import advice_on, find_files
from codetr.data.readers import Reader, coco
from codetr.errors import UserError

_NAMED = 3  # of the files that are missing


class Listed(NamedTuple):
    """An image of an annotation file. id: as it is written there. size: (height, width)."""

    id: int | str
    size: tuple[int, int]


def listed_images(annotations: Path, folder: Path, absent: bool) -> dict[Path, Listed]:
    """The files below `folder` of all images of a COCO file, in its order; it needs no `annotations`.

    absent: whether files may be missing; they have the names of the file then.
    Raises UserError for a record that is none of an image, for two images of one id or of one file, for a folder that
    is none, and for missing files.
    """
    if not folder.is_dir():
        raise UserError(
            f"images={folder} is no folder: with annotations=FILE, which says which images are meant, give the folder "
            "in which they lie"
        )
    written = list(coco.read(annotations, annotated=False)["images"])
    judged = list(judge_images(written))
    if fault := next((f"{_called(one)}: {one.fault}" for one in judged if one.fault), None):
        raise UserError(f"annotations={annotations}: {fault}")
    names = {i: one.record["file_name"] for i, one in enumerate(judged)}
    files = find_files(folder, names)
    missing = [name for i, name in names.items() if i not in files]
    if missing and not absent:
        named = ", ".join(missing[:_NAMED]) + ", ..." * (len(missing) > _NAMED)
        raise UserError(
            f"{len(missing)} of {len(names)} images of annotations={annotations} are not in images={folder}: {named}"
            f"{advice_on(missing[0])}; give the folder in which they lie, or go on without them, on_error=skip"
        )
    listed: dict[Path, Listed] = {}
    ids: set[int] = set()
    for i, (own, one) in enumerate(zip(written, judged, strict=True)):
        path, record = folder / files.get(i, names[i]), one.record
        if path in listed or record["id"] in ids:
            what = f"the id {record['id']}" if record["id"] in ids else f"the file {path}"
            raise UserError(f"annotations={annotations}: two images have {what}; which one is meant?")
        ids.add(record["id"])
        listed[path] = Listed(_as_written(own, record), (record["height"], record["width"]))
    return listed


def _called(image: JudgedImage) -> str:
    return f"image {image.record.get('id')!r} ({image.record.get('file_name')!r})"


def _as_written(own: dict[str, Any], meant: dict[str, Any]) -> int | str:
    return own["id"] if isinstance(own["id"], str) else meant["id"]


def ids_as_text(annotations: Path, reader: Reader) -> dict[int, str]:
    """Of the images whose ids a file writes as text, "640": the number that is meant, and the text."""
    written = list(reader(annotations)["images"])
    pairs = zip(written, judge_images(written), strict=True)
    return {one.record["id"]: own["id"] for own, one in pairs if isinstance(own.get("id"), str) and not one.fault}


def category_ids(annotations: Path, class_names: Sequence[str]) -> list[int]:
    """The id of each class in a COCO file, by its name. Raises UserError for a class that the file does not list."""
    categories = list(coco.read(annotations, annotated=False)["categories"])
    ids = {name: i for i, name in select_classes(categories, None, annotations).items()}
    if unknown := [name for name in class_names if name not in ids]:
        raise UserError(f"annotations={annotations} has no category of the names {unknown}, which the checkpoint finds")
    return [ids[name] for name in class_names]
