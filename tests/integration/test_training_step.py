"""The benchmark of a training step runs, at toy size on the CPU; what it measures on a GPU only a GPU can tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "training_step.py"
TOY = (
    "model/backbone=resnet10_small",
    "model/collaborator=[faster_rcnn_small,atss]",
    "model.width=32",
    "model.num_heads=2",
    "model.ffn_width=32",
    "model.norm_groups=4",
    "model.num_classes=3",
    "model.detector.encoder.num_layers=1",
    "model.detector.decoder.num_layers=2",
    "model.detector.main.num_queries=10",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_a_toy_step_on_the_cpu(tmp_path: Path) -> None:
    size = ["--size", "64", "96", "--objects", "3", "--steps", "1"]
    process = run("--device", "cpu", "--out", str(tmp_path / "new" / "step"), *size, *TOY)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "new" / "step.json").read_text())
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
    assert (tmp_path / "new" / "step.md").read_text().startswith("| deformable attention | step, ms |")


def test_results_of_a_gpu_are_not_overwritten_by_a_cpu() -> None:
    process = run("--device", "cpu")
    assert process.returncode == 2
    assert "--out" in process.stderr
