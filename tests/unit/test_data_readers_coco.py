"""Files in the formats of COCO, LVIS and Objects365 against the packages of COCO and LVIS."""

import contextlib
import io
import json
import logging
import random
import string
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import document, write, write_image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from codetr.data import tabulate
from codetr.data.dataset import DetectionDataset
from codetr.data.readers import coco, json_stream
from codetr.data.segmentations import fault
from codetr.errors import UserError
from lvis_api import LVIS

Doc = dict[str, Any]
in_pieces = partial(coco.read, whole=0)


def outlined(doc: Doc) -> Doc:
    """With a triangle for every object."""
    for a in doc["annotations"]:
        x, y, w, h = a["bbox"]
        a["segmentation"] = [[x, y, x + w, y, x + w / 2, y + h]]
    return doc


def lvis_document(count: int) -> Doc:
    doc = outlined(document(count))
    rng = np.random.default_rng(1)
    doc["categories"] = [
        {**c, "frequency": f, "image_count": 1, "instance_count": 1, "synset": "a.n.01"}
        for c, f in zip(doc["categories"], "rfc", strict=True)
    ]
    for i, image in enumerate(doc["images"]):
        name = image.pop("file_name")
        image["coco_url"] = f"http://images.cocodataset.org/{'train2017' if i % 3 else 'val2017'}/{name}"
        image["neg_category_ids"] = rng.permutation([3, 7, 12])[: i % 3].tolist()
        image["not_exhaustive_category_ids"] = rng.permutation([3, 7, 12])[: i % 2].tolist()
    for a in doc["annotations"]:
        del a["iscrowd"]
    return doc


def write_lvis(folder: Path, doc: Doc) -> Path:
    for image in doc["images"]:
        path = folder.joinpath(*image["coco_url"].split("/")[-2:])
        write_image(path, image["width"], image["height"])
    (folder / "lvis.json").write_text(json.dumps(doc))
    return folder / "lvis.json"


def test_lvis_is_what_its_package_reads(tmp_path: Path) -> None:
    doc = lvis_document(9)
    source = write_lvis(tmp_path, doc)
    theirs = LVIS(source)
    dataset = DetectionDataset(tmp_path, source, masks=True, rle=True)
    categories = theirs.load_cats(theirs.get_cat_ids())
    assert dataset.class_names == tuple(c["name"] for c in categories)
    assert dataset.frequencies == tuple(c["frequency"] for c in categories)
    label = {c: i for i, c in enumerate(dataset.category_ids)}
    assert len(dataset) == len(theirs.imgs)
    compared = 0
    for index in range(len(dataset)):
        sample = dataset[index]
        image, objects = theirs.imgs[sample.image_id], theirs.img_ann_map[sample.image_id]
        assert str(dataset.path(index).relative_to(tmp_path)) == "/".join(image["coco_url"].split("/")[-2:])
        truth = sample.truth
        assert truth["neg_labels"].tolist() == [label[c] for c in image["neg_category_ids"]]
        assert truth["not_exhaustive_labels"].tolist() == [label[c] for c in image["not_exhaustive_category_ids"]]
        assert truth["labels"].tolist() == [label[a["category_id"]] for a in objects]
        assert truth["area"].tolist() == [a["area"] for a in objects]
        assert not truth["iscrowd"].any()
        boxes = np.array([a["bbox"] for a in objects]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_array_equal(truth["boxes"], boxes)
        assert sample.masks is not None
        for mask, runs, annotation in zip(sample.masks, truth["rle"], objects, strict=True):
            expected = theirs.ann_to_mask(annotation)
            assert torch.equal(mask, torch.from_numpy(expected))
            np.testing.assert_array_equal(coco_mask.decode(runs), expected)
            compared += 1
    assert compared > 10


def test_lists_of_categories_follow_the_selected_classes(tmp_path: Path) -> None:
    doc = lvis_document(6)
    source = write_lvis(tmp_path, doc)
    some = DetectionDataset(tmp_path, source, classes=["star", "disc"])
    assert some.frequencies == ("c", "r")
    label = {12: 0, 7: 1}
    for index, image in enumerate(doc["images"]):
        expected = [label[c] for c in image["neg_category_ids"] if c in label]
        assert some.truth(index)["neg_labels"].tolist() == expected


def test_objects365_names_count_from_their_patch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    doc = document(6)
    for i, image in enumerate(doc["images"]):
        version = 1 + i % 2
        image["file_name"] = f"images/v{version}/patch{i // 2}/objects365_v{version}_{i:08}.jpg"
        short = image["file_name"].split("/", 2)[2]
        if i != 3:  # some files of Objects365 are known to be missing
            write_image(tmp_path / "train" / short, image["width"], image["height"])
    source = tmp_path / "zhiyuan_objv2_train.json"
    source.write_text(json.dumps(doc))
    reader = partial(coco.read, name_parts=2)
    with pytest.raises(UserError, match=r"1 x missing image file: image 109 \(.*/train/patch1/objects365_v2_00000003"):
        DetectionDataset(tmp_path / "train", source, reader=reader)
    with caplog.at_level(logging.WARNING):
        dataset = DetectionDataset(tmp_path / "train", source, reader=reader, on_error="skip")
    assert "1 bad records dropped" in caplog.text
    assert dataset.image_ids.tolist() == [100, 103, 106, 112, 115]
    assert dataset.path(4) == tmp_path / "train/patch2/objects365_v2_00000005.jpg"
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(source)
    for index in range(len(dataset)):
        sample = dataset[index]
        expected = [a["category_id"] for a in theirs.imgToAnns[sample.image_id]]
        assert [dataset.category_ids[v] for v in sample.truth["labels"]] == expected
    kept = {i["id"] for i in doc["images"]} - {109}
    used = [a for a in doc["annotations"] if a["image_id"] in kept and not a["iscrowd"]]
    ids = [3, 7, 12]
    names = {7: "disc", 3: "square", 12: "star"}
    assert dataset.label_counts == {names[c]: sum(a["category_id"] == c for a in used) for c in (7, 3, 12)}
    images_with = {names[c]: len({a["image_id"] for a in used if a["category_id"] == c}) for c in ids}
    assert dataset.image_counts == images_with


def test_ignored_objects_are_truth_that_is_not_trained_on(tmp_path: Path) -> None:
    doc = document(8)
    for i, a in enumerate(doc["annotations"]):
        a |= {"ignore": int(i % 3 == 0)}
    dataset = DetectionDataset(*write(tmp_path, doc))
    of_image = {i["id"]: [a for a in doc["annotations"] if a["image_id"] == i["id"]] for i in doc["images"]}
    ignored = 0
    for index in range(len(dataset)):
        sample, objects = dataset[index], of_image[int(dataset.image_ids[index])]
        assert sample.truth["ignore"].tolist() == [bool(a["ignore"]) for a in objects]
        assert len(sample.labels) == sum(not a["ignore"] and not a["iscrowd"] for a in objects)
        ignored += sum(a["ignore"] for a in objects)
    assert ignored > 3
    assert sum(dataset.label_counts.values()) == len(dataset.objects().labels)


def awkward_text(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters + '"\\{}[],: äß✓\n', k=rng.randrange(30)))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("piece", [1, 100, 10**6])
def test_pieces_hold_what_json_reads(tmp_path: Path, piece: int, indent: int | None) -> None:
    rng = random.Random(piece)
    doc: Doc = {"info": {"a": [1, {"images": [2]}]}, awkward_text(rng): awkward_text(rng), "licenses": []}
    doc |= {"annotations": [], "images": [], "categories": []}
    for i in range(40):
        for key in ("annotations", "images", "categories"):
            value = rng.choice([awkward_text(rng), -1.5e-7, None, [[1, [2]], {}], {"counts": ']}"', "size": [1, 2]}])
            doc[key].append({"id": i, awkward_text(rng): value, "nan": float("nan")})
    path = tmp_path / "a.json"
    for prefix in ("", "\ufeff", " \n"):
        path.write_text(prefix + json.dumps(doc, indent=indent, ensure_ascii=bool(indent)))
        read = coco.read(path, whole=0, piece=piece)
        for key in ("annotations", "images", "categories"):
            assert repr(list(read[key])) == repr(doc[key])  # type: ignore[literal-required]


def test_small_and_large_files_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, source = write(tmp_path, outlined(document(12)))
    whole = DetectionDataset(root, source, masks=True)
    monkeypatch.setattr(tabulate, "_BATCH", 4)
    pieces = DetectionDataset(root, source, reader=partial(in_pieces, piece=200), masks=True)
    for index in range(len(whole)):
        a, b = whole[index], pieces[index]
        torch.testing.assert_close(a.truth, b.truth, rtol=0, atol=0)
        assert torch.equal(a.masks, b.masks)
    assert whole.label_counts == pieces.label_counts
    assert whole.image_counts == pieces.image_counts


def test_large_files_fail_as_clearly_as_small_ones(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    good = json.dumps(document(3))

    def read(text: str) -> None:
        source.write_text(text)
        for records in in_pieces(source).values():
            list(records)  # type: ignore[call-overload]

    read(good)
    with pytest.raises(UserError, match=r"a\.json is not JSON: it ends within .* copied in full\?"):
        read(good[:-20])
    with pytest.raises(UserError, match=r"a\.json is not a COCO instances file: it does not begin with an object"):
        read("[1, 2]")
    with pytest.raises(UserError, match=r"no list of objects under annotations"):
        read(json.dumps(document(3) | {"annotations": {}}))
    with pytest.raises(UserError, match=r"no list of objects under images"):
        read(json.dumps(document(3) | {"images": [1, 2]}))
    at = good.index(":", good.index('"width"'))
    with pytest.raises(UserError, match=rf"is not JSON \(.*about byte {at}"):
        read(good[:at] + "?" + good[at + 1 :])


def test_compressed_runs_that_pycocotools_would_trust_are_counted() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = tuple(rng.integers(1, 70, 2).tolist())
        pixels = np.asfortranarray(rng.random(size) < rng.random(), np.uint8)
        if rng.random() < 0.5:
            pixels[:, : size[1] // 2] = 0
        counts = coco_mask.encode(np.asfortranarray(pixels))["counts"].decode()
        assert fault({"size": list(size), "counts": counts}, size) is None
        for wrong in (counts[:-1], counts + "1", counts + "\x10", ""):
            assert "do not add up" in (fault({"size": list(size), "counts": wrong}, size) or "")


def test_large_files_are_read_where_nothing_can_be_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba has no folder to write to on a read-only installation without a home."""
    from numba.core.caching import CacheImpl

    source = tmp_path / "a.json"
    doc = {"images": [{"id": i} for i in range(50)], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    source.write_text(json.dumps(doc))
    for implementation in CacheImpl.__subclasses__():
        monkeypatch.setattr(implementation, "_locator_classes", [])
    json_stream._scanner.cache_clear()
    assert list(coco.read(source, whole=0, piece=64)["images"]) == doc["images"]
    json_stream._scanner.cache_clear()
