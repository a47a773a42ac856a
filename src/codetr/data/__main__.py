"""python -m codetr.data COMMAND key=value ..."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from types import ModuleType

from codetr.data import commands
from codetr.errors import UserError
from codetr.names import shown_lines

_HELP = ("-h", "--help", "help")


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit status. Raises UserError for a command that is none."""
    names = [m.name for m in pkgutil.iter_modules(commands.__path__)]
    if not arguments or arguments[0] in _HELP:
        print(_overview(names))
        return 0 if arguments else 2
    word, *overrides = arguments
    if word not in names:
        near = difflib.get_close_matches(word, names, n=1)
        meant = f"did you mean {near[0]}?" if near else f"give one of {', '.join(names)}"
        raise UserError(f"python -m codetr.data has no command {word}: {meant}")
    command = _command(word)
    if any(o in _HELP for o in overrides):
        print((command.__doc__ or "").strip())
        return 0
    status: int = command.main(overrides)
    return status


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"{commands.__name__}.{name}")


def _overview(names: list[str]) -> str:
    lines = [f"  {n:8} {(_command(n).__doc__ or '').strip().splitlines()[0]}" for n in names]
    usage = "python -m codetr.data COMMAND key=value ..."
    return "\n".join([usage, "", *lines, "", "python -m codetr.data COMMAND --help tells more."])


def main() -> None:
    try:
        status = run(sys.argv[1:])
    except UserError as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr, flush=True)
        status = 2
    raise SystemExit(status)


if __name__ == "__main__":
    main()
