"""Both auxiliary heads against the official Co-Deformable-DETR bundle."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from codetr.assign import BACKGROUND
from codetr.assign.max_iou import assign_max_iou
from codetr.heads.atss import ATSSHead
from codetr.heads.dense import Selection
from codetr.heads.faster_rcnn import FasterRCNNHead
from codetr.heads.roi import BoxHead, RoIPool
from codetr.heads.rpn import RPN, ProposalSelection
from codetr.types import Pyramid, Targets

CLASSES, WIDTH = 6, 64
FACTOR = 2 * 2  # lambda_2 x decoder layers of the bundle
NAMES = {
    "atss_cls": "classes",
    "atss_reg": "deltas",
    "atss_centerness": "centerness",
    "cls_convs.0.conv": "class_tower.0",
    "cls_convs.0.gn": "class_tower.1",
    "reg_convs.0.conv": "box_tower.0",
    "reg_convs.0.gn": "box_tower.1",
    "rpn_conv": "rpn.conv",
    "rpn_cls": "rpn.objectness",
    "rpn_reg": "rpn.deltas",
    "shared_fcs.0": "box_head.hidden.1",
    "shared_fcs.1": "box_head.hidden.3",
    "fc_cls": "box_head.classes",
    "fc_reg": "box_head.deltas",
}


class Case(NamedTuple):
    atss: ATSSHead
    rcnn: FasterRCNNHead
    pyramid: Pyramid
    targets: Targets
    aux: dict[str, Tensor]
    train: dict[str, Tensor]
    scales: Tensor


def fixed_order(rank: Tensor) -> Tensor:
    """The bundle's stand-in for a random permutation."""
    return rank * 7919 % 104729


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` times the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def atss_head(weights: dict[str, Tensor]) -> ATSSHead:
    head = ATSSHead(WIDTH, CLASSES, 5, 1, 32, 8, (0.1, 0.1, 0.2, 0.2), 9, 0.25, 2.0, 1, 2, 1, Selection(1000, 0.6, 100))
    head.load_state_dict(renamed(weights, "bbox_head.0."))
    return head


def rcnn_head(weights: dict[str, Tensor]) -> FasterRCNNHead:
    scales = tuple(4 * 2 ** (i / 3) for i in range(3))
    head = FasterRCNNHead(
        rpn=RPN(WIDTH, scales, (0.5, 1.0, 2.0), 0.7, 0.3, 0.3, 64, 0.5, 1, 1, fixed_order),
        proposals=ProposalSelection(400, 0.7, 200),
        pool=RoIPool(7, 14, 0),
        box_head=BoxHead(WIDTH, 7, 0, 1, 2, 32, CLASSES, False),
        box_stds=(0.1, 0.1, 0.2, 0.2),
        positive_iou=0.5,
        num_samples=64,
        positive_fraction=0.25,
        class_weight=1,
        giou_weight=10,
        score_threshold=0.0,
        nms_iou=0.5,
        max_detections=100,
        priority=fixed_order,
    )
    head.load_state_dict(renamed(weights, "rpn_head.") | renamed(weights, "roi_head.0.bbox_head."))
    return head


def renamed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The official head's tensors by our names; the scales of the levels become one vector."""
    own = {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}
    scales = [own.pop(f"scales.{i}.scale") for i in range(5) if f"scales.{i}.scale" in own]
    state = {"scales": torch.stack(scales)} if scales else {}
    for key, value in own.items():
        module, parameter = key.rsplit(".", 1)
        state[f"{NAMES[module]}.{parameter}"] = value
    return state


def padded_targets(boxes: list[Tensor], labels: list[Tensor], sizes: Tensor) -> Targets:
    count = max(1, *map(len, boxes))
    targets = Targets(
        torch.full((len(boxes), count, 4), 0.5),
        torch.zeros(len(boxes), count, dtype=torch.long),
        torch.zeros(len(boxes), count, dtype=torch.bool),
        sizes,
    )
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        size = sizes[i].flip(0).repeat(2)
        corners = box / size
        targets.boxes[i, : len(box)] = torch.cat(
            [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1
        )
        targets.labels[i, : len(box)] = label
        targets.valid[i, : len(box)] = True
    return targets


@pytest.fixture(scope="module")
def case(official: Path) -> Case:
    folder = official / "co_deformable_detr_r50"
    weights, forward, inputs, aux, train = (
        load_file(folder / f"{name}.safetensors") for name in ("weights", "forward", "inputs", "aux_forward", "train")
    )
    shapes = [aux[f"atss.cls.{i}"].shape[-2:] for i in range(4)]
    tokens = forward["memory"].split([h * w for h, w in shapes], 1)
    levels = [t.transpose(1, 2).unflatten(2, tuple(s)) for t, s in zip(tokens, shapes, strict=True)]
    pyramid = Pyramid([*levels, forward["pyramid.4"]], (8, 16, 32, 64, 128))
    boxes, labels = ([inputs[f"gt_{kind}.{i}"] for i in range(2)] for kind in ("boxes", "labels"))
    targets = padded_targets(boxes, labels, inputs["img_shape"])
    return Case(atss_head(weights), rcnn_head(weights), pyramid, targets, aux, train, inputs["scale_factor"])


def without_objects(targets: Targets, *images: int) -> Targets:
    valid = targets.valid.clone()
    valid[list(images)] = False
    return Targets(targets.boxes, targets.labels, valid, targets.sizes)


def flat(tensors: dict[str, Tensor], name: str, per_cell: int) -> Tensor:
    maps = [tensors[f"{name}.{i}"] for i in range(5)]
    return torch.cat([m.permute(0, 2, 3, 1).reshape(2, -1, m.shape[1] // per_cell) for m in maps], 1)


def test_atss_predictions_and_anchors(case: Case) -> None:
    logits, deltas, centerness = case.atss.predict(case.pyramid)
    close(logits, flat(case.aux, "atss.cls", 1))
    close(deltas, flat(case.aux, "atss.reg", 1))
    close(centerness, flat(case.aux, "atss.centerness", 1)[..., 0])
    assert torch.equal(torch.cat(case.atss.grid(case.pyramid)), case.aux["atss.anchors"])
    assert torch.equal(case.atss.grid.valid(case.pyramid, case.targets.sizes), case.aux["atss.valid_flags"].bool())


def test_atss_targets(case: Case) -> None:
    assigned = case.atss.assign(case.pyramid, case.targets)
    labels = assigned.labels.masked_fill(assigned.labels < 0, CLASSES)
    assert torch.equal(labels, case.train["train.atss_target.labels"])
    assert torch.equal(assigned.positive | assigned.negative, case.train["train.atss_target.label_weights"] > 0)
    for i in range(2):
        positive = assigned.positive[i]
        assert torch.equal(positive.nonzero()[:, 0], case.train[f"train.aux_src.1.pos_inds.img{i}"])
        close(assigned.boxes_xyxy[i, positive], case.train[f"train.aux_src.1.pos_anchors.img{i}"])
        close(assigned.target_boxes_xyxy[i, positive], case.train[f"train.aux_src.1.pos_targets.img{i}"])


def test_atss_features_of_the_positive_queries(case: Case) -> None:
    """Anchors that became queries are found again by their box; those of image 0 are all its 30 positives."""
    assigned = case.atss.assign(case.pyramid, case.targets)
    close(assigned.features[0, assigned.positive[0]], case.train["train.aux_query.1.feats"][0])


EMPTY = {"train": (), "last_image_empty": (1,), "all_images_empty": (0, 1)}


def recorded(case: Case, which: str, name: str) -> Tensor:
    """A recorded loss without its factor lambda_2 x decoder layers, summed over levels."""
    key = f"{which}.loss.{name}"
    return sum(v for k, v in case.train.items() if k == key or k.startswith(key + ".lvl")) / FACTOR


@pytest.mark.parametrize("which", EMPTY)
def test_atss_losses(case: Case, which: str) -> None:
    losses = case.atss(case.pyramid, without_objects(case.targets, *EMPTY[which])).losses
    for term, name in {"class": "loss_cls1", "giou": "loss_bbox1", "centerness": "loss_centerness1"}.items():
        close(losses[term], recorded(case, which, name))


def test_rpn_predictions_and_anchors(case: Case) -> None:
    logits, deltas = case.rcnn.rpn(case.pyramid)
    close(logits, flat(case.aux, "rpn.cls", 9)[..., 0])
    close(deltas, flat(case.aux, "rpn.reg", 9))
    close(torch.cat(case.rcnn.rpn.grid(case.pyramid)), case.aux["rpn.anchors"], 1e-6)


def test_rpn_targets(case: Case) -> None:
    rpn, targets = case.rcnn.rpn, case.targets
    anchors = torch.cat(rpn.grid(case.pyramid))
    inside = rpn.grid.valid(case.pyramid, targets.sizes)
    owner = assign_max_iou(anchors, inside, targets.boxes_xyxy, targets.valid, *rpn.thresholds)
    positive = case.train["train.rpn_target.bbox_weights"].sum(-1) > 0
    sampled = case.train["train.rpn_target.label_weights"] > 0
    assert torch.equal(owner >= 0, positive)  # fewer than the sampler wants: all are kept
    assert (owner[sampled & ~positive] == BACKGROUND).all()
    goals = targets.boxes_xyxy.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, 4))
    close(rpn.coder.encode(anchors, goals)[positive], case.train["train.rpn_target.bbox_targets"][positive])


def test_proposals(case: Case) -> None:
    logits, deltas = case.rcnn.rpn(case.pyramid)
    boxes, valid = case.rcnn.rpn.propose(logits, deltas, case.pyramid, case.targets.sizes, case.rcnn.proposals)
    for i in range(2):
        close(boxes[i, valid[i]], case.aux[f"rpn.proposals.img{i}"][:, :4])
        close(boxes[i, valid[i]], case.train[f"train.rcnn_sample.img{i}.proposals"][:, :4])


def test_sampled_regions_and_their_features(case: Case) -> None:
    positives = case.rcnn(case.pyramid, case.targets).positives
    for i in range(2):
        source = {k: case.train[f"train.aux_src.0.{k}.img{i}"] for k in ("coords", "labels", "targets", "feats")}
        assert (positives.positive | positives.negative)[i].all()
        labels = positives.labels[i].masked_fill(positives.labels[i] < 0, CLASSES)
        assert torch.equal(labels, source["labels"])
        assert torch.equal(positives.positive[i], source["labels"] < CLASSES)
        close(positives.boxes_xyxy[i], source["coords"])
        close(positives.features[i], source["feats"])
        positive = positives.positive[i]
        close(positives.target_boxes_xyxy[i, positive], source["targets"][positive])


def test_region_features_and_predictions(case: Case) -> None:
    rois = case.aux["roi.rois"]
    counts = rois[:, 0].long().bincount()
    boxes = torch.nn.utils.rnn.pad_sequence(rois[:, 1:].split(counts.tolist()), batch_first=True)
    valid = torch.arange(boxes.shape[1]) < counts[:, None]
    assert torch.equal(case.rcnn.pool.levels(boxes, (8, 16, 32, 64))[valid], case.aux["roi.levels"])
    pooled = case.rcnn.pool(case.pyramid, boxes, valid)
    close(pooled[valid][:2], case.aux["roi.feats_first2"])
    close(pooled[valid].mean((-2, -1)), case.aux["roi.feats_mean"])
    logits, deltas = case.rcnn.box_head(pooled)
    close(logits[valid], case.aux["roi.cls"])
    close(deltas[valid].flatten(1), case.aux["roi.reg"])


@pytest.mark.parametrize("which", EMPTY)
def test_rcnn_losses(case: Case, which: str) -> None:
    losses = case.rcnn(case.pyramid, without_objects(case.targets, *EMPTY[which])).losses
    names = {"rpn_class": "loss_rpn_cls", "rpn_l1": "loss_rpn_bbox", "class": "loss_cls0", "giou": "loss_bbox0"}
    for term, name in names.items():
        close(losses[term], recorded(case, which, name))


@pytest.mark.parametrize("name", ["atss", "roi"])
def test_detections(case: Case, name: str) -> None:
    """The recorded boxes are in pixels of the original image."""
    head = case.atss if name == "atss" else case.rcnn
    for i, found in enumerate(head.detect(case.pyramid, case.targets.sizes)):
        expected = {k: case.aux[f"{name}.detections.img{i}.{k}"] for k in ("boxes", "scores", "labels")}
        close(found.scores, expected["scores"])
        assert torch.equal(found.labels, expected["labels"])
        close(found.boxes_xyxy / case.scales[i], expected["boxes"])


@pytest.mark.parametrize("which", EMPTY)
def test_gradients(case: Case, official: Path, which: str) -> None:
    """The heads' parameters receive gradients from the heads' losses alone: norms as recorded for the whole step."""
    file = official / "co_deformable_detr_r50" / "train.json"
    norms = {k: torch.tensor(v) for k, v in json.loads(file.read_text())["grad_norm"][which].items()}
    for head, prefixes in ((case.atss, ["bbox_head.0."]), (case.rcnn, ["rpn_head.", "roi_head.0.bbox_head."])):
        loss = sum(head(case.pyramid, without_objects(case.targets, *EMPTY[which])).losses.values()) * FACTOR
        names, parameters = zip(*head.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        expected = {k: v for prefix in prefixes for k, v in renamed(norms, prefix).items()}
        assert expected.keys() == gradients.keys()
        for name, norm in expected.items():
            own = gradients[name].abs() if name == "scales" else gradients[name].norm()
            torch.testing.assert_close(own, norm, rtol=1e-4, atol=1e-6)
