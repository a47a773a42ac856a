"""What the papers' figures compute, against closed forms, brute force, and the modules themselves."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from codetr.kernels.msda import msda_reference
from hydra.utils import instantiate
from scipy.stats import entropy
from torch import Tensor

from codetr.analyses.conflict import distances, distributions, divergences, grad_cam, mean_distance
from codetr.analyses.discriminability import area, inside, iof_iob, score_map, spread
from codetr.analyses.groups import matching_distances, perturbation_distance
from codetr.analyses.instability import changed
from codetr.analyses.matched import objects_of_queries
from codetr.analyses.queries import Counted, count, customised
from codetr.analyses.recording import recorded, splat
from codetr.assign.hungarian import MatchingCost
from codetr.errors import UserError
from codetr.models.detector import Detector
from codetr.types import MAIN, Frames, Memory, Output, Positives, Prediction, QueryGroup, Targets
from toy_model import compose, detector

THRESHOLDS = torch.linspace(0, 1, 11)
CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds to compile."""
    monkeypatch.setenv("CODETR_MSDA", "reference")


# Discriminability


def test_a_map_that_is_one_on_objects_tells_them_from_the_rest() -> None:
    foreground = inside(torch.tensor([[2.0, 1.0, 5.0, 4.0], [6.0, 6.0, 8.0, 8.0]]), (8, 8))
    score = score_map(foreground.flatten().float(), ((8, 8),), (8, 8), (8, 8))
    iof, iob = iof_iob(score, foreground, THRESHOLDS)
    assert (iof[:-1] == 1).all()
    assert (iob == 0).all()
    assert area(iof, iob) == 1
    assert area(*iof_iob(1 - score, foreground, THRESHOLDS)) == 0
    assert area(*iof_iob(torch.full_like(score, 0.55), foreground, THRESHOLDS)) == 0.5


def test_shares_and_their_area_by_counting() -> None:
    """With as many thresholds as there are scores, the area is the part of all pairs that are in order."""
    score, foreground = torch.rand(5, 7), torch.rand(5, 7) < 0.4
    thresholds = score.flatten().sort().values
    iof, iob = iof_iob(score, foreground, thresholds)
    for s, share, other in zip(thresholds, iof, iob, strict=True):
        inner = [bool(score[i] > s) for i in product(range(5), range(7)) if foreground[i]]
        outer = [bool(score[i] > s) for i in product(range(5), range(7)) if not foreground[i]]
        assert (share, other) == (sum(inner) / len(inner), sum(outer) / len(outer))
    pairs = [float(a > b) for a in score[foreground] for b in score[~foreground]]
    assert area(iof, iob) == pytest.approx(np.mean(pairs))


def test_points_of_a_curve_are_spread_over_iob() -> None:
    iob = torch.tensor([1.0, 1.0, 0.99, 0.7, 0.69, 0.68, 0.3, 0.0, 0.0])
    assert spread(iob, 5).tolist() == [0, 3, 6, 7]  # at most 1, 0.75, 0.5, 0.25, 0


def test_every_level_counts_alike_and_the_padding_not_at_all() -> None:
    shapes, fine, coarse = ((6, 8), (3, 4)), torch.rand(48), torch.rand(12)
    whole = score_map(torch.cat([fine, coarse]), shapes, (12, 16), (12, 16))
    assert torch.allclose(whole, score_map(torch.cat([fine * 7, coarse / 3]), shapes, (12, 16), (12, 16)))
    each = [score_map(x, (s,), (12, 16), (12, 16)) for x, s in ((fine, shapes[0]), (coarse, shapes[1]))]
    assert torch.allclose(whole, (each[0] + each[1]) / 2)
    padded = fine.view(6, 8).clone()
    padded[:, 6:] = 100  # beyond the half cell that interpolation reads
    left = score_map(padded.flatten(), shapes[:1], (12, 16), (12, 11))
    assert torch.allclose(left, score_map(fine, shapes[:1], (12, 16), (12, 11)))


def test_pixels_in_boxes_one_by_one() -> None:
    boxes = torch.rand(4, 4) * 9
    boxes[:, 2:] += boxes[:, :2]
    found = inside(boxes, (9, 12))
    for y, x in product(range(9), range(12)):
        hit = any(x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1 for x0, y0, x1, y1 in boxes.tolist())
        assert found[y, x] == hit


# The decoder's attention


def test_splatting_is_what_interpolation_reads() -> None:
    """The weights that it gives to cells, times any values, are what deformable attention makes of these."""
    shapes = ((5, 7), (2, 3))
    locations = torch.rand(2, 4, 3, 2, 6, 2) * 1.6 - 0.3
    locations[0, 0, 0, 0, 0] = torch.tensor([torch.nan, 0.5])
    weights, value = torch.rand(2, 4, 3, 2, 6), torch.rand(2, 41, 3, 8)
    seen = torch.einsum("bqhs,bshd->bqhd", splat(locations, weights, shapes), value).flatten(2)
    torch.testing.assert_close(seen, msda_reference(value, shapes, locations, weights))


def looked_at(*overrides: str) -> tuple[Detector, Tensor, Tensor, Targets]:
    torch.manual_seed(0)
    model = detector(CLASSES, *overrides).eval()
    for parameter in model.parameters():  # the first offsets and weights are alike for all queries
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, 40:], padding[1, :, 64:] = True, True
    frames = Frames.unscaled(torch.tensor([[64, 96], [40, 64]]))
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.3, 0.3]]).repeat(2, 1, 1)
    targets = Targets(boxes, torch.tensor([[0, 2], [1, 0]]), torch.tensor([[True, True], [True, False]]), frames)
    return model, torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), padding, targets


@pytest.mark.parametrize("model", ["co_deformable_tiny", "conditional_detr_tiny"])
@torch.no_grad()
def test_recorded_weights_are_those_that_were_used(model: str) -> None:
    """With one head: times the values, behind the last projection, they are the output. Nothing else changes."""
    level = ["model.detector.backbone.out_indices=[3]"] if "conditional" in model else []
    made, images, padding, _ = looked_at(f"model={model}", "model.num_heads=1", "model/auxiliary_head=[]", *level)
    attention = made.decoder.layers[-1].cross_attention
    outputs: list[Tensor] = []
    with recorded(made.decoder, -1) as maps:
        handle = attention.register_forward_hook(lambda _, given, output: outputs.append(output))
        output = made(images, padding)
        handle.remove()
    inner = getattr(attention, "attention", attention)
    assert not inner._forward_pre_hooks
    value, project = (inner.value_proj, inner.output_proj) if inner is not attention else (inner.value, inner.output)
    memory = output.memory
    values = value(memory.tokens).masked_fill(memory.padding[..., None], 0)
    torch.testing.assert_close(project(maps[0] @ values), outputs[0])
    assert memory.padding.any()
    assert (maps[0][memory.padding[:, None].expand_as(maps[0])] == 0).all()
    after = made(images, padding).predictions[MAIN]
    assert torch.equal(after.boxes, output.predictions[MAIN].boxes)
    assert len(maps) == 1


def test_a_layer_that_is_not_there_is_refused() -> None:
    made = detector(CLASSES)
    with pytest.raises(UserError, match=r"figure\.layer=2: the decoder has 2 layers"), recorded(made.decoder, 2):
        pass


# Matching


def test_instability_by_hand_on_four_queries() -> None:
    """Two objects; the second goes from query 1 to query 3, then both change places."""
    objects = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]]])
    frames = Frames.unscaled(torch.tensor([[10, 10]]))
    targets = Targets(objects, torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), frames)
    cost, far = MatchingCost(2.0, 5.0, 2.0, 0.25, 2.0), torch.tensor([0.5, 0.1, 0.1, 0.1])
    a, b = objects[0]
    epochs = []
    for boxes in ([a, b, far, far], [a, far, far, b], [b, far, far, a]):
        prediction = Prediction(torch.zeros(1, 1, 4, 3), torch.stack(boxes)[None, None])
        output = Output({MAIN: QueryGroup(torch.zeros(1, 4, 8))}, {MAIN: prediction})
        epochs.append(objects_of_queries(output, MAIN, targets, cost))
    assert [epoch.tolist() for epoch in epochs] == [[[0, 1, -1, -1]], [[0, -1, -1, 1]], [[1, -1, -1, 0]]]
    assert [changed(before, after) for before, after in pairwise(epochs)] == [2, 2]
    assert changed([*epochs[0], *epochs[0]], [*epochs[1], *epochs[0]]) == 1  # the mean of two images


# Heads


def test_grad_cam_by_finite_differences() -> None:
    """The weight of a channel is the slope of the score when the whole channel is raised, per cell."""
    shapes, width = ((3, 4), (2, 2)), 6
    tokens = torch.rand(2, 16, width, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, 15] = True
    sizes = torch.tensor([[[3, 4], [2, 2]]] * 2)
    memory = Memory(tokens, tokens, padding, shapes, sizes, sizes / 4)
    mix = torch.randn(2, 16, width, dtype=torch.float64)

    def score(x: Tensor) -> Tensor:
        return ((x * mix).sin() * x.roll(1, -1)).sum()

    found, expected = grad_cam(score(tokens), memory), torch.zeros(2, 16, dtype=torch.float64)
    for image, cells, channel in product(range(2), (slice(0, 12), slice(12, 16)), range(width)):
        up, down = tokens.detach().clone(), tokens.detach().clone()
        up[image, cells, channel] += 1e-5
        down[image, cells, channel] -= 1e-5
        slope = (score(up) - score(down)) / 2e-5 / (cells.stop - cells.start)
        expected[image, cells] += slope * tokens.detach()[image, cells, channel]
    torch.testing.assert_close(found, expected.relu().masked_fill(padding, 0), rtol=1e-6, atol=1e-8)
    assert (found > 0).any()


def test_divergences_and_distances_by_other_means() -> None:
    maps = distributions(torch.rand(4, 3, 5), 0.01)
    assert torch.allclose(maps.sum(1), torch.ones(4).double())
    matrix = divergences(maps)
    for i, j in product(range(4), range(4)):
        assert float(matrix[i, j]) == pytest.approx(entropy(maps[i].numpy(), maps[j].numpy()), abs=1e-12)
    for i in range(4):
        others = [float(matrix[i, j] + matrix[j, i]) / 2 for j in range(4) if j != i]
        assert float(distances(matrix)[i]) == pytest.approx(np.mean(others))
    pairs = [float(matrix[i, j] + matrix[j, i]) / 2 for i, j in combinations(range(1, 4), 2)]
    assert mean_distance(matrix) == pytest.approx(np.mean(pairs))  # of the auxiliary heads
    assert mean_distance(matrix[:2, :2]) == pytest.approx(float(matrix[0, 1] + matrix[1, 0]) / 2)


def test_equal_heads_are_in_no_conflict_and_one_that_found_nothing_in_none_either() -> None:
    one = torch.rand(3, 5)
    assert divergences(distributions(torch.stack([one, one * 9, one]), 0.01)).abs().max() < 1e-12
    matrix = divergences(distributions(torch.stack([one, torch.zeros(3, 5)]), 0.01))
    assert matrix[0, 0] == 0
    assert matrix[0, 1].isnan()


# Queries and groups


def test_distances_of_positives_by_hand() -> None:
    """Three queries, the second is matched to object 0, the third to object 1."""
    original, matched = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 0.5]]), torch.tensor([-1, 0, 1])
    own, of = torch.tensor([[0.5, 0.9], [0.3, 0.4], [0.6, 0.8]]), torch.tensor([0, 1, 0])
    counted = Counted()
    count(counted, original, matched, own, of, objects=2)
    numbers = counted.numbers()
    assert numbers["positives_per_object"] == 1.5
    assert numbers["to_original_positive"] == pytest.approx((0.4 + np.hypot(0.7, 0.1) + np.hypot(0.1, 0.3)) / 3)
    assert numbers["to_original_negatives"] == pytest.approx((np.hypot(0.5, 0.9) + 0.5 + 1.0) / 3)


def test_positives_of_a_head_belong_to_their_objects() -> None:
    frames = Frames.unscaled(torch.tensor([[40, 80]]))
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.7, 0.6, 0.3, 0.3], [0.5, 0.5, 1, 1]]])
    targets = Targets(boxes, torch.zeros(1, 3).long(), torch.tensor([[True, True, False]]), frames)
    at = torch.tensor([[[0.0, 0, 8, 8], [40, 20, 60, 30], [0, 0, 1, 1]]])
    positives = Positives(
        at,
        torch.zeros(1, 3, 4),
        torch.tensor([[0, 0, -1]]),
        targets.boxes_xyxy[:, [1, 0, 0]],
        torch.tensor([[True, True, False]]),
        torch.tensor([[False, False, True]]),
    )
    where, of = customised(positives, targets, 0)
    assert of.tolist() == [1, 0]
    torch.testing.assert_close(where, torch.tensor([[4 / 80, 4 / 40], [50 / 80, 25 / 40]]))


def test_perturbation_distance_by_brute_force() -> None:
    points = torch.rand(3, 7, 2)
    of_pairs = []
    for a, b in combinations(range(3), 2):
        nearest = [min(float((p - q).norm()) for q in points[b]) for p in points[a]]
        nearest += [min(float((p - q).norm()) for q in points[a]) for p in points[b]]
        of_pairs.append(sum(nearest) / (2 * 7))  # eq. 6
    assert float(perturbation_distance(points)) == pytest.approx(np.mean(of_pairs), abs=1e-6)
    same = points[:1].expand(2, -1, -1)
    assert float(perturbation_distance(torch.stack([same[0], same[1].flip(0)]))) < 1e-6


def test_matching_distance_by_brute_force() -> None:
    points, matched = torch.rand(3, 5, 2), torch.full((3, 5), -1)
    for group in range(3):
        matched[group, torch.randperm(5)[:2]] = torch.tensor([0, 1])
    matched[0, matched[0] == 1] = -1  # one group has left out object 1
    found = matching_distances(points, matched, 3)
    for thing in range(2):
        places = [points[g, (matched[g] == thing).nonzero()[0, 0]] for g in range(3) if (matched[g] == thing).any()]
        pairs = [float((p - q).norm()) for p, q in combinations(places, 2)]
        assert float(found[thing]) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert found[2].isnan()


@torch.no_grad()
def test_any_group_can_be_kept() -> None:
    """And predicts alone what it does among the others."""
    made, images, padding, targets = looked_at("model.query_groups=3", "model/auxiliary_head=[]")
    assert made.main_groups == [MAIN, "group_2", "group_3"]
    together = made(images, padding, targets).predictions
    made.keep_group(3)
    torch.testing.assert_close(made(images, padding).predictions[MAIN].boxes, together["group_3"].boxes)
    with pytest.raises(UserError, match="group=4: this detector has 3 groups of main queries"):
        made.keep_group(4)


def test_without_losses_of_the_decoder_the_encoder_learns_from_the_head_alone() -> None:
    """The ATSS curve of Co-DETR's figure 2: docs/analyses.md."""
    alone = ("criterion.focal=0", "criterion.l1=0", "criterion.giou=0")
    given = ("model/auxiliary_head=[atss]", "model.detector.collaborative=null")
    made, images, padding, targets = looked_at(*given)
    criterion = instantiate(compose(*given, *alone, "model.num_classes=3").criterion)
    weights = list(made.encoder.parameters())
    losses = criterion(made(images, padding, targets), targets)
    of_head = [value for name, value in losses.items() if name.startswith("head_atss/")]
    every = torch.autograd.grad(torch.stack(list(losses.values())).sum(), weights, retain_graph=True)
    own = torch.autograd.grad(torch.stack(of_head).sum(), weights)
    torch.testing.assert_close(every, own)
    assert any(slope.abs().max() > 0 for slope in own)
