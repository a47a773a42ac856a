"""The directory of a run: whose it is, what lies in it, and which one a run goes on with."""

from __future__ import annotations

import glob
import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from codetr.errors import UserError
from codetr.files import atomically

LAST = Path("checkpoints") / "last.ckpt"
GENERATIONS = "checkpoints/last*.ckpt"  # and those before it: any of them is enough to go on
SAVED_CONFIG = Path(".hydra") / "config.yaml"
OWN = ("checkpoints", "snapshots", "tensorboard", "csv", ".hydra")  # what `overwrite=true` deletes of a run
_NOW = re.compile(r"\$\{now:[^}]*\}")


def first_process() -> bool:
    """Whether this process is the first, or the only one, of its run."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def newest_run(config: DictConfig) -> Path | None:
    """The run that wrote a checkpoint last, of those whose directory is `run_dir` at some time."""
    times = config.copy()
    times.run_dir = _NOW.sub("<time>", _unresolved(config))
    pattern = glob.escape(times.run_dir).replace("<time>", "*")
    checkpoints = [Path(path) for path in glob.glob(f"{pattern}/{GENERATIONS}")]
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parents[1] if checkpoints else None


def _unresolved(config: DictConfig) -> str:
    return str(OmegaConf.to_container(config, resolve=False)["run_dir"])  # type: ignore[call-overload,index]


def fresh_directory(config: DictConfig, resume: bool, overwrite: bool) -> Path:
    """The directory that `run_dir` names now; the first process makes it. Raises UserError where a run lies in it."""
    directory = Path(config.run_dir)
    if not first_process():
        return directory
    if _NOW.search(_unresolved(config)):
        return make_unique(directory)
    claim(directory, resume, overwrite)
    return directory


def make_unique(directory: Path) -> Path:
    """`directory`, which nobody else has made: of runs that start in one second, the later ones get a number."""
    numbered = directory
    for number in itertools.count(2):
        try:
            numbered.mkdir(parents=True)
            break
        except FileExistsError:
            numbered = Path(f"{directory}_{number}")
    return numbered


def claim(directory: Path, resume: bool, overwrite: bool) -> None:
    """Make the run's folder `.hydra`, which of two processes only one can. Raises UserError to the other."""
    if resume:
        return
    if overwrite:
        for name in OWN:
            shutil.rmtree(directory / name, ignore_errors=True)
    try:
        if any(directory.glob(GENERATIONS)):
            raise FileExistsError
        (directory / SAVED_CONFIG).parent.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"run_dir={directory}: there is a run in it already. Go on with it (resume=auto), delete it "
            "(overwrite=true) or choose another run_dir"
        ) from None


def resume_from(config: DictConfig) -> Path | None:
    """The checkpoint to go on with, or its name where only generations before it are left; None: there is none."""
    directory = Path(config.run_dir)
    return directory / LAST if config.resume and any(directory.glob(GENERATIONS)) else None


def keep_configuration(config: DictConfig, saved: dict[str, Any]) -> None:
    """Hydra has written `config` into the run's directory before anybody could refuse it: write `saved` again."""
    path = Path(config.run_dir) / SAVED_CONFIG
    if first_process() and path.exists():
        with atomically(path) as part:
            OmegaConf.save(OmegaConf.create(saved), part)
