"""`config.pbtxt` of Triton Inference Server's model repository, in the text form of its protocol buffer ModelConfig."""

from __future__ import annotations

import json
from typing import Any

MAX_BATCH = 8
_DELAY = 2000  # microseconds that a request waits for company
_TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8", 7: "TYPE_INT64"}  # by onnx.TensorProto's numbers


def server_config(name: str, graph: Any) -> str:
    """name: of the model, which is that of its folder. graph: of onnx; its first axis is the batch, which the server
    makes of requests whose images have one size."""
    inputs, outputs = (",\n".join(map(_tensor, ends)) for ends in (graph.input, graph.output))
    return f"""\
name: {json.dumps(name)}
backend: "onnxruntime"
max_batch_size: {MAX_BATCH}
input [
{inputs}
]
output [
{outputs}
]
dynamic_batching {{
  max_queue_delay_microseconds: {_DELAY}
}}
"""


def _tensor(one: Any) -> str:
    """Without the axis of the batch; -1 for an axis of any length."""
    axes = one.type.tensor_type.shape.dim[1:]
    dims = ", ".join(str(axis.dim_value if axis.HasField("dim_value") else -1) for axis in axes)
    kind = _TYPES[one.type.tensor_type.elem_type]
    return f"  {{\n    name: {json.dumps(one.name)}\n    data_type: {kind}\n    dims: [ {dims} ]\n  }}"
