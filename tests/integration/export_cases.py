"""What the tests of exported files share: exports, and what "the same" means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from codetr.application import compose
from codetr.export import export
from codetr.inference import Exported, Model
from codetr.types import Detections

if TYPE_CHECKING:
    from conftest import Trained


def exported(trained: Trained, out: Path, *overrides: str) -> Path:
    """`codetr export` of its checkpoint."""
    return export(compose("export", [f"checkpoint={trained.checkpoint}", f"out={out}", *overrides]))


def assert_same(model: Model | Exported, eager: Model, images: list[np.ndarray], batch: int) -> None:
    """In every image, see `assert_same_objects`."""
    found, truth = (one.predict(images, score_threshold=0, batch_size=batch) for one in (model, eager))
    assert len(found) == len(truth) == len(images)
    for one, true in zip(found, truth, strict=True):
        assert len(true) > 20
        assert_same_objects(
            (one.boxes_xyxy, one.scores, one.labels),
            (true.boxes_xyxy, true.scores, true.labels),
        )


def assert_same_objects(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Boxes within 1e-3 pixel, scores within 1e-5, in the same order, except that scores which are equal to that
    precision may have changed places."""
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    near = (found[1][:, None] - expected[1]).abs() <= 1e-5
    same = near & (found[2][:, None] == expected[2]) & ((found[0][:, None] - expected[0]).abs().amax(-1) <= 1e-3)
    assert same.any(1).all()
    assert same.any(0).all()


def assert_near(model: Model | Exported, other: Model, images: list[np.ndarray]) -> None:
    """As half precision rounds: for each of the ten best one of its class, half a pixel beside it at the most."""
    for one, true in zip(*(m.predict(images, score_threshold=0) for m in (model, other)), strict=True):
        torch.testing.assert_close(one.scores[:10], true.scores[:10], rtol=0, atol=2e-2)
        for box, label in zip(true.boxes_xyxy[:10], true.labels, strict=False):
            assert (one.boxes_xyxy[one.labels == label] - box).abs().amax(1).min() < 0.5


def on_canvas(eager: Model, count: int, canvas: tuple[int, int]) -> tuple[Tensor, Tensor, list[Detections]]:
    """Noise as images, their sizes, and what the checkpoint finds in them."""
    images = torch.randint(0, 256, (count, 3, *canvas), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([canvas, (canvas[0] - 28, 90), (64, canvas[1] - 1)] * 3)[:count]
    padding = torch.ones(count, *canvas, dtype=torch.bool)
    for own, (height, width) in zip(padding, sizes.tolist(), strict=True):
        own[:height, :width] = False
    with torch.inference_mode():
        return images, sizes, eager.postprocess(eager.detector.detect(images, padding), sizes)


def assert_pairs(found: Sequence[Tensor], truth: list[Detections]) -> None:
    for scores, labels, boxes, true in zip(*found, truth, strict=True):
        count = len(labels)
        expected = true.boxes_xyxy[:count], true.scores[:count], true.labels[:count]
        assert_same_objects((boxes, scores, labels), expected)
