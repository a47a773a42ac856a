"""Every engine against pycocotools and lvis-api on many small cases that are hard on an evaluator."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluation import KEYS, NAMES, Image, evaluate, reference, update, xywh

from codetr.errors import UserError
from codetr.evaluation import engines
from codetr.evaluation.mean_ap import detection_metric
from codetr.types import Detections
from lvis_api import LVIS, LVISEval, LVISResults

GRID = (8.0, 16.0, 32.0, 96.0, 100.0)  # sides on and beside the borders of the area ranges


def hard_case(generator: np.random.Generator, extras: Sequence[int] = (0, 2, 8, 30)) -> dict[int, Image]:
    """A few images: equal scores and boxes, crowds, areas of zero and on borders, boxes without area, empty images,
    classes that only one side has, more detections than count."""
    images = {}
    for i in generator.permutation(50)[: generator.integers(1, 5)].tolist():
        objects, extra = generator.integers(0, 7), generator.choice(extras)
        boxes, found = boxes_of(generator, objects), boxes_of(generator, extra)
        near = boxes + generator.choice([0.0, 1.0, 4.0], (objects, 4))
        found = np.concatenate([found, near, near[: generator.integers(0, 3)]])
        scores = generator.choice([0.2, 0.5, 0.9, *generator.random(3)], len(found))
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1) * generator.choice([0.0, 0.5, 1.0], objects)
        truth = {
            "boxes": torch.tensor(boxes),
            "labels": torch.tensor(generator.integers(0, 3, objects)),
            "iscrowd": torch.tensor(generator.random(objects) < 0.2).long(),
            "area": torch.tensor(area),
        }
        labels = torch.tensor(generator.integers(1, 5, len(found)))
        images[i] = Detections(torch.tensor(scores), labels, torch.tensor(found)), truth
    return images


def boxes_of(generator: np.random.Generator, count: int) -> np.ndarray:
    """[count, 4] xyxy float32 values: the engines get numbers that are exact."""
    corner = generator.integers(0, 40, (count, 2)).astype(float)
    return np.concatenate([corner, corner + generator.choice([0.0, *GRID], (count, 2))], 1)


@pytest.mark.parametrize("backend", ["hotcoco", "faster_coco_eval", "pycocotools"])
def test_hard_cases(backend: str) -> None:
    for seed in range(300 if backend == "hotcoco" else 40):
        images = hard_case(np.random.default_rng(seed))
        limit = (100, 12)[seed % 2]
        own, expected = evaluate(images, backend, limit), reference(images, limit)
        np.testing.assert_allclose(own.precision, expected.eval["precision"][..., 0, -1], rtol=0, atol=1e-9)
        np.testing.assert_allclose(own.recall, expected.eval["recall"][..., 0, -1], rtol=0, atol=1e-9)
        if limit == 100:  # pycocotools looks for 100 by name
            stats = dict(zip(KEYS, expected.stats.tolist(), strict=True))
            assert own.numbers == pytest.approx(stats, abs=1e-9), seed


def test_few_classes_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = hard_case(np.random.default_rng(5)) | hard_case(np.random.default_rng(6))
    whole = evaluate(images)
    monkeypatch.setattr(engines, "CHUNK", 3)
    parts = evaluate(images)
    assert parts.numbers == whole.numbers
    assert np.array_equal(parts.precision, whole.precision)
    assert np.array_equal(parts.confusion, whole.confusion)


def test_confusions_are_counted_once_each() -> None:
    """Two ants, one found as a bee; a cat that is missed; a dog found in an empty place; a hesitant elk."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    truth = {
        "boxes": boxes,
        "labels": torch.tensor([0, 0, 2]),
        "iscrowd": torch.zeros(3),
        "area": torch.full((3,), 1e2),
    }
    found = torch.cat([boxes[:2] + 1, torch.tensor([[70.0, 0, 80, 10], [40, 0, 50, 10]])])
    detections = Detections(torch.tensor([0.9, 0.8, 0.7, 0.2]), torch.tensor([0, 1, 3, 4]), found)
    expected = np.zeros((6, 6), int)
    expected[0, 0] = expected[0, 1] = expected[2, 5] = expected[5, 3] = 1
    evaluation = evaluate({4: (detections, truth), 7: (detections, truth)})
    assert np.array_equal(evaluation.confusion, 2 * expected)
    assert evaluation.confused(10) == [("ant", "bee", 2)]


def federated_case(
    generator: np.random.Generator, extras: Sequence[int] = (0, 2, 8, 30)
) -> tuple[dict[int, Image], list[str]]:
    """Images that were searched for some classes only, some of them not exhaustively; and the classes' frequency."""
    images = hard_case(generator, extras)
    for _, truth in images.values():
        truth["iscrowd"].zero_()
        absent = [k for k in range(len(NAMES)) if k not in truth["labels"].tolist()]
        truth["neg_labels"] = generator.permutation(absent)[: generator.integers(0, len(absent) + 1)]
        truth["not_exhaustive_labels"] = np.flatnonzero(generator.random(len(NAMES)) < 0.4)
    return images, generator.choice(["r", "c", "f"], len(NAMES)).tolist()


def lvis_numbers(images: dict[int, Image], frequency: list[str], limit: int, path: Path) -> LVISEval:
    annotations, results, records = [], [], []
    for i, (found, truth) in images.items():
        lists = {name: truth[key].tolist() for name, key in LISTS.items()}
        records.append({"id": i, "width": 200, "height": 200} | lists)
        for box, label, area in zip(xywh(truth["boxes"]), truth["labels"], truth["area"], strict=True):
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": int(label), "bbox": box.tolist()}
            annotations.append(entry | {"area": float(area)})
        for box, label, score in zip(xywh(found.boxes_xyxy), found.labels, found.scores, strict=True):
            entry = {"image_id": i, "category_id": int(label), "bbox": box.tolist(), "score": float(score)}
            results.append(entry)
    categories = [{"id": k, "name": n, "frequency": f} for k, (n, f) in enumerate(zip(NAMES, frequency, strict=True))]
    path.write_text(json.dumps({"images": records, "annotations": annotations, "categories": categories}))
    truth = LVIS(str(path))
    evaluation = LVISEval(truth, LVISResults(truth, results, max_dets=limit), "bbox")
    evaluation.params.max_dets = limit
    evaluation.run()
    return evaluation


LISTS = {"neg_category_ids": "neg_labels", "not_exhaustive_category_ids": "not_exhaustive_labels"}
LVIS_KEYS = {"AP": "map", "AP50": "map_50", "AP75": "map_75", "APs": "map_small", "APm": "map_medium"}
LVIS_KEYS |= {"APl": "map_large", "APr": "map_rare", "APc": "map_common", "APf": "map_frequent"}
LVIS_KEYS |= {"ARs": "mar_small", "ARm": "mar_medium", "ARl": "mar_large"}


@pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")
def test_federated_cases_are_those_of_lvis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis-api was written for numpy 1
    logging.getLogger("lvis").setLevel(logging.ERROR)
    compared = 0
    for seed in range(150):
        many = seed > 146
        images, frequency = federated_case(np.random.default_rng(seed), (500,) if many else (0, 2, 8, 30))
        limit = 400 if many else (300, 9)[seed % 2]
        if not any(len(found.scores) for found, _ in images.values()):
            continue  # lvis-api stops
        expected = lvis_numbers(images, frequency, limit, tmp_path / "lvis.json")
        metric = detection_metric(NAMES, limit, federated=True)
        metric.frequency = frequency
        update(metric, images)
        metric.compute()
        evaluation = metric.evaluations["bbox"]
        theirs = {LVIS_KEYS[key.split("@")[0]]: value for key, value in expected.results.items() if key[:3] != "AR@"}
        theirs[f"mar_{limit}"] = expected.results[f"AR@{limit}"]
        assert evaluation.numbers == pytest.approx(theirs, abs=1e-9), seed
        np.testing.assert_allclose(evaluation.precision, expected.eval["precision"][..., 0], rtol=0, atol=1e-9)
        compared += expected.results["AP"] > 0
    assert compared > 50


def test_lvis_needs_its_lists_and_hotcoco() -> None:
    images, _ = federated_case(np.random.default_rng(1))
    with pytest.raises(UserError, match=r"needs metrics\.backend=hotcoco"):
        detection_metric(NAMES, 300, "pycocotools", federated=True)
    for _, truth in images.values():
        del truth["neg_labels"]
    with pytest.raises(UserError, match="federated=true needs images"):
        update(detection_metric(NAMES, 300, federated=True), images)
