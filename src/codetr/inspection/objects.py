"""Faults of annotation records, as training judges them, and what shows only when records are compared."""

from __future__ import annotations

import numpy as np

from codetr.data.judge import Judge
from codetr.data.rules import BOX_RULES, RULES
from codetr.inspection.split import Split


def inspect_objects(split: Split) -> None:
    """Judges the annotations, which become what they mean; images are inspected before."""
    names = {c["id"]: str(c.get("name")) for c in split.categories if type(c.get("id")) is int}
    sizes = np.array([split.size(i)[::-1] for i in split.usable.values()], np.int64).reshape(-1, 2)
    broken = {repr(image.get("id")) for image in split.images}
    ids = np.array(list(split.usable), np.int64)
    judge = Judge(ids, sizes, broken, np.array(list(names), np.int64))
    judged = judge.judge_all(split.annotations)
    split.annotations = list(judged.records)
    boxes = judged.boxes.tolist()
    numbered = ~judged.broken[BOX_RULES[0]] & (judged.owner >= 0)
    split.boxes = {i: (boxes[i][0], boxes[i][1], boxes[i][2], boxes[i][3]) for i in numbered.nonzero()[0].tolist()}
    for rule, hits in judged.broken.items():
        for i in hits.nonzero()[0].tolist():
            what = f"{split.annotation_name(i)}{judged.why(rule, i)}"
            if RULES[rule].severity == "error":
                split.drop_annotation(i, rule, what)
            elif RULES[rule].mend:
                split.change(i, rule, what, **judged.mended(rule, i))
            else:
                split.add(rule, what, split.picture(i))
    for rule, why in judge.habits.found(list(names.values())).items():
        split.add(rule, why)
    _inspect_repetitions(split)
    _inspect_image_lists(split, set(names))


def _inspect_repetitions(split: Split) -> None:
    seen: dict[tuple[object, ...], int] = {}
    for i, box in split.boxes.items():
        record = split.annotations[i]
        key = (record["image_id"], *box)
        first = seen.setdefault(key, i)
        if first == i:
            continue
        same = split.annotations[first].get("category_id") == record.get("category_id")
        rule = "same box twice" if same else "same box with two categories"
        what = f"{split.annotation_name(i)} and annotation {split.annotations[first].get('id')}"
        split.add(rule, what, split.picture(i))


def _inspect_image_lists(split: Split, categories: set[int]) -> None:
    """LVIS' lists of the categories that an image has not, or has more of than is drawn."""
    excluded = {}
    for position, record in enumerate(split.images):
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            values = record.get(key) or []
            unknown = [c for c in values if c not in categories] if isinstance(values, list) else [values]
            if unknown:
                split.add("image list with an unknown category", f"{split.image_name(position)}: {key} has {unknown}")
        if record.get("neg_category_ids") and type(record.get("id")) is int:
            excluded[record["id"]] = record["neg_category_ids"]
    for i, record in enumerate(split.annotations if excluded else ()):
        if type(record.get("image_id")) is int and record.get("category_id") in excluded.get(record["image_id"], ()):
            what = f"{split.annotation_name(i)} (category {record['category_id']})"
            split.add("object of a category that its image excludes", what, split.picture(i))
