"""Reading checkpoints, and starting from a detector of other classes."""

import os
from pathlib import Path

import pytest
import torch

import codetr
from codetr.application import plain
from codetr.checkpoint import TRAINING_ONLY, Checkpoint, initialise_from, load_weights
from codetr.errors import UserError
from codetr.models.detector import Detector
from codetr.nn.class_rows import declared_rows
from toy_model import compose, detector

OLD, NEW = ("cat", "dog", "fish"), ("fish", "cow", "cat", "bird")


def numbered(model: Detector) -> dict[str, torch.Tensor]:
    """Every entry of every tensor is another number, so that a wrong row is seen."""
    return {n: (torch.arange(t.numel()).view(t.shape) + 0.5).to(t.dtype) for n, t in model.state_dict().items()}


def rows(name: str) -> tuple[int, int] | None:
    """(per class, without class), written down by hand for the toy detector."""
    if name.startswith(("decoder.class_heads.", "heads.atss.predictor.classes.")):
        return 1, 0
    if name.startswith("heads.faster_rcnn.") and ".classes." in name:
        return 1, 1
    if name.startswith("heads.faster_rcnn.") and ".deltas." in name and "rpn" not in name:
        return 4, 0
    return None


@pytest.mark.parametrize("new_names", [NEW, ("dog", "fish", "cat")])
def test_class_rows_follow_their_names(new_names: tuple[str, ...]) -> None:
    old = numbered(detector(OLD))
    model = detector(new_names)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = initialise_from(model, Checkpoint(Path("old.ckpt"), old, class_names=OLD), new_names)
    moved = 0
    for name, tensor in model.state_dict().items():
        layout = rows(name)
        if name.startswith("queries.main.class_head."):  # object or background, told by the first row
            assert torch.equal(tensor[:3], old[name][:3])
            continue
        if layout is None:
            assert torch.equal(tensor, old[name]), name
            continue
        moved += 1
        size, rest = layout
        for label, class_name in enumerate(new_names):
            got = tensor[label * size : (label + 1) * size]
            if class_name in OLD:
                source = OLD.index(class_name) * size
                assert torch.equal(got, old[name][source : source + size]), (name, class_name)
            else:
                assert torch.equal(got, fresh[name][label * size : (label + 1) * size]), (name, class_name)
        if rest:
            assert torch.equal(tensor[-1], old[name][-1])
    assert moved == 10
    shared = len(set(OLD) & set(new_names))
    assert len(report.special.pop(f"moved by class name ({shared} classes in common)")) == moved
    assert len(report.taken) + moved == len(old)
    assert not report.missing + report.unexpected + report.misshapen + list(report.special)


def test_spelling_does_not_make_a_class_another_one() -> None:
    """As COCO, LVIS and Objects365 write the same class."""
    old = numbered(detector(("traffic light", "dog", "stop_sign")))
    names = ("Stop Sign", "Traffic Light", "cow")
    model = detector(names)
    report = initialise_from(
        model, Checkpoint(Path("old"), old, class_names=("traffic light", "dog", "stop_sign")), names
    )
    expected = old["decoder.class_heads.0.weight"][[2, 0]]
    assert torch.equal(model.decoder.class_heads[0].weight[:2], expected)
    assert list(report.special) == ["moved by class name (2 classes in common)"]


def test_unknown_class_names_of_another_number_start_fresh() -> None:
    model = detector(NEW)
    fresh = model.decoder.class_heads[0].weight.clone()
    report = initialise_from(model, Checkpoint(Path("old"), numbered(detector(OLD))), NEW)
    assert torch.equal(model.decoder.class_heads[0].weight, fresh)
    assert len(report.special["re-initialised, class names unknown"]) == 10


def test_training_only_parts_may_differ_others_not() -> None:
    plain_model = "model/auxiliary_head=[]"
    whole, bare = detector(OLD), detector(OLD, plain_model)
    report = initialise_from(detector(OLD), Checkpoint(Path("x"), bare.state_dict(), class_names=OLD), OLD)
    assert report.special[TRAINING_ONLY]
    report = initialise_from(detector(OLD, plain_model), Checkpoint(Path("x"), whole.state_dict()), OLD)
    assert report.special[TRAINING_ONLY]
    weights = {**whole.state_dict(), "decoder.what.weight": torch.zeros(1)}
    weights["encoder.level_embedding"] = torch.zeros(9, 9)
    del weights["decoder.layers.0.norm1.weight"]
    for part in ("decoder.what.weight", "decoder.layers.0.norm1.weight", r"level_embedding \[9, 9\] for \[4, 32\]"):
        with pytest.raises(UserError, match=part):
            initialise_from(detector(OLD), Checkpoint(Path("x"), weights), OLD)
    report = initialise_from(detector(OLD), Checkpoint(Path("x"), weights), OLD, strict=False)
    assert report.missing == ["decoder.layers.0.norm1.weight"]
    assert report.misshapen == ["encoder.level_embedding [9, 9] for [4, 32]"]
    assert report.table("x").row_count == 4


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_files_that_are_no_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": detector(OLD).state_dict()}, "good.ckpt")
    content = Path("good.ckpt").read_bytes()
    Path("half.ckpt").write_bytes(content[: len(content) // 2])
    Path("text.ckpt").write_text("hello")
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": Malicious()}, "bad.ckpt")
    torch.save([1, 2], "list.ckpt")
    torch.save({"epoch": 3}, "other.ckpt")
    for name in ("half", "text", "empty", "bad", "list", "other", "absent"):
        with pytest.raises(UserError, match=f"{name}.ckpt"):
            load_weights(f"{name}.ckpt")
    assert not Path("executed").exists()
    assert len(load_weights("good.ckpt").weights) == len(detector(OLD).state_dict())


def test_load_rebuilds_the_detector_from_the_file_alone(tmp_path: Path) -> None:
    model = detector(OLD).eval()
    config = plain(compose("model.num_classes=3"))
    average = {
        name: tensor * 0.5 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    torch.save(
        {
            "state_dict": {f"detector.{name}": tensor for name, tensor in model.state_dict().items()},
            "ema": {"updates": 1, "weights": {n: t for n, t in average.items() if t.is_floating_point()}},
            "codetr": {"config": config, "class_names": list(OLD)},
        },
        tmp_path / "x.ckpt",
    )
    for weights, expected in (("ema", average), ("raw", model.state_dict())):
        loaded = codetr.load(tmp_path / "x.ckpt", device="cpu", weights=weights).detector
        assert not loaded.training
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    assert load_weights(tmp_path / "x.ckpt").class_names == OLD


def test_every_layer_that_grows_with_the_classes_declares_how() -> None:
    """Against the shapes of detectors of 3 and of 5 classes: all heads, denoising, first stage by class, masks."""
    heads = "[faster_rcnn_small,atss,retinanet,fcos,gfl,paa,mask_rcnn_small]"
    more = (
        "model/mask_head=refine_mask",
        "model.detector.mask_head.iou.hidden_width=16",
        "+model/query@model.detector.queries.denoising=denoising",
        "model.detector.main.class_agnostic=false",
        "model/position@model.detector.decoder.query_position=reference",
    )
    few, many = (detector(tuple("abcde")[:number], f"model/auxiliary_head={heads}", *more) for number in (3, 5))
    declared, sizes = declared_rows(many), few.state_dict()
    grown = {name: len(sizes[name]) for name, tensor in many.state_dict().items() if tensor.shape != sizes[name].shape}
    assert len(grown) > 30
    assert {name for name, own in declared.items() if not own.agnostic} == set(grown)
    assert all(declared[name].count(3) == rows for name, rows in grown.items())


def test_each_anchor_of_a_cell_has_a_row_per_class() -> None:
    old, model = detector(OLD, "model/auxiliary_head=[retinanet]"), detector(NEW, "model/auxiliary_head=[retinanet]")
    weights, fresh = numbered(old), {name: t.clone() for name, t in model.state_dict().items()}
    initialise_from(model, Checkpoint(Path("old.ckpt"), weights, class_names=OLD), NEW)
    name = "heads.retinanet.predictor.classes.bias"
    found, before, start = model.state_dict()[name], weights[name], fresh[name]
    anchors = len(before) // len(OLD)
    assert anchors == 9
    for anchor in range(anchors):
        for label, class_name in enumerate(NEW):
            place = anchor * len(NEW) + label
            known = class_name in OLD
            expected = before[anchor * len(OLD) + OLD.index(class_name)] if known else start[place]
            assert found[place] == expected
