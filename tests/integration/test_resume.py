"""A run that is killed and resumed ends exactly as the one that was not."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from toy import make_coco, train

STEPS_PER_EPOCH, EPOCHS = 6, 3
OPTIONS = (
    f"trainer.max_epochs={EPOCHS}",
    "callbacks.checkpoints.every_n_steps=2",
    "model.dropout=0.1",
    "data/sampling=repeat_factor",
    "data.sampling.threshold=1",
    "data.aspect_ratio_grouping=true",
)


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equal to the bit, through containers."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("step", [STEPS_PER_EPOCH + 3])
def test_killed_and_resumed_is_uninterrupted(tmp_path: Path, step: int) -> None:
    """In the middle of an epoch that shows some images twice, in batches of one orientation."""
    data = tmp_path / "data"
    make_coco(data, train=9, val=3, sizes=((64, 80), (80, 64), (96, 64)))
    done = train(data, tmp_path, *OPTIONS, "run_dir=whole")
    assert done.returncode == 0, done.stderr
    killed = train(data, tmp_path, *OPTIONS, f"+callbacks.kill={{_target_: toy_callbacks.Kill, step: {step}}}")
    assert killed.returncode == -9, killed.stderr
    resumed = train(data, tmp_path, *OPTIONS, "resume=auto")
    assert resumed.returncode == 0, resumed.stderr

    whole, (parts,) = tmp_path / "whole", (tmp_path / "outputs" / "toy").iterdir()
    a, b = (torch.load(d / "checkpoints" / "last.ckpt", weights_only=True) for d in (whole, parts))
    assert a["global_step"] == STEPS_PER_EPOCH * EPOCHS
    for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "random_states", "callbacks"):
        assert_same(a[key], b[key], key)
    assert rows(whole) == rows(parts)
    assert len(rows(whole)) == STEPS_PER_EPOCH * EPOCHS + EPOCHS
