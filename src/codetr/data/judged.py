"""The records of a document that training would take, as records."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from codetr.data.checks import root_category, select_classes
from codetr.data.findings import Findings
from codetr.data.image_records import image_columns, judge_images
from codetr.data.judge import Judge, Record
from codetr.data.names import advice_on, find_files
from codetr.data.readers import Document
from codetr.data.values import whole

Records = list[Record]


def judged(document: Document, root: Path, findings: Findings) -> tuple[Records, Records, Records]:
    """Categories, images and annotations, with values and names of files of `root` as they are meant; what is wrong
    with the others goes into `findings`. Boxes are not clipped.

    Raises UserError where the categories make no sense.
    """
    categories, written = list(document["categories"]), list(document["images"])
    annotations = list(document["annotations"])
    root_at, used = root_category(categories), {whole(a.get("category_id")) for a in annotations}
    if root_at is not None and categories[root_at]["id"] not in used:
        del categories[root_at]
    names = select_classes(categories, None, findings.source)
    ids = np.array(list(names), np.int64)
    columns, broken = image_columns(written, ids, findings)
    images: dict[int, Record] = {}
    for image in judge_images(written):
        if not image.fault:
            images.setdefault(image.record["id"], image.record)
    _find_files(images, root, findings)
    judge = Judge(columns["image_ids"], columns["sizes"], broken, ids)
    objects = judge.judge_all(annotations)
    objects.tell(findings)
    for rule, why in judge.habits.found(list(names.values())).items():
        findings.add(rule, why)
    kept = [objects.records[i] for i in objects.good.nonzero()[0].tolist()]
    return categories, list(images.values()), [a for a in kept if a["image_id"] in images]


def _find_files(images: dict[int, Record], root: Path, findings: Findings) -> None:
    """Leave those images that have a file, by the name that it is found under."""
    names = {i: r["file_name"] for i, r in images.items()}
    files = find_files(root, names)
    for i, name in names.items():
        if i not in files:
            findings.add("missing image file", f"image {i} ({root / name}{advice_on(name)})")
            del images[i]
        elif files[i] != name:
            findings.add("image file of another spelling", f"image {i} ({name}) is {files[i]}")
            images[i] = images[i] | {"file_name": files[i]}
