"""The prediction application, from its command line."""

import json
import os
import resource
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from omegaconf import open_dict
from PIL import Image

import forked
from codetr.application import compose
from codetr.errors import UserError
from codetr.eval import evaluate
from codetr.predict import predict

if TYPE_CHECKING:
    from conftest import Trained


def run(folder: Path, *overrides: str) -> CompletedProcess[str]:
    return forked.run("codetr.predict", "num_workers=0", "device=cpu", *overrides, cwd=folder, env=os.environ)


def test_files_in_annotated_pictures_and_results_out(trained: "Trained", tmp_path: Path) -> None:
    images = tmp_path / "photos"
    images.mkdir()
    for path in trained.images.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "broken.png").write_bytes(b"broken")
    options = [f"checkpoint={trained.checkpoint}", f"images={images}", "score_threshold=0"]
    with pytest.raises(UserError, match=r"broken\.png.*on_error=skip"):
        predict(compose("predict", [*options, "num_workers=0", "device=cpu", f"out={tmp_path}/stopped"]))

    done = run(tmp_path, *options, "on_error=skip", "out=found")
    assert done.returncode == 0, done.stderr
    assert "1 skipped" in done.stdout
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == [
        *(f"{i}.png" for i in range(5)),
        "predictions.json",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found", "photos", "stopped"]  # no logs
    results = json.loads((tmp_path / "found" / "predictions.json").read_text())
    truth = json.loads((trained.images.parent / "truth.json").read_text())
    names = {c["id"]: c["name"] for c in truth["categories"]}
    files = {i["id"]: i["file_name"] for i in truth["images"]}
    for annotation in truth["annotations"]:  # the best detections of the same weights
        same = [r for r in results if r["file_name"] == files[annotation["image_id"]]]
        same = [r for r in same if r["category_name"] == names[annotation["category_id"]]]
        assert min(np.abs(np.subtract(r["bbox"], annotation["bbox"])).max() for r in same) < 0.01
    with Image.open(tmp_path / "found" / "0.png") as picture:
        assert picture.size == (512, 384)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["images=photos"], "checkpoint is not given"),
        (["checkpoint=best.ckpt"], "images is not given"),
        (["checkpoint=absent.ckpt", "images=photos"], "no such checkpoint"),
        (["checkpoint=best.ckpt", "images=photos", "on_error=ignore"], "on_error=ignore: must be one of stop, skip"),
    ],
)
def test_mistakes_are_explained(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        predict(compose("predict", overrides))


def test_a_mistake_ends_the_command_with_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "checkpoint=absent.ckpt", "images=photos")
    assert result.returncode == 2
    assert result.stderr == "error: absent.ckpt: no such checkpoint\n"


def load(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def options(trained: "Trained", out: Path, *more: str) -> list[str]:
    return [f"checkpoint={trained.checkpoint}", "score_threshold=0", "num_workers=0", "device=cpu", f"out={out}", *more]


@pytest.fixture
def knowing(trained: "Trained", tmp_path: Path) -> Path:
    """The checkpoint as codetr.train writes it: with the category ids of its data set."""
    content = torch.load(trained.checkpoint, weights_only=True)
    content["codetr"]["category_ids"] = [9, 8, 7]
    torch.save(content, tmp_path / "knowing.ckpt")
    return tmp_path / "knowing.ckpt"


def test_pycocotools_finds_what_the_evaluation_reports(
    trained: "Trained", knowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Truth of which the model finds a part, with category ids in reverse order and images from 100 on."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = load(trained.images.parent / "truth.json")
    for annotation in truth["annotations"][::2]:
        annotation["bbox"] = [side + 3 for side in annotation["bbox"]]
    for annotation in truth["annotations"][::3]:
        annotation["category_id"] = 7 + (annotation["category_id"] - 6) % 3
    file = tmp_path / "moved.json"
    file.write_text(json.dumps(truth))
    monkeypatch.chdir(tmp_path)
    evaluated = compose(
        "eval", [f"checkpoint={knowing}", f"+data.val_annotations={file}", "trainer=cpu", "run_dir=eval"]
    )
    with open_dict(evaluated):
        evaluated.callbacks, evaluated.trainer.default_root_dir = {}, "eval"
    expected = evaluate(evaluated)
    assert 0.05 < expected < 0.95
    capsys.readouterr()
    where = [f"images={trained.images}", "pictures=false"]
    with_file = predict(compose("predict", options(trained, tmp_path / "a", *where, f"annotations={file}")))
    by_itself = predict(compose("predict", options(trained, tmp_path / "b", *where, f"checkpoint={knowing}")))
    assert "category ids" not in capsys.readouterr().out
    assert {r["image_id"] for r in load(with_file)} == {i["id"] for i in truth["images"]}
    numbers = {i["file_name"]: i["id"] for i in truth["images"]}
    renumbered = [{**r, "image_id": numbers[r["file_name"]]} for r in load(by_itself)]
    coco = COCO(str(file))
    for results in (load(with_file), renumbered):
        judge = COCOeval(coco, coco.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        assert judge.stats[0] == pytest.approx(expected, abs=1e-6)


def test_a_checkpoint_without_category_ids_says_so(
    trained: "Trained", tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = f"images=[{trained.images}/0.png,{trained.images}/1.png]"
    results = load(predict(compose("predict", options(trained, tmp_path / "out", images, "pictures=false"))))
    assert "does not tell the category ids of its data set" in capsys.readouterr().out
    assert {r["category_id"] for r in results} <= {0, 1, 2}
    assert {r["file_name"] for r in results} == {"0.png", "1.png"}


def test_what_was_found_before_an_error_is_kept(trained: "Trained", tmp_path: Path) -> None:
    images, out = tmp_path / "photos", tmp_path / "out"
    images.mkdir()
    out.mkdir()
    for path in trained.images.iterdir():
        (images / path.name).symlink_to(path)
    (images / "3.jpg").write_bytes(b"broken")
    (out / "predictions.json").write_text("an older run")
    more = [f"images={images}", "batch_size=2", "pictures=false"]
    with pytest.raises(UserError, match=r"3\.jpg cannot be decoded.*on_error=skip.*; 3 of 6 images were done before"):
        predict(compose("predict", options(trained, out, *more)))
    assert {r["file_name"] for r in load(out / "predictions.json")} == {"0.png", "1.png", "2.png"}
    assert [p.name for p in out.iterdir()] == ["predictions.json"]


def test_a_full_disk_ends_with_a_sentence_and_the_results(trained: "Trained", tmp_path: Path) -> None:
    """As on a full disk: the kernel refuses files above some bytes, which is more than the results of two images."""
    more = [f"images={trained.images}", "batch_size=1", "pictures=false"]
    whole = load(predict(compose("predict", options(trained, tmp_path / "whole", *more))))
    size = (tmp_path / "whole" / "predictions.json").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*: File too large; \d of 5 images were done before"):
            predict(compose("predict", options(trained, tmp_path / "out", *more)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = load(tmp_path / "out" / "predictions.json")
    assert 0 < len(found) < len(whole)
    assert found == whole[: len(found)]


def test_the_thinnest_images_go_through_the_detector(trained: "Trained", tmp_path: Path) -> None:
    sizes = ((10, 20000), (200, 1), (1, 1), (20000, 10))
    for width, height in sizes:
        Image.new("RGB", (width, height), (200, 30, 30)).save(tmp_path / f"{width}.png")
    results = load(
        predict(compose("predict", options(trained, tmp_path / "out", f"images={tmp_path}", "pictures=false")))
    )
    for width, height in sizes:
        boxes = np.array([r["bbox"] for r in results if r["file_name"] == f"{width}.png"])
        assert len(boxes)
        assert (boxes >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= [width + 1e-3, height + 1e-2]).all()


def test_further_formats_lie_beside_the_predictions(trained: "Trained", tmp_path: Path) -> None:
    """With the ids of the annotation file where one is given."""
    more = [f"images={trained.images}", "pictures=false", "score_threshold=0.02"]
    path = predict(compose("predict", [*options(trained, tmp_path / "a", *more), "formats=[csv,yolo,crops]"]))
    found = load(path)
    rows = (path.parent / "predictions.csv").read_text().splitlines()
    assert len(rows) == 1 + len(found) > 5
    assert len(list((path.parent / "crops").rglob("*.jpg"))) == len(found)
    assert {file.name for file in (path.parent / "yolo" / "labels").iterdir()} == {f"{i}.txt" for i in range(5)}
    ids = f"annotations={trained.images.parent}/truth.json"
    path = predict(compose("predict", [*options(trained, tmp_path / "b", *more), ids, "formats=csv"]))
    rows = (path.parent / "predictions.csv").read_text().splitlines()[1:]
    assert {row.split(",")[0] for row in rows} <= {str(number) for number in range(100, 105)}
    assert len(load(path)) > len(rows) == len(found)


def test_a_film_leaves_lines_and_a_film(trained: "Trained", tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="not installed: codetr[video]")
    with av.open(str(tmp_path / "film.mp4"), "w") as output:
        stream = output.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 128, 96
        stream.pix_fmt = "yuv420p"
        for file in sorted(trained.images.iterdir()):
            frame = av.VideoFrame.from_ndarray(np.asarray(Image.open(file)), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    more = [f"images={tmp_path}/film.mp4", "every=2", "track=true"]
    path = predict(compose("predict", options(trained, tmp_path / "out", *more)))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["frame"] for line in lines] == [0, 2, 4]
    assert all("track_id" in one for line in lines for one in line["objects"])
    assert sorted(file.name for file in path.parent.iterdir()) == ["film.jsonl", "film.mp4"]
    with pytest.raises(UserError, match="annotations and formats are for images"):
        predict(compose("predict", [*options(trained, tmp_path / "out", *more), "formats=[csv]"]))
