"""Where every transform and every recipe of conf/augment puts the pixels of an object, its box and its mask.

Each object of a data set has a colour and a label of its own. Without interpolation the pixels of a colour are the
mask, one by one; as the recipes interpolate, the edge of a painted object is where its channel passes one half.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from painted import IMAGES, OBJECTS, check_consistent, colour, draw, draw_coloured, extent
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as TvImage
from torchvision.tv_tensors import wrap

from codetr.application import compose
from codetr.data.dataset import DetectionDataset, Sample
from codetr.data.geometry import PadTo, RandomScaledCrop, RandomSizeCrop, RandomTurn
from codetr.data.transforms import TransformedDataset, fit_canvas, large_scale_jitter

ROOT = Path(__file__).resolve().parents[2]
# All but albumentations': test_data_albumentations.py
RECIPES = sorted(path.stem for path in (ROOT / "conf/augment").glob("*.yaml") if path.stem != "albumentations")
TRANSFORMS = {
    "flip": v2.RandomHorizontalFlip(1),
    "shortest": v2.RandomShortestSize([50, 61, 200, 333], max_size=350),
    "resize": v2.Resize(70, max_size=90),
    "longest": v2.Resize(None, max_size=77),
    "jitter": v2.ScaleJitter((100, 100), (0.2, 3.0)),
    "crop": RandomSizeCrop(40, 90),
    "pad": PadTo(170, 114),
    "fit": fit_canvas(128, 114),
    "upside down": v2.RandomVerticalFlip(1),
    "turn": RandomTurn(),
    "scaled crop": RandomScaledCrop(60, (0.5, 2.0)),
    "large scale jitter": large_scale_jitter(90, (0.3, 3.0), 0.5, 114),
}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return draw_coloured(tmp_path_factory.mktemp("coloured"))


@pytest.fixture(scope="module")
def by_channel(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    """The first three objects of an image fill a channel each, the last all of them: its edges are not looked at."""

    def paint(pixels: np.ndarray, label: int, box: tuple[int, int, int, int]) -> None:
        if label % OBJECTS < 3:
            pixels[box[1] : box[3], box[0] : box[2], label % OBJECTS] = 255

    return draw(tmp_path_factory.mktemp("by_channel"), paint)


def parts(transform: Any) -> Iterator[Any]:
    yield transform
    for inner in getattr(transform, "transforms", []):
        yield from parts(inner)


def recipe(name: str, kind: str, interpolate: bool) -> tuple[Any, Any]:
    """The transform and the copy-paste of a file; without interpolation also without the jitter of colours."""
    config = _augment(name)
    transform = instantiate(config[f"{kind}_transform"], _convert_="all")
    return _exact(transform, interpolate), instantiate(config.get("copy_paste")) if kind == "train" else None


def fill(name: str) -> int | None:
    """The grey of a recipe's canvas."""
    return _augment(name).train_transform.get("fill")


@cache
def _augment(name: str) -> DictConfig:
    return compose("train", ["data=shapes_demo", f"augment@data={name}"]).data


def _exact(transform: Any, interpolate: bool) -> Any:
    for part in parts(transform):
        if not interpolate and hasattr(part, "interpolation"):
            part.interpolation = v2.InterpolationMode.NEAREST
        if isinstance(part, v2.ColorJitter):
            part.brightness = part.contrast = None
    return transform


def check_exact(sample: Sample, tolerance: float, sources: int) -> int:
    """Masks are the pixels of their colours, boxes their extent; colours that are left without a label are slivers.
    Returns how many objects of the image are gone."""
    check_consistent(sample)
    image = sample.image.as_subclass(Tensor)
    labels = sample.labels.tolist()
    for label, box, mask in zip(labels, sample.boxes.tolist(), sample.masks.as_subclass(Tensor), strict=True):
        painted = image[1] == colour(label)[1]
        assert torch.equal(painted, mask.bool())
        where = extent(painted)
        if where is None:
            assert min(box[2] - box[0], box[3] - box[1]) <= tolerance
        else:
            assert np.abs(where - box).max() <= tolerance
    seen = torch.bincount(image[1].flatten(), minlength=256)
    for label in set(range(sources)) - set(labels):
        if seen[colour(label)[1]]:
            where = extent(image[1] == colour(label)[1])
            assert where is None or min(where[2] - where[0], where[3] - where[1]) <= 1 + tolerance
    return OBJECTS - len(labels)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_to_the_pixel(coloured: DetectionDataset, name: str) -> None:
    dataset = TransformedDataset(coloured, _exact(TRANSFORMS[name], interpolate=False), 1, "stop")
    gone = 0
    for epoch in range(8):
        for index in range(IMAGES):
            gone += check_exact(dataset[epoch, index], 1, IMAGES * OBJECTS)
    assert (gone > 0) == (name in ("crop", "scaled crop", "large scale jitter"))


@pytest.mark.parametrize("kind", ["train", "val"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_to_the_pixel(coloured: DetectionDataset, name: str, kind: str) -> None:
    """Behind two resizes the first one's rounding is enlarged by the second, at most from 384 to 1536 pixels."""
    transform, copy_paste = recipe(name, kind, interpolate=False)
    tolerance = {"multiscale": 1 + 800 / 384, "multiscale_1536": 5, "multiscale_1536_long": 5}.get(name, 1)
    dataset = TransformedDataset(coloured, transform, 1, "stop", [copy_paste] if copy_paste else [])
    plain = TransformedDataset(coloured, transform, 1, "stop")
    pasted = 0
    for index in range(IMAGES):
        for epoch in range(1 if "1536" in name else 2):
            check_exact(plain[epoch, index], tolerance if kind == "train" else 1, IMAGES * OBJECTS)
            if copy_paste is not None:
                pasted += check_pasted(dataset[epoch, index], index)
    assert (pasted > 0) == (copy_paste is not None)


def check_pasted(sample: Sample, index: int) -> int:
    """What is seen of each object, of this image or of another, is its mask, and its box fits tightly."""
    check_consistent(sample)
    image = sample.image.as_subclass(Tensor)
    others = 0
    for label, box, mask in zip(sample.labels.tolist(), sample.boxes.tolist(), sample.masks, strict=True):
        painted = image[1] == colour(label)[1]
        others += label // OBJECTS != index
        if torch.equal(painted, mask.bool()):
            assert extent(painted).tolist() == box
        else:  # the image was pasted onto itself: the same colour twice
            assert sample.labels.tolist().count(label) == 2
    return others


@pytest.mark.parametrize("kind", ["train", "val"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_as_they_interpolate(by_channel: DetectionDataset, name: str, kind: str) -> None:
    transform, _ = recipe(name, kind, interpolate=True)
    dataset = TransformedDataset(by_channel, transform, 2, "stop")
    worst = 0.0
    for index in range(IMAGES):
        for epoch in range(1 if "1536" in name else 3):
            sample = dataset[epoch, index]
            check_consistent(sample)
            height, width = sample.image.shape[-2:]
            zoom = max(1, sample.scale[0])
            objects = dict(zip((sample.labels % OBJECTS).tolist(), sample.boxes.numpy(), strict=True))
            shown = sample.masks.new_zeros(height, width) if not objects else None
            for channel in range(3):
                bright = sample.image[channel].as_subclass(Tensor) > 127
                if (grey := fill(name)) is not None:  # of the canvas, which has no objects
                    bright &= ~(sample.image == grey).all(0)
                where = extent(bright)
                if channel not in objects:
                    assert where is None or min(where[2] - where[0], where[3] - where[1]) <= 2
                elif where is not None:
                    # Where a cut left less than a pixel of the file, only its round corner is seen, enlarged.
                    corner = (objects[channel][2:] - objects[channel][:2]).min() < zoom
                    worst = max(worst, np.abs(where - objects[channel]).max() / (zoom if corner else 1))
                else:
                    x1, y1, x2, y2 = objects[channel]
                    assert min(x2 - x1, y2 - y1) < 2
            assert shown is None or not bright.any()
    assert worst <= 1


def test_colour_is_changed_before_anything_but_a_window(coloured: DetectionDataset) -> None:
    """Of a large picture only what is cut out of it. Boxes do not depend on it."""
    seen = []

    def inverted(image: TvImage) -> TvImage:
        seen.append(tuple(image.shape[1:]))
        return wrap(255 - image, like=image)

    for name, whole in (("large scale jitter", True), ("flip", True), ("scaled crop", False), ("crop", False)):
        transform = _exact(TRANSFORMS[name], interpolate=False)
        plain = TransformedDataset(coloured, transform, 1, "stop")
        changed = TransformedDataset(coloured, transform, 1, "stop", colour=inverted)
        for index in range(IMAGES):
            one, other = plain[0, index], changed[0, index]
            beyond = (one.image == 114).all(0)  # the canvas
            assert torch.equal(torch.where(beyond, one.image, 255 - one.image), other.image)
            assert torch.equal(one.boxes, other.boxes)
            assert (seen.pop() == tuple(coloured.sizes[index].tolist())) == whole
