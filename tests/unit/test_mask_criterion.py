"""Matching and losses of masks: against brute force, against the dense loss, and at the edges."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, cross_entropy, grid_sample

from codetr.assign.hungarian import match
from codetr.assign.mask_cost import MaskCost
from codetr.errors import UserError
from codetr.mask_criterion import MaskCriterion
from codetr.nn.points import UncertainPoints, at_points, objects_at_points
from codetr.types import Frames, Known, Matching, Output, Pixels, Prediction, Problem, QueryGroup, QueryMasks, Targets

LAYERS, QUERIES, CLASSES, WIDTH, STRIDE = 2, 6, 4, 8, 4
CELLS = (9, 12)
COST = MaskCost(class_weight=2.0, mask_weight=5.0, dice_weight=3.0, num_points=60)


def grid(logits: Tensor) -> Tensor:
    """The same points for every mask, so many that they are all of it."""
    rows, columns = (torch.arange(n * 10) / (n * 10) + 0.05 / n for n in CELLS)
    places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)
    return places.expand(len(logits), -1, -1)


def criterion(points: object = grid) -> MaskCriterion:
    return MaskCriterion(COST, points, 0.1, 2.0, 5.0, 3.0, 2.0, {})  # type: ignore[arg-type]


def targets(*counts: int, most: int | None = None) -> Targets:
    """Rectangles of any size, the first of the first image a single pixel."""
    height, width = (n * STRIDE for n in CELLS)
    most = most or max(*counts, 1)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    sides = torch.rand(len(counts), most, 4)
    x, y = torch.arange(width), torch.arange(height)[:, None]
    low, high = sides[..., :2] * 0.5, sides[..., :2] * 0.5 + sides[..., 2:] * 0.5
    x1, y1, x2, y2 = (part[..., None, None] for part in (*low.unbind(-1), *high.unbind(-1)))
    masks = (x >= x1 * width) & (x < x2 * width) & (y >= y1 * height) & (y < y2 * height)
    masks[0, 0] = False
    masks[0, 0, 13, 22] = True
    labels = torch.randint(CLASSES, (len(counts), most)) * valid
    frames = Frames.unscaled(torch.tensor([[height, width]] * len(counts)))
    return Targets(torch.full((len(counts), most, 4), 0.5), labels, valid, frames, masks & valid[..., None, None])


def prediction(batch: int, queries: int = QUERIES, pixels: Pixels | None = None) -> Prediction:
    pixels = pixels or Pixels(torch.randn(batch, WIDTH, *CELLS, requires_grad=True), STRIDE, torch.zeros(0))
    logits = torch.randn(LAYERS, batch, queries, CLASSES + 1, requires_grad=True)
    masks = QueryMasks(torch.randn(LAYERS, batch, queries, WIDTH, requires_grad=True), pixels)
    return Prediction(logits, logits.new_empty(LAYERS, batch, queries, 0), masks)


def dense(p: Prediction) -> Tensor:
    assert p.masks is not None
    return torch.einsum("lbnc,bchw->lbnhw", p.masks.embeddings, p.masks.pixels.maps)


def output(**groups: tuple[QueryGroup, Prediction]) -> Output:
    return Output({name: g for name, (g, _) in groups.items()}, {name: p for name, (_, p) in groups.items()})


def group(goal: object, queries: int = QUERIES, **rest: object) -> QueryGroup:
    return QueryGroup(torch.zeros(2, queries, WIDTH), None, goal, **rest)  # type: ignore[arg-type]


def test_pixels_of_objects_are_read_as_from_a_copy_of_floats() -> None:
    """Beyond the mask too."""
    goal, objects = targets(3, 2), torch.tensor([[2, 0, 1, 1], [1, 0, 0, 1]])
    height, width = goal.masks.shape[-2:]
    shares = torch.rand(2, 4, 50, 2) * 1.2 - 0.1
    found = objects_at_points(goal.masks, objects, shares * torch.tensor([width, height]))
    chosen = torch.stack([own[index] for own, index in zip(goal.masks, objects, strict=True)]).float()
    expected = grid_sample(chosen.flatten(0, 1)[:, None], shares.flatten(0, 1)[:, None] * 2 - 1, align_corners=False)
    torch.testing.assert_close(found, expected[:, 0, 0].view_as(found), rtol=0, atol=1e-4)


@torch.no_grad()
def test_costs_equal_their_definition() -> None:
    goal, p = targets(3, 1), prediction(2)
    torch.manual_seed(7)
    cost = torch.cat(COST.of(Problem(p), goal))
    torch.manual_seed(7)
    points = torch.rand(2, 60, 2)
    for layer, image, k, query in itertools.product(range(LAYERS), range(2), range(3), range(QUERIES)):
        places = points[image][None, None] * 2 - 1
        truth = grid_sample(goal.masks[image, k].float()[None, None], places, align_corners=False).flatten()
        found = grid_sample(dense(p)[layer, image, query][None, None], places, align_corners=False).flatten().sigmoid()
        entropy = float(binary_cross_entropy(found, truth))
        dice = 1 - (2 * float(found @ truth) + 1) / (float(found.sum() + truth.sum()) + 1)
        probability = float(p.logits[layer, image, query].softmax(0)[goal.labels[image, k]])
        expected = 5 * entropy + 3 * dice - 2 * probability
        assert float(cost[layer, image, k, query]) == pytest.approx(expected, abs=1e-4)


def test_matching_is_optimal() -> None:
    goal, p = targets(2, 0), prediction(2)
    torch.manual_seed(7)
    cost = torch.cat(COST.of(Problem(p), goal))
    torch.manual_seed(7)
    (found,) = match([Problem(p)], goal, COST)
    assert (found.labels[:, 1] == -1).all()
    for layer in range(LAYERS):
        queries = (found.labels[layer, 0] >= 0).nonzero()[:, 0]
        got = sum(float(cost[layer, 0, found.objects[layer, 0, q], q]) for q in queries)
        pairs = itertools.permutations(range(QUERIES), 2)
        assert got == pytest.approx(min(float(cost[layer, 0, 0, a] + cost[layer, 0, 1, b]) for a, b in pairs))


@torch.no_grad()
def test_losses_written_out() -> None:
    """Of known targets, query by query; empty places count for nothing."""
    goal, p = targets(3, 1), prediction(2)
    objects = torch.randint(3, (2, QUERIES)) * torch.tensor([[1], [0]])
    labels = goal.labels.gather(1, objects).masked_fill(torch.rand(2, QUERIES) < 0.4, -1)
    valid = torch.rand(2, QUERIES) < 0.7
    labels = labels.masked_fill(~valid, -1)
    known = Known(labels, torch.zeros(2, QUERIES, 4), objects)
    losses = criterion()(output(atss=(group(known, valid=valid, weight=0.5), p)), goal)
    positives = int((labels >= 0).sum())
    for layer in range(LAYERS):
        weights = torch.where(labels >= 0, 1.0, 0.1)[valid]
        wanted = labels.where(labels >= 0, CLASSES)[valid]
        entropy = cross_entropy(p.logits[layer][valid], wanted, reduction="none")
        expected = 0.5 * 2 * float((entropy * weights).sum() / weights.sum())
        assert float(losses[f"atss/{layer}/class"]) == pytest.approx(expected, rel=1e-5)
        masks, dices = 0.0, 0.0
        for image, query in (labels >= 0).nonzero().tolist():
            places = grid(torch.zeros(1))[:, None] * 2 - 1
            truth = goal.masks[image, objects[image, query]].float()
            truth = grid_sample(truth[None, None], places, align_corners=False).flatten()
            found = grid_sample(dense(p)[layer, image, query][None, None], places, align_corners=False).flatten()
            masks += float(binary_cross_entropy_with_logits(found, truth))
            dices += 1 - float((2 * (found.sigmoid() * truth).sum() + 1) / (found.sigmoid().sum() + truth.sum() + 1))
        assert float(losses[f"atss/{layer}/mask"]) == pytest.approx(0.5 * 5 * masks / positives, rel=1e-4)
        assert float(losses[f"atss/{layer}/dice"]) == pytest.approx(0.5 * 3 * dices / positives, rel=1e-4)


@torch.no_grad()
def test_the_loss_at_random_points_is_that_of_the_whole_mask_in_the_mean() -> None:
    goal, p = targets(2, 1), prediction(2)
    known = Known(goal.labels[:, :1].expand(-1, QUERIES), torch.zeros(2, QUERIES, 4), torch.zeros(2, QUERIES).long())
    given = output(main=(group(known), p))
    whole = criterion()(given, goal)["main/0/mask"]
    anywhere = criterion(UncertainPoints(count=200, oversample=1.0, share=0.0))
    drawn = torch.stack([anywhere(given, goal)["main/0/mask"] for _ in range(60)])
    assert abs(float(drawn.mean() - whole)) < 4 * float(drawn.std() / 60**0.5)


def test_uncertain_points_are_the_least_certain_of_those_drawn() -> None:
    logits = torch.randn(3, *CELLS)
    torch.manual_seed(11)
    points = UncertainPoints(count=20, oversample=3.0, share=0.75)(logits)
    torch.manual_seed(11)
    drawn, anywhere = torch.rand(3, 60, 2), torch.rand(3, 5, 2)
    doubt = at_points(logits[:, None], drawn)[:, 0].abs()
    for mask in range(3):
        kept = sorted(map(tuple, points[mask, :15].tolist()))
        assert kept == sorted(map(tuple, drawn[mask, doubt[mask].argsort()[:15]].tolist()))
    assert torch.equal(points[:, 15:], anywhere)


@pytest.mark.parametrize(
    ("counts", "most"), [((0, 0), 1), ((1, 0), 1), ((3, 1), 9), ((200, 3), 200)], ids=["none", "one", "padded", "many"]
)
def test_numbers_of_objects(counts: tuple[int, ...], most: int) -> None:
    """Objects of fewer pixels than a cell are among them; with more than queries, all queries serve one."""
    goal, p = targets(*counts, most=most), prediction(2)
    torch.manual_seed(7)
    losses = criterion()(output(main=(group(Matching()), p)), goal)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    embeddings, maps = p.masks.embeddings.grad, p.masks.pixels.maps.grad
    assert embeddings.isfinite().all()
    assert p.logits.grad.isfinite().all()
    served = (embeddings != 0).any(-1).sum(-1)
    assert served.tolist() == [[min(count, QUERIES) for count in counts]] * LAYERS
    assert bool((maps != 0).any()) == any(counts)


def test_groups_at_once_are_groups_one_by_one() -> None:
    """Each is matched on its own; one-to-many beside them."""
    goal, first = targets(2, 3), prediction(2)
    pixels = first.masks.pixels
    second, many = prediction(2, pixels=pixels), prediction(2, 9, pixels)
    rules = {"main": Matching(), "group_2": Matching(), "hybrid": Matching(2)}
    predictions = {"main": first, "group_2": second, "hybrid": many}
    groups = {
        name: group(rule, p.logits.shape[2])
        for (name, rule), p in zip(rules.items(), predictions.values(), strict=True)
    }

    def losses(*names: str, draws: int = 0) -> dict[str, Tensor]:
        """draws: made before. The cost draws its points once for all groups of one kind."""
        torch.manual_seed(7)
        for _ in range(draws):
            torch.rand(2, COST.num_points, 2)
        return criterion()(output(**{name: (groups[name], predictions[name]) for name in names}), goal)

    together = losses("main", "group_2", "hybrid")
    for name in groups:
        for key, value in losses(name, draws=int(name == "hybrid")).items():
            torch.testing.assert_close(together[key], value, rtol=1e-5, atol=1e-6)
    assert together["main/0/mask"] != together["group_2/0/mask"]


def test_what_is_refused() -> None:
    goal, p = targets(1, 1), prediction(2)
    blind = Known(torch.zeros(2, QUERIES).long(), torch.zeros(2, QUERIES, 4))
    with pytest.raises(UserError, match="query group 'atss' does not tell whose masks"):
        criterion()(output(atss=(group(blind), p)), goal)
    goal.masks = None
    with pytest.raises(UserError, match=r"set data\.masks=true"):
        criterion()(output(main=(group(Matching()), p)), goal)
