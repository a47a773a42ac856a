"""Files of `codetr export` behind the face of a checkpoint: ONNX Runtime opens .onnx, OpenVINO .xml."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from codetr.errors import UserError
from codetr.inference.about import KEY, About
from codetr.inference.face import Face, size_divisor
from codetr.postprocess import PostProcess
from codetr.trust import build, parts
from codetr.types import MAIN, Batch, Detections

Outputs = Sequence[np.ndarray]
Run = Callable[[np.ndarray, np.ndarray], Outputs]
"""images [B, 3, H, W] uint8, sizes [B, 2] int64 -> boxes [B, n, 4], scores [B, n], labels [B, n]."""


@dataclass
class Exported(Face):
    """A detector in another runtime.

    about: what the file says of itself.
    postprocess: whose second half, suppression, is outside of the graph.
    run: the graph.

    config holds postprocess and data. The others: see `Face`.
    """

    about: About
    postprocess: PostProcess
    run: Run
    runs_on: torch.device

    @property
    def device(self) -> torch.device:
        """Where batches have to be: what a runtime does with them is its own matter."""
        return torch.device("cpu")

    @property
    def finds_masks(self) -> bool:
        return False

    def to(self, device: str | torch.device) -> Exported:
        """Open the file anew for another device. Raises UserError for one that its runtime does not know."""
        self.runs_on = torch.device(device)
        self.run = RUNTIMES[self.path.suffix].open(self.path, self.runs_on)[0]
        return self

    @torch.inference_mode()
    def detect(self, batch: Batch, score_threshold: float) -> list[Detections]:
        if self.tiles is None:
            every = self._found(batch.images, batch.frames.sizes)
        else:
            of_tiles = self.tiles(
                lambda tiles, _, sizes: {MAIN: self._found(tiles, sizes)}, batch.images, batch.frames.sizes
            )
            every = of_tiles[MAIN]
        return batch.frames.to_files([one.above(score_threshold) for one in every])

    def _found(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        return self.postprocess.thinned(*self.pairs(images, sizes))

    def pairs(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """scores, labels [B, n] and boxes [B, n, 4] in pixels of the network. images: [B, 3, H, W] uint8, which are
        padded to what the graph takes.

        Raises UserError for images that the graph cannot take.
        """
        height, width = images.shape[2:]
        wanted = self.about.size or tuple(self._side(side) for side in (height, width))
        if height > wanted[0] or width > wanted[1]:
            raise UserError(
                f"{self.path} takes images of {wanted[1]}x{wanted[0]} pixels, and behind its resize one has {width}x"
                f"{height}: export it with size=null, or with a size into which all of them fit"
            )
        canvas = pad(images, (0, wanted[1] - width, 0, wanted[0] - height))
        try:
            found = self.run(canvas.contiguous().numpy(), sizes.numpy())
        except Exception as error:  # of whichever runtime
            raise UserError(f"{self.path} fails on images of {wanted[1]}x{wanted[0]} pixels: {_line(error)}") from error
        boxes, scores, labels = (torch.from_numpy(np.array(one)) for one in found)
        return scores, labels, boxes

    def _side(self, length: int) -> int:
        """The least side of an image that holds so many pixels and that the graph takes."""
        divisor = self.about.size_divisor
        return max(-(-length // divisor) * divisor, self.about.least_side)


def load_exported(path: Path, device: str | torch.device, trust: Sequence[str] = ()) -> Exported:
    """Raises UserError for a file that is missing, damaged or not of `codetr export`, for a runtime that is not
    installed, and for a device that it does not know."""
    runtime = RUNTIMES[path.suffix]
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if importlib.util.find_spec(runtime.package) is None:
        raise UserError(f"{path} needs {runtime.package}: pip install 'codetr[{runtime.extra}]'")
    runs_on = torch.device("cpu" if device == "auto" else device)
    run, said = runtime.open(path, runs_on)
    about = About.from_json(said, path)
    config = parts(about.config, path, trust, ("postprocess", "data"))
    postprocess = build({**config["postprocess"], "max_detections": about.max_detections}, path)
    if not isinstance(postprocess, PostProcess):
        raise UserError(f"{path}: its postprocess is a {type(postprocess).__name__}; export it again")
    return Exported(
        path=path,
        class_names=about.class_names,
        category_ids=about.category_ids,
        transform=build(config["data"].get("val_transform"), path),
        size_divisor=size_divisor(about.size_divisor, path),
        config=config,
        step=about.step,
        tiles=build(config["tiles"], path) if "tiles" in config else None,
        about=about,
        postprocess=postprocess,
        run=run,
        runs_on=runs_on,
    )


@dataclass(frozen=True)
class Runtime:
    """package: that is imported; extra: of codetr, which installs it. open: (path, device) -> what runs, metadata."""

    package: str
    extra: str
    open: Callable[[Path, torch.device], tuple[Run, str | None]]


def _open_onnx(path: Path, device: torch.device) -> tuple[Run, str | None]:
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
        raise UserError(f"{path}: ONNX Runtime cannot open it ({_line(error)}); export it again") from error
    names = [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]
    _check_names(path, *names)

    def run(images: np.ndarray, sizes: np.ndarray) -> Outputs:
        found: Outputs = session.run(["boxes", "scores", "labels"], {"images": images, "sizes": sizes})
        return found

    return run, session.get_modelmeta().custom_metadata_map.get(KEY)


def _open_openvino(path: Path, device: torch.device) -> tuple[Run, str | None]:
    import openvino

    try:
        core = openvino.Core()
        model = core.read_model(path)
        said = str(model.get_rt_info([KEY]).value) if model.has_rt_info([KEY]) else None
        _check_names(path, *([next(iter(one.names), "") for one in ends] for ends in (model.inputs, model.outputs)))
        name = {"cpu": "CPU", "cuda": "GPU"}.get(device.type, device.type)
        # Otherwise it rounds to bfloat16 on processors that are faster at that.
        compiled = core.compile_model(
            model, name, {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: OpenVINO cannot open it ({_line(error)}); export it again") from error

    def run(images: np.ndarray, sizes: np.ndarray) -> Outputs:
        found: Any = compiled({"images": images, "sizes": sizes})
        return [found[name] for name in ("boxes", "scores", "labels")]

    return run, said


def _check_names(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    if set(inputs) != {"images", "sizes"} or set(outputs) != {"boxes", "scores", "labels"}:
        raise UserError(
            f"{path}: its graph is none of codetr export's: from {', '.join(inputs)} to {', '.join(outputs)}"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


RUNTIMES = {
    ".onnx": Runtime("onnxruntime", "onnx", _open_onnx),
    ".xml": Runtime("openvino", "openvino", _open_openvino),
}
SUFFIXES = tuple(RUNTIMES)
