"""The batch against its definition, element by element."""

import pytest
import torch
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image

from codetr.data.collate import collate
from codetr.data.dataset import Sample

SHAPES = [(20, 33), (31, 12), (7, 9)]


def sample(index: int, objects: int) -> Sample:
    height, width = SHAPES[index]
    corners = torch.rand(objects, 2, 2).sort(1).values * torch.tensor([width, height])
    return Sample(
        image=Image(torch.randint(1, 256, (3, height, width), dtype=torch.uint8)),
        boxes=BoundingBoxes(corners.flatten(1), format=BoundingBoxFormat.XYXY, canvas_size=(height, width)),
        labels=torch.randint(1, 9, (objects,)),
        image_id=50 + index,
        scale=(1 / 3, 1 / 3),
        file_size=(3 * height, 2 * width),
        truth={"boxes": corners.flatten(1).double() * 3},
    )


@pytest.mark.parametrize("counts", [(2, 0, 5), (0, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize(("divisor", "padded"), [(1, (31, 33)), (8, (32, 40)), (32, (32, 64))])
def test_batch_holds_every_sample_and_padding(counts: tuple, divisor: int, padded: tuple) -> None:
    samples = [sample(i, n) for i, n in enumerate(counts)]
    batch = collate(samples, divisor)
    slots = max(1, *counts)
    assert batch.images.shape == (3, 3, *padded)
    assert batch.images.dtype == torch.uint8
    assert batch.targets.boxes.shape == (3, slots, 4)
    assert batch.targets.boxes.dtype == torch.float32
    assert type(batch.images) is type(batch.targets.boxes) is type(batch.targets.labels) is Tensor
    assert batch.image_ids.tolist() == [50, 51, 52]
    assert batch.frames.sizes.tolist() == [list(s) for s in SHAPES]
    torch.testing.assert_close(batch.frames.scale, torch.full((3, 2), 1 / 3))
    assert batch.frames.file_sizes.tolist() == [[3 * h, 2 * w] for h, w in SHAPES]
    assert batch.targets.counts.tolist() == list(counts)
    for i, (s, (h, w)) in enumerate(zip(samples, SHAPES, strict=True)):
        torch.testing.assert_close(batch.images[i, :, :h, :w], torch.as_tensor(s.image), rtol=0, atol=0)
        inside = torch.zeros(padded, dtype=torch.bool)
        inside[:h, :w] = True
        assert torch.equal(batch.padding[i], ~inside)
        assert not batch.images[i, :, ~inside].any()
        assert batch.truth[i] is s.truth
        for j in range(slots):
            if j < counts[i]:
                x1, y1, x2, y2 = s.boxes[j].tolist()
                expected = [(x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h]
            else:
                expected = [0.5, 0.5, 1, 1]
            torch.testing.assert_close(batch.targets.boxes[i, j], torch.tensor(expected))
            assert batch.targets.labels[i, j] == (s.labels[j] if j < counts[i] else 0)
            assert batch.targets.valid[i, j] == (j < counts[i])


def test_places_for_more_objects() -> None:
    """At least so many, filled as those that a batch lacks anyway."""
    samples = [sample(0, 2), sample(1, 4)]
    few, many = collate(samples, 8).targets, collate(samples, 8, most_objects=7).targets
    assert many.boxes.shape == (2, 7, 4)
    assert torch.equal(many.counts, few.counts)
    for name, filling in {"boxes": [0.5, 0.5, 1, 1], "labels": 0, "valid": False}.items():
        assert torch.equal(getattr(many, name)[:, :4], getattr(few, name))
        assert (getattr(many, name)[:, 4:] == torch.tensor(filling)).all()
    assert collate(samples, 8, most_objects=3).targets.boxes.shape == (2, 4, 4)


def test_boxes_come_back_in_network_pixels() -> None:
    samples = [sample(i, 2) for i in range(3)]
    for xyxy, s in zip(collate(samples, 32).targets.boxes_xyxy, samples, strict=True):
        torch.testing.assert_close(xyxy, torch.as_tensor(s.boxes), atol=1e-4, rtol=0)
