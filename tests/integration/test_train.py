"""The command line: directories, refusals, and a start from other weights."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

import codetr
from codetr import application, run_directory
from codetr.errors import UserError
from toy import CLASSES, make_coco, train


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def decided(*argv: str) -> list[str]:
    return application.with_run_directory(list(argv), "train")


def make_run(directory: str, seconds: int) -> Path:
    path = Path(directory)
    for name in (".hydra/config.yaml", "checkpoints/last.ckpt"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("name: toy\n")
        os.utime(path / name, (seconds, seconds))
    return path


def test_a_fresh_run_names_its_directory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = decided("name=mine")
    assert first[0] == "name=mine"
    assert first[1].startswith("run_dir='outputs/mine/20")
    assert decided("name=mine", "--config-dir", ".")[2:] == ["--config-dir", "."]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert decided(*first) == first  # what a process launched by Lightning sees


@pytest.mark.parametrize("name", ["train", "eval"])
def test_runs_that_start_in_one_second_have_directories_of_their_own(name: str) -> None:
    """From many processes' point of view: whoever makes it has it, the others get numbers."""
    given = ["checkpoint=x"] if name == "eval" else []
    directories = [application.with_run_directory([*given, "name=n"], name)[-1] for _ in range(6)]
    assert len(set(directories)) == 6
    assert len(list(Path("outputs/n").iterdir())) == 6
    application.with_run_directory([*given, "run_dir=fixed"], name)
    with pytest.raises(UserError, match="run_dir=fixed: there is a run in it already"):
        application.with_run_directory([*given, "run_dir=fixed"], name)


def test_sweeps_that_start_in_one_second_have_directories_of_their_own() -> None:
    first, second = (decided("-m", "name=n", "seed=1,2")[-1] for _ in range(2))
    assert first.startswith("hydra.sweep.dir='outputs/n/multirun/20")
    assert first != second


def test_the_demo_does_not_touch_another_run() -> None:
    make_run("outputs/demo", 1), make_run("outputs/other", 900), make_run("outputs/longer/2", 300)
    assert decided("experiment=demo", "name=longer")[-1].startswith("run_dir='outputs/longer/20")
    assert decided("experiment=demo", "name=longer", "resume=auto")[-1] == "run_dir='outputs/longer/2'"
    assert decided("experiment=demo", "resume=auto")[-1].startswith("run_dir='outputs/demo/20")
    assert len(list(Path().rglob("last.ckpt"))) == 3


def test_a_configuration_file_neither_overwrites_nor_resumes_what_it_does_not_name(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "fixed.yaml").write_text("# @package _global_\nrun_dir: outputs/mine[1]\n")
    (folder / "destroys.yaml").write_text("# @package _global_\nrun_dir: outputs/mine[1]\noverwrite: true\n")
    make_run("outputs/mine1", 900)
    own = ("--config-dir", str(folder.parent))
    assert decided("experiment=fixed", "resume=auto", *own)[2] == "run_dir='outputs/mine[1]'"
    run = make_run("outputs/mine[1]", 1)
    assert decided("experiment=fixed", "resume=auto", *own)[2] == "run_dir='outputs/mine[1]'"
    with pytest.raises(UserError, match=r"there is a run in it already"):
        decided("experiment=fixed", *own)
    with pytest.raises(UserError, match="overwrite=true stands in a configuration file"):
        decided("experiment=destroys", *own)
    assert (run / "checkpoints/last.ckpt").exists()


def test_resume_auto_takes_the_newest_run_of_that_name() -> None:
    make_run("outputs/a/1", 300), make_run("outputs/a/2", 100), make_run("outputs/b/3", 900)
    assert decided("name=a", "resume=auto") == ["name=a", "resume=auto", "run_dir='outputs/a/1'"]
    assert decided("name=new", "resume=auto")[2].startswith("run_dir='outputs/new/20")
    assert decided("resume=auto", "run_dir=outputs/b/3") == ["resume=auto", "run_dir=outputs/b/3"]


def test_resume_of_a_directory_uses_its_own_config() -> None:
    run = make_run("out puts/it's", 1)
    argv = decided(f"resume='{str(run).replace(chr(39), chr(92) + chr(39))}'", "trainer.max_epochs=5")
    assert argv[0] == f"--config-path={run.resolve() / '.hydra'}"
    assert argv[1] == "--config-name=config"
    assert argv[-1] == r"hydra.run.dir='out puts/it\'s'"
    with pytest.raises(UserError, match=r"resume=nowhere: there is no .*config.yaml"):
        decided("resume=nowhere")


def test_a_run_whose_last_checkpoint_was_deleted_goes_on_from_the_one_before() -> None:
    run = make_run("fixed", 1)
    last = run / "checkpoints/last.ckpt"
    last.rename(last.with_name("last.1.ckpt"))
    with pytest.raises(UserError, match="run_dir=fixed: there is a run in it already"):
        decided("run_dir=fixed")
    assert decided("resume=fixed")[0] == f"--config-path={run.resolve() / '.hydra'}"
    for resume, found in (("auto", last), ("null", None)):
        config = application.compose("train", [f"resume={resume}", "run_dir=fixed"])
        assert run_directory.resume_from(config) == found


def test_a_run_is_not_overwritten_by_accident() -> None:
    run = make_run("fixed", 1)
    (run / "notes.txt").touch()
    with pytest.raises(UserError, match="run_dir=fixed: there is a run in it already"):
        decided("run_dir=fixed")
    decided("run_dir=fixed", "resume=auto")
    assert (run / "checkpoints/last.ckpt").exists()
    decided("run_dir=fixed", "overwrite=true")
    left = [path for path in run.rglob("*") if path.is_file()]
    assert left == [run / "notes.txt"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trainr.max_epochs=3"], "Did you mean trainer.max_epochs"),
        (["optimizer.weight_deca=3"], "Did you mean optimizer.weight_decay"),
        (["schedule=cosin"], "Did you mean cosine"),
        (["experiment=nothing_like_it"], "Could not find 'experiment/nothing_like_it'"),
        (["a=[1"], "Overrides look like key=value"),
        (["-m", "seed=1,2", "trainer.devices=2"], "a sweep .* runs on one device, and trainer.devices is 2"),
        (["-m", "seed=1,2", "resume=auto"], "cannot be resumed as a whole"),
    ],
)
def test_messages(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        decided(*argv)


def test_processes_from_outside_need_a_named_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run_dir="):
        decided("name=a")
    assert decided("run_dir=named") == ["run_dir=named"]


@pytest.mark.slow
def test_sweep_then_a_start_from_its_weights(tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_coco(data, train=4, val=2)
    done = train(data, tmp_path, "seed=1,2", "trainer.max_epochs=1", "hydra.sweep.dir=sweep", "-m")
    assert done.returncode == 0, done.stderr
    best = [tmp_path / "sweep" / job / "checkpoints" / "best.ckpt" for job in ("0", "1")]
    weights = [codetr.load(path).detector.decoder.class_heads[0].weight for path in best]
    assert weights[0].shape[0] == len(CLASSES)
    assert not weights[0].equal(weights[1])

    again = train(
        data,
        tmp_path,
        f"initialise.checkpoint={best[0]}",
        "data.classes=[blue,red]",
        "trainer.max_epochs=1",
        "optimizer.lr=0",
        "callbacks.ema.decay=0",
        "run_dir=again",
    )
    assert again.returncode == 0, again.stderr
    assert "moved by class name" in " ".join(again.stdout.split())
    moved = codetr.load("again/checkpoints/best.ckpt").detector.decoder.class_heads[0].weight
    assert moved.equal(weights[0][[CLASSES.index("blue"), CLASSES.index("red")]])


def test_every_head_at_once_and_evaluated_on_its_own(tmp_path: Path) -> None:
    """All seven heads of the Co-DETR paper, a second ATSS head, masks from the data set, a lambda of its own."""
    data = tmp_path / "data"
    make_coco(data, train=4, val=2)
    heads = ["faster_rcnn", "mask_rcnn", "atss", "retinanet", "fcos", "paa", "gfl"]
    chosen = ",".join(f"{head}_small" if head.endswith("rcnn") else head for head in heads)
    done = train(
        data,
        tmp_path,
        f"model/auxiliary_head=[{chosen}]",
        "+model/auxiliary_head@model.detector.heads.second=atss",
        "+criterion.lambda_2_by_head.second=0.5",
        "trainer.max_epochs=1",
        "evaluate_heads=true",
        "run_dir=run",
    )
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "run").rglob("metrics.csv")
    with log.open() as file:
        logged = {name: value for row in csv.DictReader(file) for name, value in row.items() if value}
    everyone = {*heads, "second"}
    assert {name.split("/")[1] for name in logged if name.startswith("train/head_")} == {f"head_{h}" for h in everyone}
    assert {name.split("/")[2] for name in logged if name.startswith("val/branch/")} == everyone
    assert float(logged["train/head_mask_rcnn/mask"]) > 0


def test_an_error_of_the_user_has_no_stack_trace(tmp_path: Path) -> None:
    done = train(tmp_path / "absent", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "absent") in done.stderr.splitlines()[-1]
