"""The files that a graph becomes."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from codetr.errors import UserError
from codetr.exporting.graph import INPUTS, Canvas, Graph, traceable
from codetr.exporting.named import name_axes, name_nodes
from codetr.exporting.triton import server_config
from codetr.files import atomically
from codetr.inference.about import KEY, About
from codetr.ops.export_form import for_onnx, with_gathers

OLDEST_OPSET = 18  # that PyTorch's exporter writes
# Numbers of a constant that is computed beforehand: weights of convolutions times those of their frozen norms, but not
# the masks of Swin's windows.
_LARGEST_CONSTANT = 2**22


@dataclass(frozen=True)
class Work:
    """A graph that becomes a file.

    opset: of ONNX. rounding: from the model of onnx to one with eight bits; None: it stays as it is.
    """

    graph: Graph
    canvas: Canvas
    about: About
    opset: int
    rounding: Callable[[Any], Any] | None = None

    @cached_property
    def onnx(self) -> Any:
        """The model of onnx, as protocol buffers, with its description; made once for all formats."""
        import onnx

        model = _to_onnx(self)
        onnx.helper.set_model_props(model, {KEY: self.about.to_json()})
        return model


@dataclass(frozen=True)
class Format:
    """suffix: of its file. packages: that writing it needs, and the extra of codetr that installs them.

    write: (work, path) -> None. precisions: that it can have.
    """

    suffix: str
    packages: tuple[str, ...]
    extra: str
    write: Callable[[Work, Path], None]
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")

    def check(self, name: str, precision: str) -> None:
        """Raises UserError where a package is not installed, and for a precision that the format cannot have."""
        if precision not in self.precisions:
            raise UserError(f"format={name} has precision={' or '.join(self.precisions)}, not {precision}")
        needed = (*self.packages, *(("onnxruntime",) if precision == "int8" else ()))
        if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
            raise UserError(f"format={name} needs {', '.join(missing)}: pip install 'codetr[{self.extra}]'")


def _torch(work: Work, path: Path) -> None:
    program = _traced(work)
    with atomically(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor")  # weights in channels-last order, which it copies
        try:
            torch.export.save(program, part, extra_files={f"{KEY}.json": work.about.to_json()})
        except Exception as error:  # of its own kinds
            if work.canvas.size is not None:
                raise
            raise UserError(
                "format=torch: PyTorch cannot write the shapes of this detector on images of any size "
                f"({' '.join(str(error).split())[:100]}): give height and width of all batches, size=[800,1344]"
            ) from error


def _traced(work: Work) -> torch.export.ExportedProgram:
    with traceable():
        return torch.export.export(work.graph, work.canvas.example(), dynamic_shapes=work.canvas.dynamic_shapes())


def _onnx(work: Work, path: Path) -> None:
    import onnx

    with atomically(path) as part:
        onnx.save(work.onnx, part)


def _tensorrt(work: Work, path: Path) -> None:
    with with_gathers():
        _onnx(work, path)


def _triton(work: Work, path: Path) -> None:
    """A model of Triton Inference Server: `path`/1/model.onnx and `path`/config.pbtxt."""
    _onnx(work, path / "1" / "model.onnx")
    with atomically(path / "config.pbtxt") as part:
        part.write_text(server_config(path.name, work.onnx.graph))


def _openvino(work: Work, path: Path) -> None:
    import onnx
    import openvino

    with atomically(path.with_suffix(".onnx")) as part:  # of which OpenVINO's graph is made
        onnx.save(work.onnx, part)
        converted = openvino.convert_model(part)
        converted.set_rt_info(work.about.to_json(), [KEY])
        openvino.save_model(converted, path, compress_to_fp16=work.about.precision == "fp16")


def _to_onnx(work: Work) -> Any:
    """A model of onnx, as protocol buffers."""
    import onnx_ir

    with traceable(), for_onnx(), _quiet("onnx_ir", "onnxscript", "torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of axes that share a name and of its deprecated parts
        program = torch.onnx.export(
            _traced(work),  # the exporter itself would trace it twice
            work.canvas.example(),
            dynamo=True,
            dynamic_shapes=work.canvas.dynamic_shapes(),
            opset_version=work.opset,
            input_names=INPUTS,
            output_names=work.graph.outputs,
            optimize=False,  # see `tidy`
            verbose=False,
        )
        assert program is not None
        tidy(program.model)
    proto = onnx_ir.to_proto(program.model)
    del proto.graph.value_info[:]  # of what is between; the exporter leaves some without a type
    name_axes(proto.graph)
    return proto if work.rounding is None else work.rounding(proto)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """In which these loggers tell errors alone."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def tidy(model: Any) -> None:
    """Fold constants and drop what nobody uses, in place.

    Not by onnxscript's `optimize`: its rule FuseMaxMinToClip (0.7.2) drops a minimum that others read too.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    for _ in range(2):  # shapes that the first makes known
        optimizer.fold_constants(
            model, onnx_shape_inference=True, input_size_limit=_LARGEST_CONSTANT, output_size_limit=_LARGEST_CONSTANT
        )
        common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    name_nodes(model)
    common.ClearMetadataAndDocStringPass()(model)  # the source lines of every node, with the paths of this machine


_ONNX = ("onnx", "onnxscript")
FORMATS = {
    "torch": Format(".pt2", (), "", _torch, precisions=("fp32", "fp16")),
    "onnx": Format(".onnx", _ONNX, "onnx", _onnx),
    "openvino": Format(".xml", (*_ONNX, "openvino"), "openvino", _openvino),
    "tensorrt": Format(".onnx", _ONNX, "onnx", _tensorrt, precisions=("fp32", "fp16")),
    "triton": Format("", _ONNX, "onnx", _triton),
}


def check_opset(opset: int) -> None:
    """Raises UserError for one that cannot be written."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise UserError(f"opset={opset}: must be from {OLDEST_OPSET} to {newest}")
