"""Exported files: the numbers of the checkpoint that they were made of, in other runtimes and behind the same face."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import codetr
from codetr.application import compose
from codetr.errors import UserError
from codetr.eval import evaluate
from codetr.export import export
from codetr.exporting.graph import Canvas
from codetr.inference import Exported, Model
from codetr.inference.about import KEY, About
from codetr.inference.model import load_checkpoint
from codetr.predict import predict
from codetr.tiles import Tiles
from codetr.types import Detections
from toy_model import detector

if TYPE_CHECKING:
    from conftest import Trained

SIZES = ((96, 128), (128, 100), (70, 160))  # of images; behind the resize some are wide, some high


def exported(trained: Trained, out: Path, *overrides: str) -> Path:
    return export(compose("export", [f"checkpoint={trained.checkpoint}", f"out={out}", *overrides]))


@pytest.fixture(scope="module")
def onnx_file(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(trained, tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.fixture(scope="module")
def eager(trained: Trained) -> Model:
    model = codetr.load(trained.checkpoint, device="cpu")
    assert isinstance(model, Model)
    return model


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    pixels = (rng.integers(0, 256, (6, 8, 3), np.uint8) for _ in range(8))
    sizes = (SIZES[i % len(SIZES)] for i in range(8))
    return [np.asarray(Image.fromarray(p).resize((w, h))) for p, (h, w) in zip(pixels, sizes, strict=True)]


def assert_same(model: Model | Exported, eager: Model, images: list[np.ndarray], batch: int) -> None:
    """Boxes within 1e-3 pixel, scores within 1e-5, in the same order."""
    found, truth = (one.predict(images, score_threshold=0, batch_size=batch) for one in (model, eager))
    assert len(found) == len(truth) == len(images)
    for one, true in zip(found, truth, strict=True):
        assert len(one) == len(true) > 20
        assert torch.equal(one.labels, true.labels)
        torch.testing.assert_close(one.scores, true.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.boxes_xyxy, true.boxes_xyxy, rtol=0, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_an_onnx_file_finds_what_the_checkpoint_finds(
    onnx_file: Path, eager: Model, images: list[np.ndarray], batch: int
) -> None:
    """Batches of one size and of several, which are padded."""
    model = codetr.load(onnx_file)
    assert isinstance(model, Exported)
    assert (model.class_names, model.category_ids) == (eager.class_names, eager.category_ids)
    assert_same(model, eager, images, batch)
    assert_same(model, eager, images[::3], batch)


def test_tiles_are_cut_for_the_file_too(onnx_file: Path, trained: Trained, images: list[np.ndarray]) -> None:
    model, eager = codetr.load(onnx_file), codetr.load(trained.checkpoint, device="cpu")
    assert isinstance(model, Exported)
    assert isinstance(eager, Model)
    model.tiles = eager.tiles = Tiles(size=model.about.least_side, overlap=0.25, iou=0.5, batch_size=2)
    wide = [np.tile(image, (1, 3, 1)) for image in images[:2]]
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
    trained: Trained, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["trainer=cpu", "+data.num_workers=0", "~callbacks.pictures", "~callbacks.progress"]
    values = [
        evaluate(compose("eval", [f"checkpoint={path}", f"run_dir={path.suffix[1:]}", *options]))
        for path in (onnx_file, trained.checkpoint)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-9)
    assert values[0] > 0.5
    report = json.loads((tmp_path / "onnx/metrics.json").read_text())
    assert report["step"] == 7


def test_predict_takes_the_file(trained: Trained, onnx_file: Path, tmp_path: Path) -> None:
    given = [f"images={trained.images}", "pictures=false", "score_threshold=0.02", "num_workers=0"]
    one, other = (
        json.loads(predict(compose("predict", [*given, f"checkpoint={path}", f"out={tmp_path / name}"])).read_text())
        for name, path in (("a", onnx_file), ("b", trained.checkpoint))
    )
    assert [r["category_name"] for r in one] == [r["category_name"] for r in other]
    assert np.allclose([r["bbox"] for r in one], [r["bbox"] for r in other], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_openvino_finds_what_the_checkpoint_finds(
    trained: Trained, eager: Model, images: list[np.ndarray], tmp_path: Path, precision: str
) -> None:
    path = exported(trained, tmp_path / "model.xml", "format=openvino", f"precision={precision}")
    model = codetr.load(path)
    if precision == "fp32":
        for batch in (1, 3, 8):
            assert_same(model, eager, images, batch)
    else:
        assert_near(model, eager, images)


@pytest.mark.slow
def test_half_precision_finds_the_same_to_its_rounding(
    trained: Trained, images: list[np.ndarray], tmp_path: Path
) -> None:
    """As the checkpoint does with weights of half precision, which selects other proposals than float32."""
    path = exported(trained, tmp_path / "model.onnx", "precision=fp16")
    kinds = {one.data_type for one in onnx.load(path).graph.initializer if len(one.dims) > 1}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert path.stat().st_size < 4e6
    assert_near(codetr.load(path), load_checkpoint(trained.checkpoint, device="cpu").half(), images)


def assert_near(model: Model | Exported, other: Model, images: list[np.ndarray]) -> None:
    """As half precision rounds: for each of the ten best one of its class, half a pixel beside it at the most."""
    for one, true in zip(*(m.predict(images, score_threshold=0) for m in (model, other)), strict=True):
        torch.testing.assert_close(one.scores[:10], true.scores[:10], rtol=0, atol=2e-2)
        for box, label in zip(true.boxes_xyxy[:10], true.labels, strict=False):
            assert (one.boxes_xyxy[one.labels == label] - box).abs().amax(1).min() < 0.5


@pytest.mark.slow
def test_what_torch_loads_finds_what_the_checkpoint_finds(
    trained: Trained, eager: Model, images: list[np.ndarray], tmp_path: Path
) -> None:
    """With nothing of codetr."""
    path = exported(trained, tmp_path / "model.pt2", "format=torch")
    extra = {f"{KEY}.json": ""}
    run = torch.export.load(path, extra_files=extra).module()
    about = About.from_json(extra[f"{KEY}.json"], path)
    assert about.class_names == eager.class_names
    for count in (1, 3, 8):
        images, sizes, truth = on_canvas(eager, count, (128, 160))
        with torch.inference_mode():
            boxes, scores, labels = run(images, sizes)
        assert_pairs((scores, labels, boxes), truth)


def on_canvas(eager: Model, count: int, canvas: tuple[int, int]) -> tuple[Tensor, Tensor, list[Detections]]:
    """Noise as images, their sizes, and what the checkpoint finds in them."""
    images = torch.randint(0, 256, (count, 3, *canvas), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([canvas, (100, 90), (64, canvas[1] - 1)] * 3)[:count]
    padding = torch.ones(count, *canvas, dtype=torch.bool)
    for own, (height, width) in zip(padding, sizes.tolist(), strict=True):
        own[:height, :width] = False
    with torch.inference_mode():
        return images, sizes, eager.postprocess(eager.detector.detect(images, padding), sizes)


def assert_pairs(found: Sequence[Tensor], truth: list[Detections]) -> None:
    for scores, labels, boxes, true in zip(*found, truth, strict=True):
        assert torch.equal(labels, true.labels[: len(labels)])
        torch.testing.assert_close(scores, true.scores[: len(labels)], rtol=0, atol=1e-5)
        torch.testing.assert_close(boxes, true.boxes_xyxy[: len(labels)], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_form_for_tensorrt_has_gathers_and_the_same_numbers(
    trained: Trained, eager: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(trained, tmp_path / "model.onnx", "format=tensorrt", "size=[192,224]", "max_detections=30")
    assert "trtexec --onnx=" in capsys.readouterr().out
    assert not {"GridSample", "SequenceAt"} & {node.op_type for node in onnx.load(path).graph.node}
    model = codetr.load(path)
    assert isinstance(model, Exported)
    for count in (1, 3, 8):
        images, sizes, truth = on_canvas(eager, count, (192, 224))
        assert_pairs(model.pairs(images, sizes), truth)
    large = np.zeros((100, 400, 3), np.uint8)
    with pytest.raises(UserError, match=r"takes images of 224x192 pixels, and behind its resize one has 384x96"):
        model.predict(large)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "checkpoint is not given"),
        (["checkpoint=a.ckpt", "format=coreml"], "format=coreml: must be one of torch, onnx, openvino, tensorrt"),
        (["checkpoint=a.ckpt", "precision=int8"], "precision=int8: must be one of fp32, fp16"),
        (["checkpoint=a.ckpt", "opset=11"], "opset=11: must be from 18 to "),
        (["checkpoint=a.ckpt", "out=a.xml"], "out=a.xml: a file of format=onnx ends in .onnx"),
        (["checkpoint=absent.ckpt"], "no such checkpoint"),
    ],
)
def test_mistakes_are_explained(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        export(compose("export", overrides))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("[100,128]", r"size=\[100, 128\]: give multiples of 32"),
        ("[64,128]", "of at least 96 pixels"),
        ("[128]", "height and width"),
    ],
)
def test_sizes_that_cannot_be(trained: Trained, tmp_path: Path, size: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        exported(trained, tmp_path / "a.onnx", f"size={size}")


def test_swin_needs_a_size(eager: Model) -> None:
    arguments = "{embed_dim:16,depths:[1,1,1,1],num_heads:[1,2,2,2],window_size:4}"
    chosen = ["model=deformable_pp", "model/backbone=swin_tiny", f"+model.detector.backbone.arguments={arguments}"]
    model = replace(eager, detector=detector(eager.class_names, *chosen))
    with pytest.raises(UserError, match=r"size=null: .*Swin"):
        Canvas.of(model, None, "onnx")
    assert Canvas.of(model, (192, 224), "onnx").size == (192, 224)


def test_masks_are_refused(segmenting: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="detectors with a mask head cannot be exported"):
        exported(segmenting, tmp_path / "a.onnx")


def test_files_that_are_none_are_explained(onnx_file: Path, tmp_path: Path) -> None:
    whole = onnx_file.read_bytes()
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.xml").write_text("<xml/>")
    for name, words in (
        ("half.onnx", "ONNX Runtime cannot open it"),
        ("text.xml", "OpenVINO cannot open it"),
        ("absent.onnx", "there is no such file"),
    ):
        with pytest.raises(UserError, match=words):
            codetr.load(tmp_path / name)
    with pytest.raises(UserError, match="weights=raw"):
        codetr.load(onnx_file, weights="raw")


def changed(onnx_file: Path, path: Path, text: str | None) -> Path:
    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    if text is not None:
        onnx.helper.set_model_props(model, {KEY: text})
    onnx.save(model, path)
    return path


def test_metadata_are_read_with_distrust(onnx_file: Path, tmp_path: Path) -> None:
    """They come with somebody's file, and what they name is built."""
    (entry,) = onnx.load(onnx_file).metadata_props
    said = json.loads(entry.value)
    hostile = {**said, "config": {**said["config"], "postprocess": {"_target_": "os.system", "command": "true"}}}
    for text, words in (
        (None, "does not say which classes"),
        ("{", "metadata cannot be read"),
        (json.dumps({**said, "form": 9}), "have form 9"),
        (json.dumps({**said, "class_names": [1]}), "metadata cannot be read"),
        (json.dumps(hostile), r"_target_ is os\.system, which is no part of a detector"),
    ):
        with pytest.raises(UserError, match=words):
            codetr.load(changed(onnx_file, tmp_path / "a.onnx", text))


EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_without_torch"


def test_the_example_runs_without_torch(trained: Trained, onnx_file: Path, eager: Model, tmp_path: Path) -> None:
    """On images that are resized, and on one that is as the network takes it."""
    photo = tmp_path / "large.png"
    Image.open(trained.images / "0.png").resize((400, 300), Image.Resampling.BICUBIC).save(photo)
    files = [trained.images / "1.png", photo]
    code = f"import sys, runpy; sys.modules['torch'] = None; sys.path.insert(0, {str(EXAMPLE)!r}); import detect\n"
    code += f"model = detect.Model({str(onnx_file)!r}); import json\n"
    code += f"print(json.dumps([model(path, 0.0) for path in {[str(f) for f in files]!r}]))\n"
    code += "assert not [name for name in sys.modules if name.startswith(('torch', 'codetr')) and sys.modules[name]]\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for found, file, pixels in zip(json.loads(done.stdout), files, (1e-3, 1.0), strict=True):
        (true,) = eager.predict(file, score_threshold=0)
        boxes = np.array([one["box"] for one in found])
        assert np.abs(boxes[:5] - true.boxes_xyxy[:5].numpy()).max() < pixels
        assert [one["name"] for one in found[:5]] == true.names[:5]


def test_its_sizes_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from detect import resized

    rng = np.random.default_rng(0)
    for short, long in ((800, 1333), (None, 128), (96, 128), (640, None)):
        for width, height in rng.integers(30, 3000, (200, 2)).tolist():
            expected = v2.functional.resize(torch.empty(0, height, width), [short] if short else None, max_size=long)
            assert resized((width, height), short, long) == (expected.shape[2], expected.shape[1])
