"""Lower precision: which layers it rounds, on which ranges, and that its price is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from export_cases import exported
from onnx import numpy_helper

import codetr
from codetr.application import compose
from codetr.before_after import WARNED, table
from codetr.eval import evaluate
from codetr.exporting import int8
from codetr.inference import Exported, Model
from codetr.inference.about import About

if TYPE_CHECKING:
    from conftest import Trained


@pytest.fixture(scope="module")
def about(onnx_file: Path) -> About:
    model = codetr.load(onnx_file)
    assert isinstance(model, Exported)
    return model.about


@pytest.fixture(scope="module")
def eight(onnx_file: Path, eager: Model, about: About, small: Trained) -> onnx.ModelProto:
    images = int8.calibration_images(eager, str(small.images), 3)
    assert len(images) == 3
    return int8.rounded(onnx.load(onnx_file), int8.batches(eager, about, images))


def products(model: onnx.ModelProto) -> dict[str, bool]:
    """Name of every convolution and product -> whether it takes what was eight bits."""
    made_by = {output: node.op_type for node in model.graph.node for output in node.output}
    return {
        node.name: made_by.get(node.input[0]) == made_by.get(node.input[1]) == "DequantizeLinear"
        for node in model.graph.node
        if node.op_type in int8.ROUNDED_OPERATIONS
    }


def check_rounded(model: onnx.ModelProto, expected: dict[str, bool]) -> None:
    """All products of each part of the detector have eight bits, or none."""
    found = products(model)
    for part, rounded in expected.items():
        own = [value for name, value in found.items() if name.startswith(f"detector.{part}")]
        assert own, part
        assert set(own) == {rounded}, part


def test_only_what_multiplies_most_is_rounded(eight: onnx.ModelProto) -> None:
    """Backbone, neck and encoder have eight bits; what makes coordinates, and the decoder, have not."""
    check_rounded(eight, {"backbone.": True, "neck.": True, "encoder.layers.0.ffn": True, "decoder.": False})


def test_weights_are_rounded_to_a_step_of_their_channel(onnx_file: Path, eight: onnx.ModelProto) -> None:
    """Each is at most half a step from what it was, and a channel has 127 steps of seven bits."""
    before = {one.name: numpy_helper.to_array(one) for one in onnx.load(onnx_file).graph.initializer}
    constants = {one.name: numpy_helper.to_array(one) for one in eight.graph.initializer}
    seen = 0
    for node in eight.graph.node:
        name = node.input[0].removesuffix("_quantized")
        if node.op_type != "DequantizeLinear" or name not in before or before[name].ndim < 2:
            continue
        rounded, scale = constants[node.input[0]].astype(float), constants[node.input[1]]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        shape = [-1 if i == axis else 1 for i in range(rounded.ndim)]
        assert scale.size == rounded.shape[axis] > 1
        assert np.abs(rounded).max() <= 64
        assert np.all(np.abs(rounded * scale.reshape(shape) - before[name]) <= 0.501 * scale.reshape(shape) + 1e-7)
        seen += 1
    assert seen > 10


def test_its_features_are_near_those_of_float32(
    onnx_file: Path, eight: onnx.ModelProto, about: About, eager: Model, small: Trained
) -> None:
    """What the neck gives to the encoder, on an image that was not among those of the calibration."""
    model = onnx.load(onnx_file)
    name = next(
        node.output[0] for node in model.graph.node if node.name.startswith("detector.neck.") and node.op_type == "Conv"
    )
    images = int8.calibration_images(eager, str(small.images), 5)
    (inputs,) = int8.batches(eager, about, images[1:2])
    found = []
    for one in (model, eight):
        copy = onnx.ModelProto()
        copy.CopyFrom(one)
        copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        found.append(onnxruntime.InferenceSession(copy.SerializeToString()).run([name], inputs)[0])
    error = np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0])
    assert 1e-4 < error < 0.1


def test_images_are_spread_over_the_folder(eager: Model, small: Trained) -> None:
    names = [path.name for path in int8.calibration_images(eager, str(small.images), 3)]
    assert names == ["0.png", "2.png", "4.png"]
    assert int8.calibration_images(eager, "data", 100) == int8.calibration_images(eager, str(small.images), 100)


@pytest.mark.slow
def test_what_makes_coordinates_keeps_float32(trained: Trained, tmp_path: Path) -> None:
    given = ["precision=int8", f"calibration={trained.images}", "compare=0"]
    expected = {
        "encoder.layers.0.attention.value_proj": True,
        "encoder.layers.0.attention.sampling_offsets": False,
        "encoder.layers.0.attention.attention_weights": False,
        "queries.": False,
    }
    check_rounded(onnx.load(exported(trained, tmp_path / "small.onnx", *given)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "name"), [("onnx", "small.onnx"), ("openvino", "small.xml")])
def test_the_price_is_told(
    form: str, name: str, small: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AP of both, as `codetr eval` has it."""
    given = [f"format={form}", "precision=int8", f"calibration={small.images}"]
    path = exported(small, tmp_path / name, *given)
    text = capsys.readouterr().out
    assert "In float32: offsets and weights of deformable attention" in text
    told = {name: float(value) for name, value in re.findall(r"^  (\w+) +AP +([\d.]+)", text, re.MULTILINE)}
    quiet = [f"~callbacks.{name}" for name in ("whereabouts", "pictures", "report", "results")]
    for key, file in {"checkpoint": small.checkpoint, "int8": path}.items():
        options = [f"checkpoint={file}", "trainer=cpu", "+data.num_workers=0", "run_dir=.", *quiet]
        assert told[key] == pytest.approx(100 * evaluate(compose("eval", options)), abs=0.06)
    assert ("warning:" in text) == (told["checkpoint"] - told["int8"] > WARNED)


def test_a_fall_of_more_than_half_a_point_is_a_warning() -> None:
    files = {"checkpoint": Path("best.ckpt"), "fp16": Path("half.onnx")}
    times = {"checkpoint": 20.0, "fp16": 10.0}
    assert "warning" not in table(files, {"checkpoint": 47.0, "fp16": 46.6}, times)
    assert "warning" not in table(files, {"checkpoint": 47.0, "fp16": 49.0}, times)
    text = table(files, {"checkpoint": 47.0, "fp16": 46.25}, times)
    assert text.splitlines()[-1] == "warning: precision=fp16 costs 0.8 points of AP; fp32 costs none"
    assert "AP  46.2     10.0 ms  half.onnx" in text


@pytest.mark.slow
def test_where_no_data_set_is_here_the_export_says_so(
    small: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(small, tmp_path / "half.onnx", "precision=fp16", "+data.val_annotations=nowhere.json")
    text = capsys.readouterr().out
    assert "warning: what precision=fp16 costs is not known: " in text
    assert "nowhere.json" in text
