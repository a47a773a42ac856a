"""The best (query, class) pairs, and the suppression of duplicates within a class."""

import torch

from codetr.postprocess import PostProcess
from codetr.types import Prediction

BOX, FAR = [0.25, 0.25, 0.2, 0.2], [0.75, 0.75, 0.2, 0.2]
SIZES = torch.tensor([[100, 200]])


def test_best_pairs_in_pixels_of_the_original_image() -> None:
    logits = torch.tensor([[[2.0, 1.0], [0.0, 3.0]]])
    (found,) = PostProcess(3, None)(Prediction(logits, torch.tensor([[BOX, FAR]])), SIZES)
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    assert found.labels.tolist() == [1, 0, 1]
    expected = torch.tensor([[130.0, 65, 170, 85], [30.0, 15, 70, 35], [30.0, 15, 70, 35]])
    torch.testing.assert_close(found.boxes_xyxy, expected)


def test_boxes_are_cut_at_the_image() -> None:
    (found,) = PostProcess(1, None)(Prediction(torch.zeros(1, 1, 1), torch.tensor([[[0.0, 1.0, 0.4, 0.4]]])), SIZES)
    torch.testing.assert_close(found.boxes_xyxy, torch.tensor([[0.0, 80, 40, 100]]))


def test_suppression_keeps_the_better_one_of_a_class_and_other_classes() -> None:
    near = [0.26, 0.25, 0.2, 0.2]
    logits = torch.tensor([[[3.0, -9.0], [2.0, -9.0], [-9.0, 1.0], [0.5, -9.0]]])
    (found,) = PostProcess(4, 0.6)(Prediction(logits, torch.tensor([[BOX, near, near, FAR]])), SIZES)
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 1.0, 0.5]).sigmoid())
    assert found.labels.tolist() == [0, 1, 0]
