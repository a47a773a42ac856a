"""Views on the demo's photograph: AP of the whole image, of tiles, of test-time augmentation and of both, and seconds.

Of a checkpoint of `make demo`. Tiles are also compared with what predictions of each of them cost. Finished rows are
kept: an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
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
from codetr.views import TTA, WBF, Pixels, Tiles, Views
from codetr.views.view import Part, whole

NUMBERS = ("map", "map_50", "map_75", "mar_500")
DEFAULT = Path("outputs/compare_trees/k2/checkpoints/best.ckpt")


def cases(size: int) -> dict[str, tuple[Views, ...]]:
    tiles, flips = Tiles(size=size), {"vertical_flip": True, "scales": [1.0]}
    return {
        "whole image": (),
        "tiles": (tiles,),
        "tiles and the whole": (Tiles(size=size, full=True),),
        "whole, 3 scales, mirrored": (TTA(),),
        "whole, 3 scales, mirrored; WBF": (TTA(merge=WBF()),),
        "tiles, mirrored both ways": (tiles, TTA(**flips)),
        "tiles, mirrored both ways; WBF": (tiles, TTA(**flips, merge=WBF())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT, help="of experiment=trees (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/views"), help="of finished rows (%(default)s)")
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
    done = options.out / "rows.json"
    rows: dict[str, Any] = json.loads(done.read_text()) if done.exists() else {}
    for name, views in track(cases(size).items(), "views"):
        if name not in rows:
            start = time.perf_counter()
            found = model.look(Pixels(image), 0.0, views)
            seconds = time.perf_counter() - start
            metric = instantiate(config.metrics, data.class_names)()
            metric.update(*inputs(batch.image_ids, [found], batch.truth))
            metric.compute()
            rows[name] = {**metric.evaluations["bbox"].numbers, "seconds": seconds}
            options.out.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(rows))
    times = beside_the_sum(model, image, Tiles(size=size), options.rounds)
    write(rows, times, image.shape[-2:])


def beside_the_sum(model: Model | Exported, image: Tensor, tiles: Tiles, rounds: int) -> dict[str, float]:
    """Seconds of tiles, and of predictions of all of them in batches of as many; the least of all rounds, in turns."""
    picture = Pixels(image)
    parts = [Part(picture, view) for view in tiles.of(picture.size)]
    images = [part.read(whole(part)) for part in parts]
    runs = {
        "tiles": lambda: model.predict(image, 0.0, views=tiles),
        "sum": lambda: model.predict(images, 0.0, batch_size=tiles.batch_size, views=()),
    }
    times = {name: float("inf") for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name] = min(times[name], time.perf_counter() - start)
    return {**times, "count": len(parts)}


def write(rows: dict[str, dict[str, float]], times: dict[str, float], size: Sequence[int]) -> None:
    cells = [[name, *(f"{row[n]:.3f}" for n in NUMBERS), f"{row['seconds']:.1f}"] for name, row in rows.items()]
    ratio = times["tiles"] / times["sum"]
    about = (
        f"One photograph of {size[1]} x {size[0]} pixels with 279 trees, one checkpoint: differences of a few "
        f"hundredths may be chance. Seconds with {torch.get_num_threads()} threads. {times['count']:.0f} tiles took "
        f"{times['tiles']:.1f} s, predictions of each of them {times['sum']:.1f} s: {ratio:.2f} times the sum. "
        f"`make bench NAME=inference/views`, {date.today()}, {report.machine()}."
    )
    text = f"{report.table(('', *NUMBERS, 'seconds'), cells)}\n\n{about}"
    report.write("views", text, {"rows": rows, "tiles": times})


if __name__ == "__main__":
    main()
