"""Parameters, arithmetic, memory, and the batch that fits a card, before anything is built.

  codetr estimate experiment=co_deformable_r50_12e
  codetr estimate model=co_dino model/backbone=swin_large sizes=[[800,1333],[1280,2048]] cards=[24,80]
  codetr estimate experiment=demo sizes=[[128,128]] batches=[8] out=cost.json

Runs training steps and inferences on tensors that have shapes and no content: no memory, seconds each. Takes what
training takes: the model, its losses, optimizer, moving average and precision (trainer.precision=bf16-mixed).

  sizes=[[800,1333]]    (height, width) of padded batches
  batches=[1,2]         images of a step
  objects=20            of an image
  cards=[8,...,80]      memory of cards, in GiB
  reserve=0.1           share of a card that is left: the driver's context, workspaces of kernels, fragments
  out=null              out=cost.json: also into this file
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codetr import commands

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.table import Table

    from codetr.costs.estimate import Estimator

GIB, MIB = 2**30, 2**20
PHASES = ("training", "inference")


def main(overrides: list[str]) -> int:
    """Raises UserError for a configuration that is none, and for a detector that cannot be estimated."""
    from rich.console import Console

    from codetr import application

    if any(override in commands.HELP for override in overrides):
        print((__doc__ or "").strip())
        return 0
    config = application.compose("estimate", overrides)
    _check(config)
    result = estimated(config)
    console = Console()
    for table in _tables(result):
        console.print(table)
    if config.out:
        _write(Path(config.out), {"command": " ".join(["codetr estimate", *overrides]), **result})
    return 0


def estimated(config: DictConfig) -> dict[str, Any]:
    """Everything in plain containers: weights, costs by size and batch, the largest batch by size and card."""
    from rich.progress import Progress

    from codetr.costs.estimate import Estimator
    from codetr.costs.step import with_classes

    limits = [card * GIB * (1 - config.reserve) for card in config.cards]
    with Progress(transient=True) as progress:
        progress.add_task("Steps without content", total=None)
        estimator = Estimator(config, with_classes(config), config.objects)
        by_size = [_of_size(estimator, (height, width), config.batches, limits) for height, width in config.sizes]
    return {
        "weights": vars(estimator.weights),
        "costs": [cost for costs, _ in by_size for cost in costs],
        "cards": list(config.cards),
        "reserve": config.reserve,
        "fits": [fits for _, fits in by_size],
    }


def _of_size(
    estimator: Estimator, size: tuple[int, int], batches: list[int], limits: list[float]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The costs of batches, and the largest ones within `limits` in bytes."""
    from functools import cache

    from codetr.costs.estimate import largest_batches

    training = cache(lambda batch: estimator.training(batch, size))
    inference = cache(lambda batch: estimator.inference(batch, size))
    costs = [
        {"batch": n, "size": list(size), "training": vars(training(n)), "inference": vars(inference(n))}
        for n in batches
    ]
    fits = {
        "training": largest_batches(lambda n: training(n).memory, limits),
        "inference": largest_batches(lambda n: inference(n).memory, limits),
    }
    return costs, {"size": list(size), **fits}


def _check(config: DictConfig) -> None:
    from codetr.errors import UserError

    for height, width in config.sizes:
        if min(height, width) < 1:
            raise UserError(f"sizes=[[{height},{width}]]: give heights and widths in pixels")
    for key in ("batches", "cards"):
        if not config[key] or min(config[key]) <= 0:
            raise UserError(f"{key}={config[key]}: give at least one number, all above 0")
    if not 0 <= config.reserve < 1:
        raise UserError(f"reserve={config.reserve}: give a share of the card's memory, from 0 to below 1")


def _tables(result: dict[str, Any]) -> Iterator[Table]:
    weights = result["weights"]
    yield _table(
        ["parameters", "trained", "at inference", "weights", "optimizer's state", "average"],
        [
            [f"{weights[name] / 1e6:.1f} M" for name in ("parameters", "trained", "at_inference")]
            + [f"{weights[name] / MIB:.0f} MiB" for name in ("bytes", "state", "average")]
        ],
    )
    yield _table(
        ["batch", "training step", "kept for backward", "GFLOP", "inference", "GFLOP"],
        [
            [
                f"{one['batch']} x {one['size'][0]} x {one['size'][1]}",
                f"{one['training']['memory'] / GIB:.2f} GiB",
                f"{one['training']['kept'] / GIB:.2f} GiB",
                f"{one['training']['flops'] / 1e9:.0f}",
                f"{one['inference']['memory'] / GIB:.2f} GiB",
                f"{one['inference']['flops'] / 1e9:.0f}",
            ]
            for one in result["costs"]
        ],
    )
    rows = [
        [f"{height} x {width}, {what}", *map(str, own[what])]
        for own in result["fits"]
        for height, width in [own["size"]]
        for what in PHASES
    ]
    yield _table(["largest batch on a card of", *(f"{card:g} GiB" for card in result["cards"])], rows)


def _table(head: list[str], rows: list[list[str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    return table


def _write(path: Path, result: dict[str, Any]) -> None:
    import json

    from codetr.files import atomically

    with atomically(path, advice="choose another out=FILE") as part:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    commands.leave(lambda: main(sys.argv[1:]))
