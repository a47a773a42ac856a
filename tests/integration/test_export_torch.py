"""Programs of `torch.export`: the face of a checkpoint with codetr, and the same numbers without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from export_cases import assert_pairs, assert_same, exported, on_canvas

import codetr
from codetr.application import compose
from codetr.errors import UserError
from codetr.eval import evaluate
from codetr.inference import Model
from codetr.inference.about import KEY, About

if TYPE_CHECKING:
    from conftest import Trained


@pytest.fixture(scope="module")
def program(small: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(small, tmp_path_factory.mktemp("program") / "model.pt2", "format=torch", "size=[96,128]")


def test_a_program_finds_what_the_checkpoint_finds(eager: Model, program: Path, photos: list[np.ndarray]) -> None:
    """In images that behind their resize have its size."""
    model = codetr.load(program, trust=["torch.export"])
    for batch in (1, 3):
        assert_same(model, eager, photos[::3], batch)


@pytest.mark.slow
def test_a_program_for_images_of_any_size(trained: Trained, tmp_path: Path, photos: list[np.ndarray]) -> None:
    path = exported(trained, tmp_path / "model.pt2", "format=torch")
    model, eager = codetr.load(path, trust=["torch.export"]), codetr.load(trained.checkpoint, device="cpu")
    assert isinstance(eager, Model)
    for batch in (1, 3, 8):
        assert_same(model, eager, photos, batch)


@pytest.mark.slow
def test_shapes_that_pytorch_cannot_write_need_a_size(small: Trained, tmp_path: Path) -> None:
    """Those behind a dilated stage: it has no word for `ceil`."""
    with pytest.raises(UserError, match=r"PyTorch cannot write the shapes .* size=\[800,1344\]"):
        exported(small, tmp_path / "model.pt2", "format=torch")
    assert not list(tmp_path.iterdir())


def test_what_torch_loads_finds_what_the_checkpoint_finds(eager: Model, program: Path) -> None:
    """With nothing of codetr."""
    extra = {f"{KEY}.json": ""}
    run = torch.export.load(program, extra_files=extra).module()
    about = About.from_json(extra[f"{KEY}.json"], program)
    assert about.class_names == eager.class_names
    for count in (1, 3, 8):
        images, sizes, truth = on_canvas(eager, count, (96, 128))
        with torch.inference_mode():
            boxes, scores, labels = run(images, sizes)
        assert_pairs((scores, labels, boxes), truth)


@pytest.mark.slow
def test_eval_of_the_program_has_the_mean_ap_of_the_checkpoint(
    small: Trained, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["trainer=cpu", "+data.num_workers=0", "~callbacks.pictures", "~callbacks.progress"]
    values = [
        evaluate(
            compose("eval", [f"checkpoint={path}", f"run_dir={path.suffix[1:]}", "trust=[torch.export]", *options])
        )
        for path in (program, small.checkpoint)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-9)
    assert values[0] > 0.3


def test_a_program_runs_only_with_consent(program: Path, tmp_path: Path) -> None:
    """PyTorch unpickles it: nothing is opened before somebody says so."""
    with pytest.raises(UserError, match=r"model.pt2: PyTorch unpickles .* trust=\[torch.export\]"):
        codetr.load(program)
    damaged = tmp_path / "half.pt2"
    damaged.write_bytes(program.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"half.pt2: PyTorch cannot open it"):
        codetr.load(damaged, trust=["torch.export"])
    with pytest.raises(UserError, match=r"device=meta: .* is a program for the CPU"):
        codetr.load(program, device="meta", trust=["torch.export"])
