"""What every kind of query group promises: isolation, in values and gradients (DESIGN, section 6.2)."""

from functools import partial

import pytest
import torch
from torch import Tensor

from codetr.models.cross_attention import ConditionalCrossAttention, DeformableCrossAttention
from codetr.models.decoder import Decoder, DecoderLayer
from codetr.models.query_position import ModulatedPosition, ReferencePosition
from codetr.nn.group_attention import GroupSelfAttention, attention_plan
from codetr.types import Memory, QueryGroup

WIDTH, HEADS, CLASSES, BATCH = 32, 4, 3, 2
SHAPES = ((4, 6), (2, 3))


def deformable() -> Decoder:
    """As in DINO: boxes, positions derived in every layer, look forward twice."""
    cross = partial(DeformableCrossAttention, WIDTH, HEADS, len(SHAPES), 2)
    layer = partial(DecoderLayer, WIDTH, HEADS, 48, 0.0, "relu", False, cross)
    position = ReferencePosition(WIDTH, 20, True)
    return Decoder(WIDTH, CLASSES, 3, layer, position, None, "look_forward_twice", False, True, 0.0, 1e-5, 0)


def conditional() -> Decoder:
    """As in DAB-DETR: dense cross-attention with modulated locations."""
    cross = partial(ConditionalCrossAttention, WIDTH, HEADS, 0.0)
    layer = partial(DecoderLayer, WIDTH, HEADS, 48, 0.0, "prelu", True, cross)
    position = ModulatedPosition(WIDTH, 20)
    return Decoder(WIDTH, CLASSES, 3, layer, position, None, "look_forward_twice", True, True, 0.0, 1e-3, 0)


@pytest.fixture(params=[deformable, conditional])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    out = request.param().double()
    for parameter in out.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return out


@pytest.fixture
def memory() -> Memory:
    cells = sum(h * w for h, w in SHAPES)
    tokens = torch.randn(BATCH, cells, WIDTH, dtype=torch.double, requires_grad=True)
    padding = torch.zeros(BATCH, cells, dtype=torch.bool)
    padding[1, -2:] = True
    sizes = torch.tensor(SHAPES, dtype=torch.int32).expand(BATCH, -1, -1)
    return Memory(tokens, torch.randn_like(tokens), padding, SHAPES, sizes, torch.ones(BATCH, 2, 2, dtype=torch.double))


def group(size: int, seed: int, **fields: object) -> QueryGroup:
    draw = torch.Generator().manual_seed(seed)
    content = torch.randn(BATCH, size, WIDTH, generator=draw, dtype=torch.double)
    reference = torch.rand(BATCH, size, 4, generator=draw, dtype=torch.double)
    return QueryGroup(content, reference, **fields)  # type: ignore[arg-type]


def kinds() -> dict[str, QueryGroup]:
    """Main, two equal groups, a larger one, one with missing queries, one in blocks that sees main."""
    valid = torch.rand(BATCH, 6, generator=torch.Generator().manual_seed(9)) > 0.4
    known = torch.rand(BATCH, 12, generator=torch.Generator().manual_seed(8)) > 0.3
    return {
        "main": group(5, 0),
        "group_2": group(5, 1),
        "group_3": group(5, 2),
        "hybrid": group(9, 5),
        "atss": group(6, 3, valid=valid),
        "denoising": group(12, 4, valid=known, blocks=3, sees=("main",)),
    }


def only_main() -> dict[str, QueryGroup]:
    return {"main": kinds()["main"]}


def test_training_groups_leave_main_unchanged(decoder: Decoder, memory: Memory) -> None:
    alone, together = decoder(only_main(), memory)["main"], decoder(kinds(), memory)["main"]
    torch.testing.assert_close(together.logits, alone.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(together.boxes, alone.boxes, rtol=0, atol=1e-12)
    gradients = []
    for groups in (only_main(), kinds()):
        out = decoder(groups, memory)["main"]
        gradients.append(
            torch.autograd.grad(out.logits.square().sum() + out.boxes.sum(), [memory.tokens, *decoder.parameters()])
        )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(a.abs().max().clamp(min=1)))


def test_one_pass_equals_a_pass_per_group(decoder: Decoder, memory: Memory) -> None:
    """Values, and the gradients of the sum."""
    together = decoder(kinds(), memory)
    parameters = [memory.tokens, *decoder.parameters()]
    losses = []
    for name, one in kinds().items():
        if one.sees:
            alone = decoder({**only_main(), name: one}, memory)[name]
        else:
            alone = decoder({"main": one}, memory)["main"]
        torch.testing.assert_close(together[name].logits, alone.logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(together[name].boxes, alone.boxes, rtol=0, atol=1e-12)
        losses.append(alone.logits.square().sum() + alone.boxes.sum())
    total = sum(p.logits.square().sum() + p.boxes.sum() for p in together.values())
    for a, b in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(sum(losses), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(a.abs().max().clamp(min=1)))


def test_group_order_and_query_order_do_not_matter(decoder: Decoder, memory: Memory) -> None:
    expected = decoder(kinds(), memory)
    reversed_ = decoder(dict(reversed(kinds().items())), memory)
    for name, prediction in expected.items():
        torch.testing.assert_close(reversed_[name].boxes, prediction.boxes, rtol=0, atol=1e-12)
    order = torch.tensor([3, 0, 4, 1, 2])
    groups = kinds()
    main = groups["main"]
    main.content, main.reference = main.content[:, order], main.reference[:, order]
    permuted = decoder(groups, memory)
    torch.testing.assert_close(permuted["main"].logits, expected["main"].logits[:, :, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(permuted["main"].boxes, expected["main"].boxes[:, :, order], rtol=0, atol=1e-12)


def test_denoising_sees_main(decoder: Decoder, memory: Memory) -> None:
    """The reverse, that main never sees it, is the first test."""
    groups = kinds()
    groups["main"].content[0, 0] += 1
    changed, expected = decoder(groups, memory)["denoising"], decoder(kinds(), memory)["denoising"]
    assert not torch.equal(changed.logits[:, 0], expected.logits[:, 0])
    torch.testing.assert_close(changed.logits[:, 1], expected.logits[:, 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("poisoned", ["main", "group_2", "hybrid", "atss", "denoising"])
def test_nan_stays_in_its_group(decoder: Decoder, memory: Memory, poisoned: str) -> None:
    clean, groups = decoder(kinds(), memory), kinds()
    groups[poisoned].content[0, 0] = float("nan")
    dirty = decoder(groups, memory)
    for name, one in groups.items():
        if name == poisoned or poisoned in one.sees:
            assert dirty[name].logits.isnan().any()
        else:
            assert torch.equal(dirty[name].logits, clean[name].logits)


def _by_mask(attention: GroupSelfAttention, content: Tensor, position: Tensor, given: dict[str, QueryGroup]) -> Tensor:
    """The usual way: one softmax over all queries under a mask that says who sees whom."""
    names, groups = list(given), list(given.values())
    owner = torch.cat([torch.full((g.content.shape[1],), i) for i, g in enumerate(groups)])
    block = torch.cat(
        [torch.arange(g.content.shape[1]) // (g.content.shape[1] // g.blocks) + 100 * i for i, g in enumerate(groups)]
    )
    allowed = block[:, None] == block[None]
    for i, g in enumerate(groups):
        for name in g.sees:
            seen = names.index(name)
            allowed |= (owner == i)[:, None] & (owner == seen)[None]
    valid = torch.cat(
        [torch.ones(BATCH, g.content.shape[1], dtype=torch.bool) if g.valid is None else g.valid for g in groups], 1
    )
    allowed = allowed[None] & valid[:, None, :]
    query, key = attention.query_key(content + position).chunk(2, -1)
    heads = [x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, attention.value(content))]
    scores = heads[0] @ heads[1].transpose(-1, -2) / heads[0].shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
    return attention.output((weights @ heads[2]).transpose(1, 2).flatten(2))


def test_self_attention_equals_one_big_mask() -> None:
    attention = GroupSelfAttention(WIDTH, HEADS, 0.0, False).double()
    groups = kinds()
    for g in groups.values():  # a block without any valid query has no softmax under the big mask
        if g.valid is not None:
            g.valid[:, :: g.content.shape[1] // g.blocks // 2] = True
    content = torch.cat([g.content for g in groups.values()], 1)
    position = torch.randn_like(content)
    ours = attention(content, position, attention_plan(groups))
    torch.testing.assert_close(ours, _by_mask(attention, content, position, groups), rtol=0, atol=1e-12)


def test_a_group_without_any_valid_query_stays_finite(decoder: Decoder, memory: Memory) -> None:
    empty = group(4, 5, valid=torch.zeros(BATCH, 4, dtype=torch.bool))
    assert decoder({**only_main(), "atss": empty}, memory)["atss"].logits.isfinite().all()
