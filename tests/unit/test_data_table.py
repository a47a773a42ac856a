"""Tables of annotations: kept while they are true, made anew when they are not, by one process of many."""

import functools
import json
import logging
import multiprocessing
import os
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import document, write

from codetr.data import cache, tabulate
from codetr.data.cache import open_table
from codetr.data.dataset import DetectionDataset
from codetr.data.findings import Findings
from codetr.data.image_records import take_lists
from codetr.data.readers import Document, coco
from codetr.data.table import Table
from codetr.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    doc = document(12)
    for a in doc["annotations"]:
        x, y, w, h = a["bbox"]
        a["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
    return write(tmp_path, doc)[1]


def logged(path: Path, note: Path) -> Document:
    """A reader that leaves a line in `note`."""
    with note.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return coco.read(path)


Read = Callable[..., tuple[Table, Findings]]


@pytest.fixture
def read(source: Path, tmp_path: Path) -> Read:
    reader = functools.partial(logged, note=tmp_path / "note")
    return lambda masks=False, cache=None: open_table(source, reader, masks=masks, cache=cache)


@pytest.fixture
def reads(tmp_path: Path) -> Callable[[], int]:
    """How often the file has been read."""
    note = tmp_path / "note"
    return lambda: len(note.read_text().splitlines()) if note.exists() else 0


def content(table: Table) -> dict[str, Any]:
    columns = {name: getattr(table, name).tolist() for name in table.layout["columns"]}
    return columns | {"all": table.names_from(0, 99), "classes": table.category_names}


def aged(path: Path, seconds: int = 100) -> None:
    """So long unchanged that its time of modification tells."""
    time = path.stat().st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(time, time))


def test_a_table_is_made_once(source: Path, read: Read, reads: Callable[[], int], monkeypatch: Any) -> None:
    aged(source)
    first, report = read()
    monkeypatch.setattr(cache, "_content", lambda path: pytest.fail("the content was read"))
    again, kept = read()
    assert reads() == 1
    assert content(again) == content(first)
    assert kept == report
    assert [p.suffix for p in sorted((source.parent / ".codetr_cache").iterdir())] == [".table", ".json", ".lock"]


def test_content_counts_and_times_do_not(source: Path, read: Read, reads: Callable[[], int], monkeypatch: Any) -> None:
    first, _ = read()
    aged(source)
    assert content(read()[0]) == content(first)
    assert reads() == 1
    with monkeypatch.context() as patch:  # the new time is known from now on
        patch.setattr(cache, "_content", lambda path: pytest.fail("the content was read"))
        read()
    doc = json.loads(source.read_text())
    doc["annotations"].pop()
    source.write_text(json.dumps(doc))
    assert len(read()[0].boxes) == len(first.boxes) - 1
    assert reads() == 2
    assert len(list(source.parent.glob(".codetr_cache/*.table"))) == 1


def test_a_change_within_one_tick_of_the_clock_is_seen(source: Path, read: Read, reads: Callable[[], int]) -> None:
    first, _ = read()
    stat = source.stat()
    source.write_text(source.read_text().replace('"disc"', '"dish"'))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.stat().st_size == stat.st_size
    assert read()[0].category_names == ("dish", "square", "star")
    assert first.category_names[0] == "disc"
    assert reads() == 2


def test_options_that_change_a_table_have_their_own(source: Path, read: Read, reads: Callable[[], int]) -> None:
    plain, _ = read()
    masked, _ = read(masks=True)
    assert (plain.has_masks, masked.has_masks) == (False, True)
    assert len(masked.segmentation_offsets) == len(masked.boxes) + 1
    read(), read(masks=True)
    assert reads() == 2
    parts = functools.partial(coco.read, name_parts=1)
    assert cache._describe(parts) != cache._describe(coco.read)
    assert cache._describe(functools.partial(parts, piece=2)) != cache._describe(parts)


def test_classes_are_a_view(source: Path, read: Read, reads: Callable[[], int], tmp_path: Path) -> None:
    reader = functools.partial(logged, note=tmp_path / "note")
    every = DetectionDataset(tmp_path / "train", source, reader=reader)
    some = DetectionDataset(tmp_path / "train", source, reader=reader, classes=["star", "disc"])
    assert reads() == 1
    assert some.label_counts == {name: every.label_counts[name] for name in ("star", "disc")}
    assert some.image_counts == {name: every.image_counts[name] for name in ("star", "disc")}


def test_a_warm_start_reports_the_same(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    doc = json.loads(source.read_text())
    for i, a in enumerate(doc["annotations"][:5]):
        a["bbox"] = [[0, 0, 0, 0], [1, 2], [500, 0, 3, 3], [-4, 0, 9, 9], None][i]
    doc["annotations"].append(doc["annotations"][-1])
    source.write_text(json.dumps(doc))
    messages = []
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            DetectionDataset(tmp_path / "train", source)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "5 bad records" in messages[0]
    (tmp_path / "train/000.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        report = DetectionDataset(tmp_path / "train", source, on_error="skip").report
    assert report.errors["missing image file"] == 1
    assert report.counts["box that reaches out of its image"] == 1
    assert "6 bad records dropped" in caplog.text


def test_a_table_of_another_version_is_replaced(
    source: Path,
    read: Read,
    reads: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read()
    monkeypatch.setattr(cache, "_VERSION", -1)
    read(), read()
    assert reads() == 2
    assert not caplog.records
    assert len(list(source.parent.glob(".codetr_cache/*.table"))) == 1


def damage(folder: Path, what: str) -> None:
    (table,), (head,) = folder.glob("*.table"), folder.glob("*.json")
    if what == "cut table":
        table.write_bytes(table.read_bytes()[:-100])
    elif what == "no table":
        table.unlink()
    elif what == "no layout":
        head.write_text(json.dumps(json.loads(head.read_text()) | {"layout": {}}))
    else:
        head.write_text({"cut head": head.read_text()[:50], "empty head": "", "other head": "[]"}[what])


@pytest.mark.parametrize("what", ["cut table", "no table", "cut head", "empty head", "other head", "no layout"])
def test_a_broken_table_is_made_anew(
    source: Path, read: Read, reads: Callable[[], int], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = content(read()[0])
    damage(source.parent / ".codetr_cache", what)
    with caplog.at_level(logging.WARNING):
        assert content(read()[0]) == expected
    assert "is broken" in caplog.text
    assert reads() == 2
    read()
    assert reads() == 2


def test_a_reader_that_fails_leaves_nothing(source: Path) -> None:
    def failing(path: Path) -> Document:
        document = coco.read(path)

        def annotations() -> Any:
            yield from list(document["annotations"])[:3]
            raise UserError("half")

        return Document(**document | {"annotations": annotations()})  # type: ignore[typeddict-item]

    with pytest.raises(UserError, match="half"):
        open_table(source, failing, masks=False, cache=None)
    assert [p.suffix for p in (source.parent / ".codetr_cache").iterdir()] == [".lock"]


def test_sources_of_a_reader_count(source: Path, tmp_path: Path) -> None:
    folder, count = tmp_path / "parts", 0
    folder.mkdir()

    def reader(path: Path) -> Document:
        nonlocal count
        count += 1
        return Document(**coco.read(path) | {"sources": [folder, source]})  # type: ignore[typeddict-item]

    for expected in (1, 1):
        open_table(source, reader, masks=False, cache=None)
        assert count == expected
    (folder / "new").touch()
    open_table(source, reader, masks=False, cache=None)
    assert count == 2
    (folder / "new").write_text("what is in it is no matter of the folder")
    open_table(source, reader, masks=False, cache=None)
    assert count == 2


def test_where_nothing_can_be_written_the_user_has_a_cache(
    source: Path, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source.parent / ".codetr_cache").write_text("a file, in which root cannot write either")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    read()
    assert len(list((tmp_path / "home/codetr").glob("*.table"))) == 1
    read(cache=tmp_path / "mine" / "tables")
    assert len(list((tmp_path / "mine/tables").glob("*.table"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    with pytest.raises(UserError, match=r"no table of .*train\.json can be kept in .*set data\.cache=FOLDER"):
        read()


def test_processes_that_want_one_table_make_one(source: Path, tmp_path: Path, reads: Callable[[], int]) -> None:
    fork = multiprocessing.get_context("fork")
    start, results = fork.Event(), fork.Queue()

    def work() -> None:
        start.wait()
        table, _ = open_table(source, functools.partial(logged, note=tmp_path / "note"), masks=True, cache=None)
        results.put(content(table))

    processes = [fork.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert reads() == 1
    assert all(f == found[0] for f in found)


def test_what_travels_to_workers_does_not_grow(tmp_path: Path) -> None:
    sizes, doc = [], document(4)
    for repeats in (1, 500):
        doc["annotations"] = [
            {**a, "id": 10_000 * k + i} for k in range(repeats) for i, a in enumerate(document(4)["annotations"])
        ]
        dataset = DetectionDataset(*write(tmp_path, doc, f"x{repeats:03}"))
        sizes.append(len(pickle.dumps(dataset)))
        assert len(dataset.truth(1)["boxes"]) == 2 * repeats
    assert sizes[1] - sizes[0] < 100


@pytest.mark.parametrize("batch", [1, 3, 7, 1000])
def test_batches_do_not_show(source: Path, tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plainest way to say it, with repeated ids, images without objects and objects without images."""
    doc = json.loads(source.read_text())
    doc["images"][5]["width"] = 0
    doc["images"].append(dict(doc["images"][2], file_name="again.jpg"))
    for a in doc["annotations"][3:12:4]:
        a["id"] = doc["annotations"][0]["id"]
    doc["annotations"][1]["image_id"] = 5.5
    doc["annotations"][2]["category_id"] = "seven"
    del doc["annotations"][4]["id"], doc["annotations"][5]["id"]
    source.write_text(json.dumps(doc))
    images = [i for i in doc["images"][:-1] if i["width"]]
    seen: set[Any] = set()
    good = []
    for a in doc["annotations"]:
        usable = a["image_id"] in {i["id"] for i in images} and a["category_id"] in (3, 7, 12)
        if usable and (a.get("id") is None or a["id"] not in seen):
            good.append(a)
            seen.add(a.get("id"))
    monkeypatch.setattr(tabulate, "_BATCH", batch)
    table, report = open_table(source, coco.read, masks=True, cache=tmp_path / str(batch))
    assert table.image_ids.tolist() == [i["id"] for i in images]
    assert (
        table.names_from(0, len(table))
        == [i["file_name"] for i in images]
        == [table.name(i) for i in range(len(images))]
    )
    for i, image in enumerate(images):
        own = [a for a in good if a["image_id"] == image["id"]]
        rows = slice(table.offsets[i], table.offsets[i + 1])
        assert table.category_ids[table.categories[rows]].tolist() == [a["category_id"] for a in own]
        xyxy = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        assert table.boxes[rows].tolist() == xyxy
        assert table.areas[rows].tolist() == [a["area"] for a in own]
        assert table.crowd[rows].tolist() == [bool(a["iscrowd"]) for a in own]
    usable = [a for a in good if not a["iscrowd"]]
    assert table.counts.tolist() == [sum(a["category_id"] == c for a in usable) for c in (7, 3, 12)]
    pairs = {(a["image_id"], a["category_id"]) for a in usable}
    assert table.image_counts.tolist() == [sum(c == category for _, c in pairs) for category in (7, 3, 12)]
    assert report.errors == {
        "bad image record": 1,
        "duplicate image id": 1,
        "annotation of an unknown image": 1,
        "unknown category id": 1,
        "duplicate annotation id": sum(a.get("id") == doc["annotations"][0]["id"] for a in doc["annotations"]) - 1,
    }


def test_lists_are_taken_by_row() -> None:
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 9, rng.integers(4)).tolist() for _ in range(20)]
    offsets = np.cumsum([0, *map(len, lists)])
    rows = np.flatnonzero(rng.random(20) < 0.6)
    values, ends = take_lists(np.array([v for own in lists for v in own]), offsets, rows)
    assert [values[a:b].tolist() for a, b in pairwise(ends)] == [lists[r] for r in rows]
