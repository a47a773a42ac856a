"""From `git clone` to the picture: clones this repository, runs `make demo-shapes` there, and writes what came out.

--repeat N runs the training N times in the clone and says whether all numbers are the same to the last digit.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from PIL import Image

from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")


def run(clone: Path) -> tuple[dict, float]:
    """metrics.json and the seconds that `make demo-shapes` took."""
    start = time.monotonic()
    subprocess.run(["make", "demo-shapes"], cwd=clone, check=True)
    return json.loads((newest(clone) / "metrics.json").read_text()), time.monotonic() - start


def newest(clone: Path) -> Path:
    """The directory of the last run."""
    return max((clone / "outputs/demo").iterdir(), key=lambda path: path.stat().st_mtime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "codetr"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=clone, text=True).strip()
        runs = [run(clone) for _ in range(options.repeat)]
        shutil.copy(newest(clone) / "curves.png", report.folder / "demo_curves.png")
        shown = Image.open(newest(clone) / "predictions.png").reduce(2).quantize(256)  # for the README
        shown.save(report.folder / "demo_predictions.png", optimize=True)
    metrics = [m for m, _ in runs]
    same = all(m == metrics[0] for m in metrics)
    about = (
        f"Clone to picture: {runs[0][1] / 60:.1f} minutes, installation included; commit {commit}, {date.today()}, "
        f"{report.machine()}."
    )
    if len(runs) > 1:
        about += f" {len(runs)} runs: {'the same to the last digit' if same else 'NOT the same numbers'}."
    numbers = report.table(NUMBERS, [[f"{metrics[0][n]:.3f}" for n in NUMBERS]])
    record = {"commit": commit, "date": str(date.today()), "machine": report.machine()}
    record |= {"seconds": [s for _, s in runs], "metrics": metrics, "same": same}
    report.write("demo", f"{numbers}\n\n{about}", record)
    sys.exit(0 if same else 1)
