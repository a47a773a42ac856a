"""Copy-paste against a pixel-by-pixel account of who is seen where."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from coco_files import document, write
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image, Mask

from codetr.data.copy_paste import CopyPaste, tight_boxes
from codetr.data.dataset import DetectionDataset, Sample
from codetr.data.transforms import TransformedDataset, fit_canvas

SIDE = 32


def sample(rectangles: list[list[int]], first_label: int, colour: int) -> Sample:
    """Object i fills its rectangle (xyxy) of a plain image of value `colour` with colour + 1 + i."""
    image = torch.full((3, SIDE, SIDE), colour, dtype=torch.uint8)
    masks = torch.zeros(len(rectangles), SIDE, SIDE, dtype=torch.uint8)
    for i, (x1, y1, x2, y2) in enumerate(rectangles):
        masks[i, y1:y2, x1:x2] = 1
        image[:, y1:y2, x1:x2] = colour + 1 + i
    boxes = torch.tensor(rectangles, dtype=torch.float32).reshape(-1, 4)
    return Sample(
        Image(image),
        BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=(SIDE, SIDE)),
        torch.arange(len(rectangles)) + first_label,
        7,
        (SIDE, SIDE),
        (SIDE, SIDE),
        {},
        Mask(masks),
    )


ONTO = sample([[0, 0, 10, 10], [12, 12, 30, 30], [20, 2, 24, 6]], 0, 10)
OTHER = sample([[4, 0, 10, 10], [12, 12, 14, 30], [20, 2, 24, 6]], 10, 100)


def pasted(onto: Sample, other: Sample, seed: int, most: int = 99, moved: float = 3, visible: int = 50) -> Sample:
    torch.manual_seed(seed)
    return CopyPaste(most, moved, visible)(onto, lambda: other)


def test_pixels_boxes_and_masks() -> None:
    """Of every selection: the image shows what is in front, masks and boxes what is seen."""
    seen = set()
    for seed in range(60):
        result = pasted(ONTO, OTHER, seed)
        labels = result.labels.tolist()
        new = [label for label in labels if label >= 10]
        seen.add(frozenset(new))
        expected = torch.as_tensor(ONTO.image).clone()
        for label in new:
            mask = OTHER.masks[label - 10].bool()
            expected[:, mask] = 101 + label - 10
        assert torch.equal(torch.as_tensor(result.image), expected)
        assert isinstance(result.boxes, BoundingBoxes)
        assert result.boxes.canvas_size == (SIDE, SIDE)
        for label, box, mask in zip(labels, result.boxes.tolist(), result.masks, strict=True):
            value = 101 + label - 10 if label >= 10 else 11 + label
            assert torch.equal(mask.bool(), expected[0] == value)
            rows, columns = mask.nonzero(as_tuple=True)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        # 0 loses 60 of its 100 pixels and six columns to 10; 1 keeps 288 pixels; 2 is covered by 12.
        kept = {label for label in labels if label < 10}
        assert kept == {0, 1, 2} - ({0} if 10 in new else set()) - ({2} if 12 in new else set())
    assert len(seen) == 8


@pytest.mark.parametrize(("moved", "visible", "kept"), [(6, 40, True), (5.9, 39, True), (5.9, 40, False)])
def test_limits_of_occlusion(moved: float, visible: int, kept: bool) -> None:
    """Object 0 under 10: its box moves by six pixels, 40 pixels of it are seen."""
    results = [pasted(ONTO, OTHER, seed, moved=moved, visible=visible) for seed in range(20)]
    found = [0 in r.labels.tolist() for r in results if 10 in r.labels.tolist()]
    assert found == [kept] * len(found)
    assert found


def test_how_many_are_pasted() -> None:
    """None to all, or to the limit, each number as often; five standard deviations."""
    for most, numbers in ((99, 4), (2, 3)):
        counts = torch.tensor([(pasted(ONTO, OTHER, seed, most).labels >= 10).sum() for seed in range(300)])
        shares = counts.bincount() / 300
        assert len(shares) == numbers
        assert (shares - 1 / numbers).abs().max() < 5 * (1 / numbers * (1 - 1 / numbers) / 300) ** 0.5


def test_without_objects() -> None:
    empty = sample([], 0, 50)
    for seed in range(5):
        result = pasted(ONTO, empty, seed)
        assert torch.equal(torch.as_tensor(result.image), torch.as_tensor(ONTO.image))
        assert result.labels.tolist() == [0, 1, 2]
        alone = pasted(empty, OTHER, seed)
        assert len(alone.boxes) == len(alone.labels) == len(alone.masks)
        assert alone.boxes.dtype == torch.float32
        assert alone.masks.dtype == torch.uint8
    assert len(pasted(empty, empty, 0).labels) == 0


def test_boxes_become_tight() -> None:
    loose = replace(ONTO, boxes=BoundingBoxes(ONTO.boxes + 1, format=BoundingBoxFormat.XYXY, canvas_size=(SIDE, SIDE)))
    result = pasted(loose, sample([], 0, 50), 0)
    assert torch.equal(as_tensor(result.boxes), as_tensor(ONTO.boxes))
    assert tight_boxes(torch.zeros(1, 4, 4, dtype=torch.uint8)).tolist() == [[0, 0, 0, 0]]


def test_a_data_set_that_pastes(tmp_path: Path) -> None:
    """Everything is decided by seed, epoch and index; others come from the whole data set, in the size of the canvas;
    identity and truth stay those of the image that was asked for."""
    doc = document(6)
    for annotation in doc["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    reader = DetectionDataset(*write(tmp_path, doc), masks=True)

    def dataset(masks: bool) -> TransformedDataset:
        return TransformedDataset(reader, fit_canvas(48, 114), 3, "stop", [CopyPaste(99, 10, 20)], masks)

    plain = TransformedDataset(reader, fit_canvas(48, 114), 3, "stop")
    keys = [(epoch, index) for epoch in range(6) for index in range(len(reader))]
    first, again = dataset(masks=True), dataset(masks=False)
    changed = 0
    for key, state in zip(keys, reversed(keys), strict=True):
        torch.manual_seed(state[0])
        sample, twin, alone = first[key], again[key], plain[key]
        assert torch.equal(as_tensor(sample.image), as_tensor(twin.image))
        assert torch.equal(as_tensor(sample.boxes), as_tensor(twin.boxes))
        assert torch.equal(sample.labels, twin.labels)
        assert twin.masks is None
        assert len(sample.masks) == len(sample.labels)
        assert sample.image.shape == (3, 48, 48)
        assert (sample.image_id, sample.scale) == (alone.image_id, alone.scale)
        torch.testing.assert_close(sample.truth, reader.truth(key[1]))
        changed += not torch.equal(as_tensor(sample.image), as_tensor(alone.image))
    assert changed > len(keys) / 3


def as_tensor(value: Tensor) -> Tensor:
    return value.as_subclass(Tensor)
