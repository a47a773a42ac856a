"""Pictures: what is drawn lies where it belongs."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from codetr.data.segmentations import encode
from codetr.types import Detections
from codetr.visualize import (
    class_color,
    compare,
    draw_boxes,
    grid,
    read_metrics_csv,
    save_learning_curves,
    save_precision_recall,
    side_by_side,
)

GREY = torch.full((3, 64, 128), 120, dtype=torch.uint8)


def pixels_of(picture: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(picture) == color).all(-1)


def test_frames_lie_on_the_boxes_of_the_enlarged_picture() -> None:
    picture = draw_boxes(GREY, torch.tensor([[40.0, 20.0, 100.0, 50.0]]), torch.tensor([3]), ["a", "b", "c", "d"])
    assert picture.size == (512, 256)  # four times as large: small images get legible labels
    rows, columns = np.nonzero(pixels_of(picture, class_color(3)))
    assert (columns.min(), columns.max(), rows.max()) == (160, 400, 200)
    inside = np.asarray(picture)[100:190, 180:390]
    assert (inside == 120).all()


def test_large_pictures_keep_their_size_and_labels_grow_with_them() -> None:
    def label_height(factor: int) -> int:
        image = torch.full((3, 512 * factor, 512 * factor), 120, dtype=torch.uint8)
        picture = draw_boxes(image, torch.tensor([[100.0, 200.0, 400.0, 400.0]]) * factor, torch.tensor([0]), ["cow"])
        assert picture.size == (512 * factor, 512 * factor)
        filled = pixels_of(picture, class_color(0))[: 200 * factor].any(1)
        return int(filled.sum())

    assert abs(label_height(3) - 3 * label_height(1)) <= 4


def test_boxes_outside_and_without_area_do_not_break() -> None:
    boxes = torch.tensor([[-50.0, -50.0, 500.0, 500.0], [10.0, 10.0, 10.0, 10.0], [126.0, 60.0, 128.0, 64.0]])
    picture = draw_boxes(GREY, boxes, torch.tensor([0, 1, 2]), ["a", "b", "a rather long name"], torch.rand(3))
    assert pixels_of(picture, class_color(2)).any()
    assert draw_boxes(GREY, torch.zeros(0, 4), torch.zeros(0).long(), []).size == picture.size


def test_labels_of_neighbouring_boxes_do_not_cover_each_other() -> None:
    boxes = torch.tensor([[40.0, 30.0, 80.0, 60.0]]).repeat(3, 1)
    names = ["first", "second", "third"]
    picture = draw_boxes(GREY, boxes, torch.arange(3), names)
    visible = [pixels_of(picture, class_color(i)).sum() for i in range(3)]
    assert min(visible) > 400  # the frame on top hides the others, so these are their plates


def test_colors_are_distinct_and_stable() -> None:
    colors = [class_color(i) for i in range(80)]
    assert all(max(abs(x - y) for x, y in zip(a, b, strict=True)) >= 8 for a, b in combinations(colors, 2))
    close = [sum(abs(x - y) for x, y in zip(a, b, strict=True)) for a, b in pairwise(colors)]
    assert min(close) > 80
    assert class_color(0) == colors[0]


def test_comparison_shows_truth_left_and_confident_predictions_right() -> None:
    box = torch.tensor([[40.0, 20.0, 100.0, 50.0]])
    truth = {"boxes": box, "labels": torch.tensor([0])}
    found = Detections(torch.tensor([0.9, 0.1]), torch.tensor([1, 2]), box.repeat(2, 1))
    picture = compare(GREY, truth, found, ["a", "b", "c"], score_threshold=0.3)
    half = picture.width // 2
    left, right = picture.crop((0, 0, half, picture.height)), picture.crop((half, 0, picture.width, picture.height))
    drawn = [[bool(pixels_of(side, class_color(k)).any()) for k in range(3)] for side in (left, right)]
    assert drawn == [[True, False, False], [False, True, False]]


def test_grid_and_row_hold_every_picture() -> None:
    colors = [class_color(i) for i in range(3)]
    pictures = [Image.new("RGB", (100, 50 + 30 * i), color) for i, color in enumerate(colors)]
    paper = grid(pictures, columns=2, cell=200)
    for picture, color in zip(pictures, colors, strict=True):
        assert pixels_of(paper, color).sum() == 4 * picture.width * picture.height
    row = side_by_side({"one": pictures[0], "two": pictures[0]})
    assert pixels_of(row, colors[0]).sum() == 2 * 100 * 50


def test_metrics_csv_is_read_column_by_column(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,train/loss,val/map\n0,9,2.5,\n0,19,1.5,\n0,19,,0.25\n")
    series = read_metrics_csv(log)
    assert {name: [list(x) for x in points] for name, points in series.items()} == {
        "train/loss": [[9, 19], [2.5, 1.5]],
        "val/map": [[19], [0.25]],
    }
    save_learning_curves(log, tmp_path / "curves.png", ["train/loss", "absent"], ["val/map"])
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 800


def test_precision_recall_curves_of_absent_classes_are_left_out(tmp_path: Path) -> None:
    precision = np.linspace(1, 0, 101)[None, :, None].repeat(10, 0).repeat(3, 2)
    precision[..., 1] = -1
    save_precision_recall(precision, {"cow": 0.5, "yak": -1.0, "elk": 0.5}, tmp_path / "some.png")
    save_precision_recall(np.full((10, 101, 3), -1.0), {"cow": -1, "yak": -1, "elk": -1}, tmp_path / "none.png")
    with Image.open(tmp_path / "some.png") as file:
        picture = file.convert("RGB")
    assert not pixels_of(picture, class_color(1)).any()
    assert (tmp_path / "none.png").is_file()


def test_masks_are_filled_with_a_colour_that_shines_through() -> None:
    """Half the resolution of the image: a mask is of what the image shows."""
    masks = torch.zeros(2, 32, 64, dtype=torch.bool)
    masks[0, 8:24, 8:32] = masks[1, 8:24, 24:48] = True
    boxes = torch.tensor([[1.0, 1.0, 3.0, 3.0]]).repeat(2, 1)  # out of the way
    picture = draw_boxes(GREY, boxes, torch.arange(2), ["a", "b"], torch.rand(2), encode(masks))
    pixels = np.asarray(picture).astype(float)  # eight times the masks' size
    grey, (first, second) = np.full(3, 120.0), (np.array(class_color(k), float) for k in range(2))

    def over(color: np.ndarray, below: np.ndarray) -> np.ndarray:
        return below + (color - below) * 115 / 255

    assert np.abs(pixels[128, 100] - over(first, grey)).max() <= 1
    assert np.abs(pixels[128, 340] - over(second, grey)).max() <= 1
    assert np.abs(pixels[128, 224] - over(first, over(second, grey))).max() <= 1  # the best is on top
    assert (pixels[220:, :] == 120).all()


def test_a_crowd_is_not_hidden_behind_its_captions() -> None:
    """Pixels away from all frames stay as they are."""
    corners = torch.cartesian_prod(torch.arange(9), torch.arange(9)).float() * 50 + 20
    boxes = torch.cat([corners, corners + 30], 1)
    image = torch.full((3, 512, 512), 200, dtype=torch.uint8)
    picture = np.asarray(draw_boxes(image, boxes, torch.zeros(81).long(), ["a rather long name"]))
    away = np.ones((512, 512), bool)
    for x0, y0, x1, y1 in boxes.int().tolist():
        away[y0 - 4 : y1 + 5, x0 - 4 : x1 + 5] = False
    assert (picture[away] == 200).all()
    assert (picture != 200).any()
    few = np.asarray(draw_boxes(image, boxes[:5], torch.zeros(5).long(), ["a rather long name"]))
    assert (few[away] != 200).any()
