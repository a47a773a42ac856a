"""A run with `compile` is the run without it, and its checkpoints are of the same detector."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from toy import make_coco, train

CANVAS = ("augment@data=lsj_1024", "data.train_transform.canvas=64", "data.copy_paste=null")
STATIC = ("static_shapes=true", *CANVAS, "trainer.max_epochs=2", "trainer.accumulate_grad_batches=2")


@pytest.mark.slow
def test_losses_and_weights_are_those_of_the_run_without(tmp_path: Path) -> None:
    """With batches that are accumulated: what they are divided by is measured without the compiler."""
    make_coco(tmp_path / "data", train=8, val=2)
    logs, weights = [], []
    for backend in ("null", "eager"):
        done = train(tmp_path / "data", tmp_path, *STATIC, f"compile={backend}", f"run_dir=run_{backend}")
        assert done.returncode == 0, done.stderr
        with next((tmp_path / f"run_{backend}").rglob("metrics.csv")).open() as file:
            rows = [{k: float(v) for k, v in row.items() if v and k != "epoch"} for row in csv.DictReader(file)]
        logs.append([row for row in rows if "train/loss" in row])
        state = torch.load(tmp_path / f"run_{backend}" / "checkpoints" / "last.ckpt", weights_only=False)
        weights.append(state["state_dict"])
    assert len(logs[0]) == 4
    for own, expected in zip(*logs, strict=True):
        assert own == pytest.approx(expected, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_shapes_that_change_are_not_compiled(tmp_path: Path) -> None:
    make_coco(tmp_path / "data", train=2, val=2)
    done = train(tmp_path / "data", tmp_path, "compile=inductor")
    assert done.returncode != 0
    assert "static_shapes=true" in done.stderr
