"""A step's gradient does not depend on how its images are split into accumulated batches and processes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from accumulation import CASES, COUNTS, STILL, TINY, Split, make_data, off, steps, train, train_in_processes

QUERIES = 10  # of the main group
HEADS = "model/auxiliary_head=[faster_rcnn_small,atss,fcos,gfl,paa,retinanet]"
MODELS = {
    "groups": CASES["3 groups (Group DETR)"],
    "denoising": CASES["denoising, one block in every batch"],
    "hybrid": CASES["hybrid"],
    "heads": ["model=co_deformable_tiny", HEADS],
    "masks": ["model=co_deformable_tiny", "model/auxiliary_head=[mask_rcnn_small]", "model/mask_head=refine_mask"],
}


LONG = ("hybrid", "masks")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accumulation") / "data"
    make_data(folder)
    return folder


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in MODELS]
)
def test_batches_of_a_step_are_one_batch(model: str, data: Path, tmp_path: Path) -> None:
    """With images with and without objects. The last step, of two images, has fewer batches than the others."""

    def gradients(split: Split) -> list:
        train(split, data, tmp_path / str(split), *MODELS[model])
        return steps(split, tmp_path / str(split))

    expected = [*gradients(Split(4)), gradients(Split(2))[-1]]
    found = gradients(Split(1, accumulate=4))
    assert [images for _, images in found] == [images for _, images in expected]
    for (own, _), (one, _) in zip(found, expected, strict=True):
        assert off(own, one) < 1e-6
    alone = gradients(Split(1, accumulate=4, over_step=False))
    assert max(off(own, one) for (own, _), (one, _) in zip(alone, expected, strict=True)) > 0.1


@pytest.mark.slow
def test_batches_of_a_step_are_those_of_as_many_processes(data: Path, tmp_path: Path) -> None:
    """With what depends on the batch as well: blocks of denoising queries, and negatives as positive queries."""
    model = [
        "model=co_dino",
        TINY,
        "model/auxiliary_head=[paa]",
        *STILL,
        "model.detector.collaborative.fill=negatives",
    ]
    alone = {split.batch_size: split for split in (Split(2, accumulate=2), Split(1, accumulate=4))}
    for split in alone.values():
        train(split, data, tmp_path / str(split), *model)
    together = (Split(2, processes=2), Split(1, accumulate=2, processes=2))
    train_in_processes(together, data, tmp_path, *model)
    for split in together:
        one = alone[split.batch_size]
        expected, found = (steps(s, tmp_path / str(s)) for s in (one, split))
        for (own, images), (gradient, same) in zip(found[:2], expected[:2], strict=True):  # those of four images
            assert sorted(images) == sorted(same)
            assert off(own, gradient) < 1e-6


def test_the_pass_that_measures_leaves_no_trace(data: Path, tmp_path: Path) -> None:
    """Dropout draws the same, running statistics are the same: losses differ by what they are divided by alone."""
    model = ["model=deformable_pp", TINY, "model.detector.backbone.norm=batch", "model.dropout=0.3"]
    logged, buffers = [], []
    for over_step in (True, False):
        split = Split(1, accumulate=4, over_step=over_step)
        train(split, data, tmp_path / str(split), *model)
        with (tmp_path / str(split) / "csv" / "metrics.csv").open(newline="") as file:
            logged.append([float(row["train/main/0/class"]) for row in csv.DictReader(file)])
        buffers.append(torch.load(tmp_path / str(split) / "buffers_0.pt"))
        images = [images for _, images in steps(split, tmp_path / str(split))]
    assert all(torch.equal(buffers[0][name], value) for name, value in buffers[1].items())
    assert len(logged[0]) == len(images) == 3
    for together, alone, seen in zip(*logged, images, strict=True):  # of the first image of every step
        counts = [min(COUNTS[image - 1], QUERIES) for image in seen]
        assert together * sum(counts) / len(counts) == pytest.approx(alone * max(counts[0], 1), rel=1e-6)


def test_gradients_of_mixed_precision_are_whole(data: Path, tmp_path: Path) -> None:
    """Under autocast the pass without gradients must not leave its casts of the weights behind."""
    split, found = Split(1, accumulate=4), []
    for precision in ("32-true", "bf16-mixed"):
        train(split, data, tmp_path / precision, *MODELS["groups"], f"trainer.precision={precision}")
        found.append(steps(split, tmp_path / precision)[0][0])
    assert off(found[1], found[0]) < 0.2
