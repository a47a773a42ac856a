"""The averaged weights, the random states and the files behind a checkpoint."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from codetr.callbacks.ema import EMA
from codetr.callbacks.random_state import capture, restore
from codetr.callbacks.resume import AtomicCheckpointIO, ContinuedCSVLogger


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.detector = nn.BatchNorm1d(2, dtype=torch.float64)


def set_all(module: Module, value: float) -> None:
    for tensor in module.detector.state_dict().values():
        tensor.fill_(value)


def test_ema_in_closed_form_swapped_saved_and_resumed() -> None:
    trainer, module, ema = SimpleNamespace(global_step=0, state=SimpleNamespace(fn="fit")), Module(), EMA(0.9, 3)
    set_all(module, 0.0)
    ema.on_train_start(trainer, module)
    expected = 0.0
    for step in range(1, 9):
        set_all(module, float(step))
        trainer.global_step = step
        ema.on_train_batch_end(trainer, module)
        ema.on_train_batch_end(trainer, module)  # a second micro-batch of the same step changes nothing
        d = 0.9 * (1 - math.exp(-step / 3))
        expected = d * expected + (1 - d) * step
        if step == 4:
            checkpoint: dict = {}
            ema.on_save_checkpoint(trainer, module, checkpoint)
            assert checkpoint["ema"]["updates"] == 4
            ema = EMA(0.9, 3)
            ema.on_load_checkpoint(trainer, module, checkpoint)
            ema.on_train_start(trainer, module)
    assert set(ema.average) == {"weight", "bias", "running_mean", "running_var"}
    ema.on_validation_start(trainer, module)
    for name in ema.average:
        assert module.detector.state_dict()[name].tolist() == pytest.approx([expected] * 2, rel=1e-12)
    ema.on_validation_end(trainer, module)
    assert module.detector.weight.tolist() == [8.0, 8.0]
    assert ema.average["weight"].tolist() == pytest.approx([expected] * 2, rel=1e-12)


def test_random_states_survive_a_file(tmp_path: Path) -> None:
    def draw() -> tuple:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)

    draw()
    torch.save(capture(), tmp_path / "state")
    first = draw()
    assert draw() != first
    restore(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == first


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path, io = tmp_path / "a" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        io.save_checkpoint({"step": 2, "bad": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_metrics_of_repeated_steps_are_written_once(tmp_path: Path) -> None:
    def log(resumed_step: int | None, steps: range, name: str) -> list[str]:
        logger = ContinuedCSVLogger(str(tmp_path), 100, resumed_step)
        for step in steps:
            logger.log_metrics({name: float(step)}, step)
        logger.save()
        return (tmp_path / "metrics.csv").read_text().splitlines()

    log(None, range(5), "loss")
    lines = log(3, range(3, 6), "other")
    assert lines == ["loss,other,step", "0.0,,0", "1.0,,1", "2.0,,2", ",3.0,3", ",4.0,4", ",5.0,5"]
    assert log(None, range(1), "loss") == ["loss,step", "0.0,0"]
