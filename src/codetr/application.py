"""What the entry points share: composing the configuration, the run directory, errors a user can mend.

Everything is decided before Hydra starts, and written into the command line: processes that Lightning launches
run the same command, and so agree on the directory.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from codetr import failure
from codetr.errors import UserError
from codetr.names import shown_lines
from codetr.trust import CONFIG_MODULE, check_run, parts

if TYPE_CHECKING:
    from codetr.models.detector import Detector

LAST = Path("checkpoints") / "last.ckpt"
_GENERATIONS = "checkpoints/last*.ckpt"  # and those before it: any of them is enough to go on
SAVED_CONFIG = Path(".hydra") / "config.yaml"
_NOW = re.compile(r"\$\{now:[^}]*\}")
OWN = ("checkpoints", "tensorboard", "csv", ".hydra")  # what `overwrite=true` deletes of a run


def run(application: Callable[[DictConfig], Any], config_name: str) -> None:
    """Compose the configuration from the command line, call `application` with it.

    A UserError is printed as it is, without a stack trace; the exit status is 2. Of another exception a few lines are
    printed, and its trace goes into a file of the run (see `codetr.failure`); the exit status is 1.
    """

    def guarded(config: DictConfig) -> Any:
        if "run_dir" in config:
            with open_dict(config):
                config.run_dir = HydraConfig.get().runtime.output_dir
        try:
            return application(config)
        except UserError as error:
            _fail(error)
        except Exception as error:
            if refused := failure.refusal(error):
                _fail(refused)
            if os.environ.get(failure.FULL) == "1":
                raise
            directory = config.get("run_dir")
            failure.tell(error, f"codetr.{config_name}", Path(directory) if directory else None)
            raise SystemExit(1) from None

    try:
        sys.argv[1:] = settle(sys.argv[1:], config_name)
    except UserError as error:
        _fail(error)
    hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=config_name)(guarded)()


def _fail(error: UserError) -> None:
    print(f"error: {shown_lines(failure.message(error))}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def settle(argv: list[str], config_name: str) -> list[str]:
    """The command line with its run directory decided. Raises UserError for a configuration that is none."""
    args = get_args_parser().parse_args(argv)
    informs = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
    if args.experimental_rerun:
        raise UserError(
            "--experimental-rerun reads a pickle, which runs code: go on with the run, resume=ITS_DIRECTORY"
        )
    if informs or args.config_path or args.config_name:
        return argv
    try:
        overrides = OverridesParser.create().parse_overrides(args.overrides)
    except HydraException as error:
        raise UserError(f"{error}\nOverrides look like key=value; quote values with special characters.") from error
    resume = _value(overrides, "resume")
    if args.multirun:
        return _settle_sweep(argv, args, config_name, overrides)
    if resume not in (None, "auto"):
        return _with_saved_config(Path(resume), args.overrides, as_names(_value(overrides, "trust")))
    config = compose(config_name, args.overrides, args.config_dir)
    if "run_dir" not in config:
        return argv
    overwrite = bool(_value(overrides, "overwrite"))
    if config.overwrite and not overwrite:
        raise UserError(
            "overwrite=true stands in a configuration file, but it deletes a run: take it out there, and give it on "
            "the command line when it is meant"
        )
    if _value(overrides, "run_dir") is not None:
        if _first_process():
            _claim(Path(config.run_dir), bool(resume), overwrite)
        return argv
    _refuse_disagreement()
    directory = (newest_run(config) if resume else None) or _fresh_directory(config, bool(resume), overwrite)
    return _with_override(argv, args, f"run_dir={_quoted(directory)}")


def _first_process() -> bool:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def _settle_sweep(argv: list[str], args: Namespace, config_name: str, overrides: list[Override]) -> list[str]:
    plain = [o.input_line for o in overrides if not o.is_sweep_override() and o.input_line]
    config = compose(config_name, plain, args.config_dir)
    if config.get("resume"):
        raise UserError("a sweep (-m) cannot be resumed as a whole: resume one of its runs, resume=<its directory>")
    trainer = config.get("trainer", {})
    if trainer.get("devices", 1) not in (1, "1") or trainer.get("num_nodes", 1) != 1:
        raise UserError(
            f"a sweep (-m) runs on one device, and trainer.devices is {trainer.devices}: each process would start "
            "the sweep anew. Run the jobs one by one, or set trainer.devices=1"
        )
    if _value(overrides, "hydra.sweep.dir") is not None:
        return argv
    directory = _made(Path(compose(config_name, plain, args.config_dir, hydra_too=True).hydra.sweep.dir))
    return _with_override(argv, args, f"hydra.sweep.dir={_quoted(directory)}")


def _with_override(argv: list[str], args: Namespace, override: str) -> list[str]:
    end = argv.index(args.overrides[-1]) + 1 if args.overrides else len(argv)  # argparse wants overrides in a row
    return [*argv[:end], override, *argv[end:]]


def _with_saved_config(directory: Path, overrides: list[str], trust: tuple[str, ...]) -> list[str]:
    """Go on with the run in `directory`, by its own configuration and what is given on top."""
    for needed in (str(SAVED_CONFIG), _GENERATIONS):
        if not any(directory.glob(needed)):
            raise UserError(f"resume={directory}: there is no {needed} in it; give the directory of a run")
    check_run(directory / SAVED_CONFIG, trust)
    folder = (directory / SAVED_CONFIG).resolve().parent
    value = _quoted(directory)
    return [
        f"--config-path={folder}",
        "--config-name=config",
        *overrides,
        f"run_dir={value}",
        f"hydra.run.dir={value}",
    ]


def compose(
    config_name: str, overrides: list[str], config_dir: str | None = None, hydra_too: bool = False
) -> DictConfig:
    """The configuration of an entry point, and Hydra's own. Raises UserError, with names that were perhaps meant."""
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        with _configurations():
            return hydra.compose(config_name, [*overrides, *search], return_hydra_config=hydra_too)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{error}{_suggestion(str(error), config_name)}") from error


def _configurations() -> AbstractContextManager[None]:
    """In which Hydra knows conf/; an entry point that runs is in one already."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return hydra.initialize_config_module(CONFIG_MODULE, version_base="1.3")


def _suggestion(message: str, config_name: str) -> str:
    """Names like the one that Hydra does not know: among the options it lists, or among the keys of the default."""
    option = re.search(r"Could not find '(.+?)'", message)
    if option:
        wanted = option[1].rpartition("/")[2]
        known = [line.strip() for line in message.partition("Available options")[2].splitlines()[1:]]
    else:
        key = re.search(r"Could not override '([^']+)'", message)
        if not key:
            return ""
        wanted = key[1]
        with _configurations():
            known = list(_keys(hydra.compose(config_name)))
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
    return f"\nDid you mean {' or '.join(near)}?" if near else ""


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    names = []
    for key in map(str, config):
        names.append(f"{prefix}{key}")
        child = config._get_node(key)
        if isinstance(child, DictConfig) and not child._is_interpolation() and not child._is_none():
            names += _keys(child, f"{prefix}{key}.")
    return names


def newest_run(config: DictConfig) -> Path | None:
    """The run that wrote a checkpoint last, of those whose directory is `run_dir` at some time."""
    times = config.copy()
    times.run_dir = _NOW.sub("<time>", _unresolved(config))
    pattern = glob.escape(times.run_dir).replace("<time>", "*")
    checkpoints = [Path(path) for path in glob.glob(f"{pattern}/{_GENERATIONS}")]
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parents[1] if checkpoints else None


def _unresolved(config: DictConfig) -> str:
    return str(OmegaConf.to_container(config, resolve=False)["run_dir"])  # type: ignore[call-overload,index]


def _fresh_directory(config: DictConfig, resume: bool, overwrite: bool) -> Path:
    directory = Path(config.run_dir)
    if not _first_process():
        return directory
    if _NOW.search(_unresolved(config)):
        return _made(directory)
    _claim(directory, resume, overwrite)
    return directory


def _made(directory: Path) -> Path:
    """`directory`, which nobody else has made: of runs that start in one second, the later ones get a number."""
    made = directory
    for number in itertools.count(2):
        try:
            made.mkdir(parents=True)
            break
        except FileExistsError:
            made = Path(f"{directory}_{number}")
    return made


def _claim(directory: Path, resume: bool, overwrite: bool) -> None:
    """Make the run's folder `.hydra`, which of two processes only one can. Raises UserError to the other."""
    if resume:
        return
    if overwrite:
        for name in OWN:
            shutil.rmtree(directory / name, ignore_errors=True)
    try:
        if any(directory.glob(_GENERATIONS)):
            raise FileExistsError
        (directory / SAVED_CONFIG).parent.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"run_dir={directory}: there is a run in it already. Go on with it (resume=auto), delete it "
            "(overwrite=true) or choose another run_dir"
        ) from None


def _refuse_disagreement() -> None:
    """Processes that something else than Lightning starts would each make a directory of their own."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "with processes started from outside (torchrun, Slurm) name the directory: run_dir=outputs/mine; "
            "every process reads its own clock"
        )


def _value(overrides: list[Override], key: str) -> Any:
    values = [o.value() for o in overrides if o.key_or_group == key]
    return values[-1] if values else None


def _quoted(path: Path) -> str:
    """As a value in Hydra's grammar."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def resume_from(config: DictConfig) -> Path | None:
    """The checkpoint to go on with, or its name where only generations before it are left; None: there is none."""
    directory = Path(config.run_dir)
    return directory / LAST if config.resume and any(directory.glob(_GENERATIONS)) else None


def keep_configuration(config: DictConfig, saved: dict[str, Any]) -> None:
    """Hydra has written `config` into the run's directory before anybody could refuse it: write `saved` again."""
    path = Path(config.run_dir) / SAVED_CONFIG
    if _first_process() and path.exists():
        OmegaConf.save(OmegaConf.create(saved), path)


def plain(config: DictConfig) -> dict[str, Any]:
    """Resolved, in containers that any reader of a checkpoint knows."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=False)  # type: ignore[return-value]


def load(path: str | Path, average: bool = True, trust: Sequence[str] = ()) -> Detector:
    """The detector of a checkpoint of `codetr.train`, in evaluation mode, on the CPU, from the file alone.

    average: with its averaged weights (EMA), if it has them.
    trust: what else than parts of codetr the file may call, by name: classes, or packages with all that they define.
    Raises UserError for other files.
    """
    from codetr.checkpoint import load_weights
    from codetr.models.detector import Detector

    checkpoint = load_weights(path, average)
    if checkpoint.config is None:
        raise UserError(f"{path}: does not say which detector it belongs to; give a checkpoint of codetr.train")
    detector = build(parts(checkpoint.config, path, trust)["model"].get("detector"), path)
    if not isinstance(detector, Detector):
        raise UserError(f"{path}: its model.detector is a {type(detector).__name__}; give a checkpoint of codetr.train")
    try:
        detector.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its weights do not fit its configuration; take another copy ({reason})") from error
    return detector.eval()


def build(part: Any, source: str | Path) -> Any:
    """What a part of a configuration says, of `codetr.trust.parts`. Raises UserError for one that says nothing that can
    be built."""
    from hydra.utils import instantiate

    try:
        made = instantiate(part, _convert_="all")
    except Exception as error:  # whatever the constructors raise at what is in the file
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise UserError(f"{source}: {cause}") from error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise UserError(f"{source}: its configuration cannot be built ({reason})") from error
    if made is None or isinstance(made, (dict, list)):
        raise UserError(f"{source}: its configuration names nothing to build; give a checkpoint of codetr.train")
    return made


def as_names(value: Any) -> tuple[str, ...]:
    """Of the key `trust`: a list of names, or one name. Raises UserError for other values."""
    names = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"trust={value}: give names of classes or packages, trust=[my_package]")
    return tuple(names)
