"""Training and validation data for Lightning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torchvision.tv_tensors import Image

from codetr.data.checks import Verify, check_trainable, check_val_classes
from codetr.data.dataset import DetectionDataset
from codetr.data.findings import OnError
from codetr.data.loader import BatchLoader, TrainLoader
from codetr.data.mixing import Mixer
from codetr.data.readers import Reader, locate
from codetr.data.sampler import EvalSampler, TrainSampler
from codetr.data.sampling import Order, orientations
from codetr.data.transforms import TransformedDataset, Unreadable
from codetr.errors import UserError

_log = logging.getLogger(__name__)
_NAMED = 10  # of the files that could not be decoded


class DetectionDataModule(LightningDataModule):
    """A training and a validation set, with their loaders.

    train_images, val_images: folders, relative to `root`, or else to the working directory.
    train_annotations, val_annotations: what `reader` reads (see `codetr.data.readers`), likewise.
    cache: where tables of annotations are kept (see `codetr.data.cache`).
    train_transform, val_transform: see `codetr.data.transforms.TransformedDataset`.
    batch_size, eval_batch_size: images per process.
    size_divisor: of the height and width of a batch.
    sampling: which images an epoch shows how often.
    aspect_ratio_grouping: batches of wide or of high images (see `codetr.data.sampling`).
    classes: selects and orders categories by name; None: all, as in the training file.
    on_error, verify: see `codetr.data.checks`.
    masks: samples of the training set have the objects' masks.
    val_masks: the truth of the validation set has masks, as run lengths. (Who validates by views sets `val_pixels`:
        batches of the validation set then also have the images as their files have them.)
    prepare: called once per node before anything is read, to make or fetch the data.
    mosaic, copy_paste, mixup: applied to training images behind `train_transform`, in this order (see
        `codetr.data.mixing`); copy-paste reads masks and wants images of one size.
    colour: applied to training images before `train_transform`.
    max_pixels: of an image; larger ones are not decoded.
    scaled_decoding: of training images (see `codetr.data.transforms.TransformedDataset`).
    pad_objects: training batches have places for as many objects as an image can have; otherwise for as many as one of
        theirs has.

    With on_error "skip", an image file that does not decode in the middle of a run is replaced by the next one in
    training, and by a black one in evaluation, where its objects count as missed; `teardown` says how many, and which.

    The Trainer must not replace the samplers (use_distributed_sampler=False). After a checkpoint in the middle of
    an epoch, training goes on with the next batch (see `codetr.data.loader.TrainLoader`).

    Raises UserError from `setup`, for whatever is wrong with the data.
    """

    def __init__(
        self,
        *,
        root: str,
        train_images: str,
        train_annotations: str,
        val_images: str,
        val_annotations: str,
        reader: Reader,
        cache: str | None,
        train_transform: Callable[[dict[str, Any]], dict[str, Any]],
        val_transform: Callable[[dict[str, Any]], dict[str, Any]],
        batch_size: int,
        eval_batch_size: int,
        size_divisor: int,
        num_workers: int,
        seed: int,
        sampling: Callable[[DetectionDataset], Order],
        aspect_ratio_grouping: bool,
        classes: Sequence[str] | None,
        on_error: OnError,
        verify: Verify,
        masks: bool | None,
        val_masks: bool | None,
        prepare: Callable[[], Any] | None,
        mosaic: Mixer | None = None,
        copy_paste: Mixer | None = None,
        mixup: Mixer | None = None,
        colour: Callable[[Image], Image] | None = None,
        max_pixels: int | None = None,
        scaled_decoding: bool = False,
        pad_objects: bool = False,
    ) -> None:
        super().__init__()
        self.train_paths = locate(root, train_images), locate(root, train_annotations)
        self.val_paths = locate(root, val_images), locate(root, val_annotations)
        self.reader = reader
        self._read = partial(
            DetectionDataset, reader=reader, on_error=on_error, verify=verify, cache=cache, max_pixels=max_pixels
        )
        self.train_transform, self.val_transform = train_transform, val_transform
        self.batch_size, self.eval_batch_size, self.size_divisor = batch_size, eval_batch_size, size_divisor
        self._loading: dict[str, Any] = {
            "size_divisor": size_divisor,
            "num_workers": num_workers,
            "pin_memory": torch.cuda.is_available(),
        }
        self.seed = seed
        self.sampling, self.aspect_ratio_grouping = sampling, aspect_ratio_grouping
        self.classes, self.on_error = classes, on_error
        self.masks, self.val_masks, self.val_pixels = bool(masks), bool(val_masks), False
        self.prepare, self.colour = prepare, colour
        self.mixers = [mixer for mixer in (mosaic, copy_paste, mixup) if mixer is not None]
        self.scaled_decoding = scaled_decoding
        self.pad_objects = pad_objects
        self.train_set: DetectionDataset | None = None
        self.val_set: DetectionDataset | None = None
        self._in_use: dict[str, TransformedDataset] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in the order of the labels; known after `setup`."""
        dataset = self.train_set or self.val_set
        if dataset is None:
            raise RuntimeError("class_names is known after setup()")
        return dataset.class_names

    def prepare_data(self) -> None:
        if self.prepare is not None:
            self.prepare()

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.train_set is None:
            masks = self.masks or any(mixer.needs_masks for mixer in self.mixers)
            self.train_set = self._read(*self.train_paths, classes=self.classes, masks=masks)
            check_trainable(self.train_set.label_counts, self.train_set.report.source)
            self.val_set = None
        if self.val_set is None:
            self.val_set = self._read_val()

    def train_dataloader(self) -> TrainLoader:
        assert self.train_set is not None, "setup('fit') comes first"
        rank, world_size = self._process()
        groups = orientations(self.train_set.sizes) if self.aspect_ratio_grouping else None
        order = self.sampling(self.train_set)
        sampler = TrainSampler(order, self.batch_size, self.seed, rank, world_size, groups)
        if not len(sampler):
            raise UserError(
                f"{self.train_set.report.source} has {len(self.train_set)} usable images, fewer than one step "
                f"takes ({self.batch_size} x {world_size} processes): lower data.batch_size"
            )
        dataset = TransformedDataset(
            self.train_set,
            self.train_transform,
            self.seed,
            unreadable="next" if self.on_error == "skip" else "stop",
            mixers=self.mixers,
            masks=self.masks,
            colour=self.colour,
            scaled_decoding=self.scaled_decoding,
        )
        self._in_use["training"] = dataset
        most = self._most_objects(self.train_set) if self.pad_objects else 1
        batches_per_step = self.trainer.accumulate_grad_batches if self.trainer else 1
        return TrainLoader(dataset, sampler, batches_per_step=batches_per_step, most_objects=most, **self._loading)

    def largest_sample(self, images: int) -> tuple[tuple[int, int], int]:
        """((height, width) of a batch, at most, the objects of an image, at most), as far as the transform's draws for
        so many images tell. Where wide images meet high ones in a batch, it is as wide as those and as high as these.
        """
        assert self.train_set is not None, "setup('fit') comes first"
        dataset, divisor = self.train_dataloader().dataset, self._loading["size_divisor"]
        chosen = np.linspace(0, len(self.train_set) - 1, images).round().astype(int)
        shapes = np.array([dataset[draw, int(i)].image.shape[-2:] for draw, i in enumerate(chosen)])
        groups = orientations(self.train_set.sizes)[chosen] * self.aspect_ratio_grouping
        height, width = max((shapes[groups == group].max(0) for group in np.unique(groups)), key=np.prod)
        padded = (int(-(-side // divisor) * divisor) for side in (height, width))
        return (next(padded), next(padded)), self._most_objects(self.train_set)

    def val_dataloader(self) -> BatchLoader:
        assert self.val_set is not None, "setup() comes first"
        rank, world_size = self._process()
        sampler = EvalSampler(len(self.val_set), self.eval_batch_size, rank, world_size)
        # No other image takes the place of an unreadable one here: it would be scored twice.
        unreadable: Unreadable = "blank" if self.on_error == "skip" else "stop"
        dataset = TransformedDataset(self.val_set, self.val_transform, self.seed, unreadable, pixels=self.val_pixels)
        self._in_use["validation"] = dataset
        return BatchLoader(dataset, sampler, **self._loading)

    def teardown(self, stage: str) -> None:
        for split, dataset in self._in_use.items():
            if files := [str(path) for path in dataset.unreadable_files]:
                named = ", ".join(files[:_NAMED]) + ", ..." * (len(files) > _NAMED)
                _log.warning("%d of %d %s images could not be decoded: %s", len(files), len(dataset), split, named)

    def _most_objects(self, dataset: DetectionDataset) -> int:
        """Of a training image, with those of others that are mixed in. Transforms remove objects and add none."""
        most = of_file = int(np.diff(dataset.objects().offsets).max())
        for mixer in self.mixers:
            most = mixer.most_objects(most, of_file)
        return most

    def _process(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _read_val(self) -> DetectionDataset:
        """Labels are those of the training set when that is known, whatever this file lists, and in which order."""
        classes = self.classes if self.train_set is None else self.train_set.class_names
        val = self._read(*self.val_paths, classes=classes, rle=self.val_masks, absent=True)
        if self.train_set is not None and self.classes is None:
            check_val_classes(self.train_set.class_names, val.label_counts, val.others, val.report.source)
        return val
