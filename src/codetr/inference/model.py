"""One opened checkpoint: everything that evaluates, predicts, exports or serves starts from a `Model`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from codetr.checkpoint import load_weights
from codetr.errors import UserError
from codetr.inference.exported import Exported, load_exported
from codetr.inference.face import Face, size_divisor
from codetr.inference.runtimes import SUFFIXES
from codetr.instances import with_masks
from codetr.models.detector import Detector
from codetr.nn.half import halve
from codetr.trust import build, parts
from codetr.types import MAIN, Batch, Detections, Prediction
from codetr.views import made

Weights = Literal["ema", "raw"]


@dataclass
class Model(Face):
    """A trained detector with everything that its checkpoint says about it, ready for images.

    detector: in evaluation mode.
    postprocess: from predictions and the images' sizes in the network to detections in its pixels.
    dtype: of the weights, see `half`.

    config holds model, criterion, postprocess, optimizer, schedule and data. The others: see `Face`.
    """

    detector: Detector
    postprocess: Callable[[Prediction, Tensor], list[Detections]]
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.detector.parameters()).device

    @property
    def finds_masks(self) -> bool:
        return self.detector.finds_masks

    def to(self, device: str | torch.device) -> Model:
        """Move the detector, and return this model. device: as PyTorch names it, or "auto": a GPU if there is one.

        Raises UserError for a device that is not here.
        """
        self.detector.to(pick_device(device))
        return self

    def half(self) -> Model:
        """Turn the weights into float16, and return this model: half the memory, and faster on GPUs. Coordinates stay
        float32. Detections change slightly; there is no way back but `load`."""
        self.dtype = torch.float16
        halve(self.detector, self.dtype)
        return self

    @torch.inference_mode()
    def detect(self, batch: Batch, score_threshold: float) -> list[Detections]:
        halved = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if halved else nullcontext():
            output = self.detector(batch.images, batch.padding)
            every = self.postprocess(output.predictions[MAIN].last, batch.frames.sizes)
            found = [one.above(score_threshold) for one in every]
            if not self.finds_masks:
                return batch.frames.to_files(found)
            in_files = with_masks(self.detector, output.memory, found, batch.frames)
            return [one.above(score_threshold) for one in in_files]  # where masks change the scores


def load(
    path: str | Path, *, device: str | torch.device = "auto", weights: Weights = "ema", trust: Sequence[str] = ()
) -> Model | Exported:
    """Open a checkpoint of `codetr train` or `codetr convert`, which is all that is needed, or what `codetr export`
    made of one for ONNX Runtime (.onnx), OpenVINO (.xml) or `torch.export.load` (.pt2).

    path: the file; nothing in it is executed but what `trust` allows.
    device: where the detector runs; "auto": a GPU if there is one.
    weights: "ema" for the averaged ones, where the file has them, or "raw" for those of the last step.
    trust: what else than parts of codetr the file may build, by name: classes, or packages with all that they define;
        that runs their code. A .pt2 is a program that PyTorch unpickles and runs: it needs "torch.export" here.

    Raises UserError for a file that is missing, damaged or of another kind, and for a device that is not here.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights={weights}: must be one of ema, raw")
    if Path(path).suffix in SUFFIXES:
        if weights != "ema":
            raise UserError(f"weights={weights}: {path} is an exported file, which has one kind of weights")
        return load_exported(Path(path), device, trust)
    return load_checkpoint(path, device=device, weights=weights, trust=trust)


def load_checkpoint(
    path: str | Path, *, device: str | torch.device = "auto", weights: Weights = "ema", trust: Sequence[str] = ()
) -> Model:
    """As `load`, of a checkpoint alone."""
    checkpoint = load_weights(path, average=weights == "ema")
    if checkpoint.config is None or checkpoint.class_names is None:
        raise UserError(f"{path}: does not say which detector and classes it is of; give a checkpoint of codetr.train")
    config = parts(checkpoint.config, path, trust)
    detector = build(config["model"].get("detector"), path)
    if not isinstance(detector, Detector):
        raise UserError(f"{path}: its model.detector is a {type(detector).__name__}; give a checkpoint of codetr.train")
    try:
        detector.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its weights do not fit its configuration; take another copy ({reason})") from error
    model = Model(
        path=Path(path),
        detector=detector.eval(),
        class_names=checkpoint.class_names,
        category_ids=checkpoint.category_ids,
        transform=build(config["data"].get("val_transform"), path),
        size_divisor=size_divisor(config["data"].get("size_divisor"), path),
        postprocess=build(config["postprocess"], path),
        config=config,
        step=checkpoint.step,
        views=tuple(made(config.get("views", {}), partial(build, source=path)).values()),
    )
    return model.to(device)


def pick_device(device: str | torch.device) -> torch.device:
    """auto: a GPU if there is one. Raises UserError for a device that is not here."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device}: {str(error).splitlines()[0]}; device=auto takes what is there") from error
    return found
