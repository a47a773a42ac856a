"""A model repository of Triton Inference Server, read by the server's own definition of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest
from export_cases import exported

import codetr
from codetr.exporting.triton import server_config
from codetr.inference import Model

if TYPE_CHECKING:
    from conftest import Trained

text_format = pytest.importorskip("google.protobuf.text_format")
model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
# onnx.TensorProto's number -> the server's name of the type, from the table of its documentation.
TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8", 7: "TYPE_INT64"}


def check(text: str, name: str, graph: onnx.GraphProto) -> None:
    """What the server checks when it loads a model of ONNX: names, types and axes are those of the file, whose first
    axis is the batch and of any length."""
    config = text_format.Parse(text, model_config.ModelConfig())
    assert (config.name, config.backend) == (name, "onnxruntime")
    assert config.max_batch_size == 8
    assert config.HasField("dynamic_batching")
    for ends, own in ((config.input, graph.input), (config.output, graph.output)):
        assert [one.name for one in ends] == [one.name for one in own]
        for said, one in zip(ends, own, strict=True):
            batch, *axes = one.type.tensor_type.shape.dim
            assert batch.dim_param == "batch"
            assert list(said.dims) == [axis.dim_value or -1 for axis in axes]
            assert model_config.DataType.Name(said.data_type) == TYPES[one.type.tensor_type.elem_type]


def test_the_configuration_is_the_servers_and_fits_the_file(onnx_file: Path) -> None:
    graph = onnx.load(onnx_file).graph
    check(server_config('a "detector"', graph), 'a "detector"', graph)


@pytest.mark.slow
def test_the_repository_has_the_servers_layout(small: Trained, eager: Model, photos: list, tmp_path: Path) -> None:
    out = exported(small, tmp_path / "repository" / "detector", "format=triton", "size=[192,192]")
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == ["1/model.onnx", "config.pbtxt"]
    file = out / "1" / "model.onnx"
    check((out / "config.pbtxt").read_text(), "detector", onnx.load(file).graph)
    model = codetr.load(file)
    assert len(model.predict(photos[0], score_threshold=0)[0]) == len(eager.predict(photos[0], score_threshold=0)[0])
