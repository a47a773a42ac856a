"""Instance segmentation from the command line: trained, evaluated by masks, and masks in the predictions."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

import forked
from codetr.application import compose
from codetr.predict import predict
from toy import CLASSES, environment, make_coco, overrides

MASK_HEAD = (
    "model/mask_head=refine_mask",
    "model.detector.mask_head.iou.hidden_width=16",
)


def test_masks_from_training_to_predictions(tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_coco(data, train=2, val=2)
    options = [option for option in overrides(data) if option != "~callbacks.report"]
    given = [*options, *MASK_HEAD, "trainer.max_epochs=1", "run_dir=run"]
    done = forked.run("codetr.train", *given, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "run").rglob("metrics.csv")
    with log.open() as file:
        logged = {name: value for row in csv.DictReader(file) for name, value in row.items() if value}
    assert float(logged["train/masks/stage0"]) > 0
    assert {"val/segm/map", "val/segm/map_50", "val/segm/mar_100", "val/map"} <= set(logged)
    segm = json.loads((tmp_path / "run" / "metrics.json").read_text())["segm"]
    assert segm["map"] >= 0
    assert set(segm["map_per_class"]) == set(CLASSES)
    assert "mask AP and AR on 2 images" in done.stdout

    photo = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    Image.fromarray(pixels).resize((90, 50)).save(photo)
    (checkpoint,) = (tmp_path / "run").rglob("best.ckpt")
    options = [f"checkpoint={checkpoint}", f"images={photo}", f"out={tmp_path}/out", "device=cpu", "num_workers=0"]
    found = json.loads(predict(compose("predict", [*options, "score_threshold=0"])).read_text())
    assert found
    for one in found:
        mask = coco_mask.decode(one["segmentation"])
        assert mask.shape == (50, 90)
        x, y, width, height = one["bbox"]
        rows, columns = np.nonzero(mask)
        assert (rows + 0.5 > y).all()
        assert (rows + 0.5 < y + height).all()
        assert (columns + 0.5 > x).all()
        assert (columns + 0.5 < x + width).all()
        assert 0 <= one["mask_score"] <= 1
    assert (tmp_path / "out" / "photo.png").is_file()
