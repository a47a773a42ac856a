"""The ids that an annotation file gives to image files and classes: what judges of predictions go by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from codetr.data.checks import select_classes
from codetr.data.readers import coco
from codetr.errors import UserError


def image_ids(annotations: Path, paths: Sequence[Path]) -> list[int]:
    """The id of each image file in a COCO file: of the record whose `file_name` is the longest end of its path.

    Raises UserError for a path that no record fits, for records of one name, and for two paths of one record.
    """
    ids: dict[tuple[str, ...], int] = {}
    for image in coco.read(annotations)["images"]:
        name, number = image.get("file_name"), image.get("id")
        if not isinstance(name, str) or type(number) is not int:
            raise UserError(f"{annotations}: each image needs an integer `id` and a `file_name`, unlike {number!r}")
        if ids.setdefault(Path(name).parts, number) != number:
            raise UserError(f"{annotations}: two images have the file_name {name!r}; which one is meant?")
    owners: dict[int, Path] = {}
    for path in paths:
        parts = path.absolute().parts
        number = next((ids[parts[i:]] for i in range(len(parts)) if parts[i:] in ids), None)
        if number is None:
            raise UserError(f"annotations={annotations} has no image with the file_name of {path}")
        if number in owners:
            raise UserError(f"{owners[number]} and {path} are both image {number} of annotations={annotations}")
        owners[number] = path
    return list(owners)


def category_ids(annotations: Path, class_names: Sequence[str]) -> list[int]:
    """The id of each class in a COCO file, by its name. Raises UserError for a class that the file does not list."""
    ids = {name: i for i, name in select_classes(list(coco.read(annotations)["categories"]), None, annotations).items()}
    if unknown := [name for name in class_names if name not in ids]:
        raise UserError(f"annotations={annotations} has no category of the names {unknown}, which the checkpoint finds")
    return [ids[name] for name in class_names]
