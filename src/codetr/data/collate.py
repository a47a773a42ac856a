"""Samples to a padded batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from codetr.data.dataset import Sample
from codetr.types import Batch, Frames, Targets


def collate(samples: Sequence[Sample], size_divisor: int, most_objects: int = 1, shared: bool = False) -> Batch:
    """Pad images right and below to the largest height and width, rounded up to multiples of `size_divisor`.

    Objects are padded to the largest number in the batch, at least `most_objects`, with the box (0.5, 0.5, 1, 1), label
    0 and an empty mask. The images have channels-last strides.

    shared: the images lie in shared memory from the start, so that they need not be copied there.
    """
    sizes = [(s.image.shape[-2], s.image.shape[-1]) for s in samples]
    height, width = (-(-max(sides) // size_divisor) * size_divisor for sides in zip(*sizes, strict=True))
    targets = _targets(samples, sizes, (height, width), most_objects)
    return Batch(
        images=_images([s.image.as_subclass(Tensor) for s in samples], (height, width), shared),
        padding=padding_of(targets.frames.sizes, (height, width)),
        targets=targets,
        image_ids=torch.tensor([s.image_id for s in samples]),
        truth=[s.truth for s in samples],
        pixels=[s.pixels for s in samples if s.pixels is not None],
    )


def _images(images: Sequence[Tensor], canvas: tuple[int, int], shared: bool) -> Tensor:
    # Channels last, as decoders write and convolutions read: what is copied lies in one piece per row.
    shape = len(images), *canvas, 3
    batch = torch.empty(0, dtype=torch.uint8)
    if shared:  # as torch's own collate does it
        batch.set_(torch.UntypedStorage._new_shared(math.prod(shape)), 0, shape)  # type: ignore[call-overload]
    else:
        batch.resize_(shape)
    batch = batch.permute(0, 3, 1, 2)
    for padded, image in zip(batch, images, strict=True):
        height, width = image.shape[-2:]
        padded[:, :height, :width] = image
        padded[:, :height, width:] = 0
        padded[:, height:] = 0
    return batch


def padding_of(sizes: Tensor, canvas: tuple[int, int]) -> Tensor:
    """[B, *canvas] bool, True beside and below images of (height, width) `sizes`, [B, 2]."""
    padding = torch.ones(len(sizes), *canvas, dtype=torch.bool)
    for one, (height, width) in zip(padding, sizes.tolist(), strict=True):
        one[:height, :width] = False
    return padding


def _targets(
    samples: Sequence[Sample], sizes: Sequence[tuple[int, int]], canvas: tuple[int, int], most_objects: int
) -> Targets:
    # In NumPy: with so few numbers a call of torch takes several times as long as the work.
    slots = max(most_objects, *(len(s.labels) for s in samples))
    boxes = np.tile(np.array([0.5, 0.5, 1, 1], np.float32), (len(samples), slots, 1))
    labels, valid = np.zeros((len(samples), slots), np.int64), np.zeros((len(samples), slots), bool)
    for i, (sample, (height, width)) in enumerate(zip(samples, sizes, strict=True)):
        count = len(sample.labels)
        corners = sample.boxes.as_subclass(Tensor).numpy() / np.array([width, height] * 2, np.float32)
        low, high = corners[:, :2], corners[:, 2:]
        boxes[i, :count, :2], boxes[i, :count, 2:] = (low + high) / 2, high - low
        labels[i, :count], valid[i, :count] = sample.labels.numpy(), True
    frames = Frames(
        sizes=torch.tensor(sizes),
        scale=torch.tensor([s.scale for s in samples], dtype=torch.float32),
        file_sizes=torch.tensor([s.file_size for s in samples]),
    )
    return Targets(
        boxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        valid=torch.from_numpy(valid),
        frames=frames,
        masks=_masks(samples, slots, canvas),
    )


def _masks(samples: Sequence[Sample], slots: int, canvas: tuple[int, int]) -> Tensor | None:
    if any(s.masks is None for s in samples):
        return None
    masks = torch.zeros(len(samples), slots, *canvas, dtype=torch.bool)
    for padded, sample in zip(masks, samples, strict=True):
        assert sample.masks is not None
        count, height, width = sample.masks.shape
        padded[:count, :height, :width] = sample.masks.as_subclass(Tensor)
    return masks
