"""Pipelines of albumentations against the pixels of painted objects."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from painted import IMAGES, OBJECTS, check_consistent, colour, draw_coloured, extent
from torch import Tensor

from codetr.application import compose
from codetr.data.dataset import DetectionDataset, Sample
from codetr.data.images import UnreadableImage
from codetr.data.transforms import TransformedDataset

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the package index whether there is a newer one
A = pytest.importorskip("albumentations")
from codetr.data.with_albumentations import Pipeline  # noqa: E402

# Of whole pixels: what is painted keeps its colours.
PIPELINES = {
    "flips and turns": [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), A.RandomRotate90(p=0.7), A.Transpose(p=0.5)],
    "crop": [A.RandomCrop(40, 40), A.PadIfNeeded(50, 60, fill=114)],
    "dropped": [A.Affine(translate_px=(-60, 60), p=1)],
    "composed": [A.Compose([A.D4(p=1), A.RandomCrop(45, 45)])],
    "nothing": [],
}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return draw_coloured(tmp_path_factory.mktemp("coloured"))


def as_tensor(value: Tensor) -> Tensor:
    return value.as_subclass(Tensor)


@pytest.mark.parametrize("name", PIPELINES)
def test_to_the_pixel(coloured: DetectionDataset, name: str) -> None:
    """What is seen of each object has its label, its mask and a box around it; the scale stays one."""
    dataset = TransformedDataset(coloured, Pipeline(PIPELINES[name]), 1, "stop")
    bare = DetectionDataset(coloured.root, coloured.root.parent / "painted.json")
    without_masks = TransformedDataset(bare, Pipeline(PIPELINES[name]), 1, "stop")
    gone = 0
    for key in [(epoch, index) for epoch in range(12) for index in range(IMAGES)]:
        sample = dataset[key]
        check_consistent(sample)
        image = as_tensor(sample.image)
        own = range(OBJECTS * key[1], OBJECTS * (key[1] + 1))
        seen = [label for label in own if (image[1] == colour(label)[1]).any()]
        assert sorted(sample.labels.tolist()) == seen
        gone += OBJECTS - len(seen)
        for label, box, mask in zip(sample.labels.tolist(), sample.boxes.tolist(), sample.masks, strict=True):
            where = image[1] == colour(label)[1]
            np.testing.assert_allclose(extent(where), box, atol=1e-3)
            assert torch.equal(where, as_tensor(mask).bool())
        assert sample.scale == pytest.approx((1, 1), abs=1e-4)
        assert torch.equal(as_tensor(without_masks[key].boxes), as_tensor(sample.boxes))
        assert without_masks[key].masks is None
    assert (gone > 0) == (name in ("crop", "dropped", "composed"))


def test_the_scale_of_a_resize(coloured: DetectionDataset) -> None:
    for transform, turned in ((A.Resize(70, 31), False), (A.Compose([A.Transpose(p=1), A.Resize(70, 31)]), True)):
        dataset = TransformedDataset(coloured, Pipeline([transform]), 1, "stop")
        for index in range(IMAGES):
            height, width = coloured.sizes[index].tolist()
            rows, columns = (width, height) if turned else (height, width)
            assert dataset[0, index].scale == pytest.approx((70 / rows, 31 / columns), rel=1e-3)


def test_seed_epoch_and_index_decide_and_draws_are_independent(coloured: DetectionDataset) -> None:
    flips = [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]
    first, again = (TransformedDataset(coloured, Pipeline(flips), 3, "stop") for _ in range(2))
    keys = [(epoch, index) for epoch in range(60) for index in range(IMAGES)]
    expected: dict[tuple[int, int], Sample] = {key: first[key] for key in keys}
    counts = np.zeros((2, 2), int)
    for key in reversed(keys):
        torch.rand(3), np.random.rand(2)
        assert torch.equal(as_tensor(again[key].image), as_tensor(expected[key].image))
        one, plain = as_tensor(expected[key].boxes)[0], coloured[key[1]].boxes[0]
        height, width = expected[key].image.shape[1:]
        counts[int(one[0] == width - plain[2]), int(one[1] == height - plain[3])] += 1
    assert (abs(counts - 90) < 5 * (360 * 3 / 16) ** 0.5).all()  # five standard deviations


def test_what_is_no_image_any_more_is_said(coloured: DetectionDataset) -> None:
    dataset = TransformedDataset(coloured, Pipeline([A.Normalize()]), 1, "stop")
    with pytest.raises(UnreadableImage, match="makes no uint8 images"):
        dataset[0, 0]


def test_the_file_of_the_documents(coloured: DetectionDataset, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (example,) = re.findall(r"```yaml\n(defaults:\n  - albumentations\n.*?)```", text, re.DOTALL)
    (tmp_path / "augment").mkdir()
    (tmp_path / "augment" / "mine.yaml").write_text(example)
    given = ["data=custom", "augment@data=mine", "data.train_annotations=x", "data.val_annotations=x"]
    config = compose("train", given, str(tmp_path)).data
    config.train_transform.transforms[1].update(height=40, width=30)
    dataset = TransformedDataset(coloured, instantiate(config.train_transform, _convert_="all"), 2, "stop")
    assert dataset[0, 0].image.shape == (3, 40, 30)


def test_the_recipe(coloured: DetectionDataset) -> None:
    """As it interpolates, what it shows of an object lies in its box, and fills it but for two pixels."""
    given = ["data=custom", "augment@data=albumentations", "data.train_annotations=x", "data.val_annotations=x"]
    config = compose("train", given).data
    dataset = TransformedDataset(coloured, instantiate(config.train_transform, _convert_="all"), 2, "stop")
    for key in [(epoch, index) for epoch in range(2) for index in range(IMAGES)]:
        sample = dataset[key]
        check_consistent(sample)
        assert sample.image.shape[1:] == (640, 640) or min(sample.image.shape[1:]) in range(480, 801, 32)
        for box, mask in zip(sample.boxes.tolist(), sample.masks, strict=True):
            np.testing.assert_allclose(extent(as_tensor(mask).bool()), box, atol=1 + 800 / 90)
