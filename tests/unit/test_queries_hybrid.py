"""The hybrid branch: the ranks that follow the main group's, and when it cannot be."""

import pytest
import torch

from codetr.queries.hybrid import HybridQueries
from codetr.queries.learned import LearnedQueries
from codetr.queries.two_stage import TwoStageQueries
from codetr.types import MAIN, Frames, Matching, Memory, QueryContext, Targets

WIDTH, MAIN_QUERIES, HYBRID_QUERIES, BATCH = 8, 5, 9, 2
SHAPES = ((4, 6), (2, 3))
TOKENS = sum(h * w for h, w in SHAPES)


@pytest.fixture
def context() -> QueryContext:
    tokens = torch.randn(BATCH, TOKENS, WIDTH)
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    valid = torch.ones(BATCH, 1, dtype=torch.bool)
    sizes = torch.tensor(SHAPES, dtype=torch.int32).expand(BATCH, -1, -1)
    targets = Targets(torch.full((BATCH, 1, 4), 0.5), valid.long(), valid, Frames.unscaled(torch.full((BATCH, 2), 64)))
    return QueryContext(Memory(tokens, tokens, padding, SHAPES, sizes, torch.ones(BATCH, 2, 2)), targets)


def two_stage(class_agnostic: bool = True) -> TwoStageQueries:
    out = TwoStageQueries(WIDTH, 3, MAIN_QUERIES, class_agnostic, True, True, 10000, 1e-5, 1, 1.0)
    for parameter in out.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return out


def hybrid(embed_position: bool = True, queries: int = HYBRID_QUERIES) -> HybridQueries:
    return HybridQueries(WIDTH, queries, embed_position, 10000, 6, 0.5)


def test_references_are_the_ranks_after_mains(context: QueryContext) -> None:
    main = context.groups[MAIN] = two_stage()(context)
    group = hybrid()(context)
    for image in range(BATCH):
        proposals = main.proposals.prediction
        every = list(zip(proposals.logits[image, :, 0].tolist(), proposals.boxes[image].tolist(), strict=True))
        boxes = torch.tensor([box for _, box in sorted(every, key=lambda each: -each[0])])
        torch.testing.assert_close(main.reference[image], boxes[:MAIN_QUERIES])
        assert torch.equal(group.reference[image], boxes[MAIN_QUERIES : MAIN_QUERIES + HYBRID_QUERIES])


def test_contents_are_learned_and_positions_the_branchs_own(context: QueryContext) -> None:
    context.groups[MAIN] = two_stage()(context)
    source = hybrid()
    group = source(context)
    assert torch.equal(group.content, source.content.weight.expand(BATCH, -1, -1))
    assert torch.equal(group.position, source.embedding(group.reference)[0])
    assert hybrid(embed_position=False)(context).position is None
    assert not group.reference.requires_grad
    assert (group.targets, group.weight, group.sees, group.proposals) == (Matching(6), 0.5, (), None)


def test_fewer_tokens_than_queries(context: QueryContext) -> None:
    context.groups[MAIN] = two_stage()(context)
    group = hybrid(queries=100)(context)
    assert group.content.shape == group.position.shape == (BATCH, TOKENS - MAIN_QUERIES, WIDTH)


@pytest.mark.parametrize("kind", ["per class", "learned"])
def test_main_must_have_a_class_agnostic_first_stage(context: QueryContext, kind: str) -> None:
    learned = LearnedQueries(WIDTH, MAIN_QUERIES, "zeros", False, 1, True, 1.0)
    main = learned if kind == "learned" else two_stage(class_agnostic=False)
    context.groups[MAIN] = main(context)
    with pytest.raises(ValueError, match="class_agnostic: true"):
        hybrid()(context)
