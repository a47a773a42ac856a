"""Denoising queries: what they carry, how far they move, and what they are to become."""

from typing import Literal

import torch
from torchvision.ops import box_convert

from codetr.queries.denoising import DenoisingQueries
from codetr.types import Frames, Known, Memory, QueryContext, QueryGroup, Targets

WIDTH, CLASSES = 8, 5


def group(
    box_noise: float = 0.4,
    label_noise: float = 0.25,
    contrastive: bool = True,
    indicator: bool = False,
    unused: Literal["masked", "background"] = "masked",
    empty: bool = False,
) -> tuple[QueryGroup, Targets]:
    torch.manual_seed(3)
    objects = 3
    boxes = torch.cat([torch.rand(2, objects, 2) * 0.2 + 0.4, torch.rand(2, objects, 2) * 0.2 + 0.1], -1)
    valid = torch.ones(2, objects, dtype=torch.bool)
    valid[1, 1:] = False
    valid &= not empty
    targets = Targets(boxes, torch.randint(CLASSES, (2, objects)), valid, Frames.unscaled(torch.full((2, 2), 64)))
    nothing = torch.zeros(2, 0, WIDTH)
    memory = Memory(
        nothing, nothing, torch.zeros(2, 0, dtype=torch.bool), (), torch.ones(2, 0, 2).int(), torch.ones(2, 0, 2)
    )
    source = DenoisingQueries(
        WIDTH, CLASSES, 12, contrastive, label_noise, box_noise, indicator, unused, 1e-6, 1.0, False
    )
    made = source(QueryContext(memory, targets))
    return made, targets


def test_positives_move_less_than_the_noise_and_negatives_more() -> None:
    made, targets = group(box_noise=0.4)
    assert made.blocks == 4
    reference = box_convert(made.reference.view(2, 4, 2, 3, 4), "cxcywh", "xyxy")
    corners = box_convert(targets.boxes, "cxcywh", "xyxy")[:, None, None]
    half = targets.boxes[..., 2:].repeat(1, 1, 2)[:, None, None] / 2
    moved = ((reference - corners) / half).abs()
    assert (moved[:, :, 0] <= 0.4 + 1e-5).all()
    assert (moved[:, :, 1] >= 0.4 - 1e-5).all()
    assert (moved[:, :, 1] <= 0.8 + 1e-5).all()


def test_targets_are_the_objects_and_background() -> None:
    made, targets = group()
    assert isinstance(made.targets, Known)
    labels, valid = made.targets.labels.view(2, 4, 2, 3), made.valid.view(2, 4, 2, 3)
    expected = targets.labels.masked_fill(~targets.valid, -1)
    assert torch.equal(labels[:, :, 0], expected[:, None].expand(-1, 4, -1))
    assert (labels[:, :, 1] == -1).all()
    assert torch.equal(valid, targets.valid[:, None, None].expand_as(valid))
    assert made.sees == ("main",)
    assert torch.equal(made.targets.boxes.view(2, 8, 3, 4), targets.boxes[:, None].expand(-1, 8, -1, -1))


def test_without_noise_the_queries_are_the_objects() -> None:
    made, targets = group(box_noise=0.0, label_noise=0.0)
    torch.testing.assert_close(made.reference.view(2, 8, 3, 4), targets.boxes[:, None].expand(-1, 8, -1, -1))
    content = made.content.view(2, 8, 3, WIDTH)
    same = targets.labels[0, 0] == targets.labels[0]
    assert torch.equal((content[0, 0] == content[0, 0, 0]).all(-1), same)
    assert (content == content[:, :1]).all()


def test_the_share_of_changed_labels_is_the_label_noise() -> None:
    torch.manual_seed(0)
    source = DenoisingQueries(WIDTH, 1000, 12, True, 0.25, 0.4, False, "masked", 1e-6, 1.0, False)
    labels = torch.full((200, 100), 7)
    changed = (source._content(labels) != source.label_embedding.weight[7]).any(-1).float().mean()
    assert abs(float(changed) - 0.25) < 0.02


def test_dn_detr_moves_centres_and_scales_sides_and_has_no_negatives() -> None:
    made, targets = group(box_noise=0.4, contrastive=False, indicator=True)
    assert made.blocks == 4
    moved = made.reference.view(2, 4, 3, 4) - targets.boxes[:, None]
    width, height = targets.boxes[..., 2:].unbind(-1)
    limit = 0.4 * torch.stack([width / 2, height / 2, width, height], -1)[:, None]
    assert (moved.abs() <= limit + 1e-6).all()
    assert (moved.abs().amax((0, 1, 2)) > 0.5 * limit.amax((0, 1, 2))).all()
    assert isinstance(made.targets, Known)
    expected = targets.labels.masked_fill(~targets.valid, -1)
    assert torch.equal(made.targets.labels.view(2, 4, 3), expected[:, None].expand(-1, 4, -1))
    assert (made.content[..., -1] == 1).all()


def test_no_box_is_turned_inside_out() -> None:
    """A quarter of the negatives' corners pass each other, on either axis; their size is then the least there is."""
    made, _ = group(box_noise=1.0)
    sizes = made.reference.view(2, 4, 2, 3, 4)[..., 2:]
    least = 1e-6 / (1 + 1e-6)
    torch.testing.assert_close(sizes.min(), torch.tensor(least), rtol=1e-4, atol=0)
    assert (sizes[:, :, 0] > 0.01).all()
    share = (sizes[:, :, 1] < 2e-6).float().mean()
    assert 0.1 < share < 0.4


def test_unused_slots_as_background() -> None:
    """Image 1 has one object of three: the other slots are empty queries at the centre."""
    masked, _ = group()
    made, _ = group(unused="background")
    used = masked.valid
    assert made.valid.all()
    assert torch.equal(made.content[used], masked.content[used])
    assert torch.equal(made.reference[used], masked.reference[used])
    assert (made.content[~used] == 0).all()
    torch.testing.assert_close(made.reference[~used], torch.full_like(made.reference[~used], 0.5))
    assert (made.targets.labels[~used] == -1).all()
    none, _ = group(unused="background", empty=True)
    assert not none.valid.any()
