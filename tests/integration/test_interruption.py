"""What is lost when a run is stopped, killed, fails to write or meets numbers that are not finite."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from test_resume import assert_same, rows

from codetr.callbacks.resume import named_tensors, names_not_finite
from toy import make_coco, train

STATES = ("state_dict", "ema", "optimizer_states", "lr_schedulers", "random_states", "callbacks")
# Of the 6 batches of an epoch two make a step; a validation follows the steps 1, 2, 3, ...: each one that is due.
OPTIONS = (
    "trainer.max_epochs=2",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=2",
    "callbacks.checkpoints.every_n_steps=1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With its data, and an uninterrupted run in `whole`."""
    folder = tmp_path_factory.mktemp("interruption")
    make_coco(folder / "data", train=12, val=3)
    done = train(folder / "data", folder, *OPTIONS, "run_dir=whole")
    assert done.returncode == 0, done.stderr
    return folder


def last(directory: Path) -> dict:
    return torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)


def learned(checkpoint: dict) -> dict:
    """Without statistics of batch norms, which the forward pass gathers."""
    return {k: v for k, v in checkpoint["state_dict"].items() if "running_" not in k and "num_batches" not in k}


def assert_resumes(folder: Path, name: str) -> None:
    """To what the uninterrupted run has become, to the bit."""
    done = train(folder / "data", folder, *OPTIONS, f"run_dir={name}", "resume=auto")
    assert done.returncode == 0, done.stderr
    whole, parts = last(folder / "whole"), last(folder / name)
    for key in STATES:
        assert_same(whole[key], parts[key], key)
    assert rows(folder / "whole") == rows(folder / name)


@pytest.mark.slow
def test_killed_where_every_checkpoint_is_followed_by_a_validation(folder: Path) -> None:
    kill = "+callbacks.kill={_target_: toy_callbacks.Kill, step: 2}"
    killed = train(folder / "data", folder, *OPTIONS, "run_dir=killed", kill)
    assert killed.returncode == -9, killed.stderr
    assert last(folder / "killed")["global_step"] == 2
    assert_resumes(folder, "killed")


@pytest.mark.parametrize(
    ("number", "step", "slurm"),
    [
        (signal.SIGTERM, 1, False),
        pytest.param(signal.SIGINT, 3, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 0, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_with_its_checkpoint(folder: Path, number: int, step: int, slurm: bool) -> None:
    name, log = f"signal_{int(number)}", folder / "requeued"
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {log}\n')
    scontrol.chmod(0o755)
    variables = {"PATH": f"{scontrol.parent}:/usr/bin:/bin"} | ({"SLURM_JOB_ID": "17"} if slurm else {})
    send = f"+callbacks.send={{_target_: toy_callbacks.Send, number: {int(number)}, step: {step}}}"
    done = train(folder / "data", folder, *OPTIONS, f"run_dir={name}", send, **variables)
    assert done.returncode == 128 + number, done.stderr
    assert f"{signal.Signals(number).name}: stopped after step {step + 1}, " in done.stderr
    assert last(folder / name)["global_step"] == step + 1
    assert log.exists() == slurm
    assert not slurm or log.read_text() == "requeue 17\n"
    assert_resumes(folder, name)


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(folder: Path) -> None:
    send = "+callbacks.send={_target_: toy_callbacks.Send, number: 2, step: 0, times: 2}"
    done = train(folder / "data", folder, *OPTIONS, "run_dir=twice", send)
    assert done.returncode == -signal.SIGINT
    assert not (folder / "twice" / "checkpoints").exists()


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(folder: Path) -> None:
    two = ("trainer.devices=2", "trainer.strategy=ddp", "run_dir=two", "callbacks.checkpoints.every_n_steps=0")
    send = "+callbacks.send={_target_: toy_callbacks.Send, number: 15, step: 0, rank: 1}"
    done = train(folder / "data", folder, "trainer.max_epochs=1", *two, send)
    assert done.returncode == 143, done.stderr
    assert last(folder / "two")["global_step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["gradient", "weight"])
def test_a_step_that_is_not_finite_in_one_of_two_processes_is_left_out_in_both(folder: Path, what: str) -> None:
    two = ("trainer.devices=2", "trainer.strategy=ddp", f"run_dir=spoilt_{what}")
    spoil = f"+callbacks.spoil={{_target_: toy_callbacks.Spoil, steps: [1], what: {what}, rank: 1}}"
    done = train(folder / "data", folder, "trainer.max_epochs=1", *two, spoil)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("step 1: the loss or its gradient is not finite") == 1
    assert not names_not_finite(named_tensors(last(folder / f"spoilt_{what}")))


def test_one_step_too_many_that_is_not_finite_stops_the_run(folder: Path) -> None:
    """The checkpoint that stays is that of the step before, and the message names losses and files."""
    spoil = "+callbacks.spoil={_target_: toy_callbacks.Spoil, steps: [2, 3], what: weight}"
    options = ("trainer.max_epochs=1", "callbacks.checkpoints.every_n_steps=1", "callbacks.non_finite.skip=1")
    done = train(folder / "data", folder, *options, "run_dir=spoilt", spoil)
    assert done.returncode == 2
    assert "step 2: the loss" in done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "step 3: the loss" in line
    assert "main/0/class nan" in line
    assert "data/train/" in line
    assert "callbacks.non_finite.skip=1" in line
    kept = last(folder / "spoilt")
    assert kept["global_step"] == 3  # steps 0 and 1, and 2, which changed nothing
    before = torch.load(folder / "spoilt" / "checkpoints" / "last.1.ckpt", weights_only=True)
    assert_same(learned(before), learned(kept), "state_dict")
    assert_same(before["optimizer_states"][0]["state"], kept["optimizer_states"][0]["state"], "optimizer")
