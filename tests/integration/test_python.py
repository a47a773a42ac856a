"""Training from Python: the run that `codetr train` makes, with its best model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import codetr
from codetr.errors import UserError
from toy import CLASSES, make_coco, overrides


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_coco(folder, train=4, val=2)
    return folder


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODETR_MSDA", "reference")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def quiet(data: Path) -> list[str]:
    return [o for o in overrides(data) if o != "~callbacks.report"] + ["~callbacks.progress", "trainer.max_epochs=1"]


def test_a_training_gives_its_run_and_its_best_model(data: Path, tmp_path: Path) -> None:
    run = codetr.train(*quiet(data))
    assert run.folder.parent == tmp_path / "outputs" / "toy"
    assert run.best == run.folder / "checkpoints" / "best.ckpt"
    written = json.loads((run.folder / "metrics.json").read_text())
    assert {name: run.metrics[name] for name in ("map", "map_50", "mar_100")} == pytest.approx(
        {name: written[name] for name in ("map", "map_50", "mar_100")}
    )
    assert {f"ap/{name}" for name in CLASSES} <= set(run.metrics)
    assert run.score == run.metrics["map"]
    model = run.model()
    assert model.class_names == CLASSES
    assert model.step == 2
    (found,) = model.predict(data / "val" / "0.png", score_threshold=0)
    assert len(found) == 30  # ten queries, three classes

    # The run goes on by its directory, and by its own configuration, as that of a command does.
    saved = OmegaConf.load(run.folder / ".hydra" / "config.yaml")
    assert (saved.name, saved.trainer.max_epochs, saved.data.root) == ("toy", 1, str(data))
    longer = codetr.train(f"resume='{run.folder}'", "trainer.max_epochs=2")
    assert longer.folder == run.folder
    assert torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    with pytest.raises(UserError, match="there is a run in it already"):
        codetr.train(*quiet(data), f"run_dir='{run.folder}'")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["trainr.max_epochs=3"], "Did you mean trainer.max_epochs"),
        (["--cfg", "job"], "--cfg is a flag of the command line"),
        (["trainer.devices=2"], "run_dir=outputs/mine"),
        (["data.val_annotations=absent.json"], r"absent\.json"),
        (["trainer.precision=7"], "precision"),
    ],
)
def test_mistakes_are_explained(data: Path, given: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        codetr.train(*quiet(data), *given)


def test_a_run_without_a_validation_has_no_best_model(data: Path) -> None:
    run = codetr.train(*quiet(data), "trainer.limit_val_batches=0", "run_dir=run")
    assert (run.best, run.score, dict(run.metrics)) == (None, None, {})
    with pytest.raises(UserError, match="no best checkpoint was written"):
        run.model()
