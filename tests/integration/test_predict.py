"""The prediction application, from its command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from codetr.application import compose
from codetr.errors import UserError
from codetr.predict import predict

if TYPE_CHECKING:
    from conftest import Trained


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "codetr.predict", "num_workers=0", "device=cpu", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_files_in_annotated_pictures_and_results_out(trained: "Trained", tmp_path: Path) -> None:
    images = tmp_path / "photos"
    images.mkdir()
    for path in trained.images.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "broken.png").write_bytes(b"broken")
    options = [f"checkpoint={trained.checkpoint}", f"images={images}", "score_threshold=0"]
    with pytest.raises(UserError, match=r"broken\.png.*on_error=skip"):
        predict(compose("predict", [*options, "num_workers=0", "device=cpu", f"out={tmp_path}/stopped"]))

    done = run(tmp_path, *options, "on_error=skip", "out=found")
    assert done.returncode == 0, done.stderr
    assert "1 skipped" in done.stdout
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == [
        *(f"{i}.png" for i in range(5)),
        "predictions.json",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found", "photos", "stopped"]  # no logs
    results = json.loads((tmp_path / "found" / "predictions.json").read_text())
    truth = json.loads((trained.images.parent / "truth.json").read_text())
    names = {c["id"]: c["name"] for c in truth["categories"]}
    files = {i["id"]: i["file_name"] for i in truth["images"]}
    for annotation in truth["annotations"]:  # the best detections of the same weights
        same = [r for r in results if r["file_name"] == files[annotation["image_id"]]]
        same = [r for r in same if r["category_name"] == names[annotation["category_id"]]]
        assert min(np.abs(np.subtract(r["bbox"], annotation["bbox"])).max() for r in same) < 0.01
    with Image.open(tmp_path / "found" / "0.png") as picture:
        assert picture.size == (512, 384)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["images=photos"], "checkpoint is not given"),
        (["checkpoint=best.ckpt"], "images is not given"),
        (["checkpoint=absent.ckpt", "images=photos"], "no such checkpoint"),
        (["checkpoint=best.ckpt", "images=photos", "on_error=ignore"], "on_error=ignore: must be one of stop, skip"),
    ],
)
def test_mistakes_are_explained(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        predict(compose("predict", overrides))


def test_a_mistake_ends_the_command_with_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "checkpoint=absent.ckpt", "images=photos")
    assert result.returncode == 2
    assert result.stderr == "error: absent.ckpt: no such checkpoint\n"
