"""Training, evaluation and prediction with tiles: the checkpoint keeps them, and an image of one tile is as without."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from PIL import Image

from codetr.application import compose
from codetr.eval import evaluate
from codetr.inference import load
from codetr.predict import predict
from codetr.tiles import Tiles
from codetr.training import fit
from toy import make_coco, overrides

TILES = ["tiles=overlapping", "tiles.size=48", "tiles.batch_size=2"]


@dataclass
class Done:
    checkpoint: Path
    map: float


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("tiles")
    make_coco(folder / "data", train=2, val=2)
    given = [*overrides(folder / "data"), *TILES, "evaluate_heads=true", "trainer.max_epochs=1"]
    done = fit(compose("train", [*given, f"run_dir={folder}/run"]))
    assert done.best is not None
    return Done(done.best, done.metrics["map"])


def test_the_checkpoint_keeps_them_and_the_evaluation_is_that_of_training(run: Done, tmp_path: Path) -> None:
    assert load(run.checkpoint, device="cpu").tiles == Tiles(size=48, overlap=0.25, iou=0.5, batch_size=2)
    given = [f"checkpoint={run.checkpoint}", "trainer=cpu", "evaluate_heads=true", f"run_dir={tmp_path}/eval"]
    assert evaluate(compose("eval", given)) == pytest.approx(run.map, abs=1e-12)
    with pytest.raises(InstantiationException, match=r"tiles\.overlap"):
        evaluate(compose("eval", [*given, "overwrite=true", "tiles=overlapping", "tiles.overlap=0.9"]))


def test_an_image_of_one_tile_is_as_without_tiles(run: Done) -> None:
    model = load(run.checkpoint, device="cpu")
    model.size_divisor = 1
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    model.tiles = None
    (plain,) = model.predict(pixels, score_threshold=0.0)
    model.tiles = Tiles(size=500, overlap=0.25, iou=0.5, batch_size=2)
    (tiled,) = model.predict(pixels, score_threshold=0.0)
    torch.testing.assert_close(tiled.boxes_xyxy, plain.boxes_xyxy, rtol=0, atol=0)
    torch.testing.assert_close(tiled.scores, plain.scores, rtol=0, atol=0)


def test_predict_takes_other_tiles(run: Done, tmp_path: Path) -> None:
    Image.new("RGB", (90, 70), "green").save(tmp_path / "a.png")
    given = [f"checkpoint={run.checkpoint}", f"images={tmp_path}/a.png", "device=cpu", "num_workers=0"]
    own = [*given, "score_threshold=0", "pictures=false", *TILES, "tiles.size=64", f"out={tmp_path}/found"]
    path = predict(compose("predict", own))
    model = load(run.checkpoint, device="cpu")
    model.tiles = Tiles(size=64, overlap=0.25, iou=0.5, batch_size=2)
    (expected,) = model.predict(tmp_path / "a.png", score_threshold=0.0)
    records = json.loads(path.read_text())
    assert [r["score"] for r in records] == pytest.approx(expected.scores.tolist(), abs=1e-6)
    assert len(records) > 20
