"""`make chaos`: training that is killed, starved, poisoned and restarted ends as the one that was not.

Figures into benchmarks/results/chaos.json, a table into chaos.md beside it. Exit status 1 when something was lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track

from chaos import scenarios
from chaos.scenarios import EVERY, PHASES, STEPS, Kill, Scenario, as_rows, kinds, uninterrupted
from toy import make_coco

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def import_everything() -> None:
    """Once, for all that are forked from here."""

    import codetr.callbacks.report
    import codetr.data.datamodule
    import codetr.eval
    import codetr.task  # noqa: F401

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # says that it hides the steps that were repeated
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "CODETR_MSDA": "reference"}


def run_kills(count: int, folder: Path, seed: int) -> list[Kill]:
    """Of every kind of training and phase in turn."""
    draw = random.Random(seed)
    every = kinds(folder / "data")
    whole = {kind.name: uninterrupted(kind, folder) for kind in every}
    kills = []
    for i in track(range(count), "SIGKILL"):
        kind = every[i % len(every)]
        phase = PHASES[i // len(every) % len(PHASES)]
        kills.append(scenarios.kill(kind, whole[kind.name], folder / f"kill_{i}", phase, draw))
        if not kills[-1].harmless:
            print(kills[-1])
    return kills


def run_scenarios(folder: Path, restarts: int) -> list[Scenario]:
    one, two, *_ = kinds(folder / "data")
    whole_one, whole_two = folder / "one_process", folder / "two_processes"
    jobs: list[Callable[[], Scenario]] = [
        lambda: scenarios.signalled(one, whole_one, folder / "sigterm", signal.SIGTERM, 143),
        lambda: scenarios.signalled(two, whole_two, folder / "sigterm_two", signal.SIGTERM, 143),
        lambda: scenarios.signalled(one, whole_one, folder / "sigint", signal.SIGINT, 130),
        lambda: scenarios.full_disk(one, whole_one, folder / "full"),
        lambda: scenarios.poisoned(one, whole_one, folder / "nan_left_out", 20),
        lambda: scenarios.poisoned(one, whole_one, folder / "nan", 0),
        lambda: scenarios.poisoned(two, whole_two, folder / "nan_two", 0),
        lambda: scenarios.restarted(two, whole_two, folder / "torchrun", restarts),
        lambda: scenarios.restarted(two, whole_two, folder / "standalone", 2, "--standalone"),
    ]
    return [job() for job in track(jobs, "Other ends")]


def write(kills: list[Kill], others: list[Scenario]) -> None:
    figures = {
        "steps": STEPS,
        "every_n_steps": EVERY,
        "kills": as_rows(kills),
        "scenarios": [vars(one) for one in others],
    }
    (RESULTS / "chaos.json").write_text(json.dumps(figures, indent=1) + "\n")
    lines = [
        "| training | kills | while training | in validation | writing | steps lost, at most | equal to the bit |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(one.kind for one in kills):
        own = [one for one in kills if one.kind == name]
        fell = [sum(one.phase == phase for one in own) for phase in PHASES]
        equal, lost = sum(not one.differs for one in own), max(one.lost for one in own)
        lines.append(f"| {name} | {len(own)} | {' | '.join(map(str, fell))} | {lost} | {equal} of {len(own)} |")
    lines += ["", "| what happens | expected | happened | then equal to the bit |", "|---|---|---|---|"]
    for one in others:
        lines.append(f"| {one.name} | {one.expected} | {one.happened} | {'no' if one.differs else 'yes'} |")
    text = f"A toy run of {STEPS} steps, a checkpoint every {EVERY}, killed at random (`make chaos`).\n\n"
    (RESULTS / "chaos.md").write_text(text + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=5, help="of torchrun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep runs and logs there")
    options = parser.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        make_coco(folder / "data", train=10, val=3)
        kills = run_kills(options.kills, folder, options.seed)
        others = run_scenarios(folder, options.restarts)
    write(kills, others)
    harmless = sum(one.harmless for one in kills)
    print(
        f"{harmless} of {len(kills)} kills and {sum(one.passed for one in others)} of {len(others)} others lost nothing"
    )
    for bad in (*(one for one in kills if not one.harmless), *(one for one in others if not one.passed)):
        print(bad)
    raise SystemExit(harmless < len(kills) or not all(one.passed for one in others))


if __name__ == "__main__":
    main()
