"""Progress, pictures and report in a Lightning run of a module whose answers are known."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codetr.callbacks.pictures import Pictures, draw
from codetr.callbacks.progress import BarProgress, LineProgress
from codetr.callbacks.report import Report, tables
from codetr.callbacks.telemetry import Telemetry
from codetr.evaluation.inputs import inputs
from codetr.evaluation.mean_ap import detection_metric
from codetr.types import Batch, Detections, Frames, Targets
from codetr.visualize import class_color

# Lightning's own code, with torch 2.15.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

NAMES = ["circle", "square"]


def batch(first_id: int) -> Batch:
    """Two images of 40 x 60 pixels, shown at half the size, padded to 32 x 64; one object in each."""
    padding = torch.ones(2, 32, 64, dtype=torch.bool)
    padding[:, :20, :30] = False
    boxes = torch.tensor([[10.0, 8.0, 50.0, 32.0]], dtype=torch.float64)
    truth = {
        "boxes": boxes,
        "labels": torch.tensor([1]),
        "iscrowd": torch.tensor([False]),
        "area": torch.tensor([960.0], dtype=torch.float64),
    }
    return Batch(
        images=torch.full((2, 3, 32, 64), 100, dtype=torch.uint8),
        padding=padding,
        targets=Targets(
            boxes=torch.tensor([0.5, 0.5, 2 / 3, 0.6]).repeat(2, 1, 1),
            labels=torch.ones(2, 1, dtype=torch.long),
            valid=torch.ones(2, 1, dtype=torch.bool),
            frames=Frames(
                sizes=torch.tensor([[20, 30], [20, 30]]),
                scale=torch.full((2, 2), 0.5),
                file_sizes=torch.tensor([[40, 60], [40, 60]]),
            ),
        ),
        image_ids=torch.tensor([first_id, first_id + 1]),
        truth=[truth, truth],
    )


class Loader:
    """Batches from memory; Lightning would take a list for a list of loaders."""

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Oracle(LightningModule):
    """Finds every object; one weight, so that there is something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.metrics = {"val": detection_metric(NAMES)}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = self.weight**2
        self.log("train/loss", loss, prog_bar=True, batch_size=2)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> list[Detections]:
        found = [Detections(torch.tensor([0.9]), t["labels"], t["boxes"].float()) for t in batch.truth]
        self.metrics["val"].update(*inputs(batch.image_ids, found, batch.truth))
        return found

    def on_validation_epoch_end(self) -> None:
        numbers = self.metrics["val"].compute()
        self.metrics["val"].reset()
        self.log("val/map", numbers["map"], prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, callbacks: list, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "callbacks": callbacks,
        "default_root_dir": folder,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "logger": False,
        "max_epochs": 2,
        "num_sanity_val_steps": 1,
    }
    return Trainer(**settings | options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit of two epochs with everything on."""
    folder = tmp_path_factory.mktemp("run")
    loggers = [TensorBoardLogger(folder, name="", version="tb"), CSVLogger(folder, name="", version="csv")]
    callbacks = [
        Pictures(count=3, score_threshold=0.3),
        Report(["train/loss"], ["val/map"], about={}, images=5000),
        LineProgress(1e9),
        Telemetry(),
    ]
    fit = trainer(folder, callbacks, logger=loggers)
    fit.fit(Oracle(), Loader(*[batch(0)] * 3), Loader(batch(10), batch(20)))
    return folder


def test_a_run_leaves_numbers_curves_and_pictures(run: Path) -> None:
    result = json.loads((run / "metrics.json").read_text())
    assert result["map"] == result["map_50"] == result["map_small"] == 1.0
    assert result["map_large"] == -1.0
    assert result["map_per_class"] == {"circle": -1.0, "square": 1.0}
    assert result["objects_per_class"] == {"circle": 0, "square": 4}
    assert (result["images"], result["step"], result["epoch"]) == (4, 6, 1)
    for name in ("curves.png", "pr_curves.png", "predictions.png"):
        with Image.open(run / name) as picture:
            assert picture.width > 500


def test_what_a_run_costs_is_logged(run: Path) -> None:
    """The loss is w², w is 1 at first and shrinks by a fifth in every step; two images are in each."""
    with (run / "csv/metrics.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["train/gradient_norm"]]
    assert [float(row["train/gradient_norm"]) for row in rows] == pytest.approx([2 * 0.8**i for i in range(6)])
    assert [float(row["run/images"]) for row in rows] == [2 * i for i in range(6)]
    hours = [float(row["run/hours"]) for row in rows]
    assert hours == sorted(hours)
    assert 0 < hours[-1] < 0.1
    assert all(float(row["run/images_per_second"]) > 0 for row in rows[1:] if row["run/images_per_second"])
    assert 0.05 < float(rows[0]["run/memory_gb"]) < 100


@pytest.mark.parametrize("fused", [False, True])
def test_the_norm_of_the_gradient_is_without_the_scale_of_half_precision(fused: bool, tmp_path: Path) -> None:
    """Lightning divides by it before an optimizer that cannot; a fused one does so itself, after the norm is taken."""

    class Scaled(Oracle):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    logger = CSVLogger(tmp_path, name="", version="csv")
    fit = trainer(tmp_path, [Telemetry()], logger=logger, plugins=[precision], max_epochs=1, num_sanity_val_steps=0)
    fit.fit(Scaled(), Loader(batch(0)), Loader(batch(10)))
    with (tmp_path / "csv/metrics.csv").open(newline="") as lines:
        (norm,) = [float(row["train/gradient_norm"]) for row in csv.DictReader(lines) if row["train/gradient_norm"]]
    assert norm == pytest.approx(2.0)


def test_hours_and_images_go_on_in_a_resumed_run() -> None:
    first, second = Telemetry(), Telemetry()
    first.images, first.hours = 12, 3.0
    second.load_state_dict(first.state_dict())
    assert second.images == 12
    assert second.state_dict()["hours"] == pytest.approx(3, abs=1e-2)


def test_the_page_of_a_run_is_there(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert 'data-value="1.0"' in text
    assert "image 10" not in text  # nothing was missed
    assert "location.reload" in text  # the last validation was one of the fit


def test_pictures_reach_tensorboard_at_every_validation(run: Path) -> None:
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    tags = events.Tags()["images"]
    assert tags == [f"val/predictions/{i}" for i in range(3)]
    assert [e.step for e in events.Images(tags[0])] == [3, 6]  # none from the sanity check


def test_boxes_are_drawn_in_network_pixels_without_padding() -> None:
    found = Detections(torch.tensor([0.9]), torch.tensor([0]), torch.tensor([[10.0, 8.0, 50.0, 32.0]]))
    picture = np.asarray(draw(batch(0), 0, found, NAMES, 0.3))
    width = 512  # 30 x 20 pixels enlarged, twice side by side under a title
    head, right = picture.shape[0] - round(20 * width / 30), picture.shape[1] - width
    for offset, label in ((0, 1), (right, 0)):
        drawn = (picture[head:, offset : offset + width] == class_color(label)).all(-1)
        rows, columns = np.nonzero(drawn)
        expected = [5 * width / 30, 25 * width / 30, 16 * width / 30]
        assert np.allclose([columns.min(), columns.max(), rows.max()], expected, atol=1)


def test_lines_in_a_log_are_few_and_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = trainer(tmp_path, [LineProgress(1e9)])
    fit.fit(Oracle(), Loader(*[batch(0)] * 50), Loader(*[batch(10)] * 20))
    lines = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    heads = [
        "sanity check  1/1",
        *["epoch 1/2  50/50", "validation  20/20"],
        *["epoch 2/2  50/50", "validation  20/20"],
    ]
    assert [line[: len(head)] for line, head in zip(lines, heads, strict=True)] == heads
    assert all(word in lines[3] for word in ("train/loss ", "val/map 1 ", "left 0:00:00"))


def test_lines_come_more_often_when_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, [LineProgress(0)], max_epochs=1).fit(Oracle(), Loader(*[batch(0)] * 5), Loader(batch(10)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split()[2] for line in lines] == [f"{i}/5" for i in range(1, 6)]


def test_the_bar_runs_and_reads_the_logged_values_at_most_once_a_second(tmp_path: Path) -> None:
    bar = BarProgress()
    fit = trainer(tmp_path, [bar], max_epochs=1)
    fit.fit(Oracle(), Loader(*[batch(0)] * 5), Loader(batch(10)))
    bar.meter.seconds = 0
    assert set(bar.get_metrics(fit, fit.lightning_module)) >= {"images/s", "left"}
    bar.meter.seconds = 1e9
    before = bar.get_metrics(fit, fit.lightning_module)
    assert bar.get_metrics(fit, fit.lightning_module) is before


def test_validation_alone_reports_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(
        tmp_path, [Report([], [], about={"step": 7, "checkpoint": "best.ckpt"}, images=5000), LineProgress(1e9)]
    ).validate(Oracle(), Loader(batch(10)), verbose=False)
    shown = capsys.readouterr().out
    assert "AP per class" in shown
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert (result["images"], result["step"], result["checkpoint"]) == (2, 7, "best.ckpt")


def test_the_table_of_many_classes_shows_the_best_and_the_worst() -> None:
    names = [f"class {i:04d}" for i in range(1203)]
    metric = detection_metric(names)
    metric.update([], [])
    metric.compute()
    evaluation = metric.evaluations["bbox"]
    evaluation.map_per_class = {name: i / 1203 for i, name in enumerate(names)}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables(evaluation))
    text = console.export_text()
    assert "class 1202" in text
    assert "class 0000" in text
    assert "class 0600" not in text
    assert "1163 classes more" in text
