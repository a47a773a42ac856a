"""The papers' figures, of your own runs: numbers as CSV and JSON, and pictures.

  codetr analyse figure=discriminability runs=[outputs/base,outputs/mine]
  codetr analyse figure=discriminability figure.of=decoder runs=['outputs/compare/*'] images=500
  codetr analyse figure=conflict runs=[best.ckpt] +data.root=/data/coco out=conflict

  discriminability   where encoder or decoder tell objects from background (Co-DETR, fig. 2 and 3)
  instability        queries that change their object (Co-DETR, fig. 5); of runs with callbacks=[default,snapshots]
  conflict           what heads look at, and how far apart that is (Co-DETR, fig. 6, 8 and 9)
  queries            original and customised positives (Co-DETR, fig. 7)
  groups             where groups of queries are, PD and MD (Group DETR, fig. 3 and 4)
  every_group        AP of every group on its own (Group DETR, footnote 2)

Figure 1 of both papers, convergence, is on the page that `codetr report RUN RUN ...` writes.

  runs=[A,B]            directories of runs, or checkpoints; patterns, too
  labels=null           of each run: equal ones are seeds of one variant; null: the run's name without its seed
  checkpoint=best       best, or last, in the directory of a run
  images=100            of the validation set (split=train: of the training set), spread evenly over it
  +data.root=DIR        where the data set lies now; other values of it likewise
  figure.layer=-1       and other choices that a paper leaves open: conf/figure/
  out=null              files OUT.csv, OUT.json, OUT.png; null: outputs/analyse/<figure>
"""

from __future__ import annotations

import csv
import glob
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codetr import application, commands
from codetr.errors import UserError
from codetr.files import atomically
from codetr.names import shown

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from codetr.analyses.subject import Result, Snapshot, Subject
    from codetr.data.transforms import TransformedDataset
    from codetr.types import Batch

CHOICES = {"checkpoint": ("best", "last"), "weights": ("ema", "raw"), "split": ("val", "train")}
_SEED = re.compile(r"[-_ ]*seed[-_ =]*\d+$")


def main(overrides: list[str]) -> int:
    """Raises UserError for a configuration, a checkpoint or data that is wrong, and for runs that lack what a figure is
    made of."""
    if any(override in commands.HELP for override in overrides):
        print((__doc__ or "").strip())
        return 0
    config = application.compose("analyse", overrides)
    application.require(config, runs="[outputs/mine]")
    application.one_of(config, **CHOICES)
    from hydra.utils import instantiate
    from lightning import seed_everything

    seed_everything(config.seed, verbose=False)
    subjects = opened(config)
    result = instantiate(config.figure, _convert_="all")(subjects)
    name = config.figure._target_.split(".")[-2]
    about = {"command": " ".join(["codetr analyse", *overrides]), "figure": application.plain(config)["figure"]}
    about |= {"runs": {subject.name: subject.label for subject in subjects}, "images": config.images}
    for path in write(Path(config.out or Path(config.paths.output_dir) / "analyse" / name), result, about):
        print(path)
    return 0


def opened(config: DictConfig) -> list[Subject]:
    """Every run of `config.runs`; checkpoints are read when a figure asks for them."""
    from codetr.analyses.subject import Subject
    from codetr.reporting.comparison import unlike

    runs = found(config.runs)
    names = unlike(runs)
    labels = list(config.labels or ([_SEED.sub("", name) or name for name in names]))
    if len(labels) != len(runs):
        raise UserError(f"labels={labels}: give one for each of the {len(runs)} runs, {', '.join(names)}")
    sets: dict[str, Callable[[], Iterator[Batch]]] = {}
    return [
        Subject(
            name=shown(name),
            label=shown(label),
            final=partial(snapshot, final(run, config.checkpoint), config),
            kept=[partial(snapshot, path, config) for path in sorted((run / "snapshots").glob("step_*.ckpt"))],
            batches=images_of(final(run, config.checkpoint), config, sets),
        )
        for run, name, label in zip(runs, names, labels, strict=True)
    ]


def found(runs: Any) -> list[Path]:
    """Raises UserError for a name without a run."""
    paths = []
    for name in application.as_names(runs):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        paths += [Path(match) for match in matches if Path(match).is_dir() or Path(match).suffix == ".ckpt"]
        if not any(Path(match).exists() for match in matches):
            raise UserError(f"runs: there is no {name}; give directories of runs, or checkpoints")
    if not paths:
        raise UserError("runs=[]: give at least one directory of a run, or checkpoint")
    return paths


def final(run: Path, checkpoint: str) -> Path:
    """The checkpoint of a run; a file is its own."""
    return run / "checkpoints" / f"{checkpoint}.ckpt" if run.is_dir() else run


def snapshot(path: Path, config: DictConfig) -> Snapshot:
    """Open one checkpoint."""
    from codetr.analyses.subject import Snapshot
    from codetr.inference.model import load_checkpoint
    from codetr.trust import build

    trust = application.as_names(config.trust)
    model = load_checkpoint(path, device=config.device, weights=config.weights, trust=trust)
    cost = build(model.config["criterion"].get("matching_cost"), path)
    return Snapshot(model.step, model.detector, model.class_names, cost, model.postprocess)


def images_of(
    path: Path, config: DictConfig, sets: dict[str, Callable[[], Iterator[Batch]]]
) -> Callable[[], Iterator[Batch]]:
    """What reads the images of a checkpoint's data set, or of the one given. sets: those that are open already."""
    from codetr.checkpoint import load_weights
    from codetr.eval import data_config
    from codetr.trust import build, parts

    checkpoint = load_weights(path)
    saved = parts(checkpoint.config, path, application.as_names(config.trust))
    given = data_config(config, saved["data"], checkpoint.class_names or ())
    key = str(application.plain(given))
    if key not in sets:
        data = build(given, path)
        data.setup("validate")
        sets[key] = partial(_batches, data.val_dataloader().dataset, given.get("size_divisor", 1), config)
    return sets[key]


def _batches(dataset: TransformedDataset, size_divisor: int, config: DictConfig) -> Iterator[Batch]:
    """With a bar that tells how far it is."""
    import numpy as np
    from rich.console import Console
    from rich.progress import track

    from codetr.data.collate import collate
    from codetr.inference.model import pick_device

    device = pick_device(config.device)
    count = min(config.images, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    console = Console(stderr=True)
    for first in track(range(0, count, config.batch_size), "looking at images", console=console, transient=True):
        samples = [dataset[0, i] for i in chosen[first : first + config.batch_size]]
        yield collate(samples, size_divisor).to(device)


def write(out: Path, result: Result, about: dict[str, Any]) -> list[Path]:
    """The files of a figure; `about` is said in the JSON. Raises UserError where they cannot be written."""
    import orjson

    table, numbers = out.with_name(f"{out.name}.csv"), out.with_name(f"{out.name}.json")
    with atomically(table) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(result.rows[0]))
        writer.writeheader()
        writer.writerows(result.rows)
    with atomically(numbers) as part:
        part.write_bytes(orjson.dumps({**about, **result.numbers}, option=orjson.OPT_INDENT_2) + b"\n")
    paths = [table, numbers]
    for name, picture in result.pictures.items():
        paths.append(out.with_name(f"{out.name}{name}.png"))
        with atomically(paths[-1]) as part:
            picture.savefig(part)
    return paths


if __name__ == "__main__":
    commands.leave(lambda: main(sys.argv[1:]))
