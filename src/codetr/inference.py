"""Inference outside of training: the detector of a checkpoint, image files in, pictures and results out."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from codetr import application
from codetr.checkpoint import load_weights
from codetr.data.coco import Sample
from codetr.data.collate import collate
from codetr.data.images import UnreadableImage, read_image, seen_size
from codetr.data.transforms import Transform, failed, transformed, without_objects
from codetr.errors import UserError
from codetr.instances import with_masks
from codetr.models.detector import Detector
from codetr.outputs import Results, names_below, picture_names, refuse_inputs, write
from codetr.trust import parts as trust_parts
from codetr.types import MAIN, Batch, Detections, Prediction
from codetr.visualize import draw_boxes

RESULTS = "predictions.json"
_LARGEST_DIVISOR = 4096


@dataclass
class Trained:
    """A detector ready for inference on the CPU, with those parts of its configuration that may be built.

    category_ids: of each class in its data set; None where the checkpoint does not tell.
    """

    detector: Detector
    config: dict[str, Any]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] | None
    step: int

    @property
    def size_divisor(self) -> int:
        """Batches are padded to multiples of this many pixels. Raises UserError for what is no such number."""
        value = self.config["data"].get("size_divisor")
        if type(value) is not int or not 0 < value <= _LARGEST_DIVISOR:
            raise UserError(
                f"the checkpoint's data.size_divisor is {value}: must be from 1 to {_LARGEST_DIVISOR} pixels"
            )
        return value


def open_checkpoint(config: DictConfig) -> Trained:
    """The detector that `checkpoint` and `weights` of the configuration name. Raises UserError for other files."""
    require(config, checkpoint="outputs/train/<date>/checkpoints/best.ckpt")
    one_of(config, weights=("ema", "raw"))
    average, trust = config.weights == "ema", application.as_names(config.trust)
    detector = application.load(config.checkpoint, average, trust)
    checkpoint = load_weights(config.checkpoint, average)
    if checkpoint.config is None or checkpoint.class_names is None:
        raise UserError(f"checkpoint={config.checkpoint}: does not name its classes; give one of codetr.train")
    parts = trust_parts(checkpoint.config, config.checkpoint, trust)
    return Trained(detector, parts, checkpoint.class_names, checkpoint.category_ids, checkpoint.step)


def require(config: DictConfig, **examples: str) -> None:
    """Raises UserError for a key without a value, and shows an example of one."""
    for key, example in examples.items():
        if OmegaConf.is_missing(config, key) or config[key] is None:
            raise UserError(f"{key} is not given: add {key}={example} (--help lists what there is to give)")


def one_of(config: DictConfig, **choices: Sequence[str]) -> None:
    """Raises UserError for a key whose value is none of its choices."""
    for key, values in choices.items():
        if config[key] not in values:
            raise UserError(f"{key}={config[key]}: must be one of {', '.join(values)}")


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one. Raises UserError for a device that is not here."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: {str(error).splitlines()[0]}; device=auto takes what is there") from error
    return device


@dataclass
class Unreadable:
    """An image file that does not decode or fit the network, and why; the reason names it."""

    path: Path
    reason: str


@dataclass
class Found:
    """What was found in one file. image: [3, H, W] uint8 as in the file; boxes in its pixels."""

    path: Path
    image: Tensor
    detections: Detections


class ImageFiles(Dataset[tuple[Sample, Tensor] | Unreadable]):
    """Image files behind the evaluation transform, each with its original pixels. What does not decode is an item
    too, so that the reader decides what to do about it. max_pixels: of an image; larger ones are not decoded."""

    def __init__(self, paths: Sequence[Path], transform: Transform, max_pixels: int | None = None) -> None:
        self.paths, self.transform, self.max_pixels = paths, transform, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Sample, Tensor] | Unreadable:
        path = self.paths[index]
        try:
            size = seen_size(path)
            image = read_image(path, size, self.max_pixels)
        except (UnreadableImage, OSError) as error:
            return Unreadable(path, str(error))
        try:
            return transformed(without_objects(image, index), self.transform), image
        except Exception as error:
            return Unreadable(path, str(failed(path, size, error)))


Items = list[tuple[Sample, Tensor] | Unreadable]


def _collate(items: Items, size_divisor: int) -> tuple[Batch | None, list[Tensor], list[Unreadable]]:
    read = [i for i in items if not isinstance(i, Unreadable)]
    batch = collate([sample for sample, _ in read], size_divisor) if read else None
    return batch, [image for _, image in read], [i for i in items if isinstance(i, Unreadable)]


def finder(
    detector: Detector, postprocess: Callable[[Prediction, Tensor], list[Detections]], score_threshold: float
) -> Callable[[Batch], list[Detections]]:
    """What finds the objects of a batch with at least this score; with their masks if the detector has a mask head."""

    def find(batch: Batch) -> list[Detections]:
        output = detector(batch.images, batch.padding)
        last = output.predictions[MAIN].last
        found = [one.above(score_threshold) for one in postprocess(last, batch.frames.sizes)]
        if detector.mask_head is None:
            return batch.frames.to_files(found)
        return with_masks(detector, output.memory, found, batch.frames)

    return find


@torch.inference_mode()
def detect(
    find: Callable[[Batch], list[Detections]],
    files: ImageFiles,
    *,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    size_divisor: int,
) -> Iterator[Found | Unreadable]:
    """Detections file by file; images are read by workers while the detector runs. find: as made by `finder`."""
    loader: Iterable[tuple[Batch | None, list[Tensor], list[Unreadable]]] = DataLoader(
        files,
        batch_size,
        num_workers=num_workers,
        collate_fn=partial(_collate, size_divisor=size_divisor),
        pin_memory=device.type == "cuda",
    )
    for batch, images, unreadable in loader:
        if batch is not None:
            detections = find(batch.to(device))
            for i, image, found in zip(batch.image_ids.tolist(), images, detections, strict=True):
                yield Found(files.paths[i], image, found.to("cpu"))
        yield from unreadable  # last: who stops at one has what was found beside it


@dataclass
class Writer:
    """Annotated pictures and COCO results of one run, in the folder `out`, as a context: at its end, however it comes,
    predictions.json holds what was added.

    paths: all files of the run, none twice; pictures keep their names, and their folders below the deepest common one.
    image_ids: of each path; category_ids: of each class. Boxes below `score_threshold` are neither drawn nor written.
    pictures: whether to draw at all. inputs: other files that the run reads. done: number of images so far.

    Raises UserError, before anything is written, where an input would be overwritten; and for what cannot be written.
    """

    out: Path
    paths: Sequence[Path]
    image_ids: Sequence[int]
    class_names: Sequence[str]
    category_ids: Sequence[int]
    score_threshold: float
    pictures: bool
    inputs: Sequence[Path] = ()
    done: int = 0

    def __post_init__(self) -> None:
        names = names_below(self.paths)
        targets = [self.out / name for name in picture_names(names)] if self.pictures else []
        refuse_inputs([*targets, self.out / RESULTS], [*self.paths, *self.inputs])
        self._targets = dict(zip(self.paths, targets, strict=False))
        self._about = dict(zip(self.paths, zip(self.image_ids, names, strict=True), strict=True))
        self.results = Results(self.out / RESULTS)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.results.close()

    def add(self, one: Found) -> None:
        found = one.detections.above(self.score_threshold)
        self.results.add(self._records(*self._about[one.path], found))
        if target := self._targets.get(one.path):
            picture = draw_boxes(one.image, found.boxes_xyxy, found.labels, self.class_names, found.scores, found.runs)
            # In memory: a full disk shows as what it is, not as an encoder's failure.
            content = io.BytesIO()
            picture.save(content, PIL.Image.registered_extensions()[target.suffix.lower()], quality=92)
            write(target, content.getvalue())
        self.done += 1

    def _records(self, image_id: int, name: Path, found: Detections) -> list[dict[str, Any]]:
        rows = zip(found.labels.tolist(), found.boxes_xyxy.double().tolist(), found.scores.tolist(), strict=True)
        records: list[dict[str, Any]] = [
            {
                "image_id": image_id,
                "file_name": name.as_posix(),
                "category_id": self.category_ids[label],
                "category_name": self.class_names[label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for label, (x0, y0, x1, y1), score in rows
        ]
        if found.runs is None or found.mask_scores is None:
            return records
        masks = zip(records, found.runs, found.mask_scores.tolist(), strict=True)
        return [record | {"segmentation": runs, "mask_score": score} for record, runs, score in masks]
