"""A data set with many planted faults: training with `data.on_error=skip` finishes and counts them; the check's cleaned
file needs no skipping."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from codetr.data.commands import check
from toy import data_overrides, make_coco, train

NAN = float("nan")
BOXES: list[Any] = [
    *(
        [9, 9, -5, 4],
        [9, 9, 5, -4],
        [9, 9, 0, 4],
        [9, 9, 5, 0],
        [64, 9, 5, 4],
        [9, 64, 5, 4],
        [-9, 9, 5, 4],
        [9, -9, 5, 4],
    ),
    *(
        [NAN, 9, 5, 4],
        [9, 9, float("inf"), 4],
        [9, 9, 5],
        [9, 9, 5, 4, 1],
        None,
        "9 9 5 4",
        [9, 9, None, 4],
        ["a", 9, 5, 4],
    ),
]
REFERENCES: list[dict[str, Any]] = [
    *({"image_id": 999}, {"image_id": "one"}, {"image_id": None}, {"image_id": [1]}),
    *({"category_id": 9}, {"category_id": "one"}, {"category_id": None}, {"id": 1}),
]
SIZES: list[dict[str, Any]] = [{"width": 0}, {"height": -1}, {"width": None}, {"file_name": None}, {"width": 65}]


def plant(data: Path) -> int:
    """Spoils the objects of the last images, one fault each, and some images before; how many faults."""
    content = json.loads((data / "train.json").read_bytes())
    first = {a["image_id"]: a for a in reversed(content["annotations"])}
    victims = iter([first[image["id"]] for image in content["images"][8:]])
    for bbox in BOXES:
        next(victims)["bbox"] = bbox
    for change in REFERENCES:
        next(victims).update(change)
    folder = data / "train"
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes(b"")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:-60])
    (folder / "4.png").write_bytes(b"no image")
    (folder / "5.png").unlink()
    (folder / "5.png").mkdir()
    for image, change in zip(content["images"][-len(SIZES) :], SIZES, strict=True):
        image.update(change)
    (data / "train.json").write_text(json.dumps(content))
    return len(BOXES) + len(REFERENCES) + 5 + len(SIZES)


@pytest.mark.slow
def test_training_skips_and_counts_what_check_mends(tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_coco(data, train=8 + len(BOXES) + len(REFERENCES) + len(SIZES), val=2)
    faults = plant(data)
    assert faults >= 30
    stopped = train(data, tmp_path)
    assert stopped.returncode != 0
    assert f"error: {data}/train.json: {faults} bad records" in stopped.stderr, stopped.stderr
    assert "Traceback" not in stopped.stderr
    run = train(data, tmp_path, "data.on_error=skip", "trainer.max_steps=4", "trainer.max_epochs=1")
    assert run.returncode == 0, run.stderr
    assert re.search(rf"train\.json: {faults} bad records dropped", run.stdout + run.stderr)

    own = [o for o in data_overrides(data) if "batch_size" not in o]
    page = f"page={tmp_path}/check.html"
    assert check.main([*own, page, "fix=true"]) == 0
    assert check.main([*own, page, "data.train_annotations=train.clean.json"]) == 0
    run = train(data, tmp_path, "data.train_annotations=train.clean.json", "trainer.max_steps=2", "name=clean")
    assert run.returncode == 0, run.stderr
