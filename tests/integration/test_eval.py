"""The evaluation application, from its command line."""

import json
import os
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import pytest
import torch
from torchvision.ops import box_convert, box_iou

import forked
from codetr.application import compose
from codetr.errors import UserError
from codetr.eval import evaluate

if TYPE_CHECKING:
    from conftest import Trained

NUMBERS = ("map", "map_50", "map_75", "mar_1", "mar_100")


def run(folder: Path, *overrides: str) -> CompletedProcess[str]:
    return forked.run("codetr.eval", "trainer=cpu", *overrides, cwd=folder, env={**os.environ, "COLUMNS": "100"})


def numbers(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_alike_on_one_and_two_processes(trained: "Trained", tmp_path: Path) -> None:
    options = [f"checkpoint={trained.checkpoint}"]
    alone = run(tmp_path, *options, "run_dir=alone")
    assert alone.returncode == 0, alone.stderr
    assert "AP per class" in alone.stdout
    one = numbers(tmp_path / "alone")
    assert one["map"] > 0.5
    assert (one["step"], one["weights"], one["split"], one["images"]) == (7, "ema", "val", 5)
    assert set(one["map_per_class"]) == {"circle", "square", "star"}
    assert {"predictions.png", "pr_curves.png"} <= {p.name for p in (tmp_path / "alone").iterdir()}

    both = run(tmp_path, *options, "trainer=ddp", "trainer.accelerator=cpu", "run_dir=both")
    assert both.returncode == 0, both.stderr
    two = numbers(tmp_path / "both")
    assert {k: two[k] for k in NUMBERS} == pytest.approx({k: one[k] for k in NUMBERS}, abs=1e-9)

    raw = run(tmp_path, *options, "weights=raw", "split=train", "+data.eval_batch_size=2", "run_dir=raw")
    assert raw.returncode == 0, raw.stderr
    assert numbers(tmp_path / "raw")["map"] < one["map"] / 2
    assert numbers(tmp_path / "raw")["split"] == "train"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "checkpoint is not given"),
        (["checkpoint=best.ckpt", "weights=best"], "weights=best: must be one of ema, raw"),
        (["checkpoint=best.ckpt", "split=test"], "split=test: must be one of val, train"),
        (["checkpoint=absent.ckpt"], "no such checkpoint"),
    ],
)
def test_mistakes_are_explained(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        evaluate(compose("eval", [*overrides, "run_dir=nowhere"]))


def test_hostile_class_names_are_evaluated_and_obeyed_by_none(
    trained: "Trained", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of the same set with plain names."""
    names = ["two\nlines", "\x1b[2J[bold]red[/]", "$\\frac{1}{0}$ <b>../../x"]
    content = torch.load(trained.checkpoint, weights_only=True)
    truth = json.loads((trained.images.parent / "truth.json").read_text())
    for category in truth["categories"]:
        category["name"] = names[content["codetr"]["class_names"].index(category["name"])]
    content["codetr"]["class_names"] = names
    content["codetr"]["config"]["data"]["val_annotations"] = f"{tmp_path}/truth.json"
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    torch.save(content, tmp_path / "hostile.ckpt")
    found = []
    for checkpoint in (trained.checkpoint, tmp_path / "hostile.ckpt"):
        run_dir = tmp_path / checkpoint.stem
        evaluate(compose("eval", [f"checkpoint={checkpoint}", "trainer=cpu", f"run_dir={run_dir}"]))
        found.append(numbers(run_dir))
    assert {k: found[0][k] for k in NUMBERS} == {k: found[1][k] for k in NUMBERS}
    assert set(found[1]["map_per_class"]) == set(names)
    told = capsys.readouterr().out
    assert "two\\nlines" in told
    assert "\x1b[2J" not in told
    assert "[bold]red[/]" in told
    assert (tmp_path / "hostile/pr_curves.png").is_file()


def overlaps(folder: Path) -> float:
    """The largest IoU of two detections of one class in one image, in the file for COCO's server."""
    found: dict[tuple[int, int], list[list[float]]] = {}
    for one in json.loads((folder / "results_bbox.json").read_text()):
        found.setdefault((one["image_id"], one["category_id"]), []).append(one["bbox"])
    most = 0.0
    for boxes in found.values():
        corners = box_convert(torch.tensor(boxes, dtype=torch.float64), "xywh", "xyxy")
        most = max(most, float(box_iou(corners, corners).fill_diagonal_(0).max()))
    return most


def test_another_suppression_is_chosen_for_a_trained_model(trained: "Trained", tmp_path: Path) -> None:
    """Group DETR's figure 1: the same training, with suppression and without."""
    for name, choice in {"own": [], "nms": ["postprocess=nms", "postprocess.suppression.iou=0.1"]}.items():
        options = [f"checkpoint={trained.checkpoint}", "trainer=cpu", f"run_dir={tmp_path / name}"]
        evaluate(compose("eval", [*options, *choice]))
    assert overlaps(tmp_path / "own") > 0.1 >= overlaps(tmp_path / "nms")
