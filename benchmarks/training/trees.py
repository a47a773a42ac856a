"""Trees in real photographs: Co-DETR (K = 2), the same without auxiliary heads, and Faster R-CNN of torchvision.

All start from the same backbone weights, see the same augmented tiles and train for the same time on this machine: the
first as long as `experiment=trees` says, the others as many steps as take as long. They are validated alike, on a
photograph of a place that none of them saw, tile by tile. Finished rows are kept: an interrupted comparison goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from benchmarks import report
from codetr import application
from codetr.evaluation.inputs import inputs
from codetr.types import Batch, Detections
from codetr.views import Found, Picture, Pixels
from codetr.views.view import whole

NUMBERS = ("map", "map_50", "map_75", "mar_500")
ROWS = {"k2": "Co-DETR, K = 2", "k0": "the same, K = 0", "rival": "Faster R-CNN (torchvision)"}
K0 = ("model/auxiliary_head=[]",)
TIMED = 12  # steps, of which the first two warm up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/compare_trees"))
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows of the table")
    parser.add_argument("overrides", nargs="*", help="of experiment=trees, for all three")
    options = parser.parse_args()
    given = [*options.overrides, f"seed={options.seed}"]
    rows = {name: kept(options.out, name, given) for name in options.only}
    write({ROWS[name]: row for name, row in rows.items()}, options.out / "k2")


def kept(out: Path, name: str, given: list[str]) -> dict[str, Any]:
    """A row: of a finished run, or of one that is made now."""
    file = out / f"{name}.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        row = trained(out / "k2", given) if name == "k2" else _as_long(out, name, given)
        file.write_text(json.dumps(row))
    return json.loads(file.read_text())


def _as_long(out: Path, name: str, given: list[str]) -> dict[str, Any]:
    """Of what trains for as long as `experiment=trees` does."""
    config = application.compose("train", ["experiment=trees", *given, "run_dir=nowhere"])
    steps = steps_per_epoch(config)
    budget = config.trainer.max_epochs * steps * seconds_per_step(given)
    if name == "rival":
        return rival(config, budget)
    epochs = round(budget / seconds_per_step([*given, *K0]) / steps)
    return trained(out / name, [*given, *K0, f"trainer.max_epochs={epochs}"])


def steps_per_epoch(config: DictConfig) -> int:
    data = instantiate(config.data)
    data.prepare_data()
    data.setup("fit")
    return len(data.train_dataloader())


def seconds_per_step(given: list[str]) -> float:
    """Of the training alone, in a process of its own."""
    return report.alone(_seconds_per_step, given)


def _seconds_per_step(given: list[str]) -> float:
    config = application.compose("train", ["experiment=trees", *given, "run_dir=nowhere"])
    data = instantiate(config.data)
    data.setup("fit")
    config.model.num_classes = len(data.class_names)
    detector, criterion = instantiate(config.model.detector, _convert_="all"), instantiate(config.criterion)
    optimizer = instantiate(config.optimizer)(detector, fused=True)
    times = []
    for batch in islice(endless(data), TIMED):
        start = time.perf_counter()
        output = detector(batch.images, batch.padding, batch.targets)
        torch.stack(list(criterion(output, batch.targets).values())).sum().backward()
        nn.utils.clip_grad_norm_(detector.parameters(), config.trainer.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[len(times[2:]) // 2]


def endless(data: Any) -> Iterator[Batch]:
    """Training batches, epoch after epoch."""
    loader = data.train_dataloader()
    for epoch in count():
        loader.batch_sampler.set_epoch(epoch)
        yield from loader


def trained(folder: Path, given: list[str]) -> dict[str, Any]:
    """metrics.json, with the minutes that the run took unless it had been begun before."""
    begun, start = folder.exists(), time.monotonic()
    command = [sys.executable, "-m", "codetr.train", "experiment=trees", f"run_dir={folder}", "resume=auto", *given]
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, check=True, env=dict(os.environ))
    minutes = None if begun else (time.monotonic() - start) / 60
    return {**json.loads((folder / "metrics.json").read_text()), "minutes": minutes}


# -- Faster R-CNN


class Pyramid(nn.Module):
    """Our backbone with torchvision's feature pyramid, as FasterRCNN wants it."""

    def __init__(self, backbone: nn.Module, width: int = 256) -> None:
        super().__init__()
        self.body, self.out_channels = backbone, width
        self.fpn = FeaturePyramidNetwork(list(backbone.channels), width, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): level for i, level in enumerate(self.body(images))})


def faster_rcnn(config: DictConfig, side: int) -> FasterRCNN:
    backbone = instantiate(config.model.detector.backbone, _convert_="all")
    mean, std = (list(config.model.detector.backbone[key]) for key in ("mean", "std"))
    return FasterRCNN(
        Pyramid(backbone),
        num_classes=2,
        min_size=side,
        max_size=2 * side,
        image_mean=[value / 255 for value in mean],
        image_std=[value / 255 for value in std],
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4),
        box_detections_per_img=300,
        box_score_thresh=0.001,
    )


@dataclass
class Trainee:
    """lr: of AdamW at its height, a fifth of it for the backbone, as ours."""

    model: FasterRCNN
    lr: float = 1e-3

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        targets = batch.targets
        rows = zip(targets.boxes_xyxy, targets.labels, targets.valid, strict=True)
        truth = [{"boxes": boxes[valid], "labels": labels[valid] + 1} for boxes, labels, valid in rows]
        sum(self.model([image / 255 for image in batch.images], truth).values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    def optimizer(self) -> torch.optim.Optimizer:
        backbone, rest = [], []
        for name, parameter in self.model.named_parameters():
            (backbone if ".body." in name else rest).append(parameter)
        groups = [{"params": backbone, "lr": self.lr / 5}, {"params": rest}]
        return torch.optim.AdamW(groups, self.lr, weight_decay=0.05, fused=True)


def rival(config: DictConfig, budget: float) -> dict[str, Any]:
    """Faster R-CNN, trained for `budget` seconds with a warm-up, a cosine and averaged weights."""
    torch.manual_seed(config.seed)
    data = instantiate(config.data)
    data.setup("fit")
    trainee = Trainee(faster_rcnn(config, config.data.train_transform.crop))
    optimizer, batches = trainee.optimizer(), endless(data)
    times = []
    for batch in islice(batches, TIMED):
        start = time.perf_counter()
        trainee.step(optimizer, batch)
        times.append(time.perf_counter() - start)
    steps = round(budget / sorted(times[2:])[len(times[2:]) // 2])
    torch.manual_seed(config.seed)
    trainee = Trainee(faster_rcnn(config, config.data.train_transform.crop))
    optimizer, batches = trainee.optimizer(), endless(data)
    average = AveragedModel(trainee.model, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=50)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - 50))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [50])
    start = time.monotonic()
    for batch in track(islice(batches, steps), ROWS["rival"], total=steps):
        trainee.step(optimizer, batch)
        schedule.step()
        average.update_parameters(trainee.model)
    minutes = (time.monotonic() - start) / 60
    return {**validated(average.module, config, data), "minutes": minutes, "steps": steps}


def validated(model: FasterRCNN, config: DictConfig, data: Any) -> dict[str, Any]:
    """Tile by tile, by the same metric."""
    (tiles,), metric = application.views(config, ()), instantiate(config.metrics, data.class_names)()
    model.eval()
    model.transform.min_size = (tiles.size,)
    model.transform.max_size = 2 * tiles.size
    data.val_pixels = True
    with torch.inference_mode():
        for batch in data.val_dataloader():
            found = tiles(partial(see, model), [Pixels(pixels) for pixels in batch.pixels])
            metric.update(*inputs(batch.image_ids, [one["val"] for one in found], batch.truth, masks=False))
    metric.compute()
    return dict(metric.evaluations["bbox"].numbers)


def see(model: FasterRCNN, pictures: Sequence[Picture]) -> list[Found]:
    found = model([picture.read(whole(picture)) / 255 for picture in pictures])
    return [{"val": Detections(one["scores"], one["labels"] - 1, one["boxes"])} for one in found]


# -- results


def write(rows: dict[str, dict[str, Any]], folder: Path) -> None:
    cells = [
        [name, *(f"{row[n]:.3f}" for n in NUMBERS), f"{row['minutes']:.0f}" if row["minutes"] else "not timed"]
        for name, row in rows.items()
    ]
    about = (
        "One photograph with 279 trees, of a place that no training saw, one seed; minutes of training, of ours with "
        f"its validations. `make bench NAME=training/trees`, {date.today()}, {report.machine()}."
    )
    report.write("trees", f"{report.table(('', *NUMBERS, 'minutes'), cells)}\n\n{about}", rows)
    Image.open(folder / "predictions.png").convert("RGB").save(report.folder / "trees_predictions.jpg", quality=85)
    shutil.copy(folder / "curves.png", report.folder / "trees_curves.png")
