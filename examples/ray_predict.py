"""Objects in millions of images, as a Ray Data job: tables of Parquet, one row for every image.

    python ray_predict.py model.onnx photos found --actors 8 --gpus 1

What codetr.load opens will do: a checkpoint, or what codetr export made of it. Every part of the result is whole or not
there; started anew the job goes on with the images that no part has. An image that cannot be read is a row that says
why.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.progress import Progress

import codetr
from codetr.inference.sources import MAX_PIXELS, Unreadable

SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # (left, top, right, bottom) in pixels of the file
        ("scores", pa.list_(pa.float32())),
        ("categories", pa.list_(pa.int64())),  # of the data set that the detector was trained with
        ("error", pa.string()),
    ]
)


class Predictor:
    """One process with one detector. trust: see `codetr.load`."""

    def __init__(self, model: str, score_threshold: float, device: str, trust: tuple[str, ...]) -> None:
        self.model, self.score_threshold = codetr.load(model, device=device, trust=trust), score_threshold

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        paths = [Path(file) for file in batch["file"]]
        found = self.model.stream(paths, self.score_threshold, len(paths), 0, MAX_PIXELS)
        return pa.Table.from_pylist([row(one) for one in found], SCHEMA)


def row(one: Any) -> dict[str, Any]:
    """Of a result, or of an image that cannot be read."""
    if isinstance(one, Unreadable):
        return {"file": str(one.path), "boxes": [], "scores": [], "categories": [], "error": one.reason}
    return {
        "file": str(one.path),
        "height": one.size[0],
        "width": one.size[1],
        "boxes": one.boxes_xyxy.tolist(),
        "scores": one.scores.tolist(),
        "categories": [one.category_ids[label] for label in one.labels.tolist()],
    }


def images(folder: Path) -> list[str]:
    """All images below a folder, sorted."""
    endings = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
    below = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return sorted(str(path) for path in below if path.suffix.lower() in endings)


def done(out: Path) -> set[str]:
    """The images that the parts in `out` have."""
    parts = sorted(out.glob("part-*.parquet"))
    return {file for part in parts for file in pq.read_table(part, columns=["file"])["file"].to_pylist()}


def shares(files: list[str], size: int) -> Iterator[list[str]]:
    yield from (files[start : start + size] for start in range(0, len(files), size))


def write(table: pa.Table, out: Path) -> None:
    """As the next part, at once."""
    number = len(list(out.glob("part-*.parquet")))
    unfinished = out / f".part-{number:06d}.parquet"
    pq.write_table(table, unfinished)
    unfinished.replace(out / f"part-{number:06d}.parquet")


def run(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    before = done(options.out)
    left = [file for file in images(options.images) if file not in before]
    print(f"{len(before)} images are done, {len(left)} are left")
    device = "cuda" if options.gpus else "cpu"
    arguments = (str(options.model.resolve()), options.score_threshold, device, tuple(options.trust))
    with Progress() as progress:
        task = progress.add_task("images", total=len(left))
        for files in shares(left, options.part):
            found = ray.data.from_items([{"file": file} for file in files]).map_batches(
                Predictor,
                fn_constructor_args=arguments,
                batch_size=options.batch_size,
                concurrency=options.actors,
                num_gpus=options.gpus or None,
            )
            write(pa.concat_tables(found.iter_batches(batch_size=None, batch_format="pyarrow")), options.out)
            progress.advance(task, len(files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint, or what codetr export made of one")
    parser.add_argument("images", type=Path, help="a folder that every machine sees; files in folders below count")
    parser.add_argument("out", type=Path, help="folder of the parts")
    parser.add_argument("--score-threshold", type=float, default=0.3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--actors", type=int, default=1, help="processes, each with a detector (%(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="of each process (%(default)s)")
    parser.add_argument("--part", type=int, default=10_000, help="images in a part (%(default)s)")
    parser.add_argument("--trust", nargs="*", default=[], help="see codetr.load; torch.export for a .pt2")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
