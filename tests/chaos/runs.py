"""Training runs that are forked from this process, which has everything imported, and what is left of them."""

from __future__ import annotations

import csv
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codetr import application
from codetr.training import fit
from toy import overrides

STATE = ("state_dict", "ema", "optimizer_states", "lr_schedulers", "random_states", "callbacks", "loops")
Event = Callable[[str, int], float | None]


@dataclass
class Ended:
    """statuses: of every process, -9 for one that was killed. phase, step: the last ones that process 0 told."""

    statuses: list[int]
    phase: str
    step: int


@dataclass
class Kind:
    """A way to train the toy detector; the uninterrupted run of it is what others are compared with."""

    name: str
    data: Path
    processes: int = 1
    options: Sequence[str] = field(default_factory=tuple)

    def arguments(self, directory: Path, *more: str) -> list[str]:
        several = ("trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={self.processes}")
        ours = several if self.processes > 1 else ()
        place = (f"run_dir={directory}", "resume=auto", "logger=default")
        return [*overrides(self.data), *ours, *self.options, *place, *more]

    def train(
        self,
        directory: Path,
        *more: str,
        strike: Event | None = None,
        sign: signal.Signals = signal.SIGKILL,
        victim: int = 0,
    ) -> Ended:
        """Train in `directory`, or go on there.

        strike: (phase, step) that process 0 came to -> seconds until `sign` is sent to process `victim`, None for
        going on. After a SIGKILL the other processes are killed as well.
        """
        read, write = os.pipe()
        tell = f"+callbacks.tell={{_target_: chaos.callbacks.Tell, pipe: {write}}}"
        config = application.compose("train", self.arguments(directory, tell, *more))
        port = free_port()
        log = directory.with_suffix(".log")
        pids = [_fork(config, rank, self.processes, port, log) for rank in range(self.processes)]
        os.close(write)
        phase, step, struck = "start", 0, False
        for line in os.fdopen(read):
            phase, at = line.split()
            step = int(at)
            delay = strike(phase, step) if strike and not struck else None
            if delay is not None:
                struck = True
                time.sleep(delay)
                os.kill(pids[victim], sign)
                if sign == signal.SIGKILL:
                    time.sleep(0.1)
                    for pid in pids:
                        os.kill(pid, sign)  # not yet waited for, so the number is still theirs
        return Ended([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], phase, step)


def _fork(config: DictConfig, rank: int, processes: int, port: int, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if processes > 1:
            names = {"LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        fit(config)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def last_step(directory: Path) -> int:
    """Where `resume=auto` goes on."""
    path = directory / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["global_step"] if path.is_file() else 0


def differences(a: Path, b: Path) -> list[str]:
    """What is not equal to the bit in two runs: their last and best checkpoints, CSV and TensorBoard rows."""
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        first, second = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (a, b))
        found += [f"{name}:{key}" for key in STATE if not same(first[key], second[key])]
    if csv_rows(a) != csv_rows(b):
        found.append("csv")
    if tensorboard_rows(a) != tensorboard_rows(b):
        found.append("tensorboard")
    return found


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def csv_rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tensorboard_rows(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard shows them."""
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(row.step, row.value) for row in events.Scalars(name)] for name in events.Tags()["scalars"]}


def finite(directory: Path) -> bool:
    """Whether every number of every checkpoint is finite."""
    files = (directory / "checkpoints").glob("*.ckpt")
    return all(_finite(torch.load(file, weights_only=True)) for file in files)


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(value.isfinite().all())
