"""What well-kept libraries would give in place of the scanner of large JSON files, of the table and of the writers.

They are not among the dependencies: pip install ijson msgspec pysimdjson pyarrow supervision
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import report
from benchmarks.data.table import columns, write_file

LISTS = ("categories", "images", "annotations")
DECODERS = ("codetr", "ijson", "msgspec", "msgspec.Raw", "simdjson")
READS = 20_000


def records(name: str, source: Path) -> Iterator[Any]:
    """What the three lists of a COCO file hold, as Python objects, in the order in which a table is made."""
    if name == "codetr":
        from codetr.data.readers import coco

        document = coco.read(source, whole=0)
        yield from chain(document["categories"], document["images"], document["annotations"])
    elif name == "ijson":
        import ijson

        for key in LISTS:
            with source.open("rb") as file:
                yield from ijson.items(file, f"{key}.item", use_float=True)
    elif name == "msgspec":
        import msgspec

        document = msgspec.json.decode(source.read_bytes())
        yield from chain.from_iterable(document[key] for key in LISTS)
    elif name == "msgspec.Raw":
        import msgspec

        with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            parts = msgspec.json.decode(memoryview(view), type=dict[str, msgspec.Raw])
            for key in LISTS:
                yield from map(msgspec.json.decode, msgspec.json.decode(parts[key], type=list[msgspec.Raw]))
            del parts
    else:
        import simdjson

        document = simdjson.Parser().parse(source.read_bytes())
        yield from (record.as_dict() for key in LISTS for record in document[key])


def measure_decoder(name: str, source: Path) -> dict[str, float]:
    small = source.with_name("small.json")
    small.write_text('{"images": [], "annotations": [{"id": 1}], "categories": []}')
    assert len(list(records(name, small))) == 1  # imports, compiles
    before, began = report.peak(), time.process_time()
    number = sum(1 for _ in records(name, source))
    return {"objects": number, "seconds": time.process_time() - began, "megabytes": report.peak() - before}


def measure_table(name: str, folder: Path) -> dict[str, float]:
    """Opens what `write_tables` wrote, lists all names, and reads the boxes of random images."""
    began, before = time.perf_counter(), report.peak()
    if name == "codetr":
        from codetr.data.table import Table

        imported = time.perf_counter()
        table = Table(folder / "ours", json.loads((folder / "layout.json").read_text()))
        boxes, offsets, size = table.boxes, table.offsets, (folder / "ours").stat().st_size
        opened = time.perf_counter()
        names = table.names_from(0, len(table))
    else:
        import pyarrow as pa

        imported = time.perf_counter()
        with pa.memory_map(str(folder / "arrow")) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
        objects = batch.column("objects")
        offsets = objects.offsets.to_numpy()
        boxes = objects.values.field("box").values.to_numpy().reshape(-1, 4)
        size = (folder / "arrow").stat().st_size
        opened = time.perf_counter()
        names = batch.column("name").to_pylist()
    listed = time.perf_counter()
    images = np.random.default_rng(0).integers(0, len(offsets) - 1, READS)
    total = sum(boxes[offsets[i] : offsets[i + 1]].sum() for i in images)
    return {
        **{"import, s": imported - began, "open, s": opened - imported, "all names, s": listed - opened},
        **{"20,000 images, s": time.perf_counter() - listed, "MB more": report.peak() - before, "GB on disk": size / 2**30},
        **{"checksum": float(total) + len(names)},
    }


def write_tables(folder: Path, boxes: int) -> None:
    import pyarrow as pa

    from codetr.data import table

    data = columns(folder, boxes)
    (folder / "layout.json").write_text(json.dumps(table.write(folder / "ours", data, [], None)))
    keys = ("categories", "crowd", "ignore", "areas")
    flat = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(data["boxes"]).ravel()), 4)
    objects = pa.StructArray.from_arrays([flat, *(pa.array(data[k]) for k in keys)], ["box", *keys])
    images = {
        "id": pa.array(data["image_ids"]),
        "size": pa.FixedSizeListArray.from_arrays(pa.array(data["sizes"].ravel()), 2),
        "name": pa.array(table.texts(data["names"])),
        "objects": pa.LargeListArray.from_arrays(pa.array(data["offsets"]), objects),
    }
    batch = pa.record_batch(images)
    with pa.OSFile(str(folder / "arrow"), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def convert(folder: Path) -> list[str]:
    """A drawn set with crowds and half pixels through VOC and YOLO with supervision: what comes back."""
    import supervision as sv

    from codetr.data.readers import voc, yolo
    from codetr.shapes import PRESETS, generate

    generate(folder / "coco", PRESETS["tiny"], seed=0, workers=1)
    source = folder / "coco" / "annotations" / "instances_train.json"
    truth = json.loads(source.read_text())
    for record in truth["annotations"]:
        record["bbox"][2] -= 0.5
    source.write_text(json.dumps(truth))
    ours = sv.DetectionDataset.from_coco(str(folder / "coco" / "train"), str(source))
    places = {k: str(folder / k) for k in ("Annotations", "JPEGImages", "images", "labels")}
    ours.as_pascal_voc(places["JPEGImages"], places["Annotations"])
    yaml = folder / "data.yaml"
    ours.as_yolo(places["images"], places["labels"], str(yaml))
    yaml.write_text(yaml.read_text() + f"\nval: {places['images']}\n")
    lines = []
    for name, found in (("VOC", voc.read(Path(places["Annotations"]))), ("YOLO", yolo.read(yaml / "val"))):
        boxes = np.array([a["bbox"] for a in found["annotations"]])
        crowds = sum(bool(a.get("iscrowd")) for a in found["annotations"])
        true = np.array([a["bbox"] for a in truth["annotations"]])
        far = max(np.abs(true - b).max(1).min() for b in boxes)
        lines.append(f"| {name} | {len(true)}, {sum(a['iscrowd'] for a in truth['annotations'])} | "
                     f"{len(boxes)}, {crowds} | {far:.2g} |")  # fmt: skip
    picture = truth["images"][0]["file_name"]
    same = (folder / "coco" / "train" / picture).read_bytes() == (folder / "JPEGImages" / picture).read_bytes()
    return [*lines, f"\nImages come out {'as they are' if same else 'encoded anew'}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=float, default=10e6, help="of the table (default: 10e6)")
    parser.add_argument("--annotations", type=int, default=500_000, help="of the file that is decoded")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        write_file(folder / "a.json", options.annotations)
        decoders = {name: report.alone(measure_decoder, name, folder / "a.json") for name in DECODERS}
        (folder / "a.json").unlink()
        write_tables(folder, int(options.boxes))
        tables = {name: report.alone(measure_table, name, folder) for name in ("codetr", "pyarrow")}
        lines = convert(folder)
    keys = [k for k in tables["codetr"] if k != "checksum"]
    assert tables["codetr"]["checksum"] == tables["pyarrow"]["checksum"]
    text = [
        f"`make bench NAME=data/libraries`, {os.cpu_count()} cores, shared. {decoders['codetr']['objects']:,} records "
        "as in the table of `data/table`, decoded, nothing checked; memory is the peak above what the program itself "
        "needs.\n",
        report.table(
            ["Decoded by", "processor seconds", "MB more"],
            [[name, f"{d['seconds']:.1f}", f"{d['megabytes']:.0f}"] for name, d in decoders.items()],
        ),
        f"\n{options.boxes / 1e6:.0f} million boxes in a file that is mapped into memory.\n",
        report.table(["Table", *keys], [[name, *(f"{t[k]:.3g}" for k in keys)] for name, t in tables.items()]),
        "\nA drawn set, its boxes half a pixel narrower, through supervision's writers.\n",
        "| Format | objects, crowds before | after | farthest box, pixels |\n|---|---|---|---|",
        *lines,
    ]
    report.write("libraries", "\n".join(text))
