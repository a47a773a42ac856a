"""Early stopping, what is best, and the end at a loss that is not finite: one override each."""

import csv
from pathlib import Path

import pytest
import torch

from codetr import application
from codetr.errors import UserError
from codetr.training import Run, fit
from toy import make_coco, overrides


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_coco(tmp_path / "data", train=4, val=2)
    return tmp_path / "data"


def trained(data: Path, *more: str) -> Run:
    own = [o for o in overrides(data) if not o.startswith("~")]
    quiet = ["~callbacks.progress", "~callbacks.pictures", "logger=csv"]
    return fit(application.compose("train", [*own, *quiet, f"run_dir={data.parent / 'run'}", *more]))


def validations(run: Run) -> list[dict[str, str]]:
    with (run.folder / "csv/metrics.csv").open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["val/map"]]


@pytest.mark.filterwarnings("default")
def test_a_run_ends_where_a_number_does_not_grow(data: Path) -> None:
    """No validation beats the first one by more than 1, so the second one is the last."""
    early = ["callbacks=[default,early_stopping]", "callbacks.early_stopping.patience=1", "trainer.max_epochs=6"]
    early += ["callbacks.early_stopping.min_delta=1", "callbacks.checkpoints.every_n_steps=1"]
    run = trained(data, *early)
    assert len(validations(run)) == 2
    saved = torch.load(run.folder / "checkpoints/last.ckpt", weights_only=True)
    (state,) = (own for name, own in saved["callbacks"].items() if "EarlyStop" in name)
    assert state["best_score"] == pytest.approx(float(validations(run)[0]["val/map"]))
    assert (run.folder / "report.html").is_file()


@pytest.mark.filterwarnings("default")
def test_any_number_decides_what_is_best(data: Path) -> None:
    run = trained(data, "optimized_metric=val/map_large", "trainer.max_epochs=2")
    saved = torch.load(run.folder / "checkpoints/best.ckpt", weights_only=True)
    (state,) = (own for name, own in saved["callbacks"].items() if "Checkpoints" in name)
    assert state["best_score"] == run.score == -1  # no object is that large
    assert run.metrics["map"] != -1


@pytest.mark.filterwarnings("default")
def test_the_first_loss_that_is_not_finite_ends_a_run(data: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        trained(data, "callbacks.non_finite.skip=0", "optimizer.lr=1e30", "trainer.max_epochs=4")
