"""Files of `codetr export` behind the face of a checkpoint, whichever runtime opens them (see `runtimes`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from codetr.errors import UserError
from codetr.inference.about import BOXES, About
from codetr.inference.face import Face, size_divisor
from codetr.inference.runtimes import RUNTIMES, Session, line
from codetr.instances import pasted
from codetr.postprocess import PostProcess
from codetr.trust import build, parts
from codetr.types import Batch, Detections, Masks
from codetr.views import made


class Pairs(NamedTuple):
    """What a graph finds: scores, labels [B, n], boxes [B, n, 4] in pixels of the network, best first; with a mask head
    masks [B, n, s, s] in 0..1 and mask_ious [B, n]."""

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    masks: Tensor | None = None
    mask_ious: Tensor | None = None


@dataclass
class Exported(Face):
    """A detector in another runtime.

    about: what the file says of itself.
    postprocess: whose second half, suppression, is outside of the graph.
    session: the opened graph.

    config holds postprocess and data. The others: see `Face`.
    """

    about: About
    postprocess: PostProcess
    session: Session
    runs_on: torch.device

    @property
    def device(self) -> torch.device:
        """Where batches have to be: what a runtime does with them is its own matter."""
        return torch.device("cpu")

    @property
    def finds_masks(self) -> bool:
        return set(self.session.outputs) > set(BOXES)

    def to(self, device: str | torch.device) -> Exported:
        """Open the file anew for another device. Raises UserError for one that its runtime does not know."""
        self.runs_on = torch.device(device)
        self.session = RUNTIMES[self.path.suffix].open(self.path, self.runs_on)
        return self

    @torch.inference_mode()
    def detect(self, batch: Batch, score_threshold: float) -> list[Detections]:
        frames = batch.frames
        pairs = self.pairs(batch.images, frames.sizes)
        if not self.finds_masks:
            return frames.to_files([one.above(score_threshold) for one in self.postprocess.thinned(*pairs[:3])])
        found, masks = self._found_with_masks(pairs, score_threshold)
        return pasted(found, masks, frames)

    def _found_with_masks(self, pairs: Pairs, score_threshold: float) -> tuple[list[Detections], list[Masks]]:
        assert pairs.masks is not None
        assert pairs.mask_ious is not None
        found, masks = [], []
        chosen = self.postprocess.chosen(pairs.scores, pairs.labels, pairs.boxes)
        of_images = zip(chosen, pairs.labels, pairs.boxes, pairs.masks, pairs.mask_ious, strict=True)
        for (scores, index), labels, boxes, inside, ious in of_images:
            kept = scores >= score_threshold
            scores, index = scores[kept], index[kept]
            found.append(Detections(scores, labels[index], boxes[index]))
            masks.append(Masks(inside[index], scores * ious[index]))
        return found, masks

    def pairs(self, images: Tensor, sizes: Tensor) -> Pairs:
        """What the graph finds. images: [B, 3, H, W] uint8, which are padded to what the graph takes.

        Raises UserError for images that the graph cannot take.
        """
        inputs = self.about.inputs(images.numpy(), sizes.numpy(), self.path)
        try:
            found = self.session.run(inputs)
        except Exception as error:  # of whichever runtime
            height, width = inputs["images"].shape[2:]
            raise UserError(f"{self.path} fails on images of {width}x{height} pixels: {line(error)}") from error
        return Pairs(**{name: torch.from_numpy(np.array(one)) for name, one in found.items()})


def load_exported(path: Path, device: str | torch.device, trust: Sequence[str] = ()) -> Exported:
    """Raises UserError for a file that is missing, damaged or not of `codetr export`, for a runtime that is not
    installed, for a device that it does not know, and for a file that runs code, unless `trust` allows that."""
    runtime = RUNTIMES[path.suffix]
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if importlib.util.find_spec(runtime.package) is None:
        raise UserError(f"{path} needs {runtime.package}: pip install 'codetr[{runtime.extra}]'")
    if runtime.runs_code and runtime.runs_code not in trust:
        raise UserError(
            f"{path}: PyTorch unpickles a program of this kind, which may run any code: only if you know who made the "
            f"file, trust=[{runtime.runs_code}]; ONNX files hold none"
        )
    runs_on = torch.device("cpu" if device == "auto" else device)
    session = runtime.open(path, runs_on)
    about = About.from_json(session.said, path)
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
        views=tuple(made(config.get("views", {}), partial(build, source=path)).values()),
        about=about,
        postprocess=postprocess,
        session=session,
        runs_on=runs_on,
    )
