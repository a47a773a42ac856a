"""Names in an exported graph that tell something: nodes by their modules, axes by what they count."""

from __future__ import annotations

import ast
import re
from typing import Any

_SCOPES = "pkg.torch.onnx.name_scopes"
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def name_nodes(model: Any) -> None:
    """Call each node "<path of its module>/<operation>_<number>", in place: detector.encoder.layers.0.norm/Add_3.

    model: of onnx_ir, fresh from PyTorch's exporter, which notes for every node the modules around it.
    """
    for number, node in enumerate(model.graph):
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        # The last is the node of PyTorch's graph, the one before it the innermost module.
        module = scopes[-2] if len(scopes) > 1 and scopes[1].startswith("detector") else ""
        node.name = f"{module or 'graph'}/{node.op_type}_{number}"


def name_axes(graph: Any) -> None:
    """Call the symbolic axes of inputs and outputs batch, rows and columns, in place: images are [batch, 3, 32*rows,
    32*columns]. graph: of onnx, whose first input is the images."""
    axes = graph.input[0].type.tensor_type.shape.dim
    symbols = (_SYMBOL.search(axes[place].dim_param) for place in (0, 2, 3))
    names = {symbol[0]: name for symbol, name in zip(symbols, ("batch", "rows", "columns"), strict=True) if symbol}
    for one in (*graph.input, *graph.output):
        for axis in one.type.tensor_type.shape.dim:
            if axis.HasField("dim_param"):
                axis.dim_param = _SYMBOL.sub(lambda symbol: names.get(symbol[0], symbol[0]), axis.dim_param)
