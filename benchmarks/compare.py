"""The paper's claim in small: the same budget of steps with K = 0, 1, 2 auxiliary heads, several seeds.

Runs `experiment=compare` for every K and seed, two at a time with one thread each, and writes the table, the numbers
and the learning curves to benchmarks/results/. Finished runs are kept: an interrupted comparison goes on where it was.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

COLLABORATORS = {0: "[]", 1: "[atss]", 2: "[faster_rcnn_small,atss]"}
METRICS = ("map", "map_50", "map_75")
RESULTS = Path(__file__).parent / "results"


def train(out: Path, k: int, seed: int, overrides: list[str]) -> dict:
    """One run, or the result of a finished one."""
    run_dir = out / f"k{k}_seed{seed}"
    if not (run_dir / "metrics.json").exists():
        command = [sys.executable, "-m", "codetr.train", "experiment=compare", f"seed={seed}", f"run_dir={run_dir}"]
        command += [f"model/collaborator={COLLABORATORS[k]}", "resume=auto", *overrides]
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(out / f"k{k}_seed{seed}.log", "w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:
            raise SystemExit(f"K = {k}, seed {seed} failed; see {log.name}")
    return {"k": k, "seed": seed, **json.loads((run_dir / "metrics.json").read_text())}


def summary(runs: list[dict]) -> list[dict]:
    """Mean and spread (sample standard deviation) per K."""
    rows = []
    for k in COLLABORATORS:
        mine = [r for r in runs if r["k"] == k]
        values = {m: [r[m] for r in mine] for m in METRICS}
        rows.append(
            {"k": k, "seeds": len(mine)}
            | {m: statistics.mean(v) for m, v in values.items()}
            | {f"{m}_sd": statistics.stdev(v) if len(v) > 1 else 0.0 for m, v in values.items()}
        )
    return rows


def markdown(rows: list[dict], command: str) -> str:
    lines = ["| K | heads | mAP | mAP50 | mAP75 |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{100 * row[m]:.1f} ± {100 * row[f'{m}_sd']:.1f}" for m in METRICS]
        lines.append(f"| {row['k']} | `{COLLABORATORS[row['k']]}` | " + " | ".join(cells) + " |")
    lines.append(f"\nMean ± standard deviation of {rows[0]['seeds']} seeds; `{command}`, {date.today()}, ")
    lines[-1] += f"{platform.machine()}, 2 CPU cores, torch {torch.__version__}."
    return "\n".join(lines) + "\n"


def curves(out: Path, path: Path) -> None:
    """Validation mAP over steps, one line per run."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for k, colour in zip(COLLABORATORS, ("tab:gray", "tab:blue", "tab:red"), strict=True):
        for log in sorted(out.glob(f"k{k}_seed*/**/metrics.csv")):
            with open(log) as file:
                points = [(int(r["step"]), float(r["val/map"])) for r in csv.DictReader(file) if r.get("val/map")]
            label = f"K = {k}" if "seed0" in str(log) else None
            axes.plot(*zip(*points, strict=True), color=colour, alpha=0.8, label=label)
    axes.set(xlabel="step", ylabel="validation mAP", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"))
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for every run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [(k, seed) for seed in range(options.seeds) for k in COLLABORATORS]
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        task = bar.add_task("K = 0, 1, 2", total=len(jobs))

        def one(job: tuple[int, int]) -> dict:
            run = train(options.out, *job, options.overrides)
            bar.advance(task)
            return run

        with ThreadPoolExecutor(options.jobs) as pool:
            runs = list(pool.map(one, jobs))
    rows = summary(runs)
    table = Table("K", *METRICS)
    for row in rows:
        table.add_row(str(row["k"]), *(f"{row[m]:.3f} ± {row[f'{m}_sd']:.3f}" for m in METRICS))
    Console().print(table)
    if options.overrides:
        return  # a variation: the committed figures are those of the plain command
    (RESULTS / "compare.md").write_text(markdown(rows, "make compare"))
    (RESULTS / "compare.json").write_text(json.dumps({"summary": rows, "runs": runs}, indent=1))
    curves(options.out, RESULTS / "compare.png")


if __name__ == "__main__":
    main()
