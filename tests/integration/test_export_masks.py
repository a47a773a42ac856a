"""Masks of exported files: those of the checkpoint, in the file and as COCO's run lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from export_cases import exported
from pycocotools import mask as coco_mask

import codetr
from codetr.application import compose
from codetr.eval import evaluate
from codetr.inference import Model
from codetr.views import Tiles

if TYPE_CHECKING:
    from conftest import Trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(segmenting: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(segmenting, tmp_path_factory.mktemp("masks") / "model.onnx", "max_detections=30")


@pytest.fixture(scope="module")
def other(segmenting: Trained) -> Model:
    model = codetr.load(segmenting.checkpoint, device="cpu")
    assert isinstance(model, Model)
    return model


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_masks_are_those_of_the_checkpoint(file: Path, other: Model, photos: list[np.ndarray], batch: int) -> None:
    """Pixels at the edge of a mask, where its share is one half, may differ: one in ten thousand."""
    model = codetr.load(file)
    assert model.finds_masks
    pairs = zip(*(one.predict(photos, score_threshold=0, batch_size=batch) for one in (model, other)), strict=True)
    seen = 0
    for one, true in pairs:
        assert len(one) == 30
        assert torch.equal(one.labels, true.labels[:30])
        torch.testing.assert_close(one.boxes_xyxy, true.boxes_xyxy[:30], rtol=0, atol=1e-3)
        assert one.detections.mask_scores is not None
        assert true.detections.mask_scores is not None
        torch.testing.assert_close(one.detections.mask_scores, true.detections.mask_scores[:30], rtol=0, atol=1e-5)
        own, expected = (coco_mask.decode(r.detections.rle[:30]).astype(bool) for r in (one, true))
        assert (own != expected).mean() <= 1e-4
        seen += int(expected.any((0, 1)).sum())
    assert seen > 100


def test_eval_of_the_file_has_the_mask_ap_of_the_checkpoint(
    segmenting: Trained, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["trainer=cpu", "+data.num_workers=0", "~callbacks.pictures", "~callbacks.progress"]
    options += ["metrics.max_detections=30"]
    for path in (file, segmenting.checkpoint):
        evaluate(compose("eval", [f"checkpoint={path}", f"run_dir={path.suffix[1:]}", *options]))
    one, true = (json.loads((tmp_path / name / "metrics.json").read_text())["segm"] for name in ("onnx", "ckpt"))
    assert one.pop("map_per_class") == pytest.approx(true.pop("map_per_class"), abs=1e-3)
    assert one == pytest.approx(true, abs=1e-3)
    assert true["map"] > 0.3


def test_masks_come_back_from_tiles(file: Path, other: Model, photos: list[np.ndarray]) -> None:
    """As those of the checkpoint do."""
    wide = np.tile(photos[0], (1, 2, 1))
    tiles = Tiles(size=96, batch_size=2)
    (one,), (true,) = (model.predict(wide, score_threshold=0.02, views=tiles) for model in (codetr.load(file), other))
    assert len(one) == len(true) > 5
    torch.testing.assert_close(one.boxes_xyxy, true.boxes_xyxy, rtol=0, atol=1e-3)
    assert (one.masks != true.masks).float().mean() <= 1e-3
    assert one.masks.any()
