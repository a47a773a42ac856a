"""Numbers of reports against pycocotools, TIDE's own package, closed forms, and loops that anyone can read."""

import contextlib
import io
from collections import defaultdict
from pathlib import Path

import hotcoco
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from codetr.errors import UserError
from codetr.evaluation.columns import OUTSIDE
from codetr.evaluation.engines import IOU_THRESHOLDS, confusion, hotcoco_evaluation, in_coco_format
from codetr.reporting import bootstrap, stored
from codetr.reporting.calibration import calibration
from codetr.reporting.costs import costs
from codetr.reporting.curves import Ranking, mean_ap, operating, precision_at_recalls
from codetr.reporting.labels import doubts
from codetr.reporting.matching import NONE, Matches, match
from codetr.reporting.slices import slices
from codetr.reporting.tide import KINDS, tide
from codetr.types import Detections
from made_run import SIDE, evaluated, scene, store

NAMES = ["a", "b", "c"]


@pytest.fixture(params=[(0, False, False), (1, True, False), (2, True, True)], ids=["plain", "crowds", "masks"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> stored.Stored:
    seed, crowds, masks = request.param
    metric = evaluated(NAMES, *scene(30, len(NAMES), seed, crowds=crowds, masks=masks), masks=masks)
    return store(metric, tmp_path)


def judged(own: stored.Stored) -> COCOeval:
    """By pycocotools."""
    dataset, found = in_coco_format(own.columns.with_areas(own.about.masks), True, own.about.masks)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        results = truth.loadRes(found)
        if own.about.masks:  # loadRes takes the area of the box where there is one
            for one in results.anns.values():
                one["area"] = float(coco_mask.area(one["segmentation"]))
        judge = COCOeval(truth, results, "segm" if own.about.masks else "bbox")
        judge.params.maxDets = [own.about.limit]
        judge.evaluate()
        judge.params.maxDets = [1, 10, own.about.limit]
        judge.params.maxDets = [own.about.limit]
        judge.accumulate()
    return judge


def test_detections_find_the_objects_that_they_find_in_coco(made: stored.Stored) -> None:
    matches = match(made.scene(), OUTSIDE, IOU_THRESHOLDS)
    place = {row: i for i, row in enumerate(matches.rows.tolist())}
    judge, seen = judged(made), 0
    number = {}  # of pycocotools' results -> rows of the scene
    for one in judge.evalImgs:
        if one is None or one["aRng"] != judge.params.areaRng[0]:
            continue
        for column, result in enumerate(one["dtIds"]):
            info = judge.cocoDt.anns[result]
            row = number.setdefault(result, _row(made, info, set(number.values())))
            for t in range(len(IOU_THRESHOLDS)):
                ours, theirs = matches.object[t, place[row]], int(one["dtMatches"][t, column])
                assert (ours + 1 if ours != NONE else 0) == _true_row(made, judge, theirs)
                assert matches.ignored[t, place[row]] == bool(one["dtIgnore"][t, column])
            seen += 1
    assert seen == len(matches.rows) > 100


def _row(made: stored.Stored, info: dict, taken: set[int]) -> int:
    found = made.scene().found
    assert found.scores is not None
    same = (found.image == info["image_id"]) & (found.label == info["category_id"]) & (found.scores == info["score"])
    return next(i for i in np.flatnonzero(same).tolist() if i not in taken)


def _true_row(made: stored.Stored, judge: COCOeval, annotation: int) -> int:
    """From 1, 0 for none; the scene has the objects by class."""
    if not annotation:
        return 0
    info, truth = judge.cocoGt.anns[annotation], made.scene().truth
    if truth.rle:
        same = (truth.image == info["image_id"]) & np.array(
            [str(rle["counts"]) == str(info["segmentation"]["counts"].encode()) for rle in truth.rle]
        )
    else:
        same = (truth.image == info["image_id"]) & (truth.boxes == np.array(info["bbox"])).all(1)
    (row,) = np.flatnonzero(same & (truth.label == info["category_id"])).tolist()
    return row + 1


def test_ap_is_that_of_pycocotools_at_every_threshold(made: stored.Stored) -> None:
    ranking = Ranking(match(made.scene(), OUTSIDE, IOU_THRESHOLDS), len(NAMES))
    precision = judged(made).eval["precision"][:, :, :, 0, 0]
    assert ranking.average_precision() == pytest.approx(precision.mean(1), abs=1e-12)
    recalls = precision_at_recalls(ranking.matches, len(NAMES))
    assert recalls == pytest.approx(precision[0], abs=1e-12)


def test_weights_stand_for_images_that_are_there_several_times(tmp_path: Path) -> None:
    found, truth = scene(20, len(NAMES), seed=5, crowds=True)
    own = store(evaluated(NAMES, found, truth), tmp_path)
    weights = np.random.default_rng(0).integers(0, 4, 20)
    ranking = Ranking(match(own.scene(), OUTSIDE, IOU_THRESHOLDS), len(NAMES))
    several = [i for i, n in enumerate(weights.tolist()) for _ in range(n)]
    repeated = evaluated(NAMES, [found[i] for i in several], [truth[i] for i in several])
    expected = repeated.evaluations["bbox"]
    weighted = ranking.average_precision(weights)
    assert weighted == pytest.approx(expected.precision.mean(1), abs=1e-12)
    assert mean_ap(weighted) == pytest.approx(expected.numbers["map"], abs=1e-12)
    assert ranking.objects(weights).tolist() == list(expected.objects_per_class.values())


def test_costs_share_out_what_ap_lacks(made: stored.Stored) -> None:
    matches = match(made.scene(), OUTSIDE)
    own = costs(matches, len(NAMES))
    found, truth = np.zeros(len(matches.rows)), np.zeros(len(matches.counted))
    for k in range(len(NAMES)):
        objects = np.flatnonzero(matches.counted & (matches.true_label == k)).tolist()
        rows = [i for i in np.flatnonzero(matches.label == k).tolist() if not matches.ignored[0, i]]
        share = 1 / len(objects) / len(NAMES)
        truth[objects] = share
        for rank, i in enumerate(rows, 1):
            if (one := matches.object[0, i]) == NONE:
                continue
            above = [j for j in rows[:rank] if matches.object[0, j] == NONE]
            truth[one] = share * len(above) / rank / 2
            found[above] += share / rank / 2
    assert own.found == pytest.approx(found, abs=1e-12)
    assert own.truth == pytest.approx(truth, abs=1e-12)
    images = own.of_images(matches, 30)
    assert images.sum() == pytest.approx(own.of_classes(matches, len(NAMES)).sum())
    assert images.sum() == pytest.approx(found.sum() + truth.sum())


def test_the_best_score_of_a_class_has_the_highest_f1(made: stored.Stored) -> None:
    matches = match(made.scene(), OUTSIDE)
    own = operating(matches, len(NAMES))
    for k in range(len(NAMES)):
        objects = int((matches.counted & (matches.true_label == k)).sum())
        counts = (matches.label == k) & ~matches.ignored[0]
        score, right = matches.score[counts], matches.right[0][counts]
        every = {s: 2 * right[score >= s].sum() / ((score >= s).sum() + objects) for s in score.tolist()}
        assert own.best_f1[k] == pytest.approx(max(every.values()))
        assert every[own.best[k]] == pytest.approx(own.best_f1[k])
        above = score >= own.best[k]
        assert own.best_precision[k] == pytest.approx(right[above].mean())
        assert own.best_recall[k] == pytest.approx(right[above].sum() / objects)
        for i in (0, 37, 100):
            above = score >= own.scores[i]
            assert own.recall[i, k] == pytest.approx(right[above].sum() / objects)
            expected = right[above].mean() if above.any() else np.nan
            assert own.precision[i, k] == pytest.approx(expected, nan_ok=True)


def of(score: np.ndarray, right: np.ndarray) -> Matches:
    """Detections of one class in one image, of which some are right."""
    order = np.argsort(-score, kind="stable")
    nothing = np.zeros(len(score), int)
    objects = np.where(right[order], np.arange(len(score)), NONE)[None]
    return Matches(
        order, nothing, nothing, score[order], objects, np.zeros((1, len(score)), bool), nothing, nothing, nothing == 0
    )


def test_calibration() -> None:
    """A detector that says 0.9 and is right three times out of four; hotcoco's own bins of random ones."""
    own = calibration(of(np.full(8, 0.9), np.arange(8) < 6))
    assert own.error == pytest.approx(0.15)
    assert own.right[18] == 0.75
    assert own.number.tolist() == [0] * 18 + [8, 0]
    rng = np.random.default_rng(0)
    score, right = rng.random(1000), rng.random(1000) < 0.6
    expected, _ = hotcoco.metrics.calibration_error(score, right, 20)
    assert calibration(of(score, right)).error == pytest.approx(expected)


def one_per_image(found: np.ndarray, folder: Path) -> stored.Stored:
    """An object in every image, found in some of them, and nothing else."""
    folder.mkdir()
    box = torch.tensor([[10.0, 10, 50, 50]])
    truth = {
        "boxes": box.double(),
        "labels": torch.tensor([0]),
        "iscrowd": torch.tensor([False]),
        "area": torch.tensor([1600.0]),
    }
    detections = [Detections(torch.full((n,), 0.5), torch.zeros(n, dtype=torch.int64), box[:n]) for n in found.tolist()]
    return store(evaluated(["a"], detections, [truth] * len(found)), folder)


def test_the_bootstrap_has_the_spread_of_a_mean(tmp_path: Path) -> None:
    """Without false alarms AP is the recall (to one of 101 steps), a mean over images: its difference has a standard
    error that can be written down."""
    rng, images = np.random.default_rng(0), 400
    first, second = rng.random(images) < 0.5, rng.random(images) < 0.6
    own = [one_per_image(a.astype(int), tmp_path / n) for n, a in (("first", first), ("second", second))]
    bootstrap.require_same(*own)
    rankings = [bootstrap.rankings(one) for one in own]
    result = bootstrap.compare(*rankings, images, 1500, 0, lambda rounds: rounds)
    gain = second.astype(float) - first
    error = gain.std() / np.sqrt(images)
    assert result.value == pytest.approx(gain.mean(), abs=0.01)
    assert result.high - result.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert (result.low + result.high) / 2 == pytest.approx(gain.mean(), abs=0.01)
    same = bootstrap.compare(rankings[0], rankings[0], images, 20, 0, lambda rounds: rounds)
    assert (same.low, same.high, same.better) == (0, 0, 0.5)


def test_other_images_objects_and_classes_are_not_compared(tmp_path: Path) -> None:
    found, truth = scene(6, 3)
    first = store(evaluated(NAMES, found, truth), tmp_path)
    moved = [{**one, "boxes": one["boxes"] + 1} for one in truth]
    for names, count, other, words in (
        (["a", "b", "x"], 6, truth, "other classes"),
        (NAMES, 5, truth, "other images"),
        (NAMES, 6, moved, "other objects"),
    ):
        second = store(evaluated(names, found[:count], other[:count]), tmp_path)
        with pytest.raises(UserError, match=words):
            bootstrap.require_same(first, second)


def test_parts_of_images_have_the_ap_of_these_images(tmp_path: Path) -> None:
    found, truth = scene(40, len(NAMES), seed=3, objects=12)
    own = store(evaluated(NAMES, found, truth), tmp_path)
    parts = slices(own.scene(), match(own.scene(), OUTSIDE), len(NAMES), None)
    for name, low, high in (("1 or none", 0, 1), ("2 to 4", 2, 4), ("5 to 9", 5, 9), ("10 to 19", 10, 19)):
        chosen = [i for i, one in enumerate(truth) if low <= len(one["labels"]) <= high]
        metric = evaluated(NAMES, [found[i] for i in chosen], [truth[i] for i in chosen])
        (part,) = [p for p in parts if (p.by, p.name) == ("objects in the image", name)]
        assert part.ap == pytest.approx(metric.evaluations["bbox"].numbers["map_50"], abs=1e-12)
        assert part.objects == sum(len(truth[i]["labels"]) for i in chosen)


def test_parts_of_objects(made: stored.Stored) -> None:
    """AP by loops: what lies in another part counts neither as right nor as wrong."""
    scene_, matches = made.scene(), match(made.scene(), OUTSIDE)
    sizes = np.full((len(made.columns.ids), 2), SIDE)
    parts = slices(scene_, matches, len(NAMES), sizes)
    boxes, true_boxes = scene_.found.boxes[matches.rows], scene_.truth.boxes

    def at_border(box: np.ndarray) -> bool:
        return bool(min(box[0], box[1]) < 1 or max(box[0] + box[2], box[1] + box[3]) > SIDE - 1)

    for name, there in (("inside", False), ("at the border", True)):
        (part,) = [p for p in parts if p.name == name]
        aps = []
        for k in range(len(NAMES)):
            truth = [
                i
                for i, b in enumerate(true_boxes)
                if matches.counted[i] and matches.true_label[i] == k and at_border(b) == there
            ]
            ranked = []
            for i in np.flatnonzero((matches.label == k) & ~matches.ignored[0]).tolist():
                one = int(matches.object[0, i])
                if at_border(boxes[i] if one == NONE else true_boxes[one]) == there:
                    ranked.append(one in truth)
            if truth:
                aps.append(average(ranked, len(truth)))
        assert part.ap == pytest.approx(np.mean(aps) if aps else -1, abs=1e-12)
    assert sum(p.objects for p in parts if p.by == "border") == matches.counted.sum()
    assert sum(p.objects for p in parts if p.by == "size") == matches.counted.sum()
    assert sum(p.objects for p in parts if p.by == "aspect ratio") == matches.counted.sum()


def average(right: list[bool], objects: int) -> float:
    """Interpolated at 101 recalls."""
    points = [(sum(right[:i]) / objects, sum(right[:i]) / i) for i in range(1, len(right) + 1)]
    best = [max((p for r, p in points if r >= t), default=0.0) for t in np.linspace(0, 1, 101)]
    return float(np.mean(best))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[:2] + a[2:], b[:2] + b[2:])
    shared = float((high - low).clip(0).prod())
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def test_doubtful_labels(tmp_path: Path) -> None:
    """Sure detections that are wrong, and not nearly right: upon an object of another class, or where none is."""
    own = store(evaluated(NAMES, *scene(30, len(NAMES), seed=1, crowds=True, noise=1.0)), tmp_path)
    scene_, matches = own.scene(), match(own.scene(), OUTSIDE)
    wrong, missing = {}, set()
    for i, row in enumerate(matches.rows.tolist()):
        if matches.score[i] < 0.5 or matches.right[0, i] or matches.ignored[0, i]:
            continue
        others = np.flatnonzero(matches.counted & (matches.true_image == matches.image[i])).tolist()
        overlap = {o: iou(scene_.found.boxes[row], scene_.truth.boxes[o]) for o in others}
        same = max((v for o, v in overlap.items() if matches.true_label[o] == matches.label[i]), default=0)
        contradicted = {o: v for o, v in overlap.items() if matches.true_label[o] != matches.label[i] and v >= 0.5}
        if contradicted and not 0.1 <= same <= 0.5:
            wrong[row] = max(contradicted, key=lambda o: contradicted[o])
        elif max(overlap.values(), default=0) < 0.1:
            missing.add(row)
    found = doubts(matches, tide(scene_, matches, len(NAMES)), 1000)
    assert {d.found: d.truth for d in found if d.truth is not None} == wrong
    assert {d.found for d in found if d.truth is None} == missing
    assert min(len(wrong), len(missing)) > 3
    assert scene_.found.scores is not None
    assert (np.diff(scene_.found.scores[[d.found for d in found]]) <= 0).all()


def test_confusions_of_masks_that_fill_their_boxes_are_those_of_the_boxes(tmp_path: Path) -> None:
    found, truth = scene(30, len(NAMES), seed=4, noise=2.0)
    for one, own in zip(found, truth, strict=True):
        one.boxes_xyxy, own["boxes"] = one.boxes_xyxy.round(), own["boxes"].round()
        one.rle, own["rle"] = rectangles(one.boxes_xyxy), rectangles(own["boxes"])
        one.mask_scores, own["area"] = one.scores, (own["boxes"][:, 2:] - own["boxes"][:, :2]).prod(1)
    boxes, masks = (evaluated(NAMES, found, truth, masks=own) for own in (False, True))
    own = store(masks, tmp_path)
    matrix = confusion(own.columns.with_areas(True), len(NAMES), own.rules)
    assert (matrix == boxes.evaluations["bbox"].confusion).all()
    assert matrix.sum() > 50


def rectangles(boxes: torch.Tensor) -> list[dict]:
    whole = [np.zeros((SIDE, SIDE), np.uint8) for _ in boxes]
    for mask, (x0, y0, x1, y1) in zip(whole, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return [coco_mask.encode(np.asfortranarray(mask)) for mask in whole]


@pytest.mark.parametrize("seed", range(6))
def test_tide_is_that_of_hotcoco(seed: int, tmp_path: Path) -> None:
    own = store(evaluated(NAMES, *scene(20, len(NAMES), seed)), tmp_path)
    judge = hotcoco_evaluation(own.scene(), own.rules)
    judge.evaluate()
    judge.accumulate()
    expected = judge.tide_errors()
    ours = tide(own.scene(), match(own.scene(), OUTSIDE), len(NAMES)).errors
    assert {kind: error.lost for kind, error in ours.items()} == pytest.approx(expected["delta_ap"], abs=1e-12)
    assert {kind: ours[kind].number for kind in expected["counts"]} == expected["counts"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the package and of what it draws with
@pytest.mark.parametrize("seed", range(8))
def test_tide_is_that_of_its_own_package(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of classes with objects: the package counts others as an AP of 0, COCO does not count them. Without crowds: the
    package corrects detections that COCO ignores. At its recalls of k / 100, from some of which COCO's, those of
    np.linspace, differ in their last bit."""
    monkeypatch.setattr("codetr.reporting.curves._RECALLS", np.arange(101) / 100)
    tidecv = pytest.importorskip("tidecv")
    own = store(evaluated(NAMES, *scene(20, len(NAMES), seed)), tmp_path)
    scene_ = own.scene()
    assert set(scene_.truth.label.tolist()) == {0, 1, 2}
    data = [tidecv.Data(name, 100) for name in ("truth", "found")]
    for one in data:
        for k in range(len(NAMES)):
            one.add_class(k, NAMES[k])
        for i in range(20):
            one.add_image(i, str(i))
    for image, label, box in zip(scene_.truth.image, scene_.truth.label, scene_.truth.boxes, strict=True):
        data[0].add_ground_truth(int(image), int(label), box.tolist())
    found = scene_.found
    for image, label, score, box in zip(found.image, found.label, found.scores, found.boxes, strict=True):  # type: ignore[arg-type]
        data[1].add_detection(int(image), int(label), float(score), box.tolist())
    theirs = tidecv.TIDE()
    theirs.evaluate(*data, mode=tidecv.TIDE.BOX)
    run = theirs.runs["found"]
    lost = {kind.short_name: value for kind, value in (run.fix_main_errors() | run.fix_special_errors()).items()}
    counts = {kind.short_name: value for kind, value in run.count_errors().items()}
    ours = tide(scene_, match(scene_, OUTSIDE), len(NAMES)).errors
    names = {"FP": "FalsePos", "FN": "FalseNeg"}
    for kind in KINDS:
        assert 100 * ours[kind].lost == pytest.approx(lost[names.get(kind, kind)], abs=1e-6)
        if kind not in names:
            assert ours[kind].number == counts[kind]


def test_what_is_stored_comes_back(made: stored.Stored, tmp_path: Path) -> None:
    kind = "segm" if made.about.masks else "bbox"
    back = stored.load(tmp_path, kind)
    assert back is not None
    assert back.about == made.about
    for ours, theirs in zip(made.columns[2:], back.columns[2:], strict=True):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.counts, theirs.counts)
    (tmp_path / stored.FILES[kind]).write_bytes(b"something else")
    with pytest.raises(UserError, match="no evaluation that codetr stored"):
        stored.load(tmp_path, kind)
    assert stored.load(tmp_path / "absent", kind) is None


def test_a_sample_has_its_images_as_they_were(made: stored.Stored) -> None:
    ten = stored.sample(made.columns, 10)
    assert len(ten.ids) == 10
    place = {image: i for i, image in enumerate(made.columns.ids.tolist())}
    whole = made.columns
    for name in ("found", "truth", "found_runs", "truth_rle"):
        rows = defaultdict(list)
        part, every = getattr(ten, name), getattr(whole, name)
        for owner, row in zip(every.owners.tolist(), every.rows.tolist(), strict=True):
            rows[owner].append(row)
        expected = np.array([row for image in ten.ids.tolist() for row in rows[place[image]]], part.rows.dtype)
        np.testing.assert_array_equal(part.rows, expected.reshape(part.rows.shape))
    assert stored.sample(whole, 30) is whole
