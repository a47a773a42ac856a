"""examples/ray_predict.py: a job that is interrupted goes on, and finds what the detector finds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from codetr.inference import Model

if TYPE_CHECKING:
    from conftest import Trained

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_predict.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("ray", "pyarrow")),
        reason="needs pip install 'ray[data]'",
    ),
]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where Ray starts on this machine alone."""
    variables = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLE, *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500, env=variables)


def test_a_job_goes_on_and_finds_what_the_detector_finds(
    small: Trained, onnx_file: Path, eager: Model, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    folder, out = tmp_path / "photos", tmp_path / "found"
    shutil.copytree(small.images, folder / "below")
    (folder / "broken.jpg").write_bytes(b"no image")
    first = run(onnx_file, folder, out, "--part", 2, "--batch-size", 2, "--score-threshold", 0)
    assert first.returncode == 0, first.stderr
    assert "0 images are done, 6 are left" in first.stdout
    parts = sorted(out.glob("part-*.parquet"))
    assert len(parts) == 3
    kept = parts[0].stat().st_mtime_ns
    parts[2].unlink()  # as if it had been interrupted before
    Image.new("RGB", (64, 48), "red").save(folder / "late.png")
    second = run(onnx_file, folder, out, "--part", 2, "--batch-size", 2, "--score-threshold", 0)
    assert second.returncode == 0, second.stderr
    assert "4 images are done, 3 are left" in second.stdout
    assert parts[0].stat().st_mtime_ns == kept
    rows = [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert sorted(row["file"] for row in rows) == sorted(str(p) for p in folder.rglob("*.*") if p.is_file())
    (broken,) = (row for row in rows if row["error"])
    assert broken["file"].endswith("broken.jpg")
    assert broken["file"] in broken["error"]
    for row in (row for row in rows if not row["error"]):
        (true,) = eager.predict(row["file"], score_threshold=0)
        assert row["scores"] == pytest.approx(true.scores.tolist(), abs=1e-4)
        assert row["boxes"][0] == pytest.approx(true.boxes_xyxy[0].tolist(), abs=0.5)
        assert (row["height"], row["width"]) == true.size


def test_without_a_model_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "photos" / "a.png")
    done = run(tmp_path / "absent.onnx", tmp_path / "photos", tmp_path / "found")
    assert done.returncode != 0
    assert "absent.onnx: there is no such file" in done.stderr + done.stdout
