"""What cannot be exported, and files that cannot be opened: one message each, which says what to do."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest
from export_cases import exported

import codetr
from codetr.application import compose
from codetr.errors import UserError
from codetr.export import export
from codetr.exporting.graph import Canvas
from codetr.inference import Model
from codetr.inference.about import KEY
from toy_model import detector

if TYPE_CHECKING:
    from conftest import Trained


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "checkpoint is not given"),
        (
            ["checkpoint=a.ckpt", "format=coreml"],
            "format=coreml: must be one of torch, onnx, openvino, tensorrt, triton",
        ),
        (["checkpoint=a.ckpt", "precision=int4"], "precision=int4: must be one of fp32, fp16, int8"),
        (["checkpoint=a.ckpt", "precision=int8", "format=torch"], "format=torch has precision=fp32 or fp16, not int8"),
        (["checkpoint=a.ckpt", "opset=11"], "opset=11: must be from 18 to "),
        (["checkpoint=a.ckpt", "out=a.xml"], "out=a.xml: a file of format=onnx ends in .onnx"),
        (["checkpoint=a.ckpt", "out=a.onnx", "format=triton"], "out=a.onnx: give a folder, without an ending"),
        (["checkpoint=absent.ckpt"], "no such checkpoint"),
        (["checkpoint=a.ckpt", "compare=-1"], "compare=-1: give a number of images"),
        (["checkpoint=model.onnx", "out=a.onnx"], "model.onnx is exported already: give the checkpoint"),
    ],
)
def test_mistakes_are_explained(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        export(compose("export", overrides))


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 half of an archive"])
def test_a_checkpoint_that_is_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ckpt"):
        export(compose("export", [f"checkpoint={path}", f"out={tmp_path / 'a.onnx'}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize(
    ("form", "package", "extra"),
    [("onnx", "onnxscript", "onnx"), ("openvino", "openvino", "openvino"), ("triton", "onnx", "onnx")],
)
def test_a_format_whose_package_is_absent(
    form: str, package: str, extra: str, small: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"format={form} needs {package}: pip install 'codetr\[{extra}\]'"):
        export(compose("export", [f"checkpoint={small.checkpoint}", f"format={form}"]))


def test_a_file_whose_runtime_is_absent(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"model.onnx needs onnxruntime: pip install 'codetr\[onnx\]'"):
        codetr.load(onnx_file)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("[100,128]", r"size=\[100, 128\]: give multiples of 32"),
        ("[128]", "height and width"),
    ],
)
def test_sizes_that_cannot_be(small: Trained, tmp_path: Path, size: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        exported(small, tmp_path / "a.onnx", f"size={size}")


def test_swin_needs_a_size(eager: Model) -> None:
    arguments = "{embed_dim:16,depths:[1,1,1,1],num_heads:[1,2,2,2],window_size:4}"
    chosen = ["model=deformable_pp", "model/backbone=swin_tiny", f"+model.detector.backbone.arguments={arguments}"]
    model = replace(eager, detector=detector(eager.class_names, *chosen))
    with pytest.raises(UserError, match=r"size=null: .*Swin"):
        Canvas.of(model, None, "onnx")
    with pytest.raises(UserError, match=r"size=\[64, 128\]: give multiples of 32, of at least 96 pixels"):
        Canvas.of(model, (64, 128), "onnx")
    assert Canvas.of(model, (192, 224), "onnx").size == (192, 224)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "precision=int8 needs images of the kind that the detector will see: calibration=FOLDER"),
        (["calibration=nowhere"], "nowhere"),
        (["calibration={folder}", "calibration_images=0"], "calibration_images=0: give a number of images"),
    ],
)
def test_calibration_that_cannot_be(overrides: list[str], words: str, small: Trained, tmp_path: Path) -> None:
    given = [word.format(folder=small.images) for word in overrides]
    with pytest.raises(UserError, match=words):
        exported(small, tmp_path / "a.onnx", "precision=int8", *given)


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


def test_a_graph_of_others_is_refused(tmp_path: Path) -> None:
    """A sound file of ONNX, of something else."""
    number = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Abs", ["x"], ["y"])],
        "abs",
        [number],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "abs.onnx")
    with pytest.raises(UserError, match=r"abs.onnx: its graph is none of codetr export's: from x to y"):
        codetr.load(tmp_path / "abs.onnx")


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
