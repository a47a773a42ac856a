"""Every row of the papers: `python -m codetr.papers` lists them, prints their commands and launches them."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from codetr.errors import UserError

PAPERS = ("co_detr", "group_detr")
SCORES = {
    "ap": ("AP", "map"),
    "ap50": ("AP50", "map_50"),
    "ap75": ("AP75", "map_75"),
    "aps": ("APs", "map_small"),
    "apm": ("APm", "map_medium"),
    "apl": ("APl", "map_large"),
}
WIDE = 160  # columns where there is no terminal
USAGE = """
examples:
  python -m codetr.papers                                   every row, by paper and table
  python -m codetr.papers co_detr_t7_k3                     one row and its command
  python -m codetr.papers co_detr_t7_k3 --devices 8 --run data.root=/data/coco
  python -m codetr.papers co_detr_t7_k3 --torchrun 8 --nodes 2
  python -m codetr.papers co_detr_t7_k3 --slurm 8 --nodes 2 > job.sh && sbatch job.sh
"""


@dataclass(frozen=True)
class Row:
    """A row of a table of a paper. scores: the paper's, in percent, by the keys of `SCORES`; what it does not give is
    absent. batch: images per step, in all. needs: what is missing here for the row to run; empty: nothing. branch: the
    auxiliary head that is scored, empty: the decoder."""

    name: str
    paper: str
    table: str
    title: str
    row: str
    epochs: int
    batch: int
    overrides: tuple[str, ...]
    scores: Mapping[str, float]
    needs: str = ""
    branch: str = ""

    def arguments(self, processes: int = 1) -> list[str]:
        """What `codetr.train` is given. Raises UserError where the batch cannot be shared equally."""
        if self.batch % processes:
            raise UserError(f"{self.name} takes {self.batch} images per step, which {processes} processes cannot share")
        return [
            *self.overrides,
            f"trainer.max_epochs={self.epochs}",
            f"data.batch_size={self.batch // processes}",
            f"name={self.name}",
        ]


def load_rows() -> dict[str, Row]:
    """By name, in the order of the papers."""
    rows = [row for paper in PAPERS for row in _rows_of(paper)]
    return {row.name: row for row in rows}


def _rows_of(paper: str) -> Iterator[Row]:
    text = (files("codetr.papers") / f"{paper}.yaml").read_text(encoding="utf-8")
    content: Any = OmegaConf.to_container(OmegaConf.create(text))
    for section in content["sections"]:
        shared = {key: value for key, value in section.items() if key not in ("rows", "overrides")}
        for name, own in section["rows"].items():
            values = {"paper": content["paper"], **shared, **own}
            layers = (content, section, own)
            values["overrides"] = tuple(override for layer in layers for override in layer.get("overrides", ()))
            values["table"] = f"table {values['table']}" if isinstance(values["table"], int) else values["table"]
            scores = {key: values.pop(key) for key in SCORES if key in values}
            yield Row(name=name, scores=scores, **values)


def find(rows: Mapping[str, Row], name: str) -> Row:
    """Raises UserError for an unknown name, with those that were perhaps meant."""
    if name in rows:
        return rows[name]
    near = difflib.get_close_matches(name, rows, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "`python -m codetr.papers` lists them"
    raise UserError(f"no row is called {name}; {hint}")


def tables(rows: Mapping[str, Row]) -> Iterator[tuple[str, list[Row]]]:
    """(heading, rows) of every table."""
    for heading, group in itertools.groupby(rows.values(), lambda row: f"{row.paper}, {row.table}: {row.title}"):
        yield heading, list(group)


def command(row: Row, devices: int, extra: Sequence[str]) -> list[str]:
    """On this machine; several devices by processes that Lightning starts."""
    many = ["trainer=ddp", f"trainer.devices={devices}"] if devices > 1 else []
    return ["python", "-m", "codetr.train", *row.arguments(devices), *many, *extra]


def torchrun(row: Row, devices: int, nodes: int, extra: Sequence[str]) -> str:
    """To be run on every node. Variables of the shell stay as they are."""
    rendezvous = "--standalone"
    if nodes > 1:
        rendezvous = (
            f"--nnodes={nodes} --node-rank=$RANK --rdzv-backend=c10d --rdzv-id={row.name} "
            "--rdzv-endpoint=$FIRST_NODE:29500"
        )
    return (
        f"torchrun {rendezvous} --nproc-per-node={devices} -m codetr.train {_distributed(row, devices, nodes, extra)}"
    )


def slurm(row: Row, devices: int, nodes: int, extra: Sequence[str]) -> str:
    """A batch script; queued again it goes on where it was."""
    return (
        "#!/bin/bash\n"
        f"#SBATCH --job-name={row.name} --nodes={nodes} --ntasks-per-node={devices} --gpus-per-node={devices} "
        "--cpus-per-task=8\n"
        f"srun python -m codetr.train {_distributed(row, devices, nodes, ['resume=auto', *extra])}"
    )


def _distributed(row: Row, devices: int, nodes: int, extra: Sequence[str]) -> str:
    shape = ["trainer=ddp", f"trainer.num_nodes={nodes}", f"trainer.devices={devices}"]
    return shlex.join([*row.arguments(devices * nodes), *shape, f"run_dir=outputs/{row.name}", *extra])


def show(rows: Mapping[str, Row]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    for heading, group in tables(rows):
        scores = _given(group)
        table = Table(title=heading, title_justify="left", title_style="bold")
        table.add_column("name", no_wrap=True)
        table.add_column("row")
        for label in ("epochs", *(SCORES[key][0] for key in scores)):
            table.add_column(label, justify="right", no_wrap=True)
        needs = any(row.needs for row in group)
        if needs:
            table.add_column("cannot run yet, needs", style="yellow")
        for row in group:
            numbers = [_number(row.scores.get(key)) for key in scores]
            table.add_row(row.name, row.row, str(row.epochs), *numbers, *([row.needs] if needs else []))
        console.print(table, "")


def _given(group: Sequence[Row]) -> list[str]:
    """The scores that at least one row has, and AP."""
    return [key for key in SCORES if key == "ap" or any(key in row.scores for row in group)]


def markdown(rows: Mapping[str, Row], results: Path) -> str:
    """The reproduction table. results: a folder with the `metrics.json` of finished rows, as NAME.json."""
    lines = [
        "# Every row of the papers",
        "",
        "Written by `make readme`. `python -m codetr.papers NAME` prints the command of a row, `--run` launches it. "
        "Ours: from `benchmarks/results/rows/NAME.json`, the `metrics.json` of the run; empty: not run.",
    ]
    for heading, group in tables(rows):
        scores = _given(group)
        paper = [f"paper {SCORES[key][0]}" for key in scores]
        lines += ["", f"## {heading}", "", "| row | epochs | " + " | ".join(paper) + " | ours AP | command |"]
        lines.append("|---" * (len(paper) + 4) + "|")
        for row in group:
            numbers = [_number(row.scores.get(key)) for key in scores]
            how = f"needs {row.needs}" if row.needs else f"`python -m codetr.papers {row.name} --run`"
            cells = [row.row, str(row.epochs), *numbers, _number(measured(row, results)), how]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measured(row: Row, results: Path) -> float | None:
    """Our AP of the row in percent, if it was run."""
    path = results / f"{row.name}.json"
    if not path.is_file():
        return None
    numbers = json.loads(path.read_text())
    numbers = numbers["branches"][row.branch] if row.branch else numbers
    return 100 * float(numbers["map"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


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
        print(markdown(rows, Path("benchmarks/results/rows")), end="")
        return 0
    if arguments.row is None:
        show(rows)
        return 0
    row = find(rows, arguments.row)
    if arguments.nodes > 1 and not (arguments.torchrun or arguments.slurm):
        raise UserError("--nodes goes with --torchrun or --slurm")
    if not arguments.run:
        _describe(row, arguments)
        return 0
    if row.needs:
        raise UserError(f"{row.name} cannot run yet, it needs {row.needs}")
    if arguments.torchrun or arguments.slurm:
        raise UserError("--run launches on this machine (--devices N); run what is printed without it elsewhere")
    return subprocess.run([sys.executable, *command(row, arguments.devices, arguments.overrides)[1:]]).returncode


def _describe(row: Row, arguments: argparse.Namespace) -> None:
    """The command alone goes to stdout, so that it can be redirected into a file."""
    if arguments.slurm:
        text = slurm(row, arguments.slurm, arguments.nodes, arguments.overrides)
    elif arguments.torchrun:
        text = torchrun(row, arguments.torchrun, arguments.nodes, arguments.overrides)
    else:
        text = shlex.join(command(row, arguments.devices, arguments.overrides))
    scores = ", ".join(f"{SCORES[key][0]} {_number(value)}" for key, value in row.scores.items()) or "AP not known"
    print(f"{row.paper}, {row.table}, {row.row}: {row.epochs} epochs, batch {row.batch}, {scores}", file=sys.stderr)
    if row.needs:
        print(f"cannot run yet, needs {row.needs}", file=sys.stderr)
    print(text)
