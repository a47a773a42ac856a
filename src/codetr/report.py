"""Reports on runs: `codetr report RUN` and `codetr report RUN RUN ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from codetr.errors import UserError
from codetr.names import shown_lines
from codetr.reporting.bootstrap import ROUNDS

USAGE = """\
One run: write its page, RUN/report.html, again (training and `codetr eval` write it after every validation).
Several: one page on how they differ; the first is what the others are compared with.

  codetr report outputs/train/2026-01-01_12-00-00
  codetr report outputs/base outputs/mine --out comparison.html
  codetr report outputs/mine --text                 # for a terminal, without a page
"""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="codetr report",
        description="Pages that need no network: what a run learned and where it fails, or which run is better.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="directory of a run")
    out.add_argument("--text", action="store_true", help="print it, and write nothing")
    out.add_argument("--out", type=Path, default=Path("comparison.html"), metavar="FILE", help="page on several runs")
    out.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="draws of the bootstrap (%(default)s)")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 for what a user can mend."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.rounds < 1:
            raise UserError(f"--rounds={arguments.rounds}: give at least one")
        _main(arguments)
    except UserError as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 2
    return 0


def _main(arguments: argparse.Namespace) -> None:
    from rich import get_console

    from codetr.reporting import comparison, page, text

    console = get_console()
    if len(arguments.runs) == 1:
        if arguments.text:
            console.print(text.of_run(page.read(arguments.runs[0])))
        else:
            print(page.write(arguments.runs[0]))
        return
    own = comparison.compare([page.read(folder) for folder in arguments.runs], arguments.rounds, _progress)
    if arguments.text:
        console.print(text.of_runs(own))
    else:
        comparison.write(arguments.out, own)
        print(arguments.out)


def _progress(rounds: Iterable[int]) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    return track(rounds, "drawing images", console=Console(stderr=True), transient=True)


if __name__ == "__main__":
    raise SystemExit(main())
