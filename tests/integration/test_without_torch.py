"""An exported file without PyTorch: NumPy, ONNX Runtime and Pillow are there, and nothing else can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from codetr.inference import Model

if TYPE_CHECKING:
    from conftest import Trained

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_without_torch"
# What `pip install onnxruntime pillow` brings, and the example itself.
INSTALLED = {"numpy", "onnxruntime", "PIL", "flatbuffers", "packaging", "google", "detect"}
ALONE = f"""
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {INSTALLED!r} and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
sys.path.insert(0, {str(EXAMPLE)!r})
for absent in ("torch", "torchvision", "codetr"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(absent + " is here")
import detect
model = detect.Model(sys.argv[1])
print(json.dumps([model(path, 0.0) for path in sys.argv[2:]]))
assert not [name for name in sys.modules if name.startswith(("torch", "codetr."))]
"""


def test_the_example_finds_what_the_checkpoint_finds(
    small: Trained, onnx_file: Path, eager: Model, tmp_path: Path
) -> None:
    """In images that are resized, and in one that is as the network takes it."""
    photo = tmp_path / "large.png"
    Image.open(small.images / "0.png").resize((400, 300), Image.Resampling.BICUBIC).save(photo)
    files = [small.images / "1.png", photo]
    command = [sys.executable, "-c", ALONE, onnx_file, *files]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for found, file, pixels in zip(json.loads(done.stdout), files, (1e-3, 1.0), strict=True):
        (true,) = eager.predict(file, score_threshold=0)
        boxes = np.array([one["box"] for one in found])
        assert np.abs(boxes[:5] - true.boxes_xyxy[:5].numpy()).max() < pixels
        assert [one["name"] for one in found[:5]] == true.names[:5]


def test_its_sizes_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from detect import resized

    rng = np.random.default_rng(0)
    for short, long in ((800, 1333), (None, 128), (96, 128), (640, None)):
        for width, height in rng.integers(30, 3000, (200, 2)).tolist():
            expected = v2.functional.resize(torch.empty(0, height, width), [short] if short else None, max_size=long)
            assert resized((width, height), short, long) == (expected.shape[2], expected.shape[1])
