"""What opens exported files: ONNX Runtime (.onnx), OpenVINO (.xml) and PyTorch itself (.pt2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from codetr.errors import UserError
from codetr.inference.about import BOXES, KEY, MASKS

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
"""images [B, 3, H, W] uint8 and sizes [B, 2] int64 -> outputs, by their names."""


class Session(NamedTuple):
    """An opened file. said: its description (see `About`), None without one. outputs: their names."""

    run: Run
    said: str | None
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Runtime:
    """package: that is imported; extra: of codetr, which installs it.

    open: (path, device) -> session; raises UserError for a file that is damaged or no graph of `codetr export`.
    runs_code: what users have to trust by name, because to open a file is to run what it says; "": nothing.
    """

    package: str
    extra: str
    open: Callable[[Path, torch.device], Session]
    runs_code: str = ""


def _open_onnx(path: Path, device: torch.device) -> Session:
    import onnxruntime

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type, device.type)
    if provider not in onnxruntime.get_available_providers():
        raise UserError(f"device={device}: this onnxruntime has {', '.join(onnxruntime.get_available_providers())}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:
        raise UserError(f"{path}: ONNX Runtime cannot open it ({line(error)}); export it again") from error
    outputs = _checked(path, *([one.name for one in ends] for ends in (session.get_inputs(), session.get_outputs())))

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = session.run(outputs, inputs)
        return dict(zip(outputs, found, strict=True))

    return Session(run, session.get_modelmeta().custom_metadata_map.get(KEY), outputs)


def _open_openvino(path: Path, device: torch.device) -> Session:
    import openvino

    name = {"cpu": "CPU", "cuda": "GPU"}.get(device.type, device.type)
    # Otherwise it rounds to bfloat16 on processors that are faster at that.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        core = openvino.Core()
        model = core.read_model(path)
        said = str(model.get_rt_info([KEY]).value) if model.has_rt_info([KEY]) else None
        ends = ([next(iter(one.names), "") for one in ends] for ends in (model.inputs, model.outputs))
        compiled = core.compile_model(model, name, options)
    except Exception as error:
        raise UserError(f"{path}: OpenVINO cannot open it ({line(error)}); export it again") from error
    outputs = _checked(path, *ends)

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: Any = compiled(inputs)
        return {name: found[name] for name in outputs}

    return Session(run, said, outputs)


def _open_torch(path: Path, device: torch.device) -> Session:
    if device.type != "cpu":
        raise UserError(f"device={device}: {path} is a program for the CPU; on a GPU take the checkpoint, or ONNX")
    extra = {f"{KEY}.json": ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:
        raise UserError(f"{path}: PyTorch cannot open it ({line(error)}); export it again") from error
    inputs = [one for one in program.graph_signature.user_inputs if isinstance(one, str)]
    count = len(program.graph_signature.user_outputs)
    module = program.module()
    outputs = _checked(path, inputs, (*BOXES, *MASKS)[:count])

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = module(torch.from_numpy(inputs["images"]), torch.from_numpy(inputs["sizes"]))
        return {name: one.numpy() for name, one in zip(outputs, found, strict=True)}

    return Session(run, extra[f"{KEY}.json"] or None, outputs)


def _checked(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> tuple[str, ...]:
    """The names of the outputs, in our order. Raises UserError for those of another graph."""
    for known in (BOXES, BOXES + MASKS):
        if set(inputs) == {"images", "sizes"} and set(outputs) == set(known):
            return known
    raise UserError(f"{path}: its graph is none of codetr export's: from {', '.join(inputs)} to {', '.join(outputs)}")


def line(error: Exception) -> str:
    """The beginning of its message, in one line."""
    return " ".join(str(error).split())[:200]


RUNTIMES = {
    ".onnx": Runtime("onnxruntime", "onnx", _open_onnx),
    ".xml": Runtime("openvino", "openvino", _open_openvino),
    ".pt2": Runtime("torch", "", _open_torch, runs_code="torch.export"),
}
SUFFIXES = tuple(RUNTIMES)
