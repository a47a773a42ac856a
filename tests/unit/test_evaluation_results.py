"""Records of results, against a loop over images and detections."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from codetr.errors import UserError
from codetr.evaluation import results as module
from codetr.evaluation.mean_ap import MeanAveragePrecision
from codetr.evaluation.results import results, write

SIZE = (12, 9)
CATEGORY_IDS = (90, -1, 2**40)
Image = tuple[int, dict[str, Any]]


def images(rng: np.random.Generator, counts: list[int], masks: bool) -> list[Image]:
    """Id and what was found; many scores are equal."""
    found = []
    for number, count in enumerate(counts):
        corners = np.sort(rng.uniform(0, 9, (count, 2, 2)), axis=1).astype(np.float32)
        own: dict[str, Any] = {
            "boxes": torch.from_numpy(corners.reshape(-1, 4)),
            "scores": torch.from_numpy(rng.choice([0.1, 0.3, 0.7], count).astype(np.float32)),
            "labels": torch.from_numpy(rng.integers(0, 3, count)),
        }
        if masks:
            drawn = rng.integers(0, 2, (*SIZE, count), np.uint8)
            own["masks"] = coco_mask.encode(np.asfortranarray(drawn)) if count else []
        found.append((7 - 3 * number, own))
    return found


def truth(number: int, masks: bool) -> dict[str, Any]:
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": number}
    return none | {"masks": []} if masks else none


def expected(every: list[Image], masks: bool, names: dict[int, str], limit: int | None) -> list[dict[str, Any]]:
    records = []
    for number, own in every:
        scores = own["scores"].tolist()
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:limit]  # stable
        for i in sorted(best):
            category = CATEGORY_IDS[own["labels"][i]]
            if category == -1:
                continue
            x0, y0, x1, y1 = own["boxes"][i].tolist()
            shape = {"bbox": [x0, y0, x1 - x0, y1 - y0]}
            if masks:
                shape = {"segmentation": {"size": list(SIZE), "counts": own["masks"][i]["counts"].decode()}}
            image = names.get(number, number)
            records.append({"image_id": image, "category_id": category, **shape, "score": scores[i]})
    return records


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 4])
@pytest.mark.parametrize("seed", range(12))
def test_every_detection_that_counts_is_one_record(seed: int, limit: int | None, masks: bool) -> None:
    rng = np.random.default_rng(seed)
    counts, chunk = rng.integers(0, 10, seed).tolist(), int(rng.integers(1, 30))
    every, names = images(rng, counts, masks), {4: "004"}
    metric = MeanAveragePrecision(iou_type="segm" if masks else "bbox", class_names=["a", "b", "c"])
    metric.update([own for _, own in every], [truth(number, masks) for number, _ in every])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        parts = list(results(metric._columns(), masks, CATEGORY_IDS, names, limit))
    assert [r for part in parts for r in part] == expected(every, masks, names, limit)
    assert all(len(part) <= max(chunk, *counts) for part in parts)


def test_files_hold_all_digits_and_are_whole_or_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "run" / "results_bbox.json"
    score = float(np.float32(1 / 3))
    records = [{"image_id": i, "bbox": [score, 0.1, 1e-9, 2.0], "score": score} for i in range(500)]
    assert write(path, [records[:1], [], records[1:]]) == 500
    assert json.loads(path.read_text()) == records
    assert write(path, []) == 0
    assert json.loads(path.read_text()) == []

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match=r"results_bbox\.json: there is no room for it"):
            write(path, [records])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert json.loads(path.read_text()) == []
    assert list(path.parent.iterdir()) == [path]
