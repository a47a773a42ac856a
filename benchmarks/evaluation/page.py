"""What the page of a run costs beside the evaluation that it is about: time and size, each in a process of its own."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import report
from benchmarks.evaluation.speed import BATCH, CLASSES, DETECTIONS, OBJECTS, Task, batches, clocks

HEIGHT, WIDTH = 480, 640  # of the photographs


def measure(images: int) -> dict[str, Any]:
    """Seconds, on the wall and of the processors, and MB."""
    from codetr.callbacks.report import write_metrics
    from codetr.reporting import page, stored

    task = Task()
    task.metric.keeps_columns = True
    about = stored.About([str(k) for k in range(CLASSES)], DETECTIONS, masks=False, federated=False, images=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(folder / "photo.jpg")
        files, sizes = [str(folder / "photo.jpg")] * images, np.full((images, 2), (HEIGHT, WIDTH))
        parts = {"evaluation": clocks() * 0}
        for found, truth in batches(images):
            start = clocks()
            task.update(found, truth)
            parts["evaluation"] += clocks() - start
        start = clocks()
        task.compute()
        parts["evaluation"] += clocks() - start
        start = clocks()
        stored.of_columns(task.metric.columns, images, about, range(images), sizes, files).save(folder)
        parts["storing"] = clocks() - start
        write_metrics(folder / "metrics.json", task.metric.evaluations["bbox"], {"step": 1})
        start = clocks()
        path = page.write(folder)
        parts["page"] = clocks() - start
        size = {"page_mb": path.stat().st_size / 1e6, "stored_mb": (folder / stored.FILES["bbox"]).stat().st_size / 1e6}
    seconds = {key: list(map(float, value)) for key, value in parts.items()}
    return {"images": images, **seconds, **size, "load": os.getloadavg()[0]}


def markdown(rows: list[dict[str, Any]]) -> str:
    head = ["images", "evaluation", "storing", "page", "together", "size of the page", "of what is stored"]
    table = []
    for row in rows:
        parts = np.array([row[key] for key in ("evaluation", "storing", "page")])
        times = [f"{wall:.2f} s ({own:.2f} s)" for wall, own in (*parts.tolist(), parts.sum(0).tolist())]
        table.append([f"{row['images']:,}", *times, f"{row['page_mb']:.1f} MB", f"{row['stored_mb']:.1f} MB"])
    loads = [row["load"] for row in rows]
    about = (
        f"{DETECTIONS} detections and about {OBJECTS} objects per image, {CLASSES} classes; {report.machine()}, on "
        f"which {min(loads):.0f} to {max(loads):.0f} processes ran. In brackets: of the processors, which others "
        "do not change. The first page of a process also reads plotly's code."
    )
    return f"{about}\n\n{report.table(head, table)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10 * BATCH, 100 * BATCH], help="of every evaluation")
    rows = [report.alone(measure, images) for images in parser.parse_args().images]
    report.write("report", markdown(rows), rows)
