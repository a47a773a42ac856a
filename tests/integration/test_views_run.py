"""Views in training, evaluation, prediction and Python: the checkpoint keeps them, and each is as the picture that it
shows."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from PIL import Image
from pycocotools import mask as coco_mask

import codetr
from codetr.application import compose
from codetr.errors import UserError
from codetr.eval import evaluate
from codetr.inference import Model, Result, load
from codetr.predict import predict
from codetr.training import fit
from codetr.types import Detections
from codetr.views import NMS, TTA, Tiles
from toy import make_coco, overrides

if TYPE_CHECKING:
    from conftest import Trained

TILES = ["views=tiles", "views.tiles.size=48", "views.tiles.batch_size=2"]


@dataclass
class Done:
    checkpoint: Path
    map: float


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("views")
    make_coco(folder / "data", train=2, val=2)
    given = [*overrides(folder / "data"), *TILES, "evaluate_heads=true", "trainer.max_epochs=1"]
    done = fit(compose("train", [*given, f"run_dir={folder}/run"]))
    assert done.best is not None
    return Done(done.best, done.metrics["map"])


def test_the_checkpoint_keeps_them_and_the_evaluation_is_that_of_training(run: Done, tmp_path: Path) -> None:
    assert load(run.checkpoint, device="cpu").views == (Tiles(size=48, batch_size=2),)
    given = [f"checkpoint={run.checkpoint}", "trainer=cpu", "evaluate_heads=true", f"run_dir={tmp_path}/eval"]
    assert evaluate(compose("eval", given)) == pytest.approx(run.map, abs=1e-12)
    with pytest.raises(InstantiationException, match=r"overlap=0\.9"):
        evaluate(compose("eval", [*given, "overwrite=true", "views=tiles", "views.tiles.overlap=0.9"]))


def test_predict_takes_other_views_or_none(run: Done, tmp_path: Path) -> None:
    Image.new("RGB", (90, 70), "green").save(tmp_path / "a.png")
    given = [f"checkpoint={run.checkpoint}", f"images={tmp_path}/a.png", "device=cpu", "num_workers=0"]
    given += ["score_threshold=0", "pictures=false", f"out={tmp_path}/found"]
    model = load(run.checkpoint, device="cpu")
    cases = {
        "views=none": (),
        "": None,  # those of the checkpoint
        "views=[tiles,tta] views.tiles.size=64 views.tta.scales=[1]": (Tiles(size=64), TTA(scales=[1])),
    }
    counts = []
    for words, views in cases.items():
        records = json.loads(predict(compose("predict", [*given, *words.split()])).read_text())
        (expected,) = model.predict(tmp_path / "a.png", score_threshold=0.0, views=views)
        assert [r["score"] for r in records] == pytest.approx(expected.scores.tolist(), abs=1e-6)
        counts.append(len(records))
    assert min(counts) >= 10
    assert len(set(counts)) > 1


# -- of a detector with masks


@pytest.fixture(scope="module")
def model(segmenting: "Trained") -> Model:
    found = codetr.load(segmenting.checkpoint, device="cpu")
    assert isinstance(found, Model)
    return found


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """[96, 256, 3], two tiles of 96 x 128."""
    coarse = np.random.default_rng(3).integers(0, 256, (6, 16, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((256, 96), Image.Resampling.BICUBIC))


def same(one: Result, other: Result, atol: float = 0.0) -> None:
    assert len(one) > 5
    torch.testing.assert_close(one.boxes_xyxy, other.boxes_xyxy, rtol=0, atol=atol)
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=atol)
    assert torch.equal(one.labels, other.labels)
    torch.testing.assert_close(one.mask_scores, other.mask_scores, rtol=0, atol=atol)


def test_a_picture_of_one_tile_is_as_without_tiles(model: Model, scene: np.ndarray) -> None:
    """Also where it is no multiple of the divisor: a tile is padded as an image is."""
    image = scene[:90, :123]
    (plain,) = model.predict(image, score_threshold=0.0)
    (tiled,) = model.predict(image, score_threshold=0.0, views=Tiles(size=500))
    same(tiled, plain)
    assert tiled.detections.rle == plain.detections.rle


def test_tiles_find_what_a_prediction_of_each_finds(model: Model, scene: np.ndarray) -> None:
    """Tiles that cover the image once: boxes, scores and masks are those of their predictions, moved."""
    image = np.concatenate([scene[:, :96], scene[:, 128:224]], 1)
    (found,) = model.predict(image, score_threshold=0.0, views=Tiles(size=96, overlap=0))
    halves = model.predict([image[:, :96], image[:, 96:]], score_threshold=0.0, batch_size=2)
    expected = {}
    for left, half in zip((0, 96), halves, strict=True):
        boxes = half.boxes_xyxy + torch.tensor([left, 0, left, 0])
        masks = torch.zeros(len(half), 96, 192, dtype=torch.bool)
        masks[:, :, left : left + 96] = half.masks
        expected |= dict(rows(half.labels, boxes, zip(half.scores.tolist(), masks, strict=True)))
    assert len(found) == len(expected) > 50
    for key, (score, mask) in rows(
        found.labels, found.boxes_xyxy, zip(found.scores.tolist(), found.masks, strict=True)
    ):
        assert score == expected[key][0]
        assert torch.equal(mask, expected[key][1])


def rows(labels: torch.Tensor, boxes: torch.Tensor, rest: Iterable[Any]) -> list[tuple[tuple[float, ...], Any]]:
    """Label and box of each detection, by which it is known, and the rest."""
    named = zip(labels.tolist(), boxes.tolist(), rest, strict=True)
    return [((label, *box), own) for label, box, own in named]


def test_a_flip_finds_the_mirrored_boxes_and_masks(model: Model, scene: np.ndarray) -> None:
    image = scene[:, :128]
    views = TTA(scales=[1], flip=True, merge=NMS(1.0))  # nothing is dropped
    (plain,) = model.predict(image[:, ::-1].copy(), score_threshold=0.0)
    back = views.of((96, 128))[1].back(plain.detections, (96, 128))
    (straight,) = model.predict(image, score_threshold=0.0)
    (both,) = model.predict(image, score_threshold=0.0, views=views)
    assert len(both) == len(plain) + len(straight) > 50
    for one in (straight.detections, back):
        away = (one.boxes_xyxy[:, None] - both.boxes_xyxy).abs().amax(2).amin(1)
        assert away.max() <= 1e-4
    torch.testing.assert_close(back.boxes_xyxy[:, [2, 0]], 128 - plain.boxes_xyxy[:, [0, 2]], rtol=0, atol=1e-4)
    assert np.array_equal(coco_mask.decode(back.rle)[:, ::-1], coco_mask.decode(plain.detections.rle))


def test_masks_come_back_through_all_views(model: Model, scene: np.ndarray) -> None:
    """Those of tiles, scales and flips lie in their boxes, up to the pixels on their borders."""
    (found,) = model.predict(scene, score_threshold=0.0, views=[Tiles(size=128), TTA(scales=[1, 0.75])])
    assert found.masks.shape == (len(found), 96, 256)
    assert len(found) > 20
    assert found.masks.any((1, 2)).float().mean() > 0.5
    for (x0, y0, x1, y1), mask in zip(found.boxes_xyxy.tolist(), found.masks, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows):
            assert rows.min() >= int(y0) - 1
            assert rows.max() <= y1 + 1
            assert columns.min() >= int(x0) - 1
            assert columns.max() <= x1 + 1


def test_evaluation_by_views_has_masks_and_their_ap(
    segmenting: "Trained", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one tile, an evaluation is as without."""
    monkeypatch.chdir(tmp_path)
    given = [f"checkpoint={segmenting.checkpoint}", "trainer=cpu", "+data.num_workers=0", "~callbacks.pictures"]
    numbers = []
    for name, words in (("plain", ""), ("tiles", "views=tiles"), ("tta", "views=tta views.tta.scales=[1]")):
        evaluate(compose("eval", [*given, "~callbacks.progress", f"run_dir={name}", *words.split()]))
        numbers.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    plain, tiles, tta = numbers
    assert plain["segm"]["map"] > 0.3
    for key in ("map", "mar_100", "map_per_class", "segm"):
        assert tiles[key] == plain[key]
    assert tta["map"] != plain["map"]
    assert tta["segm"]["map"] > 0.1


def test_what_cannot_be_looked_at_is_named(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png cannot be decoded"):
        model.predict(tmp_path / "a.png", views=Tiles(size=64))
    with pytest.raises(UserError, match=r"give codetr\.views\.Tiles"):
        model.predict(np.zeros((64, 64, 3), np.uint8), views="tiles")  # type: ignore[arg-type]
    assert isinstance(model.predict(np.zeros((64, 64, 3), np.uint8), views=())[0].detections, Detections)
