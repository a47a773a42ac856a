"""From `git clone` to the picture: clones this repository, runs `make demo` there, and writes what came out.

--repeat N runs the training N times in the clone and says whether all numbers are the same to the last digit.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
NUMBERS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")


def run(clone: Path) -> tuple[dict, float]:
    """metrics.json and the seconds that `make demo` took."""
    start = time.monotonic()
    subprocess.run(["make", "demo"], cwd=clone, check=True)
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
        ask = [".venv/bin/python", "-c", "import torch; print(torch.__version__)"]
        torch_version = subprocess.check_output(ask, cwd=clone, text=True).strip()
        for picture in ("predictions", "curves"):
            shutil.copy(newest(clone) / f"{picture}.png", RESULTS / f"demo_{picture}.png")
    metrics = [m for m, _ in runs]
    same = all(m == metrics[0] for m in metrics)
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, torch {torch_version}"
    lines = ["| " + " | ".join(NUMBERS) + " |", "|---" * len(NUMBERS) + "|"]
    lines.append("| " + " | ".join(f"{metrics[0][n]:.3f}" for n in NUMBERS) + " |")
    lines.append(
        f"\nClone to picture: {runs[0][1] / 60:.1f} minutes, installation included; commit {commit}, {date.today()}, "
    )
    lines[-1] += f"{machine}."
    if len(runs) > 1:
        lines[-1] += f" {len(runs)} runs: {'the same to the last digit' if same else 'NOT the same numbers'}."
    (RESULTS / "demo.md").write_text("\n".join(lines) + "\n")
    record = {"commit": commit, "date": str(date.today()), "machine": machine}
    record |= {"seconds": [s for _, s in runs], "metrics": metrics, "same": same}
    (RESULTS / "demo.json").write_text(json.dumps(record, indent=1))
    print((RESULTS / "demo.md").read_text())
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
