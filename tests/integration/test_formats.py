"""The same data set in COCO's, VOC's and YOLO's files trains to the same losses and the same mAP."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

import forked
from codetr.data.__main__ import run
from codetr.shapes import PRESETS, generate
from toy import data_overrides, environment, overrides

SPLITS = ("train", "val")


def embedded(root: Path) -> list[str]:
    """The embedded set, tiny, in COCO's files, but with what all three formats have a place for: no crowds, and areas
    of boxes. Returns its classes."""
    generate(root, PRESETS["tiny"], seed=0, workers=1)
    for split in SPLITS:
        path = root / "annotations" / f"instances_{split}.json"
        document = json.loads(path.read_text())
        kept = ("id", "image_id", "category_id", "bbox")
        document["annotations"] = [{k: a[k] for k in kept} for a in document["annotations"] if not a["iscrowd"]]
        path.write_text(json.dumps(document))
    return [c["name"] for c in document["categories"]]


def custom(root: Path) -> list[str]:
    files = [f"data.{s}_annotations=annotations/instances_{s}.json" for s in SPLITS]
    return ["data=custom", f"data.root={root}", *files, *(f"data.{s}_images={s}" for s in SPLITS)]


def trained(folder: Path, *data: str) -> list[dict[str, float]]:
    """Everything that is logged, step by step."""
    toy = [o for o in overrides(folder) if o not in data_overrides(folder)]
    own = ["augment@data=small", "data.num_workers=0", "data.batch_size=4", "trainer.max_epochs=2"]
    done = forked.run("codetr.train", *toy, *data, *own, f"run_dir={folder}", cwd=folder, env=environment())
    assert done.returncode == 0, done.stderr
    (log,) = folder.rglob("metrics.csv")
    with log.open() as file:
        return [{k: float(v) for k, v in row.items() if v and "time" not in k} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_training_is_the_same_from_every_format(tmp_path: Path) -> None:
    """Boxes are equal to rounding, and labels, order and augmentation are equal: so is all that follows."""
    classes = embedded(tmp_path / "shapes")
    chosen = f"data.classes={json.dumps(classes)}"
    sets = {"coco": custom(tmp_path / "shapes")}
    for form in ("voc", "yolo"):
        files = [o for o in custom(tmp_path / "shapes") if "_" in o]
        target = f"target={tmp_path}/{form}"
        assert run(["convert", "from=custom", f"to={form}", f"source={tmp_path}/shapes", target, *files]) == 0
        sets[form] = [f"data={form}", f"data.root={tmp_path}/{form}"]
    logs = {form: trained(tmp_path / f"run_{form}", *data, chosen) for form, data in sets.items()}
    expected = logs["coco"]
    assert any(row.get("val/map", 0) > 0 for row in expected)
    assert len([row for row in expected if "train/loss" in row]) == 2 * (PRESETS["tiny"].train // 4)
    for form in ("voc", "yolo"):
        for row, other in zip(expected, logs[form], strict=True):
            assert row.keys() == other.keys()
            for name, value in row.items():
                assert math.isclose(value, other[name], rel_tol=1e-5, abs_tol=1e-9), (form, name, value, other[name])
