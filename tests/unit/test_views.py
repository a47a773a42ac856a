"""Views of pictures, of a detector that finds every coloured rectangle that it is shown: where they lie, and whether
every object is found once, whole, where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.transforms import v2

from codetr.data.geometry import PadTo, Window, draw
from codetr.data.segmentations import encode, placed
from codetr.errors import UserError
from codetr.trust import parts
from codetr.types import Batch, Detections
from codetr.views import NMS, TTA, WBF, Eye, Found, Picture, Pixels, Tiles, View, Views, listed, made, through
from codetr.views.kinds import boundaries, starts
from codetr.views.view import Part, whole

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
    draws = torch.Generator().manual_seed(seed)
    image, boxes = torch.zeros(3, height, width, dtype=torch.uint8), []
    while len(boxes) < count:
        w, h = (int(torch.randint(3, largest + 1, (), generator=draws)) for _ in range(2))
        x, y = (int(torch.randint(0, full - own + 1, (), generator=draws)) for full, own in ((width, w), (height, h)))
        if not image[0, y : y + h, x : x + w].any():
            boxes.append([x, y, x + w, y + h])
            image[:, y : y + h, x : x + w] = len(boxes)
    return image, torch.tensor(boxes, dtype=torch.float32)


def see(pictures: Sequence[Picture]) -> list[Found]:
    """Every colour: its box in the picture, its number as the score, its pixels as the mask."""
    assert len({picture.size for picture in pictures}) == 1
    return [{"main": _see(picture.read(whole(picture))[0])} for picture in pictures]


def _see(tile: Tensor) -> Detections:
    boxes, colours = [], [int(colour) for colour in tile.unique().flip(0) if colour]  # best first
    for colour in colours:
        rows, columns = (tile == colour).nonzero(as_tuple=True)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    labels, scores = torch.zeros(len(boxes), dtype=torch.long), torch.tensor(colours) / 256
    masks = encode(tile == torch.tensor(colours)[:, None, None]) if colours else []
    return Detections(scores, labels, torch.tensor(boxes, dtype=torch.float32).view(-1, 4), masks, scores / 2)


def check(found: Detections, image: Tensor, boxes: Tensor) -> None:
    """Each object once: the last colour has the best score."""
    torch.testing.assert_close(found.boxes_xyxy.flip(0), boxes, rtol=0, atol=0)
    colours = torch.arange(1, len(boxes) + 1)
    torch.testing.assert_close(found.scores.flip(0), colours / 256, rtol=0, atol=0)
    torch.testing.assert_close(found.mask_scores.flip(0), colours / 512, rtol=0, atol=0)
    assert found.rle[::-1] == encode(image[0] == colours[:, None, None])


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("height", "width"), [(30, 40), (64, 200), (150, 190), (65, 64)])
def test_every_object_is_found_once_and_whole(height: int, width: int, full: bool, batch_size: int) -> None:
    image, boxes = painted(height, width, 20 if height > 30 else 5, largest=16, seed=height)
    tiles = Tiles(size=64, overlap=0.25, full=full, batch_size=batch_size)
    seen_as_one = see if not full else lambda pictures: [see([one])[0] for one in pictures]
    (found,) = tiles(seen_as_one, [Pixels(image)])
    check(found["main"], image, boxes)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_objects_larger_than_overlaps_and_tiles_are_put_together(seed: int, full: bool) -> None:
    """Up to more than two tiles in each direction, so that the tiles in the middle see nothing but it."""
    image, boxes = painted(300, 260, 10, largest=150, seed=seed)
    (found,) = Tiles(size=64, overlap=0.25, full=full, batch_size=1)(see, [Pixels(image)])
    check(found["main"], image, boxes)


def test_pictures_keep_apart() -> None:
    one, boxes = painted(100, 120, 12, largest=16, seed=1)
    other, others = painted(70, 90, 6, largest=16, seed=2)
    found = Tiles(size=64)(see, [Pixels(one), Pixels(other)])
    for own, image, expected in zip(found, (one, other), (boxes, others), strict=True):
        check(own["main"], image, expected)


def test_tiles_that_meet_and_do_not_overlap_find_what_each_finds() -> None:
    """No core drops and nothing merges what a tile sees whole."""
    image = torch.zeros(3, 128, 192, dtype=torch.uint8)
    parts = []
    for number, (top, left) in enumerate(product((0, 64), (0, 64, 128))):
        tile, boxes = painted(56, 56, 4, largest=20, seed=number)
        image[:, top + 4 : top + 60, left + 4 : left + 60] = tile
        parts.append(boxes + torch.tensor([left, top, left, top]) + 4)
    (found,) = Tiles(size=64, overlap=0)(see, [Pixels(image)])
    own = found["main"]
    rows = {tuple(row) for row in own.boxes_xyxy.tolist()}
    assert len(own.scores) == len(rows) == 24
    assert rows == {tuple(row) for row in torch.cat(parts).tolist()}


@pytest.mark.parametrize("merge", [NMS(), WBF(min_score=0)])
def test_a_mirrored_view_is_a_mirrored_picture(merge: NMS | WBF) -> None:
    image, boxes = painted(61, 90, 9, largest=30, seed=4)
    for flips in ({"flip": True}, {"vertical_flip": True}, {"flip": True, "vertical_flip": True}):
        view = View(Window(0, 0, 61, 90), **flips)
        (found,) = see([Part(Pixels(image), view)])
        check(view.back(found["main"], (61, 90)), image, boxes)
    every = TTA(scales=[1], flip=True, vertical_flip=True, merge=merge)
    assert len(every.of((61, 90))) == 4
    (found,) = every(see, [Pixels(image)])
    own = found["main"]
    torch.testing.assert_close(own.boxes_xyxy.flip(0), boxes, rtol=0, atol=1e-4)
    torch.testing.assert_close(own.scores.flip(0), torch.arange(1, 10) / 256)
    assert own.rle[::-1] == encode(image[0] == torch.arange(1, 10)[:, None, None])


def test_views_through_views() -> None:
    """Each tile mirrored, and each mirror image in tiles."""
    image, boxes = painted(150, 190, 20, largest=60, seed=8)
    tiles, flips = Tiles(size=64, batch_size=3), TTA(scales=[1], flip=True, batch_size=2)
    for order in ((tiles, flips), (flips, tiles)):
        (found,) = through(order, see)([Pixels(image)])
        check(found["main"], image, boxes)


@dataclass(frozen=True, kw_only=True)
class Halves(Views):
    """Left and right, a kind of one's own."""

    def of(self, size: tuple[int, int]) -> list[View]:
        height, width = size
        middle = width // 2
        return [View(Window(0, 0, height, middle)), View(Window(0, middle, height, width - middle))]


def test_views_of_ones_own() -> None:
    image, _ = painted(40, 60, 4, largest=16, seed=3)
    own = {"halves": {"_target_": "test_views.Halves"}, "tiles": None}
    (halves,) = made(own, lambda part: Halves()).values()
    (found,) = halves(see, [Pixels(image)])
    (plain,) = see([Pixels(image)])
    expected = {tuple(row) for row in plain["main"].boxes_xyxy.tolist() if row[2] <= 29 or row[0] >= 31}
    assert expected <= {tuple(row) for row in found["main"].boxes_xyxy.tolist()}
    assert len(expected) >= 1


def test_nothing_may_be_found() -> None:
    nothing = Pixels(torch.zeros(3, 50, 70, dtype=torch.uint8))
    for views in (Tiles(size=32), Tiles(size=32, merge=WBF()), TTA(scales=[1])):
        (found,) = views(see, [nothing])
        assert len(found["main"].scores) == 0


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Tiles, {"size": 0}),
        (Tiles, {"overlap": 0.6}),
        (Tiles, {"overlap": -0.1}),
        (Tiles, {"batch_size": 0}),
        (TTA, {"scales": []}),
        (TTA, {"scales": [0]}),
    ],
)
def test_settings_that_make_no_sense_are_named(kind: type[Views], given: dict) -> None:
    (key,) = given
    with pytest.raises(UserError, match=key):
        kind(**given)


def test_what_are_no_views_is_named() -> None:
    assert listed(()) == ()
    assert listed([Tiles(), TTA()]) == (Tiles(), TTA())
    for wrong in ("tiles", [Tiles(), "tta"], Tiles):
        with pytest.raises(UserError, match=r"Tiles\(\.\.\.\)"):
            listed(wrong)
    with pytest.raises(UserError, match=r"views\.mine is a dict"):
        made({"mine": {"size": 3}}, dict)


# -- run lengths


@pytest.mark.parametrize("seed", range(40))
def test_run_lengths_of_a_part_are_those_of_the_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 12, 2)
    top, left, below, beside = rng.integers(0, 4, 4) * rng.integers(0, 2)
    mask = rng.random((height, width)) < rng.choice([0, 0.2, 0.8, 1])
    flips = [(), (0,), (1,), (0, 1)][seed % 4]
    full = np.pad(np.flip(mask, flips), ((top, below), (left, beside)))
    (part,), (expected,) = (encode(torch.from_numpy(one.copy())[None]) for one in (mask, full))
    assert placed(part, (int(top), int(left)), full.shape, flips) == expected
    assert np.array_equal(coco_mask.decode(expected), full)


# -- the network's pixels


def test_a_detector_of_batches_looks_at_pictures_as_a_prediction_does() -> None:
    """Padded to multiples of the divisor, in pixels of the picture whatever the transform and the scale."""
    batches: list[Batch] = []

    def find(batch: Batch) -> list[Found]:
        batches.append(batch)
        sizes = batch.frames.sizes.float()
        boxes = torch.stack([sizes[:, 1] * 0, sizes[:, 0] * 0, sizes[:, 1] / 2, sizes[:, 0] / 4], 1)
        found = [Detections(torch.ones(1), torch.zeros(1).long(), box[None]) for box in boxes]
        return [{"main": one} for one in batch.frames.to_files(found)]

    picture = Pixels(torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8))
    eye = Eye(find, v2.Resize(90), 32, torch.device("cpu"))
    (found,) = through([TTA(scales=[1, 0.5, 2], flip=False, batch_size=1)], eye)([picture])
    assert [tuple(batch.images.shape) for batch in batches] == [(1, 3, 64, 64), (1, 3, 96, 128), (1, 3, 192, 256)]
    assert [tuple(batch.frames.sizes[0].tolist()) for batch in batches] == [(45, 60), (90, 120), (180, 240)]
    torch.testing.assert_close(found["main"].boxes_xyxy, torch.tensor([[0.0, 0.0, 40.0, 15.0]]))
    with pytest.raises(UserError, match=r"scales=\[1\]"):
        through([TTA(scales=[2])], Eye(find, v2.ColorJitter(), 32, torch.device("cpu")))([picture])


@pytest.mark.parametrize(
    "transform", [v2.Identity(), v2.Resize(40, max_size=70), v2.Compose([v2.Resize(32), PadTo(64, 114)])]
)
def test_a_zoomed_transform_makes_larger_pictures_of_the_same(transform: v2.Transform) -> None:
    image = torch.randint(0, 256, (3, 48, 60), dtype=torch.uint8)
    plain = draw(transform, (48, 60))
    zoomed = plain.zoomed(1.5)
    assert [round(1.5 * side) for side in plain.size] == list(zoomed.size)
    assert zoomed.image(image).shape[1:] == zoomed.size
    box = torch.tensor([[6.0, 8.0, 42.0, 40.0]])
    torch.testing.assert_close(zoomed.boxes(box), 1.5 * plain.boxes(box), rtol=0.02, atol=0.2)
    same = plain.zoomed(1)
    assert same.size == plain.size
    assert torch.equal(same.image(image), plain.image(image))


def test_a_checkpoint_of_former_tiles_says_what_to_give_instead(caplog: pytest.LogCaptureFixture) -> None:
    parts({"postprocess": {}, "data": {}, "tiles": {"size": 256}}, "old.ckpt", names=("postprocess", "data"))
    assert "old.ckpt was trained with `tiles`" in caplog.text
    assert "views=tiles views.tiles.size=256" in caplog.text
