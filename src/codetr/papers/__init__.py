"""Every row of the papers: `codetr papers` lists them, prints their commands and launches them."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from codetr.errors import UserError
from codetr.papers.launch import command, slurm, torchrun
from codetr.papers.page import describe, markdown, show
from codetr.papers.rows import Row, find, load_rows

__all__ = ["Row", "command", "composed", "find", "load_rows", "main", "markdown", "slurm", "torchrun"]
USAGE = """
examples:
  python -m codetr.papers                                   every row, by paper and table
  python -m codetr.papers co_detr_t7_k3                     one row and its command
  python -m codetr.papers co_detr_t7_k3 --devices 8 --run data.root=/data/coco
  python -m codetr.papers co_detr_t7_k3 --torchrun 8 --nodes 2
  python -m codetr.papers co_detr_t7_k3 --slurm 8 --nodes 2 > job.sh && sbatch job.sh
"""


def composed(row: Row, *overrides: str) -> DictConfig:
    """The row's configuration."""
    from codetr.application import compose

    return compose("train", [*row.arguments(), *overrides])


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m codetr.papers",
        description="List every row of the Co-DETR and Group DETR papers; print or launch the training of one.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("row", nargs="?", help="name of a row; none: list all rows")
    out.add_argument("overrides", nargs="*", help="further Hydra overrides, such as data.root=/data/coco")
    how = out.add_mutually_exclusive_group()
    how.add_argument("--devices", type=_count, default=1, metavar="N", help="on N devices of this machine")
    how.add_argument("--torchrun", type=_count, metavar="N", help="by torchrun, with N devices per node")
    how.add_argument("--slurm", type=_count, metavar="N", help="as a Slurm script, with N devices per node")
    out.add_argument("--nodes", type=_count, default=1, metavar="M", help="with --torchrun or --slurm: on M nodes")
    out.add_argument("--run", action="store_true", help="launch it on this machine")
    out.add_argument("--markdown", action="store_true", help="print the reproduction table of the docs")
    return out


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(argv)
    try:
        return _main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(arguments: argparse.Namespace) -> int:
    rows = load_rows()
    if arguments.markdown:
        print(markdown(rows, Path("benchmarks/results")), end="")
        return 0
    if arguments.row is None:
        show(rows)
        return 0
    row = find(rows, arguments.row)
    if arguments.nodes > 1 and not (arguments.torchrun or arguments.slurm):
        raise UserError("--nodes goes with --torchrun or --slurm")
    if arguments.run and (arguments.torchrun or arguments.slurm):
        raise UserError("--run launches on this machine (--devices N); run what is printed without it elsewhere")
    if row.needs:
        raise UserError(f"{row.name} cannot run yet, it needs {row.needs}")
    if arguments.run:
        return subprocess.run([sys.executable, *command(row, arguments.devices, arguments.overrides)[1:]]).returncode
    _describe(row, arguments)
    return 0


def _describe(row: Row, arguments: argparse.Namespace) -> None:
    """The command alone goes to stdout, so that it can be redirected into a file."""
    if arguments.slurm:
        text = slurm(row, arguments.slurm, arguments.nodes, arguments.overrides)
    elif arguments.torchrun:
        text = torchrun(row, arguments.torchrun, arguments.nodes, arguments.overrides)
    else:
        text = shlex.join(command(row, arguments.devices, arguments.overrides))
    print(*describe(row, composed(row)), sep="\n", file=sys.stderr)
    print(text)
