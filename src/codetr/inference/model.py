"""One opened checkpoint: everything that evaluates, predicts, exports or serves starts from a `Model`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from codetr.checkpoint import load_weights
from codetr.data.transforms import Transform
from codetr.errors import UserError
from codetr.inference.result import Result
from codetr.inference.sources import MAX_PIXELS, Image, Images, Read, Source, Unreadable, collate_items, find_sources
from codetr.instances import with_masks
from codetr.models.detector import Detector
from codetr.nn.half import halve
from codetr.tiles import Tiles, refuse_masks
from codetr.trust import build, parts
from codetr.types import MAIN, Batch, Detections, Memory, Prediction

Weights = Literal["ema", "raw"]
_LARGEST_DIVISOR = 4096


@dataclass
class Model:
    """A trained detector with everything that its checkpoint says about it, ready for images.

    path: of the checkpoint.
    detector: in evaluation mode.
    class_names: of label 0, 1, ...
    category_ids: of each class in the data set that it was trained on; None where the file does not tell.
    transform: the preprocessing of an image.
    size_divisor: batches are padded to multiples of so many pixels.
    postprocess: from predictions and the images' sizes in the network to detections in its pixels.
    config: what the file says of model, criterion, postprocess, optimizer, schedule and data, in plain containers; only
        what may be built (see `codetr.trust`).
    step: of the optimizer, when it was saved.
    tiles: how images are cut, see `codetr.tiles`; None: they are not.
    dtype: of the weights, see `half`.
    """

    path: Path
    detector: Detector
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] | None
    transform: Transform
    size_divisor: int
    postprocess: Callable[[Prediction, Tensor], list[Detections]]
    config: dict[str, Any]
    step: int
    tiles: Tiles | None = None
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.detector.parameters()).device

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

    def predict(
        self,
        images: Image | Sequence[Image],
        score_threshold: float = 0.3,
        batch_size: int = 4,
        num_workers: int = 0,
        max_pixels: int | None = MAX_PIXELS,
    ) -> list[Result]:
        """Find objects in every image; the results come in the order of the images.

        images: a file, a folder, a pattern such as "photos/**/*.jpg", a Pillow image, an array [H, W, 3] or a tensor
            [3, H, W] of uint8 in RGB, or a list of these.
        score_threshold: detections below it are left out.
        batch_size: images that the network sees at once.
        num_workers: processes that read files.
        max_pixels: larger images are refused before they are decoded.

        Raises UserError for names without a file, for what is no image, and for an image that cannot be read.
        """
        results = []
        for one in self.stream(find_sources(images, max_pixels), score_threshold, batch_size, num_workers, max_pixels):
            if isinstance(one, Unreadable):
                raise UserError(one.reason)
            results.append(one if one.path is None else replace(one, pixels=None))  # a folder may not fit into memory
        return results

    def stream(
        self,
        sources: Sequence[Source],
        score_threshold: float,
        batch_size: int,
        num_workers: int,
        max_pixels: int | None,
        sizes: Mapping[Path, tuple[int, int]] | None = None,
    ) -> Iterator[Result | Unreadable]:
        """As `predict`, one result after the other, each with its pixels: workers read files while the detector runs.

        What cannot be read comes last of its batch, so that who stops at it has what was found beside it. sizes:
        (height, width) of files, where annotations tell them (see `Images`).
        """
        loader: Iterable[Read] = DataLoader(
            Images(sources, self.transform, max_pixels, sizes),
            batch_size,
            num_workers=num_workers,
            collate_fn=partial(collate_items, size_divisor=self.size_divisor),
            pin_memory=self.device.type == "cuda",
        )
        ids = self.category_ids or tuple(range(len(self.class_names)))
        for read in loader:
            found = self.detect(read.batch.to(self.device), score_threshold) if read.batch is not None else []
            indices = read.batch.image_ids.tolist() if read.batch is not None else []
            for i, pixels, detections in zip(indices, read.pixels, found, strict=True):
                path = source if isinstance(source := sources[i], Path) else None
                height, width = pixels.shape[1:]
                yield Result(detections.to("cpu"), (height, width), self.class_names, ids, path, pixels)
            yield from read.unreadable

    @torch.inference_mode()
    def detect(self, batch: Batch, score_threshold: float) -> list[Detections]:
        """The objects of a batch with at least this score, in pixels of the original images; with their masks if the
        detector has a mask head."""
        halved = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if halved else nullcontext():
            if self.tiles is not None:
                refuse_masks(self.tiles, self.detector.mask_head)
                every = self.tiles(lambda *tiles: {MAIN: self._found(*tiles)[0]}, batch.images, batch.frames.sizes)[
                    MAIN
                ]
            else:
                every, memory = self._found(batch.images, batch.padding, batch.frames.sizes)
            found = [one.above(score_threshold) for one in every]
            if self.detector.mask_head is None:
                return batch.frames.to_files(found)
            return with_masks(self.detector, memory, found, batch.frames)

    def _found(self, images: Tensor, padding: Tensor, sizes: Tensor) -> tuple[list[Detections], Memory]:
        output = self.detector(images, padding)
        return self.postprocess(output.predictions[MAIN].last, sizes), output.memory


def load(
    path: str | Path, *, device: str | torch.device = "auto", weights: Weights = "ema", trust: Sequence[str] = ()
) -> Model:
    """Open a checkpoint of `codetr train` or `codetr convert`, which is all that is needed.

    path: the file; nothing in it is executed.
    device: where the detector runs; "auto": a GPU if there is one.
    weights: "ema" for the averaged ones, where the file has them, or "raw" for those of the last step.
    trust: what else than parts of codetr the file may build, by name: classes, or packages with all that they define;
        that runs their code.

    Raises UserError for a file that is missing, damaged or of another kind, and for a device that is not here.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights={weights}: must be one of ema, raw")
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
        size_divisor=_size_divisor(config["data"], path),
        postprocess=build(config["postprocess"], path),
        config=config,
        step=checkpoint.step,
        tiles=build(config["tiles"], path) if "tiles" in config else None,
    )
    return model.to(device)


def _size_divisor(data: dict[str, Any], path: str | Path) -> int:
    value = data.get("size_divisor")
    if type(value) is not int or not 0 < value <= _LARGEST_DIVISOR:
        raise UserError(f"{path}: its data.size_divisor is {value}: must be from 1 to {_LARGEST_DIVISOR} pixels")
    return value


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
