"""Two-stage queries: which proposals are chosen, and what they become."""

import math

import pytest
import torch

from codetr.errors import UserError
from codetr.queries.two_stage import ProposalEmbedding, TwoStageQueries
from codetr.types import Frames, Matching, Memory, QueryContext, QueryGroup, Targets

WIDTH, CLASSES, QUERIES, BATCH, EPS = 8, 3, 7, 2, 1e-3
SHAPES = ((4, 6), (2, 3))
TOKENS = sum(h * w for h, w in SHAPES)


@pytest.fixture
def context() -> QueryContext:
    """Of the second image the last three of six columns are padding, and the last of three."""
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[1] = torch.cat([(torch.arange(6) >= 3).repeat(4), (torch.arange(3) >= 2).repeat(2)])
    ratios = torch.ones(BATCH, 2, 2, dtype=torch.double)
    ratios[1, :, 0] = torch.tensor([3 / 6, 2 / 3])
    sizes = torch.tensor([SHAPES, ((4, 3), (2, 2))], dtype=torch.int32)
    tokens = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.double)
    targets = Targets(
        torch.full((BATCH, 1, 4), 0.5),
        torch.zeros(BATCH, 1, dtype=torch.long),
        torch.ones(BATCH, 1, dtype=torch.bool),
        Frames.unscaled(torch.full((BATCH, 2), 64)),
    )
    return QueryContext(Memory(tokens, tokens, padding, SHAPES, sizes, ratios), targets)


def source(class_agnostic: bool = True, mixed: bool = True, embed: bool = True) -> TwoStageQueries:
    out = TwoStageQueries(WIDTH, CLASSES, QUERIES, class_agnostic, mixed, embed, 10000, EPS, 2, 0.5).double()
    for parameter in out.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return out


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def by_hand(
    queries: TwoStageQueries, context: QueryContext, image: int
) -> list[tuple[float, list[float], list[float]]]:
    """(score, class logits, box) of every token, one by one, best first."""
    found, token = [], 0
    for level, (height, width) in enumerate(SHAPES):
        ratio_x, ratio_y = context.memory.valid_ratios[image, level].tolist()
        for row in range(height):
            for column in range(width):
                centre = ((column + 0.5) / width / ratio_x, (row + 0.5) / height / ratio_y)
                anchor = [*centre, 0.05 * 2**level, 0.05 * 2**level]
                legal = all(0.01 < a < 0.99 for a in anchor) and not context.memory.padding[image, token]
                features = context.memory.tokens[image, token] * legal
                features = queries.projection(features)
                logits = queries.class_head(features).tolist()
                delta = queries.box_head(features).tolist()
                box = [
                    1 / (1 + math.exp(-(d + logit(a)))) if legal else 1.0 for d, a in zip(delta, anchor, strict=True)
                ]
                found.append((logits[0] if queries.class_agnostic else max(logits), logits, box))
                token += 1
    return sorted(found, key=lambda each: -each[0])


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_references_are_the_best_proposals(context: QueryContext, class_agnostic: bool) -> None:
    queries = source(class_agnostic)
    group = queries(context)
    for image in range(BATCH):
        ranked = by_hand(queries, context, image)
        expected = torch.tensor([box for _, _, box in ranked[:QUERIES]], dtype=torch.double)
        torch.testing.assert_close(group.reference[image], expected, rtol=0, atol=1e-6)  # anchors are float32
        assert group.proposals.class_agnostic == class_agnostic
        proposed = group.proposals.prediction
        if class_agnostic:
            assert proposed.logits.shape[1] == TOKENS
            best = sorted(proposed.logits[image].tolist(), key=lambda each: -each[0])
        else:
            best = proposed.logits[image].tolist()
            assert len(best) == QUERIES
        torch.testing.assert_close(torch.tensor(best), torch.tensor([logits for _, logits, _ in ranked[: len(best)]]))


def test_without_mixed_selection_contents_come_from_the_proposals(context: QueryContext) -> None:
    """Sine encoding of x, y, w, h, C / 2 channels each; linear, norm; the first half is the position."""
    queries = source(mixed=False)
    group = queries(context)
    assert queries.content is None
    half = WIDTH // 2
    linear, norm = queries.embedding.projection
    for image in range(BATCH):
        for query in range(QUERIES):
            encoded = []
            for coordinate in group.reference[image, query].tolist():
                for channel in range(half):
                    angle = 2 * math.pi * coordinate / 10000 ** (2 * (channel // 2) / half)
                    encoded.append(math.cos(angle) if channel % 2 else math.sin(angle))
            out = norm(linear(torch.tensor(encoded, dtype=torch.double)))
            torch.testing.assert_close(group.position[image, query], out[:WIDTH], rtol=0, atol=1e-5)
            torch.testing.assert_close(group.content[image, query], out[WIDTH:], rtol=0, atol=1e-5)


def test_with_mixed_selection_only_positions_come_from_the_proposals(context: QueryContext) -> None:
    queries = source()
    group = queries(context)
    assert torch.equal(group.content, queries.content.weight.expand(BATCH, -1, -1))
    assert torch.equal(group.position, queries.embedding(group.reference)[0])
    assert source(embed=False)(context).position is None


def test_no_gradient_flows_through_the_references(context: QueryContext) -> None:
    queries = source(mixed=False)
    group = queries(context)
    assert not group.reference.requires_grad
    (group.content.sum() + group.position.square().sum()).backward()
    assert queries.box_head[0].weight.grad is None
    assert queries.embedding.projection[0].weight.grad is not None


def test_inference_makes_no_proposals_and_all_groups_carry_their_matching(context: QueryContext) -> None:
    def without_targets() -> QueryGroup:
        return queries(QueryContext(context.memory))

    queries = source()
    assert without_targets().proposals is None
    assert torch.equal(without_targets().reference, queries(context).reference)
    assert queries(context).targets == Matching(2)
    assert queries(context).weight == 0.5


@pytest.mark.parametrize("mixed", [True, False])
def test_fewer_tokens_than_queries(context: QueryContext, mixed: bool) -> None:
    queries = TwoStageQueries(WIDTH, CLASSES, 100, True, mixed, True, 10000, EPS, 1, 1.0).double()
    group = queries(context)
    assert group.content.shape == group.position.shape == (BATCH, TOKENS, WIDTH)


def test_contents_need_a_source() -> None:
    with pytest.raises(UserError, match=r"query_position=given"):
        source(mixed=False, embed=False)


def test_the_embedding_tells_coordinates_apart() -> None:
    embedding = ProposalEmbedding(WIDTH, 10000)
    boxes = torch.full((1, 4, 4), 0.3) + 0.4 * torch.eye(4)
    position, content = embedding(boxes)
    assert len({tuple(row) for row in torch.cat([position, content], -1)[0].tolist()}) == 4
