"""A decoder of masks: attention inside masks, isolation of groups, and which parts fit together."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from codetr.errors import UserError
from codetr.models.cross_attention import MaskedCrossAttention
from codetr.models.decoder import DecoderLayer
from codetr.models.mask_decoder import MaskDecoder
from codetr.models.pixel_decoder import PixelDecoder
from codetr.models.query_position import LevelsInTurn, Placement
from codetr.types import Memory, Prediction, QueryGroup
from toy_model import detector

WIDTH, HEADS, MASK_WIDTH, BATCH = 32, 4, 16, 2
IMAGE = (64, 96)
MASK2FORMER = ("model=mask2former_tiny", "model.num_levels=4")


@pytest.fixture(scope="module")
def memory() -> Memory:
    """The second image ends before the last columns and rows."""
    torch.manual_seed(0)
    encoder = PixelDecoder(WIDTH, HEADS, 4, 2, 48, 1, 0.0, 10000, 0.0, 0, 4, MASK_WIDTH, 8).double()
    levels = [torch.randn(BATCH, WIDTH, IMAGE[0] // s, IMAGE[1] // s, dtype=torch.double) for s in (4, 8, 16, 32)]
    padding = torch.zeros(BATCH, *IMAGE, dtype=torch.bool)
    padding[1, 40:], padding[1, :, 70:] = True, True
    with torch.no_grad():
        return encoder(levels, padding)


def decoder() -> MaskDecoder:
    torch.manual_seed(1)
    cross = partial(MaskedCrossAttention, WIDTH, HEADS, 0.0)
    layer = partial(DecoderLayer, WIDTH, HEADS, 48, 0.0, "relu", False, cross, cross_first=True)
    out = MaskDecoder(WIDTH, 3, 4, layer, LevelsInTurn(), MASK_WIDTH, 0).double()
    for parameter in out.parameters():
        nn.init.normal_(parameter, std=0.3)
    return out


def groups(*names: str) -> dict[str, QueryGroup]:
    """By name, always the same: two of one size, a larger one, one with missing queries."""
    sizes = {"main": 5, "group_2": 5, "hybrid": 9, "atss": 6}
    out = {}
    for seed, (name, size) in enumerate(sizes.items()):
        draw = torch.Generator().manual_seed(seed)
        content, position = torch.randn(2, BATCH, size, WIDTH, generator=draw, dtype=torch.double)
        valid = torch.rand(BATCH, size, generator=draw) > 0.4 if name == "atss" else None
        out[name] = QueryGroup(content, position=position, valid=valid)
    return {name: out[name] for name in names}


EVERY = ("main", "group_2", "hybrid", "atss")


def dense(p: Prediction) -> Tensor:
    assert p.masks is not None
    return torch.einsum("lbnc,bchw->lbnhw", p.masks.embeddings, p.masks.pixels.maps)


def test_groups_do_not_see_each_other(memory: Memory) -> None:
    """Values, and the gradients of the decoder: at once as one by one."""
    model = decoder()
    together, losses = model(groups(*EVERY), memory), []
    for name in EVERY:
        alone = model({"main": groups(name)[name]}, memory)["main"]
        torch.testing.assert_close(together[name].logits, alone.logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(dense(together[name]), dense(alone), rtol=0, atol=1e-11)
        losses.append(alone.logits.square().sum() + dense(alone).square().mean())
    total = sum(p.logits.square().sum() + dense(p).square().mean() for p in together.values())
    parameters = list(model.parameters())
    pairs = zip(torch.autograd.grad(total, parameters), torch.autograd.grad(sum(losses), parameters), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(a.abs().max().clamp(min=1)))


def test_nan_stays_in_its_group(memory: Memory) -> None:
    model, given = decoder(), groups(*EVERY)
    clean = model(groups(*EVERY), memory)
    given["hybrid"].content[0, 0] = float("nan")
    dirty = model(given, memory)
    assert dirty["hybrid"].logits.isnan().any()
    assert all(torch.equal(dirty[name].logits, clean[name].logits) for name in EVERY if name != "hybrid")


@pytest.mark.parametrize("level", [0, 1, 2])
def test_attention_keeps_inside_the_mask(memory: Memory, level: int) -> None:
    """As PyTorch's own attention, with a mask from the query's mask at full size, resized; an empty one is no mask."""
    torch.manual_seed(2)
    ours = MaskedCrossAttention(WIDTH, HEADS, 0.0).double()
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.double)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    content, position = torch.randn(2, BATCH, 7, WIDTH, dtype=torch.double)
    reference = torch.randn(BATCH, 7, MASK_WIDTH, dtype=torch.double)
    reference[:, 0] = 0.0  # a mask of the whole image
    maps = memory.pixels.maps
    masks = torch.einsum("bnc,bchw->bnhw", reference, maps)
    resized = interpolate(masks, memory.spatial_shapes[level], mode="bilinear", align_corners=False).flatten(2)
    sizes = [h * w for h, w in memory.spatial_shapes]
    tokens, place, padding = (part.split(sizes, 1)[level] for part in (memory.tokens, memory.position, memory.padding))
    allowed = (resized >= 0) & ~padding[:, None]
    assert not allowed[:, 1:].all()
    if level == 2:  # few cells: some mask has none of them
        allowed[~allowed.any(-1)] = True
    allowed = torch.where(allowed.any(-1, keepdim=True), allowed, True) & ~padding[:, None]
    expected, _ = theirs(
        content + position, tokens + place, tokens, attn_mask=~allowed.repeat_interleave(HEADS, 0), need_weights=False
    )
    found = ours(content, Placement(position, level=level), reference, memory)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_levels_from_the_coarsest_on(memory: Memory) -> None:
    rule = LevelsInTurn()
    places = [rule(layer, None, None, torch.zeros(1), memory).level for layer in range(5)]  # type: ignore[arg-type]
    assert places == [2, 1, 0, 2, 1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model/encoder@model.detector.encoder=deformable", "model.num_levels=4"],
            "model.detector.encoder: for boxes",
        ),
        (["model.detector.decoder.mask_width=8"], "mask_width=8: set them alike"),
        (["model.detector.encoder.stride=8"], "the finest level of the neck has stride 4"),
        (["model/query@model.detector.main=two_stage"], "take boxes from a first stage"),
        (["model/mask_head=refine_mask"], "finds the masks of boxes"),
        (["+model/query@model.detector.queries.denoising=denoising"], "denoising queries bring boxes alone"),
        (["model.detector.neck.bias=[true,false]"], "give as many, or one"),
    ],
)
def test_parts_that_do_not_fit(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as refused:
        detector(("a", "b"), *MASK2FORMER, *overrides)
    assert isinstance(refused.value.__cause__ or refused.value, UserError)
