"""Files of results, as servers take them: pycocotools and lvis-api read them and find the numbers that we report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from codetr.application import compose
from codetr.data.__main__ import run as data_command
from codetr.errors import UserError
from codetr.eval import evaluate
from codetr.predict import predict
from lvis_api import LVIS, LVISEval, LVISResults

if TYPE_CHECKING:
    from conftest import Trained

STATS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100")
STATS += ("mar_small", "mar_medium", "mar_large")
LVIS_KEYS = {"AP": "map", "AP50": "map_50", "AP75": "map_75", "APs": "map_small", "APr": "map_rare"}
LVIS_KEYS |= {"APc": "map_common", "APf": "map_frequent"}
IMAGE_IDS = (391895, 2**53 + 1, 0, 17, 999_999_999_999)
CATEGORY_IDS = {"circle": 90, "square": 1, "star": 1203}
BOTH = ("bbox", "segm")
FORM = {
    "bbox": {"image_id", "category_id", "bbox", "score"},
    "segm": {"image_id", "category_id", "segmentation", "score"},
}


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def truth_of(trained: Trained, image_ids: tuple[Any, ...] = IMAGE_IDS) -> dict[str, Any]:
    """Of which the model finds a part: some objects have moved or are of another class; ids are strange ones."""
    truth = load(trained.images.parent / "truth.json")
    number = {image["id"]: own for image, own in zip(truth["images"], image_ids, strict=True)}
    own = {c["id"]: CATEGORY_IDS[c["name"]] for c in truth["categories"]}
    for image in truth["images"]:
        image["id"] = number[image["id"]]
    for i, one in enumerate(truth["annotations"]):
        one["image_id"] = number[one["image_id"]]
        one["category_id"] = own[7 + (i % 3 if i % 4 == 0 else one["category_id"] - 7)]
        x, y, w, h = one["bbox"]
        if i % 2:
            one["bbox"] = [x + w / 6, y + h / 9, w, h]
            inside = np.zeros((96, 128), np.uint8)
            inside[round(y + h / 9) : round(y + h), round(x + w / 6) : round(x + w)] = 1
            rle = coco_mask.encode(np.asfortranarray(inside))
            one["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        one["area"] = w * h
    truth["categories"] = [{"id": i, "name": name} for name, i in CATEGORY_IDS.items()]
    return truth


def evaluated(trained: Trained, folder: Path, *more: str) -> dict[str, Any]:
    """metrics.json of an evaluation in the folder `run` of `folder`, on its truth.json unless `more` says otherwise."""
    options = [f"checkpoint={trained.checkpoint}", "trainer=cpu", f"run_dir={folder}/run", "~callbacks.pictures"]
    if not any("data" in option for option in more):
        options.append(f"+data.val_annotations={folder}/truth.json")
    mean = evaluate(compose("eval", [*options, "++data.num_workers=0", *more]))
    metrics = load(folder / "run/metrics.json")
    assert metrics["map"] == mean
    return metrics


def predicted(trained: Trained, out: Path, annotations: Path, *more: str) -> Path:
    options = [f"checkpoint={trained.checkpoint}", f"images={trained.images}", f"annotations={annotations}"]
    options += [f"out={out}", "num_workers=0", "device=cpu", "pictures=false"]
    return predict(compose("predict", [*options, *more]))


def of_pycocotools(truth: Path, results: Path, iou_type: str) -> dict[str, float]:
    coco = COCO(str(truth))
    judge = COCOeval(coco, coco.loadRes(str(results)), iou_type)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return dict(zip(STATS, judge.stats.tolist(), strict=True))


def of_lvis_api(truth: Path, results: Path, iou_type: str) -> dict[str, float]:
    own = LVIS(str(truth))
    judge = LVISEval(own, LVISResults(own, str(results)), iou_type)
    judge.run()
    return {LVIS_KEYS[name]: value for name, value in judge.results.items() if name in LVIS_KEYS}


def same(metrics: dict[str, Any], judged: dict[str, float]) -> bool:
    return {name: metrics[name] for name in judged} == pytest.approx(judged, abs=1e-9)


def test_an_evaluation_and_a_prediction_of_boxes_and_masks(segmenting: Trained, tmp_path: Path) -> None:
    """Both with the ids of the file; the prediction knows only images and categories."""
    truth = truth_of(segmenting)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    info = {key: value for key, value in truth.items() if key != "annotations"}
    (tmp_path / "image_info.json").write_text(json.dumps(info))
    metrics = evaluated(segmenting, tmp_path)
    first = predicted(segmenting, tmp_path / "out", tmp_path / "image_info.json")
    assert first == tmp_path / "out/results_bbox.json"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["results_bbox.json", "results_segm.json"]
    for kind, own in zip(BOTH, (metrics, metrics["segm"]), strict=True):
        assert 0.05 < own["map"] < 0.95
        for folder in ("run", "out"):
            file = tmp_path / folder / f"results_{kind}.json"
            records = load(file)
            assert {frozenset(r) for r in records} == {frozenset(FORM[kind])}
            assert Counter(r["image_id"] for r in records) == dict.fromkeys(IMAGE_IDS, 100), "what the model keeps"
            assert {r["category_id"] for r in records} <= set(CATEGORY_IDS.values())
            assert same(own, of_pycocotools(tmp_path / "truth.json", file, kind)), (folder, kind)
    assert metrics["map"] != metrics["segm"]["map"]


@pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")
def test_lvis(segmenting: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit holds for all classes of an image together: the file has no more, and lvis-api needs no other."""
    truth = truth_of(segmenting)
    for category, letter in zip(truth["categories"], "rcf", strict=True):
        category["frequency"] = letter
    for i, image in enumerate(truth["images"]):
        present = {a["category_id"] for a in truth["annotations"] if a["image_id"] == image["id"]}
        image["neg_category_ids"] = sorted(set(CATEGORY_IDS.values()) - present)[: i % 3]
        image["not_exhaustive_category_ids"] = sorted(present)[: i % 2]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    metrics = evaluated(segmenting, tmp_path, "metrics=lvis", "metrics.max_detections=20")
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis-api was written for numpy 1
    for kind, own in zip(BOTH, (metrics, metrics["segm"]), strict=True):
        file = tmp_path / f"run/results_{kind}.json"
        assert Counter(r["image_id"] for r in load(file)) == dict.fromkeys(IMAGE_IDS, 20)
        assert 0.05 < own["map"] < 0.95
        assert same(own, of_lvis_api(tmp_path / "truth.json", file, kind)), kind


def test_ids_that_are_text_stay_text(trained: Trained, tmp_path: Path) -> None:
    ids = ("391895", "17", "007", "3", "250")
    truth = truth_of(trained, ids)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    metrics = evaluated(trained, tmp_path)
    out = predicted(trained, tmp_path / "out", tmp_path / "truth.json")
    for file in (tmp_path / "run/results_bbox.json", out):
        assert {r["image_id"] for r in load(file)} == set(ids)
        assert same(metrics, of_pycocotools(tmp_path / "truth.json", file, "bbox"))


def test_classes_that_the_file_does_not_name_have_no_results(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = truth_of(trained)
    truth["categories"] = [c for c in truth["categories"] if c["name"] != "star"]
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] != CATEGORY_IDS["star"]]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    metrics = evaluated(trained, tmp_path)
    file = tmp_path / "run/results_bbox.json"
    assert {r["category_id"] for r in load(file)} <= {CATEGORY_IDS["circle"], CATEGORY_IDS["square"]}
    assert f"detections in 5 of 5 images: {file}; without star, which" in capsys.readouterr().out
    assert same(metrics, of_pycocotools(tmp_path / "truth.json", file, "bbox"))
    with pytest.raises(UserError, match=r"no category of the names \['star'\], which the checkpoint finds"):
        predicted(trained, tmp_path / "out", tmp_path / "truth.json")


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_other_formats_have_the_ids_of_their_conversion_to_coco(trained: Trained, tmp_path: Path, form: str) -> None:
    """VOC and YOLO have none of their own."""
    truth = truth_of(trained, (1, 2, 3, 4, 5))
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "images").symlink_to(trained.images)
    splits = [f"data.{s}_{key}={value}" for s in ("train", "val") for key, value in FILES.items()]
    there = ["from=custom", f"to={form}", f"source={tmp_path}", f"target={tmp_path}/{form}", *splits]
    back = [f"from={form}", "to=coco", f"source={tmp_path}/{form}", f"target={tmp_path}/coco"]
    assert data_command(["convert", *there]) == 0
    assert data_command(["convert", *back]) == 0
    metrics = evaluated(trained, tmp_path, f"data={form}", f"data.root={tmp_path}/{form}", "augment@data=small")
    (judge,) = (tmp_path / "coco").rglob("*val.json")
    assert same(metrics, of_pycocotools(judge, tmp_path / "run/results_bbox.json", "bbox"))


FILES = {"images": "images", "annotations": "truth.json"}


@pytest.mark.slow
def test_two_processes_write_one_file_with_each_image_once(trained: Trained, tmp_path: Path) -> None:
    """One of them sees an image of the other again, to have as many batches."""
    from test_eval import run

    (tmp_path / "truth.json").write_text(json.dumps(truth_of(trained)))
    options = [f"checkpoint={trained.checkpoint}", f"+data.val_annotations={tmp_path}/truth.json"]
    options += ["+data.eval_batch_size=1", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "run_dir=run"]
    done = run(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    records = load(tmp_path / "run/results_bbox.json")
    assert Counter(r["image_id"] for r in records) == dict.fromkeys(IMAGE_IDS, 100)
    judged = of_pycocotools(tmp_path / "truth.json", tmp_path / "run/results_bbox.json", "bbox")
    assert same(load(tmp_path / "run/metrics.json"), judged)


def prepared(trained: Trained, folder: Path) -> tuple[Path, Path]:
    """A folder of images and their image-info file."""
    images = folder / "images"
    images.mkdir()
    for path in trained.images.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    file = folder / "image_info.json"
    file.write_text(json.dumps({k: v for k, v in truth_of(trained).items() if k != "annotations"}))
    return images, file


def test_the_file_decides_which_images_are_meant(trained: Trained, tmp_path: Path) -> None:
    """Others in the folder are not touched, and names may have folders that the given one ends with."""
    images, file = prepared(trained, tmp_path)
    (images / "other.png").write_bytes(b"not of the file")
    info = load(file)
    for image in info["images"]:
        image["file_name"] = f"images/{image['file_name']}"
    info["images"] = info["images"][3:0:-1]
    file.write_text(json.dumps(info))
    records = load(predicted(trained, tmp_path / "out", file, f"images={images}", "batch_size=1"))
    assert list(dict.fromkeys(r["image_id"] for r in records)) == list(IMAGE_IDS[3:0:-1])


def test_the_threshold_is_for_pictures_alone(trained: Trained, tmp_path: Path) -> None:
    _, file = prepared(trained, tmp_path)
    out = predicted(trained, tmp_path / "out", file, "score_threshold=2", "pictures=true")
    assert len(load(out)) == 500
    assert {p.name for p in out.parent.glob("*.png")} == {f"{i}.png" for i in range(5)}
    everything = predicted(trained, tmp_path / "all", file, "score_threshold=0", "pictures=true")
    assert load(everything) == load(out)
    assert (everything.parent / "0.png").read_bytes() != (out.parent / "0.png").read_bytes()


def test_missing_images_stop_before_anything_is_computed(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, file = prepared(trained, tmp_path)
    (images / "2.png").unlink()
    options = [trained, tmp_path / "out", file, f"images={images}"]
    with pytest.raises(UserError, match=r"1 of 5 images of annotations=.* are not in .*: 2\.png; .*on_error=skip"):
        predicted(*options)
    assert not (tmp_path / "out").exists()
    records = load(predicted(*options, "on_error=skip"))
    assert {r["image_id"] for r in records} == set(IMAGE_IDS) - {IMAGE_IDS[2]}
    assert "500" not in (told := capsys.readouterr().out)
    assert "400 objects in 4 images, 1 skipped" in told


def test_a_part_of_the_results_is_not_called_as_the_whole(trained: Trained, tmp_path: Path) -> None:
    """Of images that do not decode, or have not the size that the file tells."""
    images, file = prepared(trained, tmp_path)
    options = [trained, tmp_path / "out", file, f"images={images}", "batch_size=1"]
    whole = load(predicted(*options))
    Image.new("RGB", (64, 96)).save(images / "3.png")
    words = r"3\.png holds 64x96 pixels, but the annotations say 128x96.*; 3 of 5 .* are in .*results_bbox\.part\.json"
    with pytest.raises(UserError, match=words):
        predicted(*options)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results_bbox.part.json"]
    assert load(tmp_path / "out/results_bbox.part.json") == whole[:300]
    assert len(load(predicted(*options, "on_error=skip"))) == 400
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results_bbox.json"]


def test_a_stored_raster_that_was_annotated_is_not_turned(trained: Trained, tmp_path: Path) -> None:
    """As in training: the size in the file decides, and not what a viewer shows."""
    images, file = prepared(trained, tmp_path)
    plain = load(predicted(trained, tmp_path / "plain", file, f"images={images}"))
    with Image.open(images / "0.png") as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(images / "0.png", exif=exif)
    assert load(predicted(trained, tmp_path / "turned", file, f"images={images}")) == plain


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": 17}, r"two images have the id 17"),
        ({"file_name": "3.png"}, r"two images have the file .*3\.png"),
        ({"id": "a"}, r"image 'a' \('0\.png'\): id is 'a', not a whole number"),
        ({"width": 0}, r"image 391895 \('0\.png'\): width is 0"),
    ],
)
def test_records_of_images_that_are_none_are_refused(
    trained: Trained, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    images, file = prepared(trained, tmp_path)
    info = load(file)
    info["images"][0] |= change
    file.write_text(json.dumps(info))
    with pytest.raises(UserError, match=words):
        predicted(trained, tmp_path / "out", file, f"images={images}")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("images=[0.png,1.png]", r"images=\[\.\.\.\]: with annotations=FILE give one folder"),
        ("images=nowhere", "images=nowhere is no folder: with annotations=FILE"),
        ("annotations=absent.json", r"annotation file absent\.json does not exist"),
    ],
)
def test_mistakes_are_explained(trained: Trained, tmp_path: Path, given: str, words: str) -> None:
    _, file = prepared(trained, tmp_path)
    with pytest.raises(UserError, match=words):
        predicted(trained, tmp_path / "out", file, given)


def test_no_input_is_overwritten(trained: Trained, tmp_path: Path) -> None:
    images, file = prepared(trained, tmp_path)
    for name in ("results_bbox.json", "results_bbox.part.json"):
        own = file.rename(tmp_path / name)
        content = own.read_bytes()
        with pytest.raises(UserError, match="is an input and would be overwritten"):
            predicted(trained, tmp_path, own, f"images={images}")
        assert own.read_bytes() == content
        file = own


def test_training_reads_no_file_without_annotations(trained: Trained, tmp_path: Path) -> None:
    _, file = prepared(trained, tmp_path)
    with pytest.raises(UserError, match="no list of objects under annotations"):
        evaluated(trained, tmp_path, f"+data.val_annotations={file}")
