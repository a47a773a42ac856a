"""Mask2Former from the command's configuration: trained, evaluated by masks and boxes, and what it predicts."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import codetr
from codetr.application import compose
from codetr.errors import UserError
from codetr.predict import predict
from codetr.training import fit
from toy import CLASSES, make_coco, overrides
from toy_model import NARROW

MASK2FORMER = (
    "model=mask2former_tiny",
    "criterion=masks",
    "postprocess=masks",
    "optimized_metric=val/segm/map",
    "criterion.points.count=200",
    "criterion.matching_cost.num_points=200",
    "model.detector.encoder.ffn_width=32",
    NARROW,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mask2former")
    make_coco(folder, train=4, val=2, empty=(1,))
    return folder


def configured(data: Path, *more: str) -> list[str]:
    return [o for o in overrides(data) if o != "model=co_deformable_tiny"] + [*MASK2FORMER, *more]


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param((), id="plain"),
        pytest.param(
            (
                "model.query_groups=2",
                "model/auxiliary_head=[atss]",
                "+model/query@model.detector.queries.more=learned",
                "+model.detector.queries.more.weight=0.5",
                "model.detector.queries.more.repeats=2",
                "model.detector.queries.more.num_queries=8",
            ),
            id="groups, a head and a hybrid branch",
        ),
    ],
)
def test_from_training_to_predictions(
    scheme: tuple[str, ...], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = fit(compose("train", configured(data, *scheme, "trainer.max_epochs=1", "run_dir=run")))
    assert {"map", "map_50", "segm/map", "segm/map_50", "segm/mar_100"} <= set(run.metrics)
    assert run.score == run.metrics["segm/map"]
    checkpoint = run.best
    photo = Path("photo.png")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    Image.fromarray(pixels).resize((90, 50)).save(photo)
    options = [f"checkpoint={checkpoint}", f"images={photo}", "out=found", "device=cpu", "num_workers=0"]
    found = json.loads(predict(compose("predict", [*options, "score_threshold=0"])).read_text())
    assert len(found) == len(CLASSES) * 10
    for one in found:
        mask = coco_mask.decode(one["segmentation"])
        assert mask.shape == (50, 90)
        rows, columns = mask.nonzero()
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1] if len(rows) else [0] * 4
        assert one["bbox"] == pytest.approx(box)
    scores = [one["score"] for one in found]
    assert scores == sorted(scores, reverse=True)
    if scheme:
        names = {name.split(".")[1] for name in codetr.load(checkpoint).detector.state_dict() if "queries." in name}
        assert names == {"main", "group_2", "atss", "more"}


@pytest.mark.parametrize(
    ("given", "message"),
    [("criterion=focal", "choose criterion=masks"), ("postprocess=nms", "choose postprocess=masks")],
)
def test_losses_and_detections_of_boxes_are_refused(
    given: str, message: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    without = [
        o for o in configured(data, "run_dir=run") if not o.startswith(("criterion.points", "criterion.matching"))
    ]
    with pytest.raises(UserError, match=message):
        fit(compose("train", [*without, given]))
