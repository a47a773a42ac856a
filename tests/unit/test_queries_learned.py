"""Learned queries: what they share with the images, and one-to-many matching in the main group."""

from itertools import permutations

import pytest
import torch

from codetr.assign.hungarian import MatchingCost, match
from codetr.errors import UserError
from codetr.queries.denoising import DenoisingQueries
from codetr.queries.learned import LearnedQueries
from codetr.types import Frames, Matching, Memory, Prediction, Problem, QueryContext, QueryGroup, Targets

WIDTH, QUERIES, BATCH = 8, 5, 2


def context(dtype: torch.dtype = torch.float32) -> QueryContext:
    tokens = torch.randn(BATCH, 6, WIDTH, dtype=dtype)
    padding = torch.zeros(BATCH, 6, dtype=torch.bool)
    return QueryContext(
        Memory(
            tokens,
            tokens,
            padding,
            ((2, 3),),
            torch.tensor([[2, 3]]).int().expand(BATCH, 1, 2),
            torch.ones(BATCH, 1, 2),
        )
    )


def made(embed_position: bool, content: str, indicator: bool) -> tuple[LearnedQueries, QueryGroup]:
    source = LearnedQueries(WIDTH, QUERIES, content, indicator, 1, embed_position, 0.5)
    return source, source(context())


@pytest.mark.parametrize("embed_position", [True, False])
@pytest.mark.parametrize("content", ["zeros", "shared", "learned"])
@pytest.mark.parametrize("indicator", [True, False])
def test_contents_and_places_are_the_parameters(embed_position: bool, content: str, indicator: bool) -> None:
    source, group = made(embed_position, content, indicator)
    rows = torch.zeros(QUERIES, WIDTH)
    if content != "zeros":
        rows[:, : WIDTH - indicator] = source.content.weight  # the last channel says: no denoising query
    assert torch.equal(group.content, torch.stack([rows] * BATCH))
    assert group.weight == 0.5
    if embed_position:
        assert group.reference is None
        assert torch.equal(group.position, torch.stack([source.position.weight] * BATCH))
    else:
        assert group.position is None
        logits = source.anchors.weight.double()
        torch.testing.assert_close(group.reference[1].double(), 1 / (1 + (-logits).exp()))
    sizes = {"zeros": 0, "shared": WIDTH - indicator, "learned": QUERIES * (WIDTH - indicator)}
    own = sizes[content] + QUERIES * (WIDTH if embed_position else 4)
    assert sum(p.numel() for p in source.parameters()) == own


def test_one_shared_content_collects_every_gradient() -> None:
    source, group = made(False, "shared", True)
    weights = torch.randn_like(group.content)
    (group.content * weights).sum().backward()
    torch.testing.assert_close(source.content.weight.grad[0], weights.sum((0, 1))[:-1])


def test_the_indicator_tells_denoising_from_main_queries() -> None:
    """DN-DETR's last channel: 0 in the main group, 1 in the denoising group, and nowhere a parameter."""
    given = context()
    labels = torch.zeros(BATCH, 3, dtype=torch.long)
    valid = torch.ones(BATCH, 3, dtype=torch.bool)
    given.targets = Targets(torch.full((BATCH, 3, 4), 0.5), labels, valid, Frames.unscaled(torch.full((BATCH, 2), 64)))
    noised = DenoisingQueries(WIDTH, 4, 9, False, 0.2, 0.4, True, "masked", 1e-6, 1.0, False)(given)
    assert (noised.content[..., -1] == 1).all()
    assert (made(False, "shared", True)[1].content[..., -1] == 0).all()


def test_zeros_follow_the_memory_in_precision() -> None:
    source = LearnedQueries(WIDTH, QUERIES, "zeros", False, 1, True, 1.0).double()
    assert source(context(torch.float64)).content.dtype == torch.float64


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_every_object_gets_as_many_queries_as_repeats_at_least_cost(repeats: int) -> None:
    """Against all assignments of 6 queries to the repeated objects."""
    group = LearnedQueries(WIDTH, 6, "zeros", False, repeats, True, 1.0)(context())
    assert group.targets == Matching(repeats)
    prediction = Prediction(torch.randn(1, 1, 6, 3), torch.rand(1, 1, 6, 4) * 0.5 + 0.1)
    targets = Targets(
        torch.tensor([[[0.4, 0.4, 0.3, 0.3], [0.6, 0.5, 0.2, 0.4]]]),
        torch.tensor([[2, 0]]),
        torch.ones(1, 2, dtype=torch.bool),
        Frames.unscaled(torch.tensor([[64, 64]])),
    )
    cost = MatchingCost(2.0, 5.0, 2.0, 0.25, 2.0)
    (known,) = match([Problem(prediction, group.targets.repeats)], targets, cost)
    table = cost(prediction, targets.labels, targets.boxes)[0, 0]
    rows = [0, 1] * repeats
    best = min(
        sum(float(table[r, q]) for r, q in zip(rows, chosen, strict=True))
        for chosen in permutations(range(6), len(rows))
    )
    owners = {label: (known.labels[0, 0] == label).nonzero().flatten() for label in (2, 0)}
    assert {label: len(queries) for label, queries in owners.items()} == {2: repeats, 0: repeats}
    found = table[0, owners[2]].sum() + table[1, owners[0]].sum()
    assert abs(float(found) - best) < 1e-4


@pytest.mark.parametrize("embed_position", [True, False])
def test_every_pattern_stands_at_every_place(embed_position: bool) -> None:
    """DAB-DETR's 900 queries: all places with the first pattern, then with the second, ..."""
    source = LearnedQueries(WIDTH, 6, "patterns", True, 1, embed_position, 0.5, patterns=3)
    group = source(context())
    for query in range(6):
        pattern, place = divmod(query, 2)
        assert torch.equal(group.content[0, query, :-1], source.content.weight[pattern])
        if embed_position:
            assert torch.equal(group.position[1, query], source.position.weight[place])
        else:
            assert torch.equal(group.reference[1, query], source.anchors.weight[place].sigmoid())


def test_queries_that_are_not_patterns_at_places_are_refused() -> None:
    with pytest.raises(UserError, match="5 queries are not 3 patterns"):
        LearnedQueries(WIDTH, 5, "patterns", False, 1, True, 0.5, patterns=3)
