"""The criterion against sums written out by hand: groups, layers, first stages, heads, masks, empty images."""

import itertools

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from codetr.assign.hungarian import MatchingCost, match
from codetr.criterion import Criterion
from codetr.losses import ClassLoss, Focal, QualityFocal, Varifocal
from codetr.types import (
    Frames,
    Known,
    Matching,
    Output,
    Prediction,
    Problem,
    Proposals,
    QueryGroup,
    TargetRule,
    Targets,
)

COST = MatchingCost(focal=2.0, l1=5.0, giou=2.0, alpha=0.25, gamma=2.0)
FOCAL = Focal(0.25, 2.0)
LAYERS, BATCH, QUERIES, CLASSES = 2, 3, 6, 4


def criterion(class_loss: ClassLoss = FOCAL) -> Criterion:
    return Criterion(COST, class_loss, focal=2.0, l1=5.0, giou=3.0, lambda_2=0.5, lambda_2_by_head={})


def boxes(*shape: int) -> Tensor:
    return torch.cat([torch.rand(*shape, 2) * 0.4 + 0.3, torch.rand(*shape, 2) * 0.4 + 0.1], -1)


def prediction(*leading: int, classes: int = CLASSES) -> Prediction:
    logits = torch.randn(*leading, QUERIES, classes)
    return Prediction(logits.requires_grad_(), boxes(*leading, QUERIES).requires_grad_())


def targets(*counts: int) -> Targets:
    valid = torch.arange(3) < torch.tensor(counts)[:, None]
    labels = torch.randint(CLASSES, (len(counts), 3)) * valid
    return Targets(boxes(len(counts), 3), labels, valid, Frames.unscaled(torch.full((len(counts), 2), 64)))


def known() -> Known:
    return Known(torch.randint(-1, CLASSES, (BATCH, QUERIES)), boxes(BATCH, QUERIES))


def group(goal: TargetRule, **rest: object) -> QueryGroup:
    return QueryGroup(torch.zeros(BATCH, QUERIES, 8), boxes(BATCH, QUERIES), goal, **rest)


def by_hand(loss: ClassLoss, p: Prediction, goal: Known, counts: Tensor) -> dict[str, float]:
    """The terms of one layer, query by query. counts: [B, N], whether the query is there at all."""
    total = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for image, query in itertools.product(range(BATCH), range(QUERIES)):
        a, b = p.boxes[image, query].detach(), goal.boxes[image, query]
        corners = box_convert(a[None], "cxcywh", "xyxy"), box_convert(b[None], "cxcywh", "xyxy")
        label = goal.labels[image, query]
        classes = loss(p.logits[image, query].detach(), label, box_iou(*corners)[0, 0])
        total["class"] += 2.0 * float(classes.sum()) * bool(counts[image, query])
        if label >= 0:
            total["l1"] += 5.0 * float((a - b).abs().sum())
            total["giou"] += 3.0 * (1 - float(generalized_box_iou(*corners)))
    positives = max(int((goal.labels >= 0).sum()), 1)
    return {term: value / positives for term, value in total.items()}


@pytest.mark.parametrize("loss", [FOCAL, QualityFocal(2.0), Varifocal(0.75, 2.0)], ids=str)
def test_known_targets_by_hand(loss: ClassLoss) -> None:
    goal, p, valid = known(), prediction(LAYERS, BATCH), torch.rand(BATCH, QUERIES) > 0.3
    goal.labels.masked_fill_(~valid, -1)
    output = Output({"aux": group(goal, valid=valid, weight=0.25)}, {"aux": p})
    losses = criterion(loss)(output, targets(3, 1, 2))
    assert len(losses) == LAYERS * 3
    for layer in range(LAYERS):
        expected = by_hand(loss, Prediction(p.logits[layer], p.boxes[layer]), goal, valid)
        for term, value in expected.items():
            assert losses[f"aux/{layer}/{term}"].item() == pytest.approx(0.25 * value, rel=1e-5)


@pytest.mark.parametrize("repeats", [1, 2])
def test_matched_groups_and_first_stages_by_hand(repeats: int) -> None:
    """The first stage is matched as its group is, and its queries do not share the decoder's `valid`."""
    goal, p, stage = targets(3, 0, 1), prediction(LAYERS, BATCH), prediction(BATCH, classes=1)
    everything, valid = torch.ones(BATCH, QUERIES, dtype=torch.bool), torch.rand(BATCH, QUERIES) > 0.3
    main = group(Matching(repeats), valid=valid, proposals=Proposals(stage, Matching(repeats), class_agnostic=True))
    losses = criterion()(Output({"main": main}, {"main": p}), goal)
    stacked = Prediction(stage.logits[None], stage.boxes[None])
    decoded, proposed = match([Problem(p, repeats), Problem(stacked, repeats, class_agnostic=True)], goal, COST)
    assert int((decoded.labels[0] >= 0).sum()) == 4 * repeats
    for layer in range(LAYERS):
        solved = Known(decoded.labels[layer], decoded.boxes[layer])
        expected = by_hand(FOCAL, Prediction(p.logits[layer], p.boxes[layer]), solved, valid)
        got = {term: losses[f"main/{layer}/{term}"].item() for term in expected}
        assert got == pytest.approx(expected, rel=1e-5)
    expected = by_hand(FOCAL, stage, Known(proposed.labels[0], proposed.boxes[0]), everything)
    assert {term: losses[f"main/encoder/{term}"].item() for term in expected} == pytest.approx(expected, rel=1e-5)


class WithoutFirstImage:
    """A kind of targets that the criterion has never heard of: matched, but image 0 is background."""

    alike = None

    def problems(self, stacked: Prediction, class_agnostic: bool) -> list[Problem]:
        return [Problem(stacked, 1, class_agnostic)]

    def known(self, solutions: list[Known], num_layers: int) -> Known:
        (found,) = solutions
        assert len(found.labels) == num_layers
        return Known(torch.cat([torch.full_like(found.labels[:, :1], -1), found.labels[:, 1:]], 1), found.boxes)


def test_a_further_kind_of_targets_is_one_class() -> None:
    """Its losses are those of the same targets, known; the groups beside it keep theirs."""
    goal, p, q = targets(2, 1, 3), prediction(LAYERS, BATCH), prediction(LAYERS, BATCH)
    groups = {"main": group(Matching()), "new": group(WithoutFirstImage()), "second": group(Matching())}
    losses = criterion()(Output(groups, {"main": p, "new": q, "second": p}), goal)
    alone = criterion()(Output({"main": group(Matching())}, {"main": p}), goal)
    (found,) = match([Problem(q)], goal, COST)
    labels = found.labels.clone()
    labels[:, 0] = -1
    for layer, term in itertools.product(range(LAYERS), ("class", "l1", "giou")):
        given = group(Known(labels[layer], found.boxes[layer]))
        one = Prediction(q.logits[layer][None], q.boxes[layer][None])
        expected = criterion()(Output({"new": given}, {"new": one}), goal)[f"new/0/{term}"]
        assert losses[f"new/{layer}/{term}"].item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(losses[f"main/{layer}/{term}"], alone[f"main/{layer}/{term}"])
        torch.testing.assert_close(losses[f"second/{layer}/{term}"], alone[f"main/{layer}/{term}"])


def test_mask_losses_have_the_factor_of_the_heads() -> None:
    """As in the official code; they are of no auxiliary head."""
    output = Output({"main": group(Matching())}, {"main": prediction(LAYERS, BATCH)}, {}, {"iou": torch.tensor(3.0)})
    assert criterion()(output, targets(1, 1, 1))["masks/iou"] == 3.0 * 0.5 * LAYERS


def test_head_losses_count_once_per_layer() -> None:
    heads = {"atss": {"class": torch.tensor(3.0), "giou": torch.tensor(2.0)}}
    output = Output({"main": group(Matching())}, {"main": prediction(LAYERS, BATCH)}, heads)
    losses = criterion()(output, targets(1, 1, 1))
    assert losses["head_atss/class"] == 3.0 * 0.5 * LAYERS
    assert losses["head_atss/giou"] == 2.0 * 0.5 * LAYERS


@pytest.mark.parametrize("loss", [FOCAL, QualityFocal(2.0), Varifocal(0.75, 2.0)], ids=str)
def test_without_objects_the_same_terms_and_zero_gradients_of_the_boxes(loss: ClassLoss) -> None:
    p = prediction(LAYERS, BATCH)
    output = Output({"main": group(Matching())}, {"main": p})
    losses = criterion(loss)(output, targets(0, 0, 0))
    sum(losses.values()).backward()
    assert len(losses) == LAYERS * 3
    assert losses["main/0/l1"] == losses["main/0/giou"] == 0
    assert torch.equal(p.boxes.grad, torch.zeros_like(p.boxes))
    assert p.logits.grad.isfinite().all()
    assert (p.logits.grad > 0).all()  # everything is pushed down


def test_the_quality_carries_no_gradient() -> None:
    goal, p = known(), prediction(LAYERS, BATCH)
    output = Output({"aux": group(goal)}, {"aux": p})
    losses = criterion(QualityFocal(2.0))(output, targets(1, 1, 1))
    (gradient,) = torch.autograd.grad(losses["aux/0/class"], p.boxes, allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize(
    ("name", "kind"), [("focal", Focal), ("quality_focal", QualityFocal), ("varifocal", Varifocal)]
)
def test_configs(name: str, kind: type) -> None:
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", ["experiment=demo", f"criterion={name}"])
    built = instantiate(config.criterion)
    assert isinstance(built.class_loss, kind)
    assert (built.focal, built.l1, built.giou, built.lambda_2) == (2.0, 5.0, 2.0, 2.0)
