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
    """Boxes within 1e-3 pixel, scores within 1e-5, in the same order."""
    found, truth = (one.predict(images, score_threshold=0, batch_size=batch) for one in (model, eager))
    assert len(found) == len(truth) == len(images)
    for one, true in zip(found, truth, strict=True):
        assert len(one) == len(true) > 20
        assert torch.equal(one.labels, true.labels)
        torch.testing.assert_close(one.scores, true.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.boxes_xyxy, true.boxes_xyxy, rtol=0, atol=1e-3)


def assert_near(model: Model | Exported, other: Model, images: list[np.ndarray]) -> None:
    """As half precision rounds: for each of the ten best one of its class, half a pixel beside it at the most."""
    for one, true in zip(*(m.predict(images, score_threshold=0) for m in (model, other)), strict=True):
        torch.testing.assert_close(one.scores[:10], true.scores[:10], rtol=0, atol=2e-2)
        for box, label in zip(true.boxes_xyxy[:10], true.labels, strict=False):
            assert (one.boxes_xyxy[one.labels == label] - box).abs().amax(1).min() < 0.5


def on_canvas(eager: Model, count: int, canvas: tuple[int, int]) -> tuple[Tensor, Tensor, list[Detections]]:
    """Noise as images, their sizes, and what the checkpoint finds in them."""
    images = torch.randint(0, 256, (count, 3, *canvas), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([canvas, (100, 90), (64, canvas[1] - 1)] * 3)[:count]
    padding = torch.ones(count, *canvas, dtype=torch.bool)
    for own, (height, width) in zip(padding, sizes.tolist(), strict=True):
        own[:height, :width] = False
    with torch.inference_mode():
        return images, sizes, eager.postprocess(eager.detector.detect(images, padding), sizes)


def assert_pairs(found: Sequence[Tensor], truth: list[Detections]) -> None:
    for scores, labels, boxes, true in zip(*found, truth, strict=True):
        assert torch.equal(labels, true.labels[: len(labels)])
        torch.testing.assert_close(scores, true.scores[: len(labels)], rtol=0, atol=1e-5)
        torch.testing.assert_close(boxes, true.boxes_xyxy[: len(labels)], rtol=0, atol=1e-3)
