"""Claims of the papers in small: the same budget of steps for every variant, several seeds.

Runs one experiment for every variant and seed, two at a time with one thread each, and writes the table, the numbers
and the learning curves to benchmarks/results/, and a page on all runs beside them (see docs/dashboards.md). Finished
runs are kept: an interrupted comparison goes on where it was.
"""

import argparse
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from benchmarks import report

COLOURS = ("gray", "tab:blue", "tab:red", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:cyan")
METRICS = ("map", "map_50", "map_75")


@dataclass(frozen=True)
class Study:
    """claim: what the table is about. experiment: what is run. rows: label -> Hydra overrides; studies share the runs
    of equal overrides. suppressed: rows that are evaluated once more with class-wise NMS above `NMS_IOU`. paper: AP of
    the rows in the paper, on COCO."""

    claim: str
    experiment: str
    rows: dict[str, list[str]]
    suppressed: tuple[str, ...] = ()
    paper: tuple[float, ...] = ()


def _heads(*names: str) -> list[str]:
    return [f"model/auxiliary_head=[{','.join(names)}]"]


CO, GROUP = _heads("faster_rcnn_small", "atss"), ["model.query_groups=3"]
HYBRID = [
    "+model/query@model.detector.queries.hybrid=hybrid",
    "model.detector.queries.hybrid.num_queries=120",
    "model.detector.queries.hybrid.repeats=3",
]
DENOISING = [
    "+model/query@model.detector.queries.denoising=denoising",
    "model.detector.queries.denoising.num_queries=30",
]
NMS_IOU = 0.6
STUDIES = {
    "heads": Study(
        "Co-DETR, table 7: K = 0, 1, 2 auxiliary heads",
        "compare",
        {
            "K = 0": _heads(),
            "K = 1: ATSS": _heads("atss"),
            "K = 2: Faster R-CNN and ATSS": _heads("faster_rcnn_small", "atss"),
        },
        paper=(47.1, 48.7, 49.5),
    ),
    "kinds": Study(
        "Co-DETR, table 8: each auxiliary head alone",
        "compare",
        {
            "none": _heads(),
            "RetinaNet": _heads("retinanet"),
            "Faster R-CNN": _heads("faster_rcnn_small"),
            "Mask R-CNN": _heads("mask_rcnn_small"),
            "FCOS": _heads("fcos"),
            "PAA": _heads("paa"),
            "GFL": _heads("gfl"),
            "ATSS": _heads("atss"),
        },
        paper=(43.3, 46.1, 46.3, 46.5, 46.5, 46.5, 46.5, 46.8),
    ),
    "parts": Study(
        "Co-DETR, table 9: what contributes, with ATSS",
        "compare",
        {
            "neither": _heads(),
            "auxiliary head": [*_heads("atss"), "model.detector.collaborative=null"],
            "positive queries": [*_heads("atss"), "criterion.lambda_2=0"],
            "both": _heads("atss"),
        },
        paper=(37.1, 41.6, 40.5, 42.3),
    ),
    "groups": Study(
        "Group DETR, figure 1 and table 7: K groups and naive one-to-many assignment",
        "compare_groups",
        {
            "1 group": [],
            "3 groups": ["model.query_groups=3"],
            "11 groups": ["model.query_groups=11"],
            "one-to-many: 1 group of as many queries, 11 matches per object": [
                "model.detector.main.num_queries=330",
                "model.detector.main.repeats=11",
            ],
        },
        suppressed=("1 group", "one-to-many: 1 group of as many queries, 11 matches per object"),
    ),
    "mixtures": Study(
        "What no paper has: auxiliary heads, groups, hybrid and denoising queries, alone and in pairs",
        "compare_mixtures",
        {
            "one-to-one alone": _heads(),
            "Co: ATSS": _heads("atss"),
            "Co: Faster R-CNN, ATSS": CO,
            "3 groups": [*_heads(), *GROUP],
            "hybrid": [*_heads(), *HYBRID],
            "denoising": [*_heads(), *DENOISING],
            "Co + 3 groups": [*CO, *GROUP],
            "Co + hybrid": [*CO, *HYBRID],
            "Co + denoising": [*CO, *DENOISING],
            "3 groups + hybrid": [*_heads(), *GROUP, *HYBRID],
            "3 groups + denoising": [*_heads(), *GROUP, *DENOISING],
            "hybrid + denoising": [*_heads(), *HYBRID, *DENOISING],
        },
    ),
}


def run_name(overrides: list[str], seed: int) -> str:
    """The folder of a run: what it varies, readable and without special characters."""
    parts = [re.sub(r"[^a-z0-9_]+", "-", o.removeprefix("model/").lower()).strip("-") for o in overrides]
    return "_".join([*parts, f"seed{seed}"])


def result_of(run_dir: Path) -> Path:
    """Of a finished run: a copy of its metrics.json, which it writes again and again until then."""
    return run_dir.with_name(f"{run_dir.name}.json")


def train(out: Path, study: Study, variant: str, seed: int, overrides: list[str]) -> dict:
    """One run, or the result of a finished one."""
    name = run_name(study.rows[variant], seed)
    run_dir, result = out / name, result_of(out / name)
    if not result.exists():
        command = [sys.executable, "-m", "codetr.train", f"experiment={study.experiment}", f"seed={seed}"]
        command += [f"run_dir={run_dir}", "resume=auto", *study.rows[variant], *overrides]
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(out / f"{name}.log", "w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:
            raise SystemExit(f"{variant}, seed {seed} failed; see {log.name}")
        shutil.copy(run_dir / "metrics.json", result)
    return {"variant": variant, "seed": seed, **json.loads(result.read_text())}


def suppressed(out: Path, study: Study, variant: str, seed: int) -> dict:
    """The finished run's best checkpoint, evaluated with NMS."""
    from benchmarks.evaluation.nms import evaluate

    checkpoint = out / run_name(study.rows[variant], seed) / "checkpoints" / "best.ckpt"
    return {"variant": f"{variant}, NMS", "seed": seed, **evaluate(checkpoint, (NMS_IOU,))[NMS_IOU]}


def summary(runs: list[dict]) -> list[dict]:
    """Mean and spread (sample standard deviation) per variant."""
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == variant]
        values = {m: [run[m] for run in mine] for m in METRICS}
        rows.append(
            {"variant": variant, "seeds": len(mine)}
            | {m: statistics.mean(v) for m, v in values.items()}
            | {f"{m}_sd": statistics.stdev(v) if len(v) > 1 else 0.0 for m, v in values.items()}
        )
    return rows


def markdown(rows: list[dict], study: Study, command: str) -> str:
    paper = dict(zip(study.rows, study.paper, strict=False))
    titles = ["variant", "mAP", "mAP50", "mAP75", *(["paper, COCO AP"] if paper else [])]
    table = []
    for row in rows:
        cells = [f"{100 * row[m]:.1f} ± {100 * row[f'{m}_sd']:.1f}" for m in METRICS]
        cells += [f"{paper[row['variant']]:.1f}"] if paper else []
        table.append([row["variant"], *cells])
    about = f"Mean ± standard deviation of {rows[0]['seeds']} seeds; `{command}`, {date.today()}, {report.machine()}."
    return f"{report.table(titles, table)}\n\n{about}"


def curves(out: Path, study: Study, path: Path) -> None:
    """Validation mAP over steps, one line per run."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for index, (variant, overrides) in enumerate(study.rows.items()):
        for log in sorted(out.glob(f"{run_name(overrides, 0)[:-1]}*/**/metrics.csv")):
            with open(log) as file:
                points = [(int(r["step"]), float(r["val/map"])) for r in csv.DictReader(file) if r.get("val/map")]
            label = variant if "seed0" in str(log) else None
            axes.plot(*zip(*points, strict=True), color=COLOURS[index], alpha=0.8, label=label)
    axes.set(xlabel="step", ylabel="validation mAP", ylim=(0, None))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def page(out: Path, study: Study, seeds: int, path: Path) -> None:
    """All runs beside each other: convergence, mean and spread over seeds, what is noise."""
    from codetr.reporting import bootstrap, comparison
    from codetr.reporting.page import read

    runs = [read(out / run_name(overrides, seed)) for overrides in study.rows.values() for seed in range(seeds)]
    comparison.write(path, comparison.compare(runs, bootstrap.ROUNDS, lambda rounds: rounds))
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES, help="; ".join(f"{k}: {s.claim}" for k, s in STUDIES.items()))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, help="default: outputs/<experiment>")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for every run")
    options = parser.parse_args()
    if options.overrides and not options.out:
        parser.error("a variation needs its own --out, beside the runs of the committed figures")
    study = STUDIES[options.study]
    out = options.out or Path("outputs") / study.experiment
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(variant, seed) for seed in range(options.seeds) for variant in study.rows]
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        task = bar.add_task(f"{len(jobs)} runs", total=len(jobs))

        def one(job: tuple[str, int]) -> dict:
            run = train(out, study, *job, options.overrides)
            bar.advance(task)
            return run

        with ThreadPoolExecutor(options.jobs) as pool:
            runs = list(pool.map(one, jobs))
    runs += [suppressed(out, study, v, seed) for v in study.suppressed for seed in range(options.seeds)]
    rows = summary(runs)
    table = Table("variant", *METRICS)
    for row in rows:
        table.add_row(row["variant"], *(f"{row[m]:.3f} ± {row[f'{m}_sd']:.3f}" for m in METRICS))
    Console().print(table)
    page(out, study, options.seeds, out / f"compare_{options.study}.html")
    if options.overrides:
        return  # a variation: the committed figures are those of the plain command
    name = f"compare_{options.study}"
    report.write(name, markdown(rows, study, f"make compare-{options.study}"), {"summary": rows, "runs": runs})
    curves(out, study, report.folder / f"{name}.png")
