"""Every kind of detector in every exported format, beside PyTorch. Differences, file sizes and latencies, a row each.

Rows that are there already are kept, so that it goes on where it was interrupted.
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
from benchmarks.export.models import FULL, TOY, batch, graph
from codetr.exporting.formats import FORMATS, Work
from codetr.exporting.graph import Canvas, Graph
from codetr.inference.about import FORM, About
from codetr.inference.runtimes import RUNTIMES

NAME = "export_matrix"
TIE = 1e-5  # scores that float32 does not tell apart: such pairs may change places
TOY_CASES = ((1, 160, 224), (3, 192, 192), (8, 192, 160))  # images, height, width
FULL_CASES = ((1, 640, 640), (2, 640, 512))
TOY_SIZE, FULL_SIZE = (192, 224), (640, 640)  # of the timed image, and of graphs with a fixed size
TIMES = {False: 15, True: 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="detectors of full width, too")
    parser.add_argument("--models", nargs="+", choices=(*TOY, *FULL), help="only these")
    parser.add_argument("--formats", nargs="+", choices=("onnx", "openvino", "tensorrt", "torch"), help="only these")
    parser.add_argument("--again", action="store_true", help="measure rows that are there anew")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after so long")
    options = parser.parse_args()
    models = dict.fromkeys(TOY, False) | (dict.fromkeys(FULL, True) if options.full else {})
    models = {name: name in FULL for name in options.models or models}
    wanted = [(name, form) for name in models for form in options.formats or ("onnx", "openvino", "tensorrt", "torch")]
    path = report.folder / f"{NAME}.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    if not options.again:
        done = {(row["model"], row["format"]) for row in rows}
        wanted = [one for one in wanted if one not in done]
    begun = time.monotonic()
    names = [name for name in models if any(name == one for one, _ in wanted)]
    for place, name in enumerate(names):
        if time.monotonic() - begun > 60 * options.minutes:
            print(f"{len(names) - place} detectors are left: run it again")
            break
        forms = [form for one, form in wanted if one == name]
        print(f"[{place + 1}/{len(names)}] {name}: {', '.join(forms)}", flush=True)
        new = report.alone(measured, name, forms)
        rows = [one for one in rows if (one["model"], one["format"]) not in {(name, form) for form in forms}] + new
        report.write(NAME, markdown(rows), rows)


def measured(name: str, forms: list[str]) -> list[dict[str, Any]]:
    """The rows of a detector. onnx and openvino are made of one graph, the others each have their own."""
    works: dict[str, Work] = {}
    rows = []
    for form in forms:
        kind = "onnx" if form == "openvino" else form
        works[kind] = works.get(kind) or work_of(name, kind)
        rows.append({"model": name, "format": form} | row(works[kind], form, name in FULL))
    return rows


def work_of(name: str, form: str) -> Work:
    full = name in FULL
    own, canvas = graph((FULL | TOY)[name], form, FULL_SIZE if full else TOY_SIZE, detections=100 if full else 20)
    about = About(FORM, ("a", "b", "c"), None, 32, canvas.least, canvas.size, "fp32", 20, 0.3, 0, {})
    return Work(own, canvas, about, 20)


def row(work: Work, form: str, full: bool) -> dict[str, Any]:
    size, cases = (FULL_SIZE, FULL_CASES) if full else (TOY_SIZE, TOY_CASES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{FORMATS[form].suffix}"
        begun = time.perf_counter()
        FORMATS[form].write(work, path)
        seconds = time.perf_counter() - begun
        megabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        run = RUNTIMES[path.suffix].open(path, torch.device("cpu")).run
        found = {"full": full, "size": list(size), "date": f"{date.today()}", "symbolic": work.canvas.size is None}
        found |= {"megabytes": megabytes, "export_seconds": seconds}
        return found | compared(run, work.graph, work.canvas, cases) | timed(run, work.graph, size, TIMES[full])


Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def compared(run: Run, own: Graph, canvas: Canvas, cases: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """The largest differences of boxes (pixels), scores and masks from PyTorch's on batches of noise with padding."""
    worst = {"box": 0.0, "score": 0.0, "mask": 0.0}
    for count, *sides in cases:
        images, sizes = batch(count, *(canvas.size or sides))
        with torch.no_grad():
            expected = own(images, sizes)
        found = run({"images": images.numpy(), "sizes": sizes.numpy()})
        for i in range(count):
            given = [torch.from_numpy(np.array(found[name][i])) for name in own.outputs]
            for key, value in differences(given, [one[i] for one in expected]).items():
                worst[key] = max(worst[key], value)
    return worst


def differences(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Of one image: scores place by place; each box, and its mask, from the nearest pair of its class whose score is
    the same within `TIE`; infinite where there is none."""
    same = ((found[1][:, None] - expected[1]).abs() <= TIE) & (found[2][:, None] == expected[2])
    boxes = (found[0][:, None] - expected[0]).abs().amax(-1).where(same, torch.inf)
    worst = {"score": (found[1] - expected[1]).abs().max().item(), "box": boxes.amin(1).max().item()}
    if len(found) > 3:
        partner = boxes.argmin(1)
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
    order = [*TOY, *FULL]
    cells = [
        [
            row["model"],
            row["format"],
            "any" if row["symbolic"] else "fixed",
            f"{row['box']:.0e}",
            f"{row['score']:.0e}",
            f"{row['mask']:.0e}" if row["mask"] else "",
            f"{row['megabytes']:.1f}",
            f"{row['file_ms']:.1f}",
            f"{row['eager_ms']:.1f}",
        ]
        for row in sorted(rows, key=lambda row: (order.index(row["model"]), row["format"]))
    ]
    head = ["model", "format", "size", "boxes, px", "scores", "masks", "MB", "ms", "PyTorch, ms"]
    toy, full = ("x".join(map(str, size)) for size in (TOY_SIZE, FULL_SIZE))
    foot = (
        "Random weights; largest differences from the detector in PyTorch on images of noise, in batches of 1, 3 and 8 "
        f"with padding (full width: 1 and 2); ms: the median of one image, {toy} at toy width and {full} at full width,"
        " file and PyTorch in turns. The tensorrt file is run by ONNX Runtime. `make export-matrix`, "
        f"{rows[-1]['date']}, {report.machine()}, {torch.get_num_threads()} thread(s)."
    )
    return f"{report.table(head, cells)}\n\n{foot}"


if __name__ == "__main__":
    main()
