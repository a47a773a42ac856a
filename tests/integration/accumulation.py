"""Gradients of optimizer steps, however the images of a step are split into batches and processes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))

import forked
from fixed_draws import fixed_draws
from toy import SIZE, environment, overrides

ROOT = Path(__file__).parents[2]
COUNTS = (1, 9, 0, 2, 14, 1, 5, 0, 3, 12)  # objects of the images


@dataclass(frozen=True)
class Split:
    """Of a step's images. over_step: whether losses are normalised over the step."""

    batch_size: int
    accumulate: int = 1
    processes: int = 1
    over_step: bool = True

    def __str__(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


def make_data(folder: Path, sizes: Sequence[tuple[int, int]] = ((SIZE, SIZE),)) -> None:
    """Images with as many coloured rectangles as `COUNTS` says. sizes: (height, width) of the images, in turn."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for i, count in enumerate(COUNTS):
            height, width = sizes[i % len(sizes)]
            pixels = np.full((height, width, 3), 90, np.uint8)
            images.append({"id": i + 1, "file_name": f"{i}.png", "width": width, "height": height})
            for _ in range(count):
                label = int(rng.integers(3))
                (x, y), (w, h) = rng.integers(0, 40, 2).tolist(), rng.integers(6, 24, 2).tolist()
                pixels[y : y + h, x : x + w] = np.eye(3, dtype=np.uint8)[label] * 255
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                own = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": label + 1}
                annotations.append(own | {"bbox": [x, y, w, h], "segmentation": [corners], "area": w * h, "iscrowd": 0})
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(("red", "green", "blue"))]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))


class Gradients(Callback):
    """Of every step, by parameter, into `directory`, and the images that it saw; no step changes a weight.

    As later in training, heads give classes a probability of about one half: of the first steps' one in a hundred
    GFL's sum of scores stays below 1, the least that a batch is divided by.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.images: list[int] = []
        self.steps: list[tuple[dict[str, Tensor], list[int]]] = []

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        for name, parameter in module.detector.named_parameters():
            if name.endswith("predictor.classes.bias"):
                parameter.zero_()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        self.images += batch.image_ids.tolist()  # type: ignore[attr-defined]

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        found = {name: p.grad.clone() for name, p in module.detector.named_parameters() if p.grad is not None}
        self.steps.append((found, self.images))
        self.images = []
        for parameter in module.parameters():
            parameter.grad = None

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        torch.save(self.steps, self.directory / f"gradients_{trainer.global_rank}.pt")
        torch.save(dict(module.detector.named_buffers()), self.directory / f"buffers_{trainer.global_rank}.pt")


def train(split: Split, data: Path, directory: Path, *more: str) -> None:
    """An epoch in float64; `more` may say otherwise. Samples of a head's candidates are not random."""
    from codetr.application import compose
    from codetr.training import fit

    directory.mkdir(parents=True, exist_ok=True)
    given = [
        *overrides(data),
        "model.dropout=0",
        "model.detector.backbone.norm=frozen",
        "model.detector.collaborative.fill=none",
        "trainer.precision=64-true",
        "trainer.gradient_clip_val=null",
        f"trainer={'ddp' if split.processes > 1 else 'cpu'}",
        "trainer.accelerator=cpu",
        f"trainer.accumulate_grad_batches={split.accumulate}",
        f"data.batch_size={split.batch_size}",
        f"normalise_over_step={str(split.over_step).lower()}",
        "trainer.max_epochs=1",
        "trainer.limit_val_batches=0",
        "~callbacks.checkpoints",
        "+trainer.enable_checkpointing=false",
        "~callbacks.ema",
        "~callbacks.progress",
        "logger=csv",
        "callbacks.non_finite.skip=0",
        f"+callbacks.gradients={{_target_: accumulation.Gradients, directory: {directory}}}",
        f"run_dir={directory}",
        *more,
    ]
    with fixed_draws():
        fit(compose("train", given))


def steps(split: Split, directory: Path) -> list[tuple[dict[str, Tensor], list[int]]]:
    """Gradients of every step, and the images of all processes."""
    ranks = [torch.load(directory / f"gradients_{rank}.pt") for rank in range(split.processes)]
    return [(same[0][0], [image for _, images in same for image in images]) for same in zip(*ranks, strict=True)]


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of the difference by that of what is expected, over all parameters."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (apart / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def train_in_processes(splits: Sequence[Split], data: Path, folder: Path, *more: str) -> None:
    """Of two processes each, one after the other in the same ones; into `folder`/split."""
    content = json.dumps([[asdict(split) for split in splits], str(data), str(folder), more])
    forked.run_two("accumulation", content, cwd=Path(__file__).parent, env=environment())


TINY = "model/backbone=resnet10_small"
STILL = [f"model.detector.queries.denoising.{noise}_noise=0" for noise in ("label", "box")]
# Empty slots of images with fewer objects than others, which DINO's code counts as background, depend on the batch.
MASKED = "model.detector.queries.denoising.unused=masked"
ONE_BLOCK = "model.detector.queries.denoising.num_queries=1"  # else their number depends on the batch's most objects
HEADS = ("atss", "faster_rcnn_small", "fcos", "gfl", "paa", "retinanet", "mask_rcnn_small")
CASES = {
    "main group": ["model=deformable_pp", TINY],
    "3 groups (Group DETR)": ["model=deformable_pp", TINY, "model.query_groups=3"],
    "hybrid": ["model=h_deformable", TINY],
    **{f"`{head}`": ["model=co_deformable_tiny", f"model/auxiliary_head=[{head}]"] for head in HEADS},
    "`refine_mask`": ["model=co_deformable_tiny", "model/auxiliary_head=[]", "model/mask_head=refine_mask"],
    "denoising, one block in every batch": ["model=dino", TINY, *STILL, MASKED, ONE_BLOCK],
    "denoising": ["model=dino", TINY, *STILL, MASKED],
}
SPLITS = {
    "2 x 2": Split(2, accumulate=2),
    "4 x 1": Split(1, accumulate=4),
    "2 x 2, each normalised on its own": Split(2, accumulate=2, over_step=False),
    "4 x 1, likewise": Split(1, accumulate=4, over_step=False),
}


def table(folder: Path) -> str:
    """Train every case in every split; Markdown. Of the two steps of four images the larger difference counts."""
    make_data(folder / "data")
    lines = [f"| losses | {' | '.join(SPLITS)} |", "|---" * (len(SPLITS) + 1) + "|"]
    for number, (name, model) in enumerate(CASES.items()):
        found = []
        for split in (Split(4), *SPLITS.values()):
            directory = folder / str(number) / str(split)
            train(split, folder / "data", directory, *model)
            found.append([gradient for gradient, images in steps(split, directory) if len(images) == 4])
        expected, *others = found
        apart = [max(off(own, one) for own, one in zip(other, expected, strict=True)) for other in others]
        lines.append(f"| {name} | {' | '.join(f'{x:.1g}' for x in apart)} |")
        print(lines[-1])
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        given, where, results, changes = json.loads(sys.argv[1])
        for values in given:
            chosen = Split(**values)
            train(chosen, Path(where), Path(results) / str(chosen), *changes)
    else:
        os.environ |= environment()
        warnings.simplefilter("ignore")
        with tempfile.TemporaryDirectory() as scratch:
            text = table(Path(scratch))
        (ROOT / "benchmarks" / "results" / "accumulation.md").write_text(text + "\n")
