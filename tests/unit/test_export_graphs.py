"""Every kind of detector as a file: runtimes find in it what PyTorch finds; and how "the same" is measured."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks.export import matrix, models

BOXES = torch.tensor([[0.0, 0, 9, 9], [5, 5, 9, 9], [1, 2, 3, 4]])
SCORES = torch.tensor([0.5, 0.5, 0.25])
LABELS = torch.tensor([0, 0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch"])
@pytest.mark.parametrize("name", models.TOY)
def test_the_file_finds_what_pytorch_finds(name: str, form: str) -> None:
    """A row of `make export-matrix`: boxes within 1e-3 pixel, scores within 1e-5, in the same order but for ties, on
    batches of 1, 3 and 8 images of several sizes; and batch mates change nothing."""
    found = matrix.measured(name, form, {})
    assert found["box"] <= 1e-3
    assert found["score"] <= 1e-5
    assert found["mask"] <= 1e-3
    assert found["mates"] <= 1e-3
    assert found["batches"] == [1, 3, 8]
    assert found["spread"] > 1e-3  # of the boxes of an image: equal ones would prove little


def test_places_may_change_where_scores_are_equal() -> None:
    order = torch.tensor([1, 0, 2])
    swapped = matrix.differences((BOXES[order], SCORES, LABELS), (BOXES, SCORES, LABELS))
    assert swapped == {"score": 0, "box": 0, "swapped": 2}
    moved = matrix.differences((BOXES + 0.25, SCORES - 2**-18, LABELS), (BOXES, SCORES, LABELS))
    assert moved == {"score": 2**-18, "box": 0.25, "swapped": 3}


@pytest.mark.parametrize(
    ("boxes", "scores", "labels"),
    [
        (BOXES[[0, 2, 1]], SCORES, LABELS),  # places of unequal scores
        (BOXES, SCORES, LABELS.flip(0)),
        (BOXES, SCORES - 1e-4, LABELS),
    ],
)
def test_what_is_another_detection_is_infinitely_far(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor
) -> None:
    found = matrix.differences((boxes, scores, labels), (BOXES, SCORES, LABELS))["box"]
    assert math.isinf(found) or found > 1


def test_one_detection_does_not_stand_for_two() -> None:
    twice = BOXES[[0, 0, 2]]
    assert matrix.differences((twice, SCORES, LABELS), (BOXES, SCORES, LABELS))["box"] == 5
