"""Geometry that is drawn before there are pixels, against torchvision's transforms of the pixels themselves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import CATEGORIES, write
from PIL import Image as Picture
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image, Mask

from codetr.data.dataset import DetectionDataset, Sample
from codetr.data.geometry import PadTo, RandomSizeCrop, RandomTurn, draw, is_geometric
from codetr.data.transforms import TransformedDataset, aerial, fit_canvas, large_scale_jitter, multiscale, transformed

SIZES = [(48, 64), (97, 61), (33, 33), (5, 700)]
TRANSFORMS = {
    "multiscale": multiscale([30, 48, 57], 90, 0.5, 0.5, [40, 50, 60], None, (38, 60)),
    "large scale jitter": large_scale_jitter(80, (0.1, 2.0), 0.5, 114),
    "fit": fit_canvas(96, 114),
    "short side": v2.Resize(41, max_size=99),
    "height and width": v2.Resize((20, 31)),
    "flip": v2.RandomHorizontalFlip(1),
    "nothing": v2.Identity(),
    # What is seen of the image is less than the canvas when it is cut and mirrored.
    "canvas first": v2.Compose(
        [fit_canvas(70, 9), RandomSizeCrop(20, 60), v2.RandomHorizontalFlip(0.5), v2.Resize((33, 44)), PadTo(50, 3)]
    ),
    "aerial": aerial(60, (0.5, 2.0), 0.5, 0.5, 0.75, 114),
    "turn first": v2.Compose(
        [
            RandomTurn(),
            RandomSizeCrop(20, 60),
            v2.RandomVerticalFlip(0.5),
            v2.Resize((33, 44)),
            RandomTurn(),
            PadTo(50, 3),
        ]
    ),
    "nearest": v2.Compose([v2.ScaleJitter((60, 60), (0.3, 2.0), interpolation=v2.InterpolationMode.NEAREST)]),
}


def sample(size: tuple[int, int], objects: int) -> Sample:
    height, width = size
    corners = (torch.rand(objects, 2, 2) * torch.tensor([width, height])).sort(1).values.flatten(1)
    return Sample(
        image=Image(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)),
        boxes=BoundingBoxes(corners, format=BoundingBoxFormat.XYXY, canvas_size=size),
        labels=torch.arange(objects),
        image_id=3,
        scale=(1.0, 1.0),
        file_size=size,
        truth={},
        masks=Mask(torch.randint(0, 2, (objects, *size), dtype=torch.uint8)),
    )


@pytest.mark.parametrize("name", TRANSFORMS)
def test_as_torchvision_does_it(name: str) -> None:
    """The same numbers are drawn, pixels are equal; boxes differ by float32's rounding behind each of the steps."""

    def by_torchvision(parts: dict[str, Any]) -> dict[str, Any]:
        return TRANSFORMS[name](parts)

    assert is_geometric(TRANSFORMS[name])
    assert not is_geometric(by_torchvision)
    sizes = SIZES if "scale" not in name and name != "nearest" else SIZES[:3]  # others become too thin to resize
    for seed in range(60):
        torch.manual_seed(seed)
        one = sample(sizes[seed % len(sizes)], seed % 9)
        state = torch.get_rng_state()
        ours = transformed(one, TRANSFORMS[name])
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        theirs = transformed(one, by_torchvision)
        assert torch.equal(after, torch.get_rng_state())
        assert ours.image.shape == theirs.image.shape
        assert torch.equal(ours.image, theirs.image)
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert torch.equal(ours.masks, theirs.masks)
        assert ours.scale == pytest.approx(theirs.scale, abs=1e-3 / min(one.file_size))
        assert ours.boxes.canvas_size == tuple(ours.image.shape[1:])
        torch.testing.assert_close(ours.boxes.as_subclass(Tensor), theirs.boxes.as_subclass(Tensor), rtol=0, atol=2e-4)


def test_what_may_do_anything_is_left_to_itself() -> None:
    class Mine(v2.RandomHorizontalFlip):
        pass

    for transform in (v2.ColorJitter(0.2), Mine(0.5), v2.Pad(3), v2.RandomIoUCrop(), lambda parts: parts):
        assert not is_geometric(transform)
        assert not is_geometric(v2.Compose([v2.Resize(9), transform]))


# Height and width in the file, where rows or columns are no multiples of 8; what they are resized to; the factor.
PHOTOGRAPHS = [
    ((480, 640), (240, 320), 1),
    ((480, 640), (120, 160), 2),
    ((481, 643), (119, 160), 2),
    ((1001, 803), (100, 80), 4),
    ((1007, 1597), (60, 95), 8),
]


def photograph(path: Path, size: tuple[int, int], boxes: Sequence[list[int]]) -> None:
    """Soft colours, in which objects are full of red and nothing else is red at all."""
    rng = np.random.default_rng(size[0])
    soft = rng.integers(0, 256, (9, 12, 3), np.uint8)
    pixels = np.array(Picture.fromarray(soft).resize(size[::-1], Picture.Resampling.BICUBIC))
    pixels[..., 0] = 0
    for x1, y1, x2, y2 in boxes:
        pixels[y1:y2, x1:x2] = [255, 0, 0]
    Picture.fromarray(pixels).save(path, quality=97, subsampling="4:4:4")


@pytest.mark.parametrize(("size", "least", "factor"), PHOTOGRAPHS)
@pytest.mark.parametrize("flip", [0, 1])
def test_scaled_decoding(tmp_path: Path, size: tuple[int, int], least: tuple[int, int], factor: int, flip: int) -> None:
    """Boxes are the same, and the objects lie where they lie of all pixels, to a tenth of a pixel: also where the last
    one that was decoded reaches beyond the file."""
    height, width = size
    h, w = height // 4, width // 4
    corners = [
        [0, 0, w, h],
        [width - w, 0, width, h],
        [0, height - h, w, height],
        [width - w, height - h, width, height],
    ]
    document = {"images": [{"id": 1, "file_name": "a.jpg", "height": height, "width": width}], "categories": CATEGORIES}
    document["annotations"] = [
        {"id": i, "image_id": 1, "category_id": CATEGORIES[0]["id"], "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for i, (x1, y1, x2, y2) in enumerate(corners)
    ]
    root, source = write(tmp_path, document)
    photograph(root / "a.jpg", size, corners)
    reader = DetectionDataset(root, source)
    transform = v2.Compose([v2.RandomHorizontalFlip(flip), v2.Resize(least)])
    whole = TransformedDataset(reader, transform, 0, "stop")[0, 0]
    part = TransformedDataset(reader, transform, 0, "stop", scaled_decoding=True)[0, 0]
    read = reader.read(0, least)
    assert read.image.shape[1:] == (-(-height // factor), -(-width // factor))
    assert read.scale == (1 / factor, 1 / factor)
    assert torch.equal(part.boxes, whole.boxes)
    assert (part.scale, part.file_size) == (whole.scale, whole.file_size)
    a, b = (torch.as_tensor(s.image).double() for s in (part, whole))
    assert a.shape == b.shape
    assert (a - b).abs().mean() < (0.01 if factor == 1 else 1.5)
    for box in part.boxes.tolist():
        np.testing.assert_allclose(red_of(a, box), red_of(b, box), atol=0.06)


def red_of(image: Tensor, box: list[float]) -> list[float]:
    """Width, height and middle (x, y) of the red around a box, to fractions of a pixel."""
    x1, y1, x2, y2 = (int(side) for side in box)
    red = torch.zeros_like(image[0])
    around = slice(max(0, y1 - 3), y2 + 4), slice(max(0, x1 - 3), x2 + 4)
    red[around] = image[0][around] / 255
    columns, rows = red.sum(0), red.sum(1)
    middles = [float(side @ (torch.arange(len(side)).double() + 0.5) / side.sum()) for side in (columns, rows)]
    return [float(rows.max()), float(columns.max()), *middles]


def test_only_what_is_resized_smoothly_and_whole_may_be_decoded_smaller() -> None:
    nearest = v2.InterpolationMode.NEAREST
    sizes = {
        "resize": v2.Resize((100, 120)),
        "mirrored": v2.Compose([v2.RandomHorizontalFlip(1), v2.Resize((100, 120)), RandomSizeCrop(30, 40)]),
        "window first": v2.Compose([RandomSizeCrop(300, 400), v2.Resize((100, 120))]),
        "nearest": v2.Resize((100, 120), interpolation=nearest),
        "without antialiasing": v2.Resize((100, 120), antialias=False),
        "flip": v2.RandomHorizontalFlip(1),
    }
    allowed = {name: draw(transform, (800, 900)).first_size for name, transform in sizes.items()}
    assert allowed == dict.fromkeys(sizes) | {"resize": (100, 120), "mirrored": (100, 120)}
