"""Training on a file of LVIS' form, with federated loss and federated AP, against lvis-api."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import codetr
from codetr import application
from lvis_api import LVIS, LVISEval, LVISResults
from toy import as_lvis, make_coco, overrides, train

KEYS = {"AP": "map", "AP50": "map_50", "APr": "map_rare", "APc": "map_common", "APf": "map_frequent", "AR@20": "mar_20"}


@pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")
def test_training_with_federated_loss_and_ap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    make_coco(data, train=12, val=6)
    for split in ("train", "val"):
        as_lvis(data / f"{split}.json")
    options = ("+criterion/fed_loss=sampled", "criterion.fed_loss.classes=2", "metrics=lvis")
    longer = ("trainer.max_epochs=6", "optimizer.lr=3e-3", "callbacks.ema.decay=0.5", "metrics.max_detections=20")
    done = train(data, tmp_path, *options, *longer)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs" / "toy").iterdir()

    annotations = json.loads((data / "train.json").read_text())["annotations"]
    images = [len({a["image_id"] for a in annotations if a["category_id"] == k}) for k in (1, 2, 3)]
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["codetr"]["category_ids"] == [1, 2, 3]
    state = checkpoint["state_dict"]
    torch.testing.assert_close(state["criterion.fed_loss.weights"], torch.tensor(images).sqrt())

    with (run / "csv" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/map"]]
    reported = max(rows, key=lambda row: float(row["val/map"]))
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis-api was written for numpy 1
    truth = LVIS(str(data / "val.json"))
    judge = LVISEval(truth, LVISResults(truth, detections(run, data), max_dets=20), "bbox")
    judge.params.max_dets = 20
    judge.run()
    assert judge.results["AP"] > 0
    for theirs, own in KEYS.items():
        assert float(reported[f"val/{own}"]) == pytest.approx(judge.results[theirs], abs=1e-6), own


@torch.inference_mode()
def detections(run: Path, data: Path) -> list[dict]:
    """Of the best checkpoint, in the form of LVIS' results."""
    from hydra.utils import instantiate

    config = application.compose("train", overrides(data))
    module = instantiate(config.data)
    module.setup("fit")
    model = codetr.load(run / "checkpoints" / "best.ckpt", device="cpu")
    results = []
    for batch in module.val_dataloader():
        found = model.detect(batch, score_threshold=0)
        for i, one in zip(batch.image_ids.tolist(), found, strict=True):
            boxes = one.boxes_xyxy.double()
            boxes[:, 2:] -= boxes[:, :2]
            columns = zip(boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True)
            results += [{"image_id": i, "bbox": b, "score": s, "category_id": k + 1} for b, s, k in columns]
    return results
