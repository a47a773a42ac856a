"""The records of a document that training would take, as records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from codetr.data.checks import Report, root_category, select_classes
from codetr.data.image_records import image_columns
from codetr.data.names import advice_on, find_misspelt
from codetr.data.object_records import ObjectRecords
from codetr.data.readers import Document
from codetr.data.values import mended_image, mended_object, whole

Records = list[dict[str, Any]]


def judged(document: Document, root: Path, report: Report) -> tuple[Records, Records, Records]:
    """Categories, images and annotations, with values and names of files of `root` as they are meant; what is wrong
    with the others goes into `report`. Boxes are not clipped.

    Raises UserError where the categories make no sense.
    """
    categories, written = list(document["categories"]), list(document["images"])
    annotations = list(document["annotations"])
    root_at, used = root_category(categories), {whole(a.get("category_id")) for a in annotations}
    if root_at is not None and categories[root_at]["id"] not in used:
        del categories[root_at]
    names = select_classes(categories, None, report.source)
    ids = np.array(list(names), np.int64)
    columns, broken = image_columns(written, ids, report)
    images: dict[int, dict[str, Any]] = {}
    for record in (r | mended_image(r) for r in written):
        if repr(record.get("id")) not in broken and record["id"] not in images:
            images[record["id"]] = record
    _find_files(images, root, report)
    objects = ObjectRecords(columns, broken, ids, False, report)
    batch = objects.columns(annotations)
    first = np.zeros(len(batch.positions), bool)
    first[np.unique(batch.columns["id"], return_index=True)[1]] = True
    report.add_all("duplicate annotation id", ~first, lambda i: f"annotation {batch.columns['id'][i]}")
    kept = [annotations[i] | mended_object(annotations[i]) for i in batch.positions[first]]
    for kind, why in objects.habits.found(list(names.values())).items():
        report.add(kind, why)
    return categories, list(images.values()), [a for a in kept if a["image_id"] in images]


def _find_files(images: dict[int, dict[str, Any]], root: Path, report: Report) -> None:
    """Leaves those with a file."""
    missing = {i: r["file_name"] for i, r in images.items() if not (root / r["file_name"]).is_file()}
    found = find_misspelt(root, missing, (r["file_name"] for i, r in images.items() if i not in missing))
    for i, name in missing.items():
        if i in found:
            report.add("image file of another spelling", f"image {i} ({name}) is {found[i]}")
            images[i] = images[i] | {"file_name": found[i]}
        else:
            report.add("missing image file", f"image {i} ({root / name}{advice_on(name)})")
            del images[i]
