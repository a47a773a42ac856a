"""The example of a head outside of the package: trained through config alone, and its assignment by hand."""

import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torchvision.ops import box_iou

from codetr.models.detector import Detector
from codetr.types import Frames, Targets
from toy import CLASSES, make_coco, train

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "task_aligned"


def test_it_trains_through_config_alone(tmp_path: Path) -> None:
    """The command of its README, on a small set: its queries and losses are in the log, and it is evaluated too."""
    make_coco(tmp_path / "data", train=6, val=3)
    options = ["model/auxiliary_head=[task_aligned]", "evaluate_heads=true", "trainer.max_epochs=2", "run_dir=run"]
    own_config = f"--config-dir={EXAMPLE / 'conf'}"
    done = train(tmp_path / "data", tmp_path, *options, own_config, PYTHONPATH=str(EXAMPLE))
    assert done.returncode == 0, done.stderr
    log = next((tmp_path / "run").rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    wanted = {"train/head_task_aligned/class", "train/task_aligned/0/giou", "val/branch/task_aligned/map"}
    assert wanted <= set(log)


def test_assignment_equals_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose(
            "train",
            [
                "model=co_deformable_tiny",
                "model/auxiliary_head=[task_aligned]",
                f"model.num_classes={len(CLASSES)}",
                f"hydra.searchpath=[{EXAMPLE / 'conf'}]",
            ],
        )
    torch.manual_seed(0)
    detector: Detector = instantiate(config.model.detector, _convert_="all")
    head = detector.heads["task_aligned"]
    head.topk = 4
    images, padding = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), torch.zeros(1, 64, 64).bool()
    boxes = torch.tensor([[[0.4, 0.4, 0.5, 0.6], [0.5, 0.5, 0.6, 0.4], [0.9, 0.9, 0.1, 0.1]]])
    frames = Frames.unscaled(torch.tensor([[64, 64]]))
    targets = Targets(boxes, torch.tensor([[2, 0, 1]]), torch.tensor([[True, True, False]]), frames)
    with torch.no_grad():
        pyramid = detector.adapter(detector.encode(images, padding))
        logits, predicted = head.predict(pyramid)
    points = torch.cat(head.grid(pyramid))
    owner, quality = head.assign(points, head.grid.valid(pyramid, targets.frames.sizes), logits, predicted, targets)
    truth, centers = targets.boxes_xyxy[0], (points[:, :2] + points[:, 2:]) / 2
    iou, scores = box_iou(truth, predicted[0]), logits[0].sigmoid()
    chosen: dict[int, dict[int, float]] = {}
    for k in range(2):
        low, high = truth[k, :2], truth[k, 2:]
        inside = [n for n, c in enumerate(centers) if (c > low).all() and (c < high).all()]
        aligned = {n: float(scores[n, targets.labels[0, k]]) * float(iou[k, n]) ** 6 for n in inside}
        chosen[k] = dict(sorted(aligned.items(), key=lambda one: -one[1])[:4])
    for n in range(len(points)):
        mine = [k for k in chosen if n in chosen[k]]
        expected = max(mine, key=lambda k: float(iou[k, n])) if mine else -1
        assert int(owner[0, n]) == expected
    for k in range(2):
        own = [n for n in chosen[k] if int(owner[0, n]) == k]
        best, overlap = max(chosen[k][n] for n in own), max(float(iou[k, n]) for n in own)
        for n in own:
            assert math.isclose(float(quality[0, n]), chosen[k][n] / best * overlap, rel_tol=1e-4)
