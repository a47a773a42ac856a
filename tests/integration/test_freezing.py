"""Frozen parts: behind two steps their tensors are what they were, bit for bit, and others have moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from codetr import application
from codetr.errors import UserError
from codetr.training import fit
from toy import make_coco, overrides, train
from toy_model import detector

# What is frozen, and the beginnings of the names that are.
CASES = {
    "backbone": ("backbone.",),
    "[backbone.stage0,encoder.layers.0]": ("backbone.body.conv1.", "backbone.body.bn1.", "encoder.layers.0."),
    "[backbone.stage2,decoder.class_heads,heads]": ("backbone.body.layer2.", "decoder.class_heads.", "heads."),
}
BACKBONE = ("norm=batch", "frozen_stages=0")
OPTIONS = [*(f"model.detector.backbone.{o}" for o in BACKBONE), "schedule.warmup_steps=0", "optimizer.lr=1e-2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("freezing") / "data"
    make_coco(folder, train=4, val=2)
    return folder


def given(data: Path, *more: str) -> list[str]:
    return [*overrides(data), *OPTIONS, "trainer.max_steps=2", *more]


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = tmp_path_factory.mktemp("start") / "start.pt"
    keep = f"+callbacks.keep={{_target_: toy_callbacks.KeepStart, path: {path}}}"
    fit(application.compose("train", given(data, keep, "trainer.fast_dev_run=true", f"run_dir={path.parent}")))
    return torch.load(path, weights_only=True)


def check(start: dict[str, Tensor], run: Path, frozen: tuple[str, ...]) -> None:
    """Live and averaged; of the rest, what every step changes has moved."""
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 2
    held = {name for name in start if name.removeprefix("detector.").startswith(frozen)}
    moved = {name for name, value in content["state_dict"].items() if not torch.equal(value, start[name])}
    assert not moved & held
    for name in held:
        average = content["ema"]["weights"].get(name.removeprefix("detector."), start[name])
        assert torch.equal(average, start[name]), name
    decayed = {name for name in start if name.endswith("weight") and start[name].ndim > 1}
    assert decayed - held <= moved
    assert {name for name in start if name.endswith("running_var")} - held <= moved


@pytest.mark.parametrize("freeze", CASES)
def test_exactly_what_is_frozen_stays(data: Path, start: dict[str, Tensor], tmp_path: Path, freeze: str) -> None:
    """Also in a run that is resumed between the steps."""
    run = given(data, f"freeze={freeze}", f"run_dir={tmp_path}/run")
    fit(application.compose("train", [*run, "trainer.max_steps=1"]))
    fit(application.compose("train", [*run, "resume=auto"]))
    check(start, tmp_path / "run", CASES[freeze])
    with pytest.raises(UserError, match=r"freeze .*state of what was trained"):
        fit(application.compose("train", [*run, "resume=auto", "freeze=[neck]", "trainer.max_steps=3"]))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes(data: Path, start: dict[str, Tensor], tmp_path: Path, trainer: str) -> None:
    (freeze, frozen) = list(CASES.items())[1]
    mode = [f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.precision=32-true", "data.batch_size=1"]
    done = train(data, tmp_path, *OPTIONS, "trainer.max_steps=2", *mode, f"freeze={freeze}", "run_dir=run")
    assert done.returncode == 0, done.stderr
    check(start, tmp_path / "run", frozen)


def test_modes_stay_and_gradients_are_left_out() -> None:
    model = detector(("a", "b"), *OPTIONS[:2])
    model.freeze(["backbone.stage1", "neck"])
    frozen = [model.backbone.body.layer1, model.neck]
    for mode in (model.train, model.eval, model.train):
        mode()
        assert not any(part.training for whole in frozen for part in whole.modules())
    assert model.encoder.training
    assert model.backbone.body.bn1.training
    held = {id(p) for part in frozen for p in part.parameters()}
    assert {id(p) for p in model.parameters() if not p.requires_grad} == held


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("backbones", "backbone, neck, encoder,"),
        ("encoder.layer", "encoder.layers"),
        ("backbone.stage9", "backbone.body, backbone.normalize, backbone.stage0, backbone.stage1,"),
        ("neck.convs.0.weight", ""),
        ("", "backbone, neck"),
    ],
)
def test_unknown_names(name: str, there: str) -> None:
    with pytest.raises(UserError, match=f"no part '{name}'; there is .*{there}"):
        detector(("a", "b")).freeze([name])


def test_something_is_left_to_train() -> None:
    model = detector(("a", "b"))
    with pytest.raises(UserError, match="nothing is left to train"):
        model.freeze([name for name, _ in model.named_children()])
