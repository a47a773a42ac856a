"""An official checkpoint becomes one of ours, finds objects in pictures, and is fine-tuned on other classes."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import codetr
import forked
from toy import data_overrides, environment, make_coco

BUNDLE = "co_dino_5scale_swin"
NAMES = ["red", "two", "three", "four", "five", "six"]
SMALL = [
    "model.width=64",
    "model.ffn_width=128",
    "model.detector.encoder.num_layers=2",
    "model.detector.encoder.checkpointed_layers=0",
    "model.detector.decoder.num_layers=2",
    "model.detector.main.num_queries=50",
    "model.detector.heads.faster_rcnn.box_head.hidden_width=48",
    "++model.detector.backbone.arguments.embed_dim=8",
    "++model.detector.backbone.arguments.depths=[2,2,2,2]",
    "++model.detector.backbone.arguments.num_heads=[1,2,2,4]",
    "++model.detector.backbone.arguments.window_size=4",
]
CONFIG = ["config=co_dino_5scale_swin_large_1x_coco", "overrides=[" + ",".join(f"'{value}'" for value in SMALL) + "]"]


def run(folder: Path, module: str, *arguments: str) -> CompletedProcess[str]:
    return forked.run(f"codetr.{module}", *arguments, cwd=folder, env=environment())


def convert(folder: Path, *arguments: str) -> CompletedProcess[str]:
    return run(folder, "convert", *arguments)


@pytest.fixture(scope="module")
def converted(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with official.pth, as the official code saves it, and ours.ckpt made of it."""
    folder = tmp_path_factory.mktemp("converted")
    weights = {name: tensor.float() for name, tensor in load_file(official / BUNDLE / "weights.safetensors").items()}
    torch.save({"meta": {"CLASSES": tuple(NAMES), "epoch": 12}, "state_dict": weights}, folder / "official.pth")
    done = convert(folder, "source=official.pth", "out=ours.ckpt", *CONFIG)
    assert done.returncode == 0, done.stderr
    assert "taken as they are" in done.stdout
    assert "left out" in done.stdout
    return folder


class AsTheyAre(torch.nn.Module):
    def forward(self, images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return images


def test_the_detector_is_the_official_one(official: Path, converted: Path) -> None:
    """From the file alone to the recorded detections of the official code's decoder."""
    detector = codetr.load(converted / "ours.ckpt", device="cpu").detector
    inputs, forward = (load_file(official / BUNDLE / f"{name}.safetensors") for name in ("inputs", "forward"))
    rows, columns = (torch.arange(n) for n in inputs["img"].shape[2:])
    extent = inputs["img_shape"]
    padding = (rows >= extent[:, :1])[:, :, None] | (columns >= extent[:, 1:])[:, None, :]
    detector.backbone.normalize = AsTheyAre()  # the recorded images are normalised
    with torch.no_grad():
        found = detector.detect(inputs["img"].float(), padding)
    torch.testing.assert_close(found.logits, forward["cls_logits"][-1], rtol=0, atol=7e-6)
    torch.testing.assert_close(found.boxes, forward["boxes"][-1], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def found(converted: Path) -> list[dict]:
    """What codetr.predict finds in one picture, best first."""
    (converted / "photos").mkdir()
    Image.effect_noise((90, 70), 80).convert("RGB").save(converted / "photos" / "one.jpg")
    done = run(converted, "predict", "checkpoint=ours.ckpt", "images=photos", "score_threshold=0", "num_workers=0")
    assert done.returncode == 0, done.stderr
    return json.loads((converted / "predictions" / "predictions.json").read_text())


def test_it_finds_objects_in_pictures(found: list[dict]) -> None:
    assert len(found) > 10
    assert {one["category_name"] for one in found} <= set(NAMES)


@pytest.mark.slow
def test_it_is_evaluated_on_a_data_set(converted: Path, found: list[dict]) -> None:
    """Whose objects are the best of what it finds, and whose categories have another order than its classes."""
    ids = {name: 9 - label for label, name in enumerate(NAMES)}
    objects = [{"category_id": ids[one["category_name"]], "bbox": one["bbox"]} for one in found[:3]]
    truth = {
        "images": [{"id": 4, "file_name": "one.jpg", "width": 90, "height": 70}],
        "annotations": [{"id": 1 + i, "image_id": 4, **one} for i, one in enumerate(objects)],
        "categories": [{"id": number, "name": name} for name, number in reversed(ids.items())],
    }
    (converted / "truth.json").write_text(json.dumps(truth))
    data = ["data=custom", "data.val_images=photos", "data.val_annotations=truth.json", "data.num_workers=0"]
    data += ["data.size_divisor=1"]  # as the official recipe and with it codetr.predict: padding changes what is found
    done = run(converted, "eval", "checkpoint=ours.ckpt", *data, "trainer=cpu", "run_dir=evaluated")
    assert done.returncode == 0, done.stderr
    assert "AP per class" in done.stdout
    numbers = json.loads((converted / "evaluated" / "metrics.json").read_text())
    assert (numbers["images"], set(numbers["map_per_class"])) == (1, set(NAMES))
    assert numbers["map"] == pytest.approx(1)


def test_it_is_fine_tuned_on_other_classes(converted: Path) -> None:
    """One step. The class that both know keeps its row."""
    data = converted / "data"
    make_coco(data, train=2, val=1)
    done = run(
        converted,
        "train",
        "experiment=official/co_dino_5scale_swin_large_1x_coco",
        *SMALL,
        *data_overrides(data),
        "model.detector.backbone.pretrained=false",
        "initialise.checkpoint=ours.ckpt",
        "trainer=cpu",
        "trainer.max_epochs=1",
        "trainer.num_sanity_val_steps=0",
        "trainer.enable_model_summary=false",
        "optimizer.lr=0",
        "~callbacks.pictures",
        "~callbacks.report",
        "run_dir=tuned",
    )
    assert done.returncode == 0, done.stderr
    assert "moved by class name" in " ".join(done.stdout.split())
    before, after = (codetr.load(converted / f).detector for f in ("ours.ckpt", "tuned/checkpoints/best.ckpt"))
    row = NAMES.index("red")
    assert torch.equal(before.decoder.class_heads[0].weight[row], after.decoder.class_heads[0].weight[0])
    assert len(after.decoder.class_heads[0].weight) == 3
    assert torch.equal(before.encoder.level_embedding, after.encoder.level_embedding)


def test_the_way_back_is_exact(converted: Path) -> None:
    done = convert(converted, "source=ours.ckpt", "out=back.pth")
    assert done.returncode == 0, done.stderr
    given, back = (torch.load(converted / f, weights_only=True) for f in ("official.pth", "back.pth"))
    assert back["meta"]["CLASSES"] == tuple(NAMES)
    constants = {name for name in given["state_dict"] if name.endswith("relative_position_index")}
    assert back["state_dict"].keys() == given["state_dict"].keys() - constants
    assert all(torch.equal(back["state_dict"][name], given["state_dict"][name]) for name in back["state_dict"])


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch exploded",)


def test_what_is_refused(converted: Path) -> None:
    state = torch.load(converted / "official.pth", weights_only=True)["state_dict"]
    extra = {**state, "query_head.new_thing.weight": torch.zeros(3)}
    extra.pop("rpn_head.rpn_conv.bias")
    torch.save({"state_dict": extra}, converted / "changed.pth")
    done = convert(converted, "source=changed.pth", "out=changed.ckpt", *CONFIG)
    assert done.returncode == 2
    assert "unexpected (1): query_head.new_thing.weight" in done.stderr
    assert "missing (1): heads.faster_rcnn.rpn.conv.bias" in done.stderr
    assert not (converted / "changed.ckpt").exists()

    torch.save({"state_dict": state}, converted / "nameless.pth")
    done = convert(converted, "source=nameless.pth", "out=nameless.ckpt", *CONFIG)
    assert done.returncode == 2
    assert "6 classes and does not name them: add class_names=" in done.stderr

    done = convert(converted, "source=official.pth", "out=ours.ckpt", *CONFIG)
    assert done.returncode == 2
    assert "overwrite=true" in done.stderr

    (converted / "bomb.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    done = convert(converted, "source=bomb.pth", "out=bomb.ckpt")
    assert done.returncode == 2
    assert "run code when they are read" in done.stderr
    assert not (converted / "exploded").exists()
    assert "Traceback" not in done.stderr
