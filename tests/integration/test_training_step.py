"""The benchmark of a training step runs, at toy size on the CPU; what it measures on a GPU only a GPU can tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toy_model import SIZES

ROOT = Path(__file__).parents[2]
SMALL = (
    "model/backbone=resnet10_small",
    "model/auxiliary_head=[faster_rcnn_small,atss]",
    "model.num_classes=3",
    *SIZES,
)


@pytest.mark.slow
def test_a_toy_step_on_the_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    size = ["--size", "64", "96", "--objects", "3", "--steps", "1"]
    command = [sys.executable, "-m", "benchmarks", "--out", str(tmp_path / "new"), "training/training_step"]
    process = subprocess.run(
        [*command, "--device", "cpu", *size, *SMALL],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "new" / "training_step_cpu.json").read_text())
    assert set(result["steps"]) == set(result["profiles"]) == {"default", "reference"}
    for name, numbers in result["steps"].items():
        profile = result["profiles"][name]
        assert numbers["step_ms"] > 0
        inner = profile["parts_ms"].pop("matching (in criterion)")
        assert 0 < inner < profile["parts_ms"]["criterion"]
        assert min(profile["parts_ms"].values()) > 0
        assert sum(profile["parts_ms"].values()) == pytest.approx(profile["busy_ms"])
        assert sum(profile["kinds_ms"].values()) == pytest.approx(profile["busy_ms"])
        assert profile["kinds_ms"]["deformable attention"] > 0
    assert len(result["log"]) == 2
    assert (tmp_path / "new" / "training_step_cpu.md").read_text().startswith("| deformable attention | step, ms |")
