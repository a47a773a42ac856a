"""Two processes: no hang, and the numbers of one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import codetr
from codetr import application
from codetr.evaluation.inputs import inputs
from toy import make_coco, overrides, train


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    make_coco(data, train=12, val=5, empty=(0, 4))
    options = (
        "trainer.max_epochs=6",
        "data.eval_batch_size=1",
        "optimizer.lr=3e-3",
        "callbacks.ema.decay=0.5",
    )
    done = train(
        data,
        tmp_path,
        *options,
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "+callbacks.no_objects={_target_: toy_callbacks.NoObjects, rank: 1}",
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs" / "toy").iterdir()  # one directory for both
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = [{k: float(v) for k, v in row.items() if k.startswith("val/")} for row in rows if row["val/map"]]
    reported = max(scores, key=lambda score: score["val/map"])
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(3 * 6))

    best = run / "checkpoints" / "best.ckpt"
    assert torch.load(best, weights_only=True)["random_states"][0] is not None
    numbers = evaluate_in_this_process(best, data)
    assert numbers["mar_100"] > 0
    for name, value in numbers.items():
        assert value == pytest.approx(reported[f"val/{name}"], abs=1e-6), name


@torch.inference_mode()
def evaluate_in_this_process(checkpoint: Path, data: Path) -> dict[str, float]:
    from hydra.utils import instantiate

    config = application.compose("train", [*overrides(data), "data.eval_batch_size=1"])
    module = instantiate(config.data)
    module.setup("fit")
    metric = instantiate(config.metrics)(module.class_names)
    model = codetr.load(checkpoint, device="cpu")
    for batch in module.val_dataloader():
        metric.update(*inputs(batch.image_ids, model.detect(batch, score_threshold=0), batch.truth))
    metric.compute()
    return metric.evaluations["bbox"].numbers
