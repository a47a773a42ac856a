"""Samples to a padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

from codetr.data.dataset import Sample
from codetr.types import Batch, Frames, Targets, box_scale


def collate(samples: Sequence[Sample], size_divisor: int, most_objects: int = 1) -> Batch:
    """Pad images right and below to the largest height and width, rounded up to multiples of `size_divisor`.

    Objects are padded to the largest number in the batch, at least `most_objects`, with the box (0.5, 0.5, 1, 1), label
    0 and an empty mask. The images have channels-last strides.
    """
    sizes = torch.tensor([s.image.shape[-2:] for s in samples])
    height, width = (int(-(-side // size_divisor) * size_divisor) for side in sizes.amax(0))
    # Channels last, as decoders write and convolutions read: what is copied lies in one piece per row.
    images = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    for i, sample in enumerate(samples):
        h, w = sample.image.shape[-2:]
        images[i, :, :h, :w] = sample.image.as_subclass(Tensor)
        padding[i, :h, :w] = False
    return Batch(
        images=images,
        padding=padding,
        targets=_targets(samples, sizes, (height, width), most_objects),
        image_ids=torch.tensor([s.image_id for s in samples]),
        truth=[s.truth for s in samples],
    )


def _targets(samples: Sequence[Sample], sizes: Tensor, canvas: tuple[int, int], most_objects: int) -> Targets:
    counts = torch.tensor([len(s.labels) for s in samples])
    slots = max(most_objects, int(counts.max()))
    valid = torch.arange(slots) < counts[:, None]
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(len(samples), slots, 1)
    labels = torch.zeros(len(samples), slots, dtype=torch.int64)
    xyxy = torch.cat([s.boxes.as_subclass(Tensor) for s in samples])
    scale = box_scale(sizes).repeat_interleave(counts, 0)
    boxes[valid] = box_convert(xyxy / scale, "xyxy", "cxcywh")
    labels[valid] = torch.cat([s.labels for s in samples])
    frames = Frames(
        sizes=sizes,
        scale=torch.tensor([s.scale for s in samples], dtype=torch.float32),
        file_sizes=torch.tensor([s.file_size for s in samples]),
    )
    return Targets(boxes=boxes, labels=labels, valid=valid, frames=frames, masks=_masks(samples, slots, canvas))


def _masks(samples: Sequence[Sample], slots: int, canvas: tuple[int, int]) -> Tensor | None:
    if any(s.masks is None for s in samples):
        return None
    masks = torch.zeros(len(samples), slots, *canvas, dtype=torch.bool)
    for padded, sample in zip(masks, samples, strict=True):
        assert sample.masks is not None
        count, height, width = sample.masks.shape
        padded[:count, :height, :width] = sample.masks.as_subclass(Tensor)
    return masks
