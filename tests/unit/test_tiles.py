"""Detection tile by tile, of a detector that finds every coloured rectangle that a tile shows."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from codetr.errors import UserError
from codetr.tiles import Found, Tiles, boundaries, refuse_masks, starts, unique_across
from codetr.types import Detections

SIDES = list(product((1, 99, 100, 101, 357, 1000), (64, 100), (0, 0.25, 0.5)))  # length, tile, overlap


@pytest.mark.parametrize(("length", "tile", "overlap"), SIDES)
def test_tiles_cover_a_side_and_are_as_few_as_overlap_enough(length: int, tile: int, overlap: float) -> None:
    begins = starts(length, tile, overlap)
    ends = [begin + tile for begin in begins]
    assert begins[0] == 0
    if length <= tile:
        assert begins == [0]
        return
    assert ends[-1] == length
    shared = [a + tile - b for a, b in pairwise(begins)]
    assert min(shared) >= round(tile * overlap) - 1  # the places are whole pixels
    # One tile fewer would not reach as far.
    fewer = len(begins) - 1
    assert fewer * tile - (fewer - 1) * round(tile * overlap) < length


@pytest.mark.parametrize(("length", "tile", "overlap"), SIDES)
def test_an_object_lies_whole_in_the_tile_in_whose_core_its_centre_is(length: int, tile: int, overlap: float) -> None:
    begins = starts(length, tile, overlap)
    least = min([a + tile - b for a, b in pairwise(begins)] or [length])
    edges = [0.0, *boundaries(begins, tile), float(length)]
    for size in {1, least // 2, least} - {0}:
        for begin in range(length - size + 1):
            center = begin + size / 2
            owners = [i for i in range(len(begins)) if edges[i] <= center <= edges[i + 1]]
            assert owners
            assert all(begins[i] <= begin and begin + size <= max(begins[i] + tile, length) for i in owners)


def painted(height: int, width: int, count: int, largest: int, seed: int) -> tuple[Tensor, Tensor]:
    """An image of rectangles with a colour each, none over another; and their boxes [n, 4] in the order of colours."""
    draw = torch.Generator().manual_seed(seed)
    image, boxes = torch.zeros(3, height, width, dtype=torch.uint8), []
    while len(boxes) < count:
        w, h = (int(torch.randint(3, largest + 1, (), generator=draw)) for _ in range(2))
        x, y = (int(torch.randint(0, full - own + 1, (), generator=draw)) for full, own in ((width, w), (height, h)))
        if not image[0, y : y + h, x : x + w].any():
            boxes.append([x, y, x + w, y + h])
            image[:, y : y + h, x : x + w] = len(boxes)
    return image, torch.tensor(boxes, dtype=torch.float32)


def see(tiles: Tensor, padding: Tensor, sizes: Tensor) -> Found:
    """Every colour: its box in the tile, its number as the score."""
    assert padding.shape == (len(tiles), *tiles.shape[-2:])
    assert not padding.any()
    assert sizes.tolist() == [list(tiles.shape[-2:])] * len(tiles)
    return {"main": [_see(tile[0]) for tile in tiles]}


def _see(tile: Tensor) -> Detections:
    boxes, colours = [], [int(colour) for colour in tile.unique() if colour]
    for colour in colours:
        rows, columns = (tile == colour).nonzero(as_tuple=True)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    labels = torch.zeros(len(boxes), dtype=torch.long)
    return Detections(torch.tensor(colours) / 256, labels, torch.tensor(boxes, dtype=torch.float32).view(-1, 4))


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize(("height", "width"), [(30, 40), (64, 200), (150, 190), (65, 64)])
def test_every_object_is_found_once_and_whole(height: int, width: int, batch_size: int) -> None:
    image, boxes = painted(height, width, 20 if height > 30 else 5, largest=16, seed=height)
    tiles = Tiles(size=64, overlap=0.25, iou=0.5, batch_size=batch_size)
    found = tiles(see, image[None], torch.tensor([[height, width]]))
    (own,) = found["main"]
    assert own.scores.tolist() == sorted(own.scores.tolist(), reverse=True)
    torch.testing.assert_close(own.boxes_xyxy.flip(0), boxes, rtol=0, atol=0)


def test_images_of_a_batch_keep_apart_and_padding_is_not_seen() -> None:
    one, boxes = painted(100, 120, 12, largest=16, seed=1)
    other, others = painted(70, 90, 6, largest=16, seed=2)
    images = torch.full((2, 3, 100, 120), 250, dtype=torch.uint8)
    images[0], images[1, :, :70, :90] = one, other
    found = Tiles(64, 0.25, 0.5, 4)(see, images, torch.tensor([[100, 120], [70, 90]]))["main"]
    for own, expected in zip(found, (boxes, others), strict=True):
        torch.testing.assert_close(own.boxes_xyxy.flip(0), expected, rtol=0, atol=0)


def greedy(boxes: Tensor, labels: Tensor, tile: Tensor, iou: float) -> list[bool]:
    left: list[int] = []
    for i in range(len(boxes)):
        drops = (j for j in left if labels[i] == labels[j] and tile[i] != tile[j])
        if not any(box_iou(boxes[i : i + 1], boxes[j : j + 1]) > iou for j in drops):
            left.append(i)
    return [i in left for i in range(len(boxes))]


@pytest.mark.parametrize("seed", range(5))
def test_of_detections_from_different_tiles_the_best_stay(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    corners = torch.rand(150, 2, generator=draw) * 20
    boxes = torch.cat([corners, corners + 5 + torch.rand(150, 2, generator=draw) * 10], 1)
    labels, tile = (torch.randint(n, (150,), generator=draw) for n in (2, 4))
    left = unique_across(boxes, labels, tile, 0.4)
    assert 0 < left.sum() < 150
    assert left.tolist() == greedy(boxes, labels, tile, 0.4)


def test_within_a_tile_nothing_is_dropped() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(3, 1)
    zeros = torch.zeros(3, dtype=torch.long)
    assert unique_across(boxes, zeros, zeros, 0.5).all()
    assert unique_across(boxes, zeros, torch.tensor([0, 1, 1]), 0.5).tolist() == [True, False, False]
    assert unique_across(boxes[:0], zeros[:0], zeros[:0], 0.5).tolist() == []


@pytest.mark.parametrize(("size", "overlap", "batch_size"), [(0, 0.2, 1), (64, 0.6, 1), (64, -0.1, 1), (64, 0.2, 0)])
def test_settings_that_make_no_sense_are_named(size: int, overlap: float, batch_size: int) -> None:
    with pytest.raises(UserError, match="tiles"):
        Tiles(size, overlap, 0.5, batch_size)


def test_masks_are_refused() -> None:
    refuse_masks(None, object())
    refuse_masks(Tiles(64, 0.25, 0.5, 1), None)
    with pytest.raises(UserError, match="tiles=null"):
        refuse_masks(Tiles(64, 0.25, 0.5, 1), object())


def test_nothing_may_be_found() -> None:
    found = Tiles(32, 0.25, 0.5, 2)(see, torch.zeros(1, 3, 50, 70, dtype=torch.uint8), torch.tensor([[50, 70]]))
    assert [len(own.scores) for own in found["main"]] == [0]
