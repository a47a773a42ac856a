"""A run goes on with another configuration, data set, batch size or number of processes: what it then does."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch

from codetr import application, resume, training
from codetr.errors import UserError
from toy import make_coco, overrides
from toy import train as train_alone

IMAGES, STEPS, LR = 12, 6, 1e-3
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.. before .optimizer.step"),
]
OWN = ["logger=csv", "trainer.limit_val_batches=0", "data.aspect_ratio_grouping=false"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "data"
    make_coco(folder, train=IMAGES, val=1)
    return folder


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODETR_MSDA", "reference")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def fit(data: Path, run: Path, *more: str) -> dict:
    """Train in this process, from what lies in `run`; its last checkpoint."""
    seen = f"+callbacks.seen={{_target_: toy_callbacks.Seen, file: {run}/seen}}"
    (run / ".hydra").mkdir(parents=True, exist_ok=True)
    config = application.compose("train", [*overrides(data), *OWN, f"run_dir={run}", "resume=auto", seen, *more])
    training.fit(config)
    return last(run)


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def begun(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that lie within their first epoch, after two steps of two images, and at its end."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("CODETR_MSDA", "reference")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    folder = tmp_path_factory.mktemp("begun")
    fit(data, folder / "end", "trainer.max_steps=2")
    shutil.copytree(folder / "end", folder / "within")
    fit(data, folder / "end", "trainer.max_epochs=1")
    monkeypatch.undo()
    return {"within": folder / "within", "end": folder / "end"}


@pytest.fixture
def run(request: pytest.FixtureRequest, begun: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the run that the test's parameter names."""
    return shutil.copytree(begun[request.param], tmp_path / "run")


within = pytest.mark.parametrize("run", ["within"], indirect=True)
end = pytest.mark.parametrize("run", ["end"], indirect=True)


def seen(run: Path, rank: int = 0) -> list[list[int]]:
    return [[int(i) for i in line.split()] for line in (run / f"seen.{rank}").read_text().splitlines()]


def rates(run: Path) -> list[float]:
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        return [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]]


def test_more_steps_go_on_within_the_epoch(begun: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Stopped by max_steps=2 and resumed, bit for bit as in one piece."""
    whole, parts = fit(data, tmp_path / "whole", "trainer.max_epochs=1"), last(begun["end"])
    assert seen(begun["end"]) == seen(tmp_path / "whole")
    assert sorted(chain(*seen(begun["end"]))) == list(range(1, IMAGES + 1))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    assert whole["lr_schedulers"][0]["last_epoch"] == parts["lr_schedulers"][0]["last_epoch"] == STEPS


@pytest.mark.parametrize("validation", ["trainer.limit_val_batches=0", "trainer.limit_val_batches=1.0"])
def test_max_steps_at_an_epochs_end(data: Path, tmp_path: Path, validation: str) -> None:
    """The next epoch is whole, and the next by its number."""
    whole = fit(data, tmp_path / "whole", "trainer.max_steps=9", validation)
    fit(data, tmp_path / "parts", f"trainer.max_steps={STEPS}", validation)
    parts = fit(data, tmp_path / "parts", "trainer.max_steps=9", validation)
    assert seen(tmp_path / "parts") == seen(tmp_path / "whole")
    assert (parts["epoch"], parts["global_step"]) == (whole["epoch"], whole["global_step"]) == (1, 9)
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    assert resume.position(parts) == resume.position(whole)
    numbers, steps = (tmp_path / "whole" / "csv" / "metrics.csv"), (tmp_path / "parts" / "csv" / "metrics.csv")
    assert numbers.read_text() == steps.read_text()


@end
def test_lr_weight_decay_and_betas_take_effect(run: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        after = fit(
            data,
            run,
            *("trainer.max_epochs=2", "optimizer.lr=3e-3", "optimizer.weight_decay=0", "optimizer.betas=[0.8,0.99]"),
        )
    assert rates(run)[STEPS:] == pytest.approx([3e-4] * STEPS)  # of the first group, the backbone's: a tenth
    (state,) = after["optimizer_states"]
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.0}
    assert {tuple(group["betas"]) for group in state["param_groups"]} == {(0.8, 0.99)}
    assert {float(moments["step"]) for moments in state["state"].values()} == {2.0 * STEPS}  # they went on
    assert f"optimizer.lr {LR} -> 0.003: takes effect" in caplog.text
    assert "run_dir" not in caplog.text


@end
def test_the_schedule_goes_by_the_true_epoch(run: Path, data: Path) -> None:
    """One epoch of 6 steps, then epochs of 3: a drop after two epochs comes after 6 + 3 steps."""
    fit(data, run, "trainer.max_epochs=3", "data.batch_size=4", "schedule=step", "+schedule.decay.milestones.e3=[2]")
    assert rates(run)[STEPS:] == pytest.approx([1e-4] * 3 + [1e-5] * 3)
    assert all(sorted(chain(*epoch)) == list(range(1, IMAGES + 1)) for epoch in (seen(run)[6:9], seen(run)[9:12]))


@within
@pytest.mark.parametrize(
    ("batch_size", "accumulate", "rest"), [(4, 1, 2), (1, 2, 8), (1, 4, 8)], ids=["larger", "smaller", "accumulated"]
)
def test_another_batch_size_within_an_epoch(run: Path, data: Path, batch_size: int, accumulate: int, rest: int) -> None:
    """The images not yet seen, once each, in the order of the run that nothing changed."""
    changed = [f"data.batch_size={batch_size}", f"trainer.accumulate_grad_batches={accumulate}"]
    after = fit(data, run, "trainer.max_epochs=2", *changed)
    batches = seen(run)
    assert [len(batch) for batch in batches[2 : 2 + rest]] == [batch_size] * rest
    images = list(chain(*batches))
    assert sorted(images[:IMAGES]) == sorted(images[IMAGES:]) == list(range(1, IMAGES + 1))
    per_epoch = IMAGES // (batch_size * accumulate)
    assert after["global_step"] == 2 + rest // accumulate + per_epoch
    assert after["epoch"] == 2 - 1


@pytest.mark.parametrize(
    ("run", "changed", "message"),
    [
        ("within", ["data.batch_size=3"], "after 4 images, and steps of 3 .* whose number of images divides 4"),
        ("within", ["seed=1"], r"within epoch 0.*seed 0 -> 1, data.seed 0 -> 1.*from the end of an epoch"),
        ("end", ["model.detector.main.num_queries=12"], r"num_queries 10 -> 12 .*initialise\.checkpoint="),
        (
            "end",
            ["data.classes=[blue,red,green]"],
            r"\[red, green, blue\].*\[blue, red, green\].*initialise\.checkpoint=",
        ),
        ("end", ["data.classes=[red,green]"], r"other classes, .*\(3\), .*\(2\).*initialise\.checkpoint="),
        ("end", ["optimizer.no_decay=[]"], "optimizer.no_decay .* groups of parameters"),
    ],
    indirect=["run"],
)
def test_refused_before_anything_is_built(run: Path, data: Path, changed: list[str], message: str) -> None:
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    (run / ".hydra" / "config.yaml").write_text("of the refused command")
    with pytest.raises(UserError, match=message):
        fit(data, run, "trainer.max_epochs=2", *changed)
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    if "data.batch_size=3" not in changed:
        assert "optimized_metric: val/map" in (run / ".hydra" / "config.yaml").read_text()


@pytest.mark.parametrize("run", ["within", "end"], indirect=True)
def test_an_edited_training_set(run: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As many images and objects, one box moved by a pixel."""
    content = json.loads((data / "train.json").read_text())
    content["annotations"][5]["bbox"][0] += 1
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(content))
    ends = last(run)["global_step"] == STEPS
    command = (data, run, "trainer.max_epochs=2", f"data.train_annotations={edited}")
    if not ends:
        with pytest.raises(UserError, match=r"within epoch 0, and data\.train_annotations is not what it was"):
            fit(*command)
        return
    with caplog.at_level(logging.INFO):
        fit(*command)
    assert "images or objects are not what they were" in caplog.text
    assert len(seen(run)) == 2 * STEPS


@end
def test_a_smaller_set_at_an_epochs_end(run: Path, data: Path, tmp_path: Path) -> None:
    """Its next epoch is whole."""
    content = json.loads((data / "train.json").read_text())
    content["images"] = content["images"][:8]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] <= 8]
    smaller = tmp_path / "smaller.json"
    smaller.write_text(json.dumps(content))
    fit(data, run, "trainer.max_epochs=2", f"data.train_annotations={smaller}")
    assert sorted(chain(*seen(run)[STEPS:])) == list(range(1, 9))


@pytest.mark.slow
def test_from_one_process_to_two_to_one_within_an_epoch(data: Path, tmp_path: Path) -> None:
    """Each image once in the epoch, in the order of one process; the weights are those of one process nearly."""
    record = "+callbacks.seen={_target_: toy_callbacks.Seen, file: seen}"
    one, two = ["data.batch_size=2"], ["data.batch_size=1", "trainer.devices=2", "trainer.strategy=ddp"]
    for number, (processes, steps) in enumerate([(one, 2), (two, 4), (one, 6), (two, 9)]):
        done = train_alone(
            data, tmp_path, *OWN, *processes, record, "run_dir=run", "resume=auto", f"trainer.max_steps={steps}"
        )
        assert done.returncode == 0, (number, done.stderr)
    first, second = seen(tmp_path, 0), seen(tmp_path, 1)
    whole = tmp_path / "whole"
    fit(data, whole, "trainer.max_steps=9")
    together = [a + b for a, b in zip(first[2:4] + first[6:], second, strict=True)]
    assert [*first[:2], *together[:2], *first[4:6], *together[2:]] == seen(whole)
    a, b = last(whole)["state_dict"], last(tmp_path / "run")["state_dict"]
    change = max(float((a[name].float() - b[name].float()).abs().max()) for name in a)
    assert change < 1
    print("largest difference of a weight after 9 steps:", change)
