"""COCO's results format, which its server takes and pycocotools and lvis-api read: of an evaluation, of one image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from codetr.evaluation.columns import Columns, Ragged, places, rle_of, xywh
from codetr.evaluation.engines import ranges_of
from codetr.files import atomically

FILES = {"bbox": "results_bbox.json", "segm": "results_segm.json"}
ABSENT = -1  # the category id of a class that the annotation file does not name
_CHUNK = 500  # detections that are records at once: Python's garbage collector goes through all that are there


def entries(
    image_ids: Iterable[int | str],
    category_ids: Iterable[int],
    scores: Iterable[float],
    boxes: np.ndarray | None,
    rle: Iterable[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Records of n detections: of boxes, [n, 4] xyxy pixels of the file, or of the compressed run lengths `rle`.

    Not of both at once: whoever finds a box in a record takes the area of a mask from it. Numbers keep all digits.
    """
    key = "bbox" if rle is None else "segmentation"
    if rle is not None:
        shapes: Iterable[Any] = ({"size": list(one["size"]), "counts": _text(one["counts"])} for one in rle)
    else:
        assert boxes is not None, "a record has a box or a mask"
        shapes = xywh(boxes.astype(float)).tolist()
    rows = zip(image_ids, category_ids, scores, shapes, strict=True)
    return [{"image_id": i, "category_id": c, key: shape, "score": score} for i, c, score, shape in rows]


def _text(counts: str | bytes) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def results(
    columns: Columns, masks: bool, category_ids: Sequence[int], names: Mapping[int, str], limit: int | None
) -> Iterator[list[dict[str, Any]]]:
    """What an evaluation was given, some images at a time, so that never all of it is there as records.

    category_ids: of the labels 0, 1, ...; detections of an ABSENT one are left out. names: of images whose ids are
    written as text (see `codetr.data.numbering.ids_as_text`). limit: the most detections of an image, the best ones of
    all classes together, as LVIS wants it.
    """
    every = [columns.found, columns.found_runs]
    ranges = list(ranges_of(np.cumsum([0, *columns.found.counts]), _CHUNK))
    known = np.array(category_ids, np.int64)
    for (first, last), found, runs in zip(ranges, *(own.parts(ranges) for own in every), strict=True):
        rows = found.rows
        category = known[rows[:, 5].astype(np.int64)]
        kept = category != ABSENT
        if limit is not None:
            kept &= places(found) < limit
        ids = [names.get(i, i) for i in np.repeat(columns.ids[first:last], found.counts)[kept].tolist()]
        rle = _kept(runs, found, columns.sizes[first:last], kept) if masks else None
        yield entries(ids, category[kept].tolist(), rows[kept, 4].tolist(), rows[kept, :4], rle)


def _kept(runs: Ragged, found: Ragged, sizes: np.ndarray, kept: np.ndarray) -> list[dict[str, Any]]:
    rle = rle_of(runs, found.counts, sizes)
    return [rle[i] for i in kept.nonzero()[0].tolist()]


def write(path: Path, parts: Iterable[list[dict[str, Any]]]) -> int:
    """All records as one list in the file `path`, which is there as a whole or as it was; how many there are.

    Raises UserError when there is no room for it.
    """
    count = 0
    with atomically(path) as part, part.open("wb") as file:
        file.write(b"[")
        for records in filter(None, parts):
            file.write(b",\n" * (count > 0) + orjson.dumps(records)[1:-1])
            count += len(records)
        file.write(b"]\n")
    return count
