"""What the entry points share: composing the configuration, deciding the run's directory, errors a user can mend.

Everything is decided before Hydra starts, and written into the command line: processes that Lightning launches
run the same command, and so agree on the directory.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
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
from codetr.files import atomically
from codetr.names import shown_lines
from codetr.run_directory import (
    GENERATIONS,
    SAVED_CONFIG,
    claim,
    first_process,
    fresh_directory,
    make_unique,
    newest_run,
)
from codetr.trust import CONFIG_MODULE, check_run

if TYPE_CHECKING:
    from codetr.views import Views

_NAME_IT = "name the directory, run_dir=outputs/mine: every process runs your program, and reads its own clock"


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
        sys.argv[1:] = with_run_directory(sys.argv[1:], config_name)
    except UserError as error:
        _fail(error)
    hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=config_name)(guarded)()


def _fail(error: UserError) -> None:
    print(f"error: {shown_lines(failure.message(error))}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None


def start(overrides: Sequence[str], config_name: str, config_dir: str | None = None) -> DictConfig:
    """What `run` does for a command line, for a caller in Python: the configuration of a run, in its directory too.

    config_dir: a folder with configurations of your own. Raises UserError as `with_run_directory`, for flags, and for
    several devices without a named directory.
    """
    if flags := [override for override in overrides if override.startswith("-")]:
        raise UserError(f"{flags[0]} is a flag of the command line; from Python give overrides, key=value")
    if not any(override.startswith(("run_dir=", "resume=")) for override in overrides):
        devices = compose(config_name, list(overrides), config_dir).trainer.devices
        if devices not in (1, "1"):
            raise UserError(f"trainer.devices={devices}: {_NAME_IT}")
    own = [] if config_dir is None else [f"--config-dir={config_dir}"]
    args = get_args_parser().parse_args(with_run_directory([*overrides, *own], config_name))
    config = compose(args.config_name or config_name, args.overrides, args.config_dir, args.config_path)
    directory = Path(config.run_dir).absolute()
    if first_process():
        with atomically(directory / SAVED_CONFIG) as part:
            OmegaConf.save(config, part)
        with atomically(directory / SAVED_CONFIG.with_name("overrides.yaml")) as part:
            OmegaConf.save(OmegaConf.create(args.overrides), part)
    config.run_dir = str(directory)
    return config


def with_run_directory(argv: list[str], config_name: str) -> list[str]:
    """The command line `argv` with its run directory decided, and made by the first process.

    Raises UserError for a configuration that is none, and for a directory in which another run lies.
    """
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
        return _with_sweep_directory(argv, args, config_name, overrides)
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
        if first_process():
            claim(Path(config.run_dir), bool(resume), overwrite)
        return argv
    _refuse_disagreement()
    directory = (newest_run(config) if resume else None) or fresh_directory(config, bool(resume), overwrite)
    return _with_override(argv, args, f"run_dir={_quoted(directory)}")


def _with_sweep_directory(argv: list[str], args: Namespace, config_name: str, overrides: list[Override]) -> list[str]:
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
    hydra_own = compose(config_name, plain, args.config_dir, hydra_too=True).hydra
    decided = []
    if hydra_own.sweeper.get("direction") is not None and _value(overrides, "hydra.sweeper.direction") is None:
        decided.append("hydra.sweeper.direction=maximize")  # of Optuna, which minimises; see `optimized_metric`
    if _value(overrides, "hydra.sweep.dir") is None:
        decided.append(f"hydra.sweep.dir={_quoted(make_unique(Path(hydra_own.sweep.dir)))}")
    return _with_override(argv, args, *decided)


def _with_override(argv: list[str], args: Namespace, *decided: str) -> list[str]:
    end = argv.index(args.overrides[-1]) + 1 if args.overrides else len(argv)  # argparse wants overrides in a row
    return [*argv[:end], *decided, *argv[end:]]


def _with_saved_config(directory: Path, overrides: list[str], trust: tuple[str, ...]) -> list[str]:
    """Go on with the run in `directory`, by its own configuration and what is given on top."""
    for needed in (str(SAVED_CONFIG), GENERATIONS):
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
    config_name: str,
    overrides: list[str],
    config_dir: str | None = None,
    config_path: str | None = None,
    hydra_too: bool = False,
) -> DictConfig:
    """The configuration of an entry point. Raises UserError, with names that were perhaps meant.

    config_dir: a folder whose files join those of conf/; config_path: a folder in their place. hydra_too: with Hydra's
    own part.
    """
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        with _configurations(config_path):
            return hydra.compose(config_name, [*overrides, *search], return_hydra_config=hydra_too)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{error}{_suggestion(str(error), config_name)}") from error


def _configurations(folder: str | None = None) -> AbstractContextManager[None]:
    """In which Hydra knows conf/, or a folder in its place; an entry point that runs is in one already."""
    if folder is not None:
        return hydra.initialize_config_dir(folder, version_base="1.3")
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


def _refuse_disagreement() -> None:
    """Processes that something else than Lightning starts would each make a directory of their own."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"with processes started from outside (torchrun, Slurm) {_NAME_IT}")


def _value(overrides: list[Override], key: str) -> Any:
    values = [o.value() for o in overrides if o.key_or_group == key]
    return values[-1] if values else None


def _quoted(path: Path) -> str:
    """As a value in Hydra's grammar."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def plain(config: DictConfig) -> dict[str, Any]:
    """Resolved, in containers that any reader of a checkpoint knows."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=False)  # type: ignore[return-value]


def views(config: DictConfig, otherwise: Sequence[Views]) -> tuple[Views, ...]:
    """Those of the group `views`; `otherwise`, those of a checkpoint, where it is null. Raises UserError for others."""
    return tuple(otherwise) if config.get("views") is None else tuple(named_views(config).values())


def named_views(config: DictConfig) -> dict[str, Views]:
    """Those of the group `views`, each by its name. Raises UserError for others."""
    from hydra.utils import instantiate

    from codetr.views import made

    return made(config.views, partial(instantiate, _convert_="all"))


def require(config: DictConfig, **examples: str) -> None:
    """Raises UserError for a key without a value, and shows an example of one."""
    for key, example in examples.items():
        if OmegaConf.is_missing(config, key) or config[key] is None:
            raise UserError(f"{key} is not given: add {key}={example} (--help lists what there is to give)")


def one_of(config: DictConfig, **choices: Sequence[str]) -> None:
    """Raises UserError for a key whose value is none of its choices."""
    for key, values in choices.items():
        if config[key] not in values:
            raise UserError(f"{key}={config[key]}: must be one of {', '.join(values)}")


def as_names(value: Any) -> tuple[str, ...]:
    """Of the key `trust`: a list of names, or one name. Raises UserError for other values."""
    names = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"trust={value}: give names of classes or packages, trust=[my_package]")
    return tuple(names)
