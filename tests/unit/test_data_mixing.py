"""Mosaic and mixup against the pixels of painted objects."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from coco_files import document, write
from hydra.utils import instantiate
from painted import IMAGES, check_consistent, colour, draw_coloured, extent
from torch import Tensor
from torchvision.transforms import v2

from codetr.application import compose
from codetr.data.copy_paste import CopyPaste
from codetr.data.dataset import DetectionDataset, Sample
from codetr.data.geometry import PadTo, RandomSizeCrop
from codetr.data.mixing import Mixer, Mixup, Mosaic
from codetr.data.transforms import TransformedDataset
from codetr.types import Batch

GREY = 114
# Without resizing, so that colours stay as they are; the first leaves every image its size.
TRANSFORMS = {"as they are": v2.Identity(), "canvas": v2.Compose([RandomSizeCrop(60, 100), PadTo(110, GREY)])}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return draw_coloured(tmp_path_factory.mktemp("coloured"))


@pytest.fixture(scope="module", params=TRANSFORMS)
def samples(coloured: DetectionDataset, request: pytest.FixtureRequest) -> list[Sample]:
    dataset = TransformedDataset(coloured, TRANSFORMS[request.param], 1, "stop")
    return [dataset[0, i] for i in range(IMAGES)]


def pixels(sample: Sample) -> Tensor:
    return sample.image.as_subclass(Tensor)


def test_mosaic_to_the_pixel(samples: list[Sample]) -> None:
    """Every colour that is seen has its label, its mask, and a box around it; four images are seen, each at least in a
    quarter of height and width."""
    gone = 0
    for seed in range(60):
        torch.manual_seed(seed)
        first, *others = (samples[i] for i in torch.randperm(IMAGES)[:4].tolist())
        mosaic = Mosaic(1, 0.25, GREY)(first, iter(others).__next__)
        check_consistent(mosaic)
        image = pixels(mosaic)
        height, width = first.image.shape[1:]
        assert image.shape == (3, height, width)
        labels = mosaic.labels.tolist()
        all_labels = torch.cat([part.labels for part in (first, *others)]).tolist()
        seen = [label for label in all_labels if (image[1] == colour(label)[1]).any()]
        assert sorted(labels) == sorted(seen)
        gone += len(all_labels) - len(labels)
        for label, box, mask in zip(labels, mosaic.boxes.tolist(), mosaic.masks, strict=True):
            where = image[1] == colour(label)[1]
            assert extent(where).tolist() == box
            assert torch.equal(where, mask.as_subclass(Tensor).bool())
        corners = [
            image[:, y : y + height // 4, x : x + width // 4]
            for y in (0, height - height // 4)
            for x in (0, width - width // 4)
        ]
        for part, corner in zip((first, *others), corners, strict=True):
            own = {0, GREY, *(colour(label)[1] for label in part.labels.tolist())}
            assert set(corner[1].unique().tolist()) <= own
        assert (mosaic.image_id, mosaic.scale, mosaic.file_size) == (first.image_id, first.scale, first.file_size)
    assert gone > 60


def test_mixup_to_the_pixel(samples: list[Sample]) -> None:
    """Both images with shares that add up to one, over the whole of the larger sides; all objects of both."""
    shares = []
    for seed in range(300):
        torch.manual_seed(seed)
        one, other = (samples[i] for i in torch.randperm(IMAGES)[:2].tolist())
        mixed = Mixup(1, 1.5)(one, iter([other]).__next__)
        check_consistent(mixed)
        height, width = (max(sides) for sides in zip(one.image.shape[1:], other.image.shape[1:], strict=True))
        a, b = torch.zeros(2, 3, height, width, dtype=torch.float64)
        for whole, part in ((a, one), (b, other)):
            whole[:, : part.image.shape[1], : part.image.shape[2]] = pixels(part)
        result = pixels(mixed).double()
        there = a != b
        assert torch.equal(result[~there], a[~there])
        # Each pixel, rounded, allows shares of the first image between two numbers; one must suit all.
        difference = (a - b)[there]
        share, half = (result - b)[there] / difference, 0.5001 / difference.abs()
        low, high = float((share - half).max()), float((share + half).min())
        assert 0 <= low <= high <= 1
        shares.append((low + high) / 2)
        assert torch.equal(mixed.boxes, torch.cat([one.boxes, other.boxes]))
        assert torch.equal(mixed.labels, torch.cat([one.labels, other.labels]))
        for mask, own in zip(mixed.masks, [*one.masks, *other.masks], strict=True):
            assert torch.equal(mask[: own.shape[0], : own.shape[1]], own)
            assert mask.sum() == own.sum()
    spread = torch.tensor(shares)
    assert abs(float(spread.mean()) - 0.5) < 5 * 0.25 / 300**0.5
    assert float(spread.var()) == pytest.approx(1 / 16, rel=0.3)  # of Beta(1.5, 1.5)


@pytest.mark.parametrize("mixer", [Mosaic(0.25, 0.25, 0), Mixup(0.25, 1.5)])
def test_how_often(samples: list[Sample], mixer: Mixer) -> None:
    """Five standard deviations. Otherwise no other image is read."""
    read = 0

    def another() -> Sample:
        nonlocal read
        read += 1
        return samples[1]

    torch.manual_seed(0)
    changed = sum(mixer(samples[0], another) is not samples[0] for _ in range(400))
    assert abs(changed - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5
    assert read == changed * (3 if isinstance(mixer, Mosaic) else 1)


@pytest.mark.parametrize("mixer", [Mosaic(1, 0.25, GREY), Mixup(1, 1.5)])
def test_without_objects_and_without_masks(coloured: DetectionDataset, mixer: Mixer) -> None:
    """Masks change nothing else; images without objects are as good as others."""
    crop = v2.Compose([RandomSizeCrop(4, 6), PadTo(8, GREY)])  # often of nothing
    whole = TransformedDataset(coloured, crop, 1, "stop", [mixer])
    bare = TransformedDataset(
        DetectionDataset(coloured.root, coloured.root.parent / "painted.json"), crop, 1, "stop", [mixer]
    )
    empty = 0
    for key in [(epoch, i) for epoch in range(20) for i in range(IMAGES)]:
        a, b = whole[key], bare[key]
        check_consistent(a)
        empty += not len(a.labels)
        assert torch.equal(pixels(a), pixels(b))
        assert torch.equal(a.boxes, b.boxes)
        assert b.masks is None
    assert empty


def test_seed_epoch_and_index_decide(coloured: DetectionDataset) -> None:
    mixers = [Mosaic(0.5, 0.25, GREY), CopyPaste(9, 10, 20), Mixup(0.5, 1.5)]
    first, again = (TransformedDataset(coloured, TRANSFORMS["canvas"], 3, "stop", mixers) for _ in range(2))
    keys = [(epoch, i) for epoch in range(6) for i in range(IMAGES)]
    expected = {key: first[key] for key in keys}
    for key in reversed(keys):
        torch.rand(key[0])
        sample = again[key]
        assert torch.equal(pixels(sample), pixels(expected[key]))
        assert torch.equal(sample.boxes, expected[key].boxes)
        assert torch.equal(sample.labels, expected[key].labels)
        torch.testing.assert_close(sample.truth, coloured.truth(key[1]))


@pytest.mark.filterwarnings("ignore:.*os.fork")
@pytest.mark.filterwarnings("ignore:.*This DataLoader will create .* worker processes")
def test_of_the_configuration_workers_and_resume_change_nothing(tmp_path: Path) -> None:
    write(tmp_path, document(8), "train")
    given = [
        f"data.{s}_{what}={tmp_path}/train{end}"
        for s in ("train", "val")
        for what, end in (("images", ""), ("annotations", ".json"))
    ]
    given += [
        "augment@data=aerial",
        "+augment/mix@data=[mosaic,mixup]",
        "data.cache=null",
        "data.train_transform.crop=64",
    ]

    def batches(workers: int, skip: int = 0) -> list[Batch]:
        data = instantiate(
            compose("train", ["data=custom", *given, f"data.num_workers={workers}", "data.pad_objects=true"]).data
        )
        data.setup("fit")
        loader = data.train_dataloader()
        assert [type(mixer) for mixer in data.mixers] == [Mosaic, Mixup]
        if skip:
            state = loader.state_dict() | {"epoch": 0, "images": skip * data.batch_size}
            loader.load_state_dict(state)
        return list(islice(loader, 4))

    alone, several, resumed = batches(0), batches(2), batches(1, skip=2)
    assert [len(part) for part in (alone, several, resumed)] == [4, 4, 2]
    most = 0
    for one, other in (*zip(alone, several, strict=True), *zip(alone[2:], resumed, strict=True)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets.boxes, other.targets.boxes)
        assert torch.equal(one.targets.valid, other.targets.valid)
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        most = max(most, int(one.targets.valid.sum(1).max()))
    assert most > 4  # of one image of the set
