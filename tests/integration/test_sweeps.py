"""The sweeps of docs/training.md, on runs of toy size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import forked
from codetr import application
from toy import environment, make_coco, overrides

DOCS = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def documented(word: str) -> list[str]:
    """The overrides of the command that has this word, without the experiment."""
    (command,) = re.findall(rf"^codetr train -m experiment=demo ((?:\\\n|.)*{word}(?:\\\n|.)*)$", DOCS, re.MULTILINE)
    return [word.strip("'") for word in command.replace("\\\n", " ").split()]


def scores(folder: Path) -> dict[str, float]:
    """The best validation of every job."""
    found = {}
    for path in folder.glob("*/csv/metrics.csv"):
        header, *rows = (line.split(",") for line in path.read_text().splitlines())
        column = header.index("val/mar_100")
        found[path.parts[-3]] = max(float(row[column]) for row in rows if row[column])
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_coco(tmp_path / "data", train=12, val=5)
    return tmp_path / "data"


def sweep(data: Path, cwd: Path, *given: str) -> None:
    """By recall, which toy runs have some of. Without the toy's own learning rate: what is given is not tried out."""
    own = [override for override in overrides(data) if not override.startswith("optimizer.lr=")]
    more = [
        "trainer.max_epochs=6",
        "callbacks.ema.decay=0.5",
        "optimized_metric=val/mar_100",
        "hydra.sweep.dir=sweep",
        "-m",
    ]
    done = forked.run("codetr.train", *own, *given, *more, cwd=cwd, env=environment())
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_optuna_maximises(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    given = [o.replace("interval(1e-5,1e-3)", "interval(1e-3,1e-2)") for o in documented("hydra/sweeper=optuna")]
    sweep(data, tmp_path, *(o for o in given if "n_trials" not in o), "hydra.sweeper.n_trials=3")
    best = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    found = scores(tmp_path / "sweep")
    assert len(found) == 3
    assert min(found.values()) < max(found.values())
    assert best["best_value"] == pytest.approx(max(found.values()), abs=1e-6)
    winner = max(found, key=lambda job: found[job])
    config = OmegaConf.load(tmp_path / "sweep" / winner / ".hydra/config.yaml")
    assert best["best_params"]["optimizer.lr"] == config.optimizer.lr
    assert best["best_params"]["model.dropout"] == config.model.dropout


@pytest.mark.slow
def test_submitit_runs_jobs_in_processes_of_their_own(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    given = [o for o in documented("submitit_local") if not o.startswith("seed")]
    sweep(data, tmp_path, *given, "seed=1,2")
    assert set(scores(tmp_path / "sweep")) == {"0", "1"}
    jobs = {path.name.partition("_")[0] for path in (tmp_path / "sweep/.submitit").glob("*/*_log.out")}
    assert len(jobs) == 2


def test_a_sweep_maximises_unless_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.chdir(tmp_path)
    optuna = ["-m", "name=n", "hydra/sweeper=optuna", "seed=range(0,9)"]
    maximise = "hydra.sweeper.direction=maximize"
    assert maximise in application.with_run_directory(optuna, "train")
    told = [*optuna, "hydra.sweeper.direction=minimize"]
    assert maximise not in application.with_run_directory(told, "train")
    assert maximise not in application.with_run_directory(["-m", "name=n", "seed=1,2"], "train")
