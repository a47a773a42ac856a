"""Every kind of detector in every exported format, beside PyTorch. Differences, file sizes and latencies, a row each.

Rows are written one by one, and those that are there are kept: it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.export.models import FULL, SHAPES, TOY, batch, graph, samples
from benchmarks.export.shapes import traced
from codetr.exporting.formats import FORMATS, Work
from codetr.exporting.graph import Canvas, Graph
from codetr.inference.about import FORM, About
from codetr.inference.runtimes import RUNTIMES

NAME = "export_matrix"
TIE = 1e-5  # scores that float32 does not tell apart: such pairs may change places
FORMS = ("onnx", "openvino", "tensorrt", "torch")
TOY_SIZE = (192, 224)  # height and width of the timed image, and of graphs with a fixed size
TOY_CASES = ((1, 160, 224), (3, 192, 192), (8, 192, 160))  # images, height, width
TOY_TIMES, FULL_TIMES = 15, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="detectors of full width, too")
    parser.add_argument("--models", nargs="+", choices=(*TOY, *FULL, *SHAPES), help="only these")
    parser.add_argument("--formats", nargs="+", choices=FORMS, help="only these")
    parser.add_argument("--again", action="store_true", help="measure rows that are there anew")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after so long")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    path = report.folder / f"{NAME}.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    done = {(row["model"], row["format"]) for row in rows if not options.again and not stale(row)}
    for name in options.models or (*TOY, *((*FULL, *SHAPES) if options.full else ())):
        forms = ("torch",) if name in SHAPES else options.formats or FORMS
        works: dict[str, Work] = {}
        for form in forms:
            if (name, form) in done:
                continue
            if time.monotonic() > end:
                print("The time is over: run it again for the rows that are left")
                return
            print(f"{name}, {form}", flush=True)
            new = {"model": name, "format": form} | measured(name, form, works)
            rows = [row for row in rows if (row["model"], row["format"]) != (name, form)] + [new]
            report.write(NAME, markdown(rows), rows)


def measured(name: str, form: str, works: dict[str, Work]) -> dict[str, Any]:
    """works: the graphs of this detector so far, by what they were made for; formats that can share one do."""
    if name in SHAPES:
        side, overrides = SHAPES[name]
        return traced(overrides, (side, side)) | {"full": True, "date": f"{date.today()}"}
    size, cases, times = TOY_SIZE, TOY_CASES, TOY_TIMES
    if name in FULL:
        side = FULL[name][0]
        size, cases, times = (side, side), ((1, side, side), (2, side, side * 3 // 4)), FULL_TIMES
    kind = shared(form, works)
    if kind not in works:
        works[kind] = work_of(name, kind, size)
    return {"full": name in FULL, "date": f"{date.today()}"} | row(works[kind], form, size, cases, times)


def stale(row: dict[str, Any]) -> bool:
    """Of files in which deformable attention had another form, and whose batch mates were not measured."""
    return not row.keys() & {"mates", "operations"}


def shared(form: str, works: dict[str, Work]) -> str:
    """For what the graph is made that this format takes."""
    if form == "tensorrt" and "onnx" in works and not samples(works["onnx"].graph):
        return "onnx"
    return "onnx" if form == "openvino" else form


def work_of(name: str, kind: str, size: tuple[int, int]) -> Work:
    overrides = FULL[name][1] if name in FULL else TOY[name]
    own, canvas = graph(overrides, kind, size, detections=100 if name in FULL else 20)
    about = About(FORM, ("a", "b", "c"), None, 32, canvas.least, canvas.size, "fp32", 20, 0.3, 0, {})
    return Work(own, canvas, about, 20)


def row(
    work: Work, form: str, size: tuple[int, int], cases: Sequence[tuple[int, int, int]], times: int
) -> dict[str, Any]:
    """size: of the timed image. cases: see `compared`. times: how often it is timed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{FORMATS[form].suffix}"
        begun = time.perf_counter()
        FORMATS[form].write(work, path)
        seconds = time.perf_counter() - begun
        megabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        run = RUNTIMES[path.suffix].open(path, torch.device("cpu")).run
        found = {"size": list(size), "symbolic": work.canvas.size is None}
        found |= {"megabytes": megabytes, "export_seconds": seconds}
        return found | compared(run, work.graph, work.canvas, cases) | timed(run, work.graph, size, times)


Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def compared(run: Run, own: Graph, canvas: Canvas, cases: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """The largest differences of boxes (pixels), scores and masks from PyTorch's on batches of noise with padding.

    Each case is a number of images, a height and a width, which a fixed size replaces. "mates": how much a box of the
    last image differs from that of the same image alone, in the file. "swapped": places of the order that differ,
    where scores are equal within `TIE`. "spread": the least standard deviation of a coordinate of an image's boxes.
    """
    worst = {"box": 0.0, "score": 0.0, "mask": 0.0, "mates": 0.0, "swapped": 0}
    spread = torch.inf
    for count, *sides in cases:
        images, sizes = batch(count, *(canvas.size or sides))
        with torch.no_grad():
            expected = own(images, sizes)
        found = outputs(run, own, images, sizes)
        spread = min(spread, found[0].std(1).min().item())
        for i in range(count):
            for key, value in differences([one[i] for one in found], [one[i] for one in expected]).items():
                worst[key] = worst[key] + value if key == "swapped" else max(worst[key], value)
        if count > 1:
            alone = outputs(run, own, images[-1:], sizes[-1:])
            mates = differences([one[0] for one in alone], [one[-1] for one in found])
            worst["mates"] = max(worst["mates"], mates["box"])
    return worst | {"spread": spread, "batches": [count for count, *_ in cases]}


def outputs(run: Run, own: Graph, images: Tensor, sizes: Tensor) -> list[Tensor]:
    found = run({"images": images.numpy(), "sizes": sizes.numpy()})
    return [torch.from_numpy(np.array(found[name])) for name in own.outputs]


def differences(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Of one image: scores place by place; each box, and its mask, from the nearest pair of its class whose score is
    the same within `TIE`; infinite where there is none, or where one pair stands for two."""
    same = ((found[1][:, None] - expected[1]).abs() <= TIE) & (found[2][:, None] == expected[2])
    boxes = (found[0][:, None] - expected[0]).abs().amax(-1).where(same, torch.inf)
    worst = {"score": (found[1] - expected[1]).abs().max().item()}
    worst["box"] = max(boxes.amin(1).max().item(), boxes.amin(0).max().item())
    partner = boxes.argmin(1)
    worst["swapped"] = int((boxes.diagonal() > 1e-3).sum())
    if len(found) > 3:
        worst["mask"] = (found[3] - expected[3][partner]).abs().max().item()
    return worst


def timed(run: Run, own: Graph, size: tuple[int, int], times: int) -> dict[str, float]:
    """Milliseconds of one image, file and PyTorch in turns; the first of each does not count."""
    images, sizes = batch(1, *size)
    taken: dict[str, list[float]] = {"file": [], "eager": []}
    with torch.no_grad():
        for _ in range(times + 1):
            begun = time.perf_counter()
            run({"images": images.numpy(), "sizes": sizes.numpy()})
            between = time.perf_counter()
            own(images, sizes)
            taken["eager"].append(time.perf_counter() - between)
            taken["file"].append(between - begun)
    return {f"{name}_ms": 1000 * median(own[1:]) for name, own in taken.items()}


def markdown(rows: list[dict[str, Any]]) -> str:
    order = [*TOY, *FULL, *SHAPES]
    shown = sorted(rows, key=lambda row: (order.index(row["model"]), FORMS.index(row["format"])))
    head = ["model", "format", "sizes", "timed at", "boxes, px", "scores", "masks", "mates, px", "swapped", "MB", "ms"]
    foot = (
        "Random weights, images of noise with padding. The largest differences from the detector in PyTorch, in "
        f"batches of 1, 3 and 8 (full width: 1 and 2), of {' and '.join(f'{h} x {w}' for _, h, w in TOY_CASES)} pixels "
        "where any size is taken; mates: of the last image of a batch from the same image alone; swapped: places in "
        f"the order of detections that differ, all with scores that agree to {TIE:.0e}. MB: of the file. ms: medians "
        "of one image, file and PyTorch in turns, on two cores of which other work took a part. The tensorrt file is "
        "run by ONNX Runtime."
        + " Rows without mates are of an older form of the files."
        * any(map(stale, rows))
        + " `make export-matrix`, "
        f"{rows[-1]['date']}, {report.machine()}, {torch.get_num_threads()} thread(s)."
    )
    return f"{report.table([*head, 'PyTorch, ms'], [cells(row) for row in shown])}\n\n{foot}"


def cells(row: dict[str, Any]) -> list[str]:
    sizes, at = "any" if row["symbolic"] else "fixed", "{} x {}".format(*row["size"])
    if "operations" in row:
        said = f"{row['operations']} operations traced, shapes as they should be; not run"
        return [row["model"], row["format"], sizes, at, said, *[""] * 7]
    return [
        row["model"],
        row["format"],
        sizes,
        at,
        f"{row['box']:.0e}",
        f"{row['score']:.0e}",
        f"{row['mask']:.0e}" if row["mask"] else "",
        f"{row['mates']:.0e}" if "mates" in row else "",
        str(row.get("swapped", "")),
        f"{row['megabytes']:.1f}",
        f"{row['file_ms']:.1f}",
        f"{row['eager_ms']:.1f}",
    ]


if __name__ == "__main__":
    main()
