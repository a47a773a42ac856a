"""What a table of 100 million boxes costs to open and to share, and what reading annotations costs before there is one.

100 million boxes are about 6 GB of disk, twice that while they are written; `--boxes 10e6` are fewer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report

PER_IMAGE, CLASSES, CHUNK = 15, 365, 1 << 20
READS, WORKERS = 20_000, 2
MEMORY = ("Private_Dirty", "Private_Clean", "table")
READERS = ("json", "ijson", "msgspec", "pycocotools", "codetr, first time", "codetr, from then on")


def generate(source: Path, boxes: int) -> None:
    """The table of an annotation file `source` as if it had been read: straight into the cache's format."""
    from codetr.data import cache
    from codetr.data.findings import Findings
    from codetr.data.readers import coco
    from codetr.data.tabulate import Tabulated

    source.write_text("{}")
    folder = cache._folder(source, None)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{cache._stem(source, coco.read, False)}-") as temporary:
        table = Tabulated(columns(Path(temporary), boxes), [f"class {i}" for i in range(CLASSES)], None)
        sources = [cache._fingerprint(source)]
        cache._keep(folder, cache._stem(source, coco.read, False), Path(temporary), table, Findings(source), sources)


def columns(folder: Path, boxes: int) -> dict[str, np.ndarray]:
    rng, images = np.random.default_rng(0), boxes // PER_IMAGE
    names = "".join(f"patch{i // 20_000}/objects365_v2_{i:08}.jpg\0" for i in range(images)).encode()
    packed = np.frombuffer(names, np.uint8)
    ends = np.concatenate([[0], np.flatnonzero(packed == 0) + 1])
    offsets = np.concatenate([[0], np.sort(rng.integers(0, boxes + 1, images - 1)), [boxes]])
    none, no_offsets = np.empty(0, np.int32), np.empty(0, np.int64)
    corner = np.memmap(folder / "boxes", np.float64, "w+", shape=(boxes, 4))
    areas = np.memmap(folder / "areas", np.float64, "w+", shape=(boxes,))
    for i in range(0, boxes, CHUNK):
        part = corner[i : i + CHUNK]
        part[:] = rng.random(part.shape) * 300
        part[:, 2:] += part[:, :2]
        areas[i : i + CHUNK] = (part[:, 2:] - part[:, :2]).prod(1)
    return {
        "image_ids": np.arange(images),
        "sizes": np.full((images, 2), 640, np.int32),
        "names": packed,
        "name_offsets": ends,
        "folders": np.frombuffer("".join(f"patch{i}\0" for i in range(-(-images // 20_000))).encode(), np.uint8),
        "offsets": offsets,
        "boxes": corner,
        "categories": rng.integers(0, CLASSES, boxes, np.int32),
        "crowd": np.zeros(boxes, bool),
        "ignore": np.zeros(boxes, bool),
        "areas": areas,
        "segmentations": np.empty(0, np.uint8),
        "segmentation_offsets": no_offsets,
        **{"negative": none, "negative_offsets": no_offsets},
        **{"not_exhaustive": none, "not_exhaustive_offsets": no_offsets},
        "category_ids": np.arange(CLASSES),
        "counts": np.full(CLASSES, boxes // CLASSES),
        "image_counts": np.full(CLASSES, images // CLASSES),
    }


def memory() -> dict[str, float]:
    """Megabytes of this process that no other one shares, now; `table`: of these, pages of the table's file."""
    private, table, inside = {"Private_Clean": 0, "Private_Dirty": 0}, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word, *rest = line.split()
        if not word.endswith(":"):
            inside = bool(rest) and rest[-1].endswith(".table")
        elif word[:-1] in private:
            private[word[:-1]] += int(rest[0])
            table += int(rest[0]) * inside
    return {**{k: v / 1024 for k, v in private.items()}, "table": table / 1024}


class Truths:
    """A data set of what is known of images; the images are not there."""

    def __init__(self, source: Path) -> None:
        from codetr.data import dataset

        coco.check_files = lambda table, *_: (np.ones(len(table), bool), {})
        self.dataset = coco.DetectionDataset(source.parent, source)

    def __len__(self) -> int:
        return READS

    def __getitem__(self, index: int) -> dict[str, float]:
        image = int(np.random.default_rng(index).integers(len(self.dataset)))
        assert len(self.dataset.truth(image)["labels"]) >= 0
        return memory() if index >= READS - 8 * WORKERS else {}


def measure_workers(source: Path, start: str) -> dict[str, Any]:
    """The largest of the workers of a DataLoader near the end of 20,000 random images."""
    from torch.utils.data import DataLoader

    data = Truths(source)
    context = multiprocessing.get_context(start)
    loader = DataLoader(data, batch_size=4, num_workers=WORKERS, collate_fn=list, multiprocessing_context=context)
    began = time.perf_counter()
    found = [one for batch in loader for one in batch if one]
    seconds = time.perf_counter() - began
    return {k: max(one[k] for one in found) for k in found[0]} | {"seconds": seconds}


def measure_opening(source: Path) -> dict[str, Any]:
    import codetr.data.dataset  # noqa: F401
    from codetr.data.cache import open_table
    from codetr.data.checks import _present
    from codetr.data.readers import coco

    began = time.perf_counter()
    table, _ = open_table(source, coco.read, masks=False, cache=None)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    _present(source.parent, table)
    asked = time.perf_counter() - began
    began = time.perf_counter()
    Truths(source)
    built = time.perf_counter() - began
    size = table.path.stat().st_size / 2**30
    return {"table": opened, "files": asked, "data set": built, "gigabytes": size, "images": len(table)}


def measure_reader(name: str, source: Path) -> dict[str, float]:
    if name.startswith("codetr"):
        from codetr.data.cache import open_table
        from codetr.data.readers import coco

        coco.read(source, whole=0)  # compiles
        before = report.peak()
        began = time.perf_counter()
        open_table(source, coco.read, masks=True, cache=None)
    else:
        module = importlib.import_module("pycocotools.coco" if name == "pycocotools" else name)
        before = report.peak()
        began = time.perf_counter()
        if name == "pycocotools":
            module.COCO(source)
        elif name == "ijson":
            for key in ("images", "annotations", "categories"):
                with source.open("rb") as file:
                    for _ in module.items(file, f"{key}.item", use_float=True):
                        pass
        elif name == "msgspec":
            module.json.decode(source.read_bytes())
        else:
            module.loads(source.read_bytes())
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "megabytes": report.peak() - before}


def write_file(source: Path, annotations: int) -> None:
    """Half of the objects with a polygon of twenty points."""
    rng, images = np.random.default_rng(0), annotations // 10
    with source.open("w") as file:
        records = [{"id": i, "file_name": f"{i:012}.jpg", "width": 640, "height": 640} for i in range(images)]
        classes = [{"id": i + 1, "name": f"class {i}"} for i in range(80)]
        file.write(json.dumps({"images": records, "categories": classes})[:-1] + ', "annotations": [')
        for i in range(annotations):
            outline = [rng.uniform(0, 300, 40).round(2).tolist()] if i % 2 else [[1, 1, 9, 1, 9, 9]]
            record = {"id": i, "image_id": int(rng.integers(images)), "category_id": i % 80 + 1, "iscrowd": 0}
            record |= {"bbox": rng.uniform(1, 300, 4).round(2).tolist(), "area": i + 0.5, "segmentation": outline}
            file.write((", " if i else "") + json.dumps(record))
        file.write("]}")


def markdown(result: dict[str, Any]) -> str:
    opening, boxes = result["opening"], result["boxes"]
    lines = [
        f"{boxes / 1e6:.0f} million boxes in {opening['images'] / 1e6:.2f} million images, "
        f"{opening['gigabytes']:.1f} GB on disk (`make bench NAME=data/table`; {result['cores']} cores, shared).\n",
        "| Warm start | seconds |\n|---|---|",
        f"| table | {opening['table']:.3f} |",
        f"| are all image files there: their names against a listing per folder | {opening['files']:.1f} |",
        f"| data set: classes and counts | {opening['data set']:.3f} |\n",
        f"Private memory of a DataLoader worker (of {WORKERS}) after {READS:,} random images, in MB; the table's share "
        "are pages of the file that happen to be mapped by this worker alone, which the system drops when it needs "
        "them. With 15,000 boxes: what Python and PyTorch need themselves.\n",
        "| Start of workers | boxes | private, dirty | private, clean | of these: table |\n|---|---|---|---|---|",
        *(
            f"| {w['start']} | {w['boxes']:,} | " + " | ".join(f"{w[k]:.0f}" for k in MEMORY) + " |"
            for w in result["workers"]
        ),
        f"\nAn annotation file with {result['annotations']:,} objects, {result['file']:.0f} MB, half of them with polygons of 20 "
        "points; codetr checks all, with masks. Memory: the peak above what the program itself needs.\n",
        "| Read with | seconds | MB more |\n|---|---|---|",
        *(f"| {name} | {r['seconds']:.2f} | {r['megabytes']:.0f} |" for name, r in result["readers"].items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=float, default=100e6)
    parser.add_argument("--annotations", type=int, default=500_000, help="of the file that is read (default: 500000)")
    options = parser.parse_args()
    boxes = int(options.boxes)
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        large, small, file = (Path(temporary, n, "a.json") for n in ("large", "small", "file"))
        for path, count in ((large, boxes), (small, 1000 * PER_IMAGE)):
            path.parent.mkdir()
            generate(path, count)
        workers = [
            {"start": start, "boxes": count, **report.alone(measure_workers, path, start)}
            for start in ("fork", "spawn")
            for path, count in ((small, 1000 * PER_IMAGE), (large, boxes))
        ]
        opening = report.alone(measure_opening, large)
        file.parent.mkdir()
        write_file(file, options.annotations)
        present = [n for n in READERS if n.startswith("codetr") or importlib.util.find_spec(n)]
        readers = {name: report.alone(measure_reader, name, file) for name in present}
        result = {
            **{"boxes": boxes, "cores": multiprocessing.cpu_count(), "opening": opening, "workers": workers},
            **{"file": file.stat().st_size / 1e6, "annotations": options.annotations, "readers": readers},
        }
    report.write("table", markdown(result), result)
