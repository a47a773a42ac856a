"""Exported files: the numbers of the checkpoint that they were made of, in other runtimes and behind the same face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from export_cases import assert_near, assert_pairs, assert_same, assert_same_objects, exported, on_canvas
from torch import Tensor

import codetr
from codetr.application import compose
from codetr.errors import UserError
from codetr.eval import evaluate
from codetr.inference import Exported, Model
from codetr.inference.model import load_checkpoint
from codetr.predict import predict
from codetr.views import Tiles

if TYPE_CHECKING:
    from conftest import Trained


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_an_onnx_file_finds_what_the_checkpoint_finds(
    onnx_file: Path, eager: Model, photos: list[np.ndarray], batch: int
) -> None:
    """Batches of one size and of several, which are padded."""
    model = codetr.load(onnx_file)
    assert isinstance(model, Exported)
    assert (model.class_names, model.category_ids) == (eager.class_names, eager.category_ids)
    assert_same(model, eager, photos, batch)
    assert_same(model, eager, photos[::3], batch)


def test_tiles_are_cut_for_the_file_too(onnx_file: Path, small: Trained, photos: list[np.ndarray]) -> None:
    model, eager = codetr.load(onnx_file), codetr.load(small.checkpoint, device="cpu")
    assert isinstance(model, Exported)
    assert isinstance(eager, Model)
    model.views = eager.views = (Tiles(size=2 * model.about.least_side, batch_size=2),)
    wide = [np.tile(image, (1, 3, 1)) for image in photos[:2]]
    assert_same(model, eager, wide, batch=1)


def test_nothing_of_training_is_in_the_file(onnx_file: Path, eager: Model) -> None:
    sizes = {name: value.numel() * 4 for name, value in eager.detector.state_dict().items()}
    training = eager.detector.training_only_prefixes()
    needed = sum(size for name, size in sizes.items() if not name.startswith(training))
    assert sum(sizes.values()) > 1.2 * needed
    assert onnx_file.stat().st_size < 1.1 * needed
    assert str(Path(codetr.__file__).parent).encode() not in onnx_file.read_bytes()


def test_the_graph_says_what_goes_in_and_out(onnx_file: Path) -> None:
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    axes = {
        one.name: [axis.dim_param or axis.dim_value for axis in one.type.tensor_type.shape.dim]
        for one in (*model.graph.input, *model.graph.output)
    }
    assert axes == {
        "images": ["batch", 3, "32*rows", "32*columns"],
        "sizes": ["batch", 2],
        "boxes": ["batch", 100, 4],
        "scores": ["batch", 100],
        "labels": ["batch", 100],
    }
    assert {node.domain for node in model.graph.node} == {""}


def test_eval_of_the_file_has_the_mean_ap_of_the_checkpoint(
    small: Trained, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["trainer=cpu", "+data.num_workers=0", "~callbacks.pictures", "~callbacks.progress"]
    values = [
        evaluate(compose("eval", [f"checkpoint={path}", f"run_dir={path.suffix[1:]}", *options]))
        for path in (onnx_file, small.checkpoint)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-9)
    assert values[0] > 0.3
    report = json.loads((tmp_path / "onnx/metrics.json").read_text())
    assert report["step"] == 7


def test_predict_takes_the_file(small: Trained, onnx_file: Path, tmp_path: Path) -> None:
    given = [f"images={small.images}", "pictures=false", "score_threshold=0.02", "num_workers=0"]
    one, other = (
        json.loads(predict(compose("predict", [*given, f"checkpoint={path}", f"out={tmp_path / name}"])).read_text())
        for name, path in (("a", onnx_file), ("b", small.checkpoint))
    )
    assert len(one) == len(other) > 20
    for name in {record["image_id"] for record in other}:
        assert_same_objects(*(in_tensors([r for r in records if r["image_id"] == name]) for records in (one, other)))


def in_tensors(records: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
    keys = "bbox", "score", "category_id"
    boxes, scores, labels = (torch.tensor([record[key] for record in records]) for key in keys)
    return boxes, scores, labels


@pytest.fixture(scope="module")
def deformable(trained: Trained) -> Model:
    """A Co-Deformable-DETR, whose graph takes longer to export."""
    model = codetr.load(trained.checkpoint, device="cpu")
    assert isinstance(model, Model)
    return model


@pytest.mark.slow
def test_a_co_deformable_detr_in_onnx(
    trained: Trained, deformable: Model, photos: list[np.ndarray], tmp_path: Path
) -> None:
    model = codetr.load(exported(trained, tmp_path / "model.onnx"))
    for batch in (1, 3, 8):
        assert_same(model, deformable, photos, batch)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_openvino_finds_what_the_checkpoint_finds(
    trained: Trained, deformable: Model, photos: list[np.ndarray], tmp_path: Path, precision: str
) -> None:
    path = exported(trained, tmp_path / "model.xml", "format=openvino", f"precision={precision}")
    model = codetr.load(path)
    if precision == "fp32":
        for batch in (1, 3, 8):
            assert_same(model, deformable, photos, batch)
    else:
        assert_near(model, deformable, photos)


@pytest.mark.slow
def test_half_precision_finds_the_same_to_its_rounding(
    trained: Trained, photos: list[np.ndarray], tmp_path: Path
) -> None:
    """As the checkpoint does with weights of half precision, which selects other proposals than float32."""
    path = exported(trained, tmp_path / "model.onnx", "precision=fp16")
    kinds = {one.data_type for one in onnx.load(path).graph.initializer if len(one.dims) > 1}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert path.stat().st_size < 4e6
    assert_near(codetr.load(path), load_checkpoint(trained.checkpoint, device="cpu").half(), photos)


@pytest.mark.slow
def test_the_form_for_tensorrt_has_gathers_and_the_same_numbers(
    trained: Trained, deformable: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(trained, tmp_path / "model.onnx", "format=tensorrt", "size=[192,224]", "max_detections=30")
    assert "trtexec --onnx=" in capsys.readouterr().out
    assert not {"GridSample", "SequenceAt"} & {node.op_type for node in onnx.load(path).graph.node}
    model = codetr.load(path)
    assert isinstance(model, Exported)
    for count in (1, 3, 8):
        images, sizes, truth = on_canvas(deformable, count, (192, 224))
        assert_pairs(model.pairs(images, sizes), truth)
    large = np.zeros((100, 400, 3), np.uint8)
    with pytest.raises(UserError, match=r"takes images of 224x192 pixels, and behind its resize one has 384x96"):
        model.predict(large)
