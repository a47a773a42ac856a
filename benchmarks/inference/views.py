"""Views on the demo's photograph: AP of the whole image, of tiles, and of tiles that are mirrored, too.

Of a checkpoint of `make demo`. Tiles are also compared with what predictions of each of them cost. What was found in a
view is kept: an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from rich.progress import track
from torch import Tensor

import codetr
from benchmarks import report
from codetr import application
from codetr.evaluation.inputs import inputs
from codetr.inference import Exported, Model
from codetr.types import MAIN
from codetr.views import TTA, WBF, Found, Picture, Pixels, SoftNMS, Tiles, Views, through
from codetr.views.view import Part

NUMBERS = ("map", "map_50", "map_75", "mar_500")
DEFAULT = Path("outputs/compare_trees/k2/checkpoints/best.ckpt")
COMPARED = 640  # pixels: of the part of the photograph on which times are compared


def cases(size: int) -> dict[str, tuple[Views, ...]]:
    tiles = Tiles(size=size)
    return {
        "whole image": (),
        "tiles": (tiles,),
        "tiles and the whole image": (Tiles(size=size, full=True),),
        "tiles, each mirrored; NMS": (tiles, TTA(scales=[1.0])),
        "tiles, each mirrored; soft-NMS": (tiles, TTA(scales=[1.0], merge=SoftNMS())),
        "tiles, each mirrored; weighted boxes fusion": (tiles, TTA(scales=[1.0], merge=WBF())),
    }


class Remembered:
    """Looks at each view once: what was found is kept in a file."""

    def __init__(self, model: Model | Exported, file: Path) -> None:
        self.model, self.file = model, file
        self.found: dict[Any, Found] = pickle.loads(file.read_bytes()) if file.exists() else {}  # our own
        self.count = 0

    def __call__(self, pictures: Sequence[Picture]) -> list[Found]:
        self.count += len(pictures)
        keys = [key(picture) for picture in pictures]
        for name, picture in zip(keys, pictures, strict=True):
            if name not in self.found:
                self.found[name] = {MAIN: self.model.look(picture, 0.0, ())}
        return [self.found[name] for name in keys]

    def keep(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(pickle.dumps(self.found))


def key(picture: Picture) -> tuple[Any, ...]:
    """What a view of the photograph shows, whichever views it is seen through; the outer ones are not mirrored."""
    top = left = 0
    flips: tuple[int, ...] = ()
    height, width = picture.size
    while isinstance(picture, Part):
        top, left = top + picture.view.window.top, left + picture.view.window.left
        flips, picture = picture.view.flips or flips, picture.of
    return top, left, height, width, flips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT, help="of experiment=trees (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/views"), help="of what was found (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of the comparison with the sum (%(default)s)")
    options = parser.parse_args()
    model = codetr.load(options.checkpoint, device="cpu")
    config = application.compose("train", ["experiment=trees", "run_dir=nowhere"])
    data = instantiate(config.data)
    data.prepare_data()
    data.setup("validate")
    data.val_pixels = True
    (batch,) = data.val_dataloader()
    (image,) = batch.pixels
    size = config.views.tiles.size
    times = beside_the_sum(model, image[:, :COMPARED, :COMPARED], Tiles(size=size), options.rounds)
    see = Remembered(model, options.out / "found.pickle")
    rows: dict[str, Any] = {}
    for name, views in track(cases(size).items(), "views"):
        see.count = 0
        (found,) = through(views, see)([Pixels(image)])
        see.keep()
        metric = instantiate(config.metrics, data.class_names)()
        metric.update(*inputs(batch.image_ids, [found[MAIN]], batch.truth))
        metric.compute()
        rows[name] = {**metric.evaluations["bbox"].numbers, "views": see.count}
    write(rows, times, (image.shape[-2], image.shape[-1]))


def beside_the_sum(model: Model | Exported, image: Tensor, tiles: Tiles, rounds: int) -> dict[str, float]:
    """Seconds of tiles, and of predictions of all of them in batches of as many; the least of all rounds, in turns."""
    picture = Pixels(image)
    views = tiles.of(picture.size)
    images = [picture.read(view.window).clone() for view in views]
    runs = {
        "tiles": lambda: model.predict(image, 0.0, views=tiles),
        "sum": lambda: model.predict(images, 0.0, batch_size=tiles.batch_size, views=()),
    }
    times = dict.fromkeys(runs, float("inf"))
    runs["sum"]()  # warms up
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name] = min(times[name], time.perf_counter() - start)
    return {**times, "count": len(views)}


def write(rows: dict[str, dict[str, float]], times: dict[str, float], size: tuple[int, int]) -> None:
    cells = [[name, *(f"{row[n]:.3f}" for n in NUMBERS), f"{row['views']}"] for name, row in rows.items()]
    ratio = times["tiles"] / times["sum"]
    about = (
        f"One photograph of {size[1]} x {size[0]} pixels with 279 trees, one checkpoint: differences of a few "
        f"hundredths may be chance. What {times['count']:.0f} tiles cost: {times['tiles']:.2f} s, where predictions of "
        f"each of them take {times['sum']:.2f} s: {ratio:.2f} times the sum ({torch.get_num_threads()} threads). "
        f"`make bench NAME=inference/views`, {date.today()}, {report.machine()}."
    )
    text = f"{report.table(('', *NUMBERS, 'views'), cells)}\n\n{about}"
    report.write("views", text, {"rows": rows, "tiles": times})


if __name__ == "__main__":
    main()
