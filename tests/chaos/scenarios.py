"""What happens to a run, and what has to be left of it."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from chaos.runs import Kind, differences, finite, last_step
from toy import environment

EPOCHS, STEPS_PER_EPOCH, EVERY = 2, 5, 2
STEPS = EPOCHS * STEPS_PER_EPOCH
OPTIONS = (f"trainer.max_epochs={EPOCHS}", f"callbacks.checkpoints.every_n_steps={EVERY}", "model.dropout=0.1")
PHASES = ("training", "validation", "writing")
DELAY = {"training": 0.2, "validation": 0.1, "writing": 0.03}  # seconds within which the kill follows


@dataclass
class Kill:
    """phase, step: where process 0 was. part: half a checkpoint lay there. lost: steps done that are done again."""

    kind: str
    phase: str
    step: int
    part: bool
    lost: int
    differs: list[str]

    @property
    def harmless(self) -> bool:
        return not self.differs and self.lost <= EVERY


@dataclass
class Scenario:
    """expected, happened: in words; differs: what is not equal to the bit when the run has gone on to its end."""

    name: str
    expected: str
    happened: str
    passed: bool
    differs: list[str]


def kinds(data: Path) -> list[Kind]:
    """data: a toy set of 10 training images in batches of 2; accumulation halves the steps, so epochs are doubled."""
    twice = (*OPTIONS[1:], "trainer.accumulate_grad_batches=2", f"trainer.max_epochs={2 * EPOCHS}")
    two = ("data.batch_size=1",)
    return [
        Kind("one process", data, 1, OPTIONS),
        Kind("two processes", data, 2, (*OPTIONS, *two)),
        Kind("accumulation", data, 1, twice),
        Kind("two processes, accumulation", data, 2, (*twice, *two)),
    ]


def uninterrupted(kind: Kind, folder: Path) -> Path:
    directory = folder / kind.name.replace(", ", "_").replace(" ", "_")
    ended = kind.train(directory)
    if any(ended.statuses):
        raise RuntimeError(f"{kind.name}, uninterrupted: ended with {ended.statuses}, see {directory}.log")
    return directory


def kill(kind: Kind, whole: Path, directory: Path, phase: str, draw: random.Random) -> Kill:
    """SIGKILL in a random occurrence of `phase`, or soon after; resumed until the end, compared with `whole`."""
    step = draw.randrange(STEPS + 1)
    delay = draw.uniform(0, DELAY[phase])

    def strike(now: str, at: int) -> float | None:
        # The last of validations and of checkpoints comes after the last step.
        late = at >= step or (phase == "training" and at == STEPS - 1)
        return delay if now == phase and late else None

    ended = kind.train(directory, strike=strike, victim=draw.randrange(kind.processes))
    part = bool(list(directory.glob("checkpoints/.*.part.*")))
    lost = ended.step - last_step(directory)
    differs = resumed(kind, whole, directory)
    return Kill(kind.name, ended.phase, ended.step, part, lost, differs)


def resumed(kind: Kind, whole: Path, directory: Path) -> list[str]:
    again = kind.train(directory)
    if any(again.statuses):
        return [f"resuming ended with {again.statuses}, see {directory}.log"]
    found = differences(whole, directory)
    if not found:
        shutil.rmtree(directory)
    return found


def signalled(kind: Kind, whole: Path, directory: Path, sign: signal.Signals, status: int) -> Scenario:
    """A polite signal in the middle of an epoch: the step it came in is not lost, the status says what it was."""
    ended = kind.train(directory, strike=lambda phase, step: 0.02 if step == 3 else None, sign=sign)
    at = last_step(directory)
    differs = resumed(kind, whole, directory)
    return Scenario(
        f"{sign.name}, {kind.name}",
        f"status {status}, no step lost",
        f"statuses {ended.statuses}, {ended.step - at} steps lost",
        ended.statuses[0] == status and ended.step <= at and not differs,
        differs,
    )


def full_disk(kind: Kind, whole: Path, directory: Path) -> Scenario:
    """Files end after half a checkpoint: nothing half is left, the older checkpoint is."""
    half = (whole / "checkpoints" / "last.ckpt").stat().st_size // 2
    ended = kind.train(directory, f"+callbacks.full={{_target_: chaos.callbacks.FullDisk, step: 3, size: {half}}}")
    parts = [path.name for path in directory.glob("checkpoints/.*.part.*")]
    at = last_step(directory)
    differs = resumed(kind, whole, directory)
    return Scenario(
        f"disk full, {kind.name}",
        "status not 0, nothing half written",
        f"statuses {ended.statuses}, half files {parts}, resumed from step {at}",
        all(ended.statuses) and not parts and at > 0 and not differs,
        differs,
    )


def poisoned(kind: Kind, whole: Path, directory: Path, skip: int) -> Scenario:
    """A gradient of NaN, left out or stopped at: no checkpoint has one, and a stopped run goes on as if it had not."""
    poison = "+callbacks.poison={_target_: chaos.callbacks.Poison, step: 5}"
    ended = kind.train(directory, poison, f"callbacks.non_finite.skip={skip}")
    clean, at = finite(directory), last_step(directory)
    differs = [] if skip else resumed(kind, whole, directory)
    return Scenario(
        f"NaN gradient, {kind.name}, skip={skip}",
        f"status {'0' if skip else 'not 0'}, checkpoints finite",
        f"statuses {ended.statuses}, {'finite' if clean else 'NaN in a checkpoint'}, last one of step {at}",
        clean and at > 0 and any(ended.statuses) != bool(skip) and not differs,
        differs,
    )


def restarted(kind: Kind, whole: Path, directory: Path, restarts: int, *options: str) -> Scenario:
    """torchrun starts both workers anew whenever one of them was killed. options: of torchrun."""
    steps = [1 + i * (STEPS - 2) // max(restarts - 1, 1) for i in range(restarts)]
    fail = f"+callbacks.fail={{_target_: chaos.callbacks.KillEveryAttempt, steps: {steps}}}"
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    command = [*launcher, f"--nproc-per-node={kind.processes}", f"--max-restarts={restarts}", "-m", "codetr.train"]
    tests = str(Path(__file__).parents[1])
    with directory.with_suffix(".log").open("w") as log:
        done = subprocess.run(
            [*command, *kind.arguments(directory, fail)],
            env={**environment(), "PYTHONPATH": tests},
            stdout=log,
            stderr=log,
            timeout=180 * (restarts + 1),
        )
    differs = [f"see {directory}.log"] if done.returncode else differences(whole, directory)
    return Scenario(
        f"torchrun {' '.join(options)}: a worker killed {restarts} times".replace(" :", ":"),
        "status 0, equal to the bit",
        f"status {done.returncode}",
        not done.returncode and not differs,
        differs,
    )


def as_rows(kills: list[Kill]) -> list[dict[str, object]]:
    return [asdict(one) | {"harmless": one.harmless} for one in kills]
