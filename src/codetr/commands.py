"""Commands that have commands of their own, `codetr data check`: a module for each, which this finds and runs."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

from codetr.errors import UserError
from codetr.names import shown_lines

HELP = ("-h", "--help", "help")


def run(package: ModuleType, name: str, arguments: list[str]) -> int:
    """Run one command; returns its exit status. Raises UserError for a command that is none.

    package: whose modules are the commands, each with a docstring that is its help and a function `main(overrides)`.
    name: of the module that is called.
    """
    words = [module.name for module in pkgutil.iter_modules(package.__path__)]
    if not arguments or arguments[0] in HELP:
        print(_overview(package, name, words))
        return 0 if arguments else 2
    word, *overrides = arguments
    if word not in words:
        near = difflib.get_close_matches(word, words, n=1)
        meant = f"did you mean {near[0]}?" if near else f"give one of {', '.join(words)}"
        raise UserError(f"python -m {name} has no command {word}: {meant}")
    command = _command(package, word)
    if any(override in HELP for override in overrides):
        print((command.__doc__ or "").strip())
        return 0
    status: int = command.main(overrides)
    return status


def main(package: ModuleType, name: str) -> None:
    """What `python -m NAME` does: `run` with its arguments."""
    leave(lambda: run(package, name, sys.argv[1:]))


def leave(command: Callable[[], int]) -> NoReturn:
    """End the process with the status that `command` returns; an error that a user can mend is printed as it is."""
    try:
        status = command()
    except UserError as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr, flush=True)
        status = 2
    raise SystemExit(status)


def _command(package: ModuleType, word: str) -> ModuleType:
    return importlib.import_module(f"{package.__name__}.{word}")


def _overview(package: ModuleType, name: str, words: list[str]) -> str:
    lines = [f"  {word:8} {(_command(package, word).__doc__ or '').strip().splitlines()[0]}" for word in words]
    usage = f"python -m {name} COMMAND key=value ..."
    return "\n".join([usage, "", *lines, "", f"python -m {name} COMMAND --help tells more."])
