"""The files that a graph becomes."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codetr.errors import UserError
from codetr.exporting.graph import INPUTS, OUTPUTS, Canvas, Graph, traceable
from codetr.files import atomically
from codetr.inference.about import KEY, About
from codetr.ops.export_form import with_gathers

OLDEST_OPSET = 18  # that PyTorch's exporter writes


@dataclass(frozen=True)
class Format:
    """suffix: of its file. packages: that writing it needs, and the extra of codetr that installs them.

    write: (graph, canvas, about, opset, path) -> None.
    """

    suffix: str
    packages: tuple[str, ...]
    extra: str
    write: Callable[[Graph, Canvas, About, int, Path], None]

    def check(self, name: str) -> None:
        """Raises UserError where a package is not installed."""
        if missing := [package for package in self.packages if importlib.util.find_spec(package) is None]:
            raise UserError(f"format={name} needs {', '.join(missing)}: pip install 'codetr[{self.extra}]'")


def _torch(graph: Graph, canvas: Canvas, about: About, opset: int, path: Path) -> None:
    with traceable():
        program = torch.export.export(graph, canvas.example(), dynamic_shapes=canvas.dynamic_shapes())
    with atomically(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor")  # weights in channels-last order, which it copies
        torch.export.save(program, part, extra_files={f"{KEY}.json": about.to_json()})


def _onnx(graph: Graph, canvas: Canvas, about: About, opset: int, path: Path) -> None:
    import onnx

    model = _to_onnx(graph, canvas, opset)
    onnx.helper.set_model_props(model, {KEY: about.to_json()})
    with atomically(path) as part:
        onnx.save(model, part)


def _tensorrt(graph: Graph, canvas: Canvas, about: About, opset: int, path: Path) -> None:
    with with_gathers():
        _onnx(graph, canvas, about, opset, path)


def _openvino(graph: Graph, canvas: Canvas, about: About, opset: int, path: Path) -> None:
    import openvino

    model = _to_onnx(graph, canvas, opset)
    with atomically(path.with_suffix(".onnx")) as part:  # of which OpenVINO's graph is made
        import onnx

        onnx.save(model, part)
        converted = openvino.convert_model(part)
        converted.set_rt_info(about.to_json(), [KEY])
        openvino.save_model(converted, path, compress_to_fp16=about.precision == "fp16")


def _to_onnx(graph: Graph, canvas: Canvas, opset: int) -> Any:
    """A model of onnx, as protocol buffers."""
    import onnx_ir

    with traceable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of axes that share a name and of its deprecated parts
        program = torch.onnx.export(
            graph,
            canvas.example(),
            dynamo=True,
            dynamic_shapes=canvas.dynamic_shapes(),
            opset_version=opset,
            input_names=INPUTS,
            output_names=OUTPUTS,
            optimize=False,  # see `_tidy`
            verbose=False,
        )
        assert program is not None
        _tidy(program.model)
    proto = onnx_ir.to_proto(program.model)
    del proto.graph.value_info[:]  # of what is between; the exporter leaves some without a type
    return proto


def _tidy(model: Any) -> None:
    """Fold constants and drop what nobody uses, in place.

    Not by onnxscript's `optimize`: its rule FuseMaxMinToClip (0.7.2) drops a minimum that others read too.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    for _ in range(2):  # shapes that the first makes known
        optimizer.fold_constants(model, onnx_shape_inference=True)
        common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.ClearMetadataAndDocStringPass()(model)  # the source lines of every node, with the paths of this machine


_ONNX = ("onnx", "onnxscript")
FORMATS = {
    "torch": Format(".pt2", (), "", _torch),
    "onnx": Format(".onnx", _ONNX, "onnx", _onnx),
    "openvino": Format(".xml", (*_ONNX, "openvino"), "openvino", _openvino),
    "tensorrt": Format(".onnx", _ONNX, "onnx", _tensorrt),
}


def check_opset(opset: int) -> None:
    """Raises UserError for one that cannot be written."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise UserError(f"opset={opset}: must be from {OLDEST_OPSET} to {newest}")
