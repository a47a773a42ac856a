"""The ViT backbone and its pyramid against tensors recorded from the official code, the official parameter names, and
a slow implementation by the formulas, window by window and with complex numbers for the rotary embedding."""

import json
from pathlib import Path

import pytest
import torch
from bundle import close
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import Tensor
from torch.nn import functional as F

from codetr.convert.names import NameTable
from codetr.convert.vit import IGNORED, RULES
from codetr.errors import UserError
from codetr.models.simple_pyramid import SimplePyramid
from codetr.models.vit import Block, ViT, rotary_table

NAMES = NameTable(RULES, IGNORED)
BUNDLES = ["co_dino_5scale_vit", "co_dino_5scale_lsj_vit_lvis", "co_dino_5scale_vit_instance"]
CONFIGS = {"vit_large": "co_dino_5scale_vit_large_coco", "vit_large_lsj": "co_dino_5scale_lsj_vit_large_lvis"}
SIZES = [(64, 96), (50, 75), (33, 130), (9, 13)]  # the first fits the patches, none the windows in both directions


def build(
    window: int = 3,
    global_blocks: tuple[int, ...] = (1,),
    rotary_canvas: int | None = None,
    checkpointed_blocks: int = 0,
    **arguments: float,
) -> ViT:
    """A small one with random weights, also where the initialisation has zeros or ones."""
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 4 / 3, "img_size": 64, "patch_size": 16}
    vit = ViT(
        "eva02_large_patch14_224",
        pretrained=False,
        window=window,
        global_blocks=global_blocks,
        rotary_canvas=rotary_canvas,
        checkpointed_blocks=checkpointed_blocks,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        arguments={**small, **arguments},
    )
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter == 1))
    return vit.eval()


def composed(config: str, *overrides: str) -> tuple[ViT, SimplePyramid]:
    """From conf/, without memory."""
    overrides = (f"model/backbone={config}", "model.detector.backbone.pretrained=false", *overrides)
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", ["model=dino_5scale", "model/neck=simple_pyramid", *overrides]).model.detector
    with torch.device("meta"):
        vit, make_pyramid = (instantiate(part, _convert_="all") for part in (config.backbone, config.neck))
        return vit, make_pyramid(in_channels=vit.channels)


def from_official(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        NAMES.to_ours(name).removeprefix(prefix): tensor.float()
        for name, tensor in weights.items()
        if name.startswith(prefix) and not NAMES.reason_to_ignore(name)
    }


@pytest.fixture
def attention_inputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value of every call of the fused attention."""
    fused, calls = F.scaled_dot_product_attention, []

    def spy(*inputs: Tensor, **kwargs: object) -> Tensor:
        calls.append(inputs)
        return fused(*inputs, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize("bundle", BUNDLES)
def test_features_and_levels_of_the_official_code(official: Path, bundle: str) -> None:
    folder = official / bundle
    weights, inputs, forward = (load_file(folder / f"{f}.safetensors") for f in ("weights", "inputs", "forward"))
    sizes = json.loads((folder / "config.json").read_text())["backbone"]
    canvas = sizes["img_size"] if sizes.get("use_lsj") else None
    vit = build(
        window=sizes["window_size"],
        global_blocks=tuple(i for i in range(sizes["depth"]) if i not in sizes["window_block_indexes"]),
        rotary_canvas=canvas,
        **{name: sizes[name] for name in ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size")},
        img_size=sizes["pretrain_img_size"],
    )
    vit.load_state_dict(from_official(weights, "backbone."))
    pyramid = SimplePyramid(vit.channels, width=32, num_levels=5)
    pyramid.load_state_dict(from_official(weights, "neck."))
    with torch.no_grad():
        (features,) = vit(inputs["img"].float())
        levels = pyramid([forward["backbone.0"]])
    close(features, forward["backbone.0"], 2e-6)
    assert len(levels) == 5
    for i, level in enumerate(levels):
        close(level, forward[f"neck.{i}"], 4e-6)


@pytest.mark.parametrize("instance", ["", "_instance"])
@pytest.mark.parametrize("config", CONFIGS)
def test_names_and_shapes_are_the_official_ones_in_both_directions(official: Path, config: str, instance: str) -> None:
    parts = dict(zip(("backbone", "neck"), composed(config), strict=True))
    ours = {f"{part}.{k}": tuple(v.shape) for part, module in parts.items() for k, v in module.state_dict().items()}
    theirs = json.loads((official / "keys" / f"{CONFIGS[config]}{instance}.json").read_text())["keys"]
    theirs = {name: tuple(shape) for name, shape, _ in theirs if name.startswith(("backbone.", "neck."))}
    learned = {name: shape for name, shape in theirs.items() if "rope" not in name}
    assert {name for name in theirs if NAMES.reason_to_ignore(name)} == theirs.keys() - learned.keys()
    assert {NAMES.to_ours(name): shape for name, shape in learned.items()} == ours
    assert {NAMES.to_theirs(name): shape for name, shape in ours.items()} == learned


@pytest.mark.parametrize("config", CONFIGS)
def test_windows_and_canvas_are_those_of_the_official_tables(official: Path, config: str) -> None:
    """The official blocks say where they attend by the length of their rotary table; without one: everywhere."""
    vit, _ = composed(config)
    keys = json.loads((official / "keys" / f"{CONFIGS[config]}.json").read_text())["keys"]
    lengths = {name: shape[0] for name, shape, _ in keys if name.endswith("rope.freqs_cos")}
    assert len(vit.blocks) == 24
    for i, block in enumerate(vit.blocks):
        length = lengths.get(f"backbone.blocks.{i}.attn.rope.freqs_cos")
        if block.window is not None:
            assert length == block.window**2
        elif vit.rotary_canvas is not None:
            assert length == (vit.rotary_canvas // 16) ** 2
        else:
            assert length is None


@pytest.mark.parametrize("config", CONFIGS)
def test_drop_path_rises_to_the_rate_of_the_last_block(config: str) -> None:
    vit, _ = composed(config, "model.detector.backbone.arguments.drop_path_rate=0.46")
    for i, block in enumerate(vit.blocks):
        for drop in (block.drop_path1, block.drop_path2):
            assert getattr(drop, "drop_prob", 0.0) == pytest.approx(0.46 * i / 23, abs=1e-7)


@pytest.mark.parametrize("window", [3, None])
def test_dropped_paths_leave_the_features_as_they_are(window: int | None) -> None:
    block = build().blocks[0].train()
    block.window = window
    x, tables = torch.randn(2, 4, 5, 32), [rotary_table(s, s, 16, torch.device("cpu")) for s in [(3, 3), (4, 5)]]
    block.drop_path1, block.drop_path2 = DropPath(1.0), DropPath(0.0)
    assert torch.equal(block(x, *tables), x + block.mlp(block.norm2(x)))
    block.drop_path2 = DropPath(1.0)
    assert torch.equal(block(x, *tables), x)


def test_rotary_tables_are_the_recorded_ones(official: Path) -> None:
    weights = load_file(official / "co_dino_5scale_lsj_vit_lvis" / "weights.safetensors")
    for name, cells in {"rope_win": 3, "rope_glb": 5}.items():
        sine, cosine = rotary_table((cells, cells), (cells, cells), 64, torch.device("cpu")).chunk(2, -1)
        close(sine, weights[f"backbone.{name}.freqs_sin"], 1e-6)
        close(cosine, weights[f"backbone.{name}.freqs_cos"], 1e-6)


def rotated(x: Tensor, size: tuple[int, int], span: tuple[float, float]) -> Tensor:
    """x: [..., H * W, D], pairs of channels as complex numbers. RoFormer, eq. 13, on two axes."""
    count = x.shape[-1] // 4
    frequencies = 10000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
    row, column = (torch.arange(n, dtype=torch.float64) / s * 16 for n, s in zip(size, span, strict=True))
    angles = torch.cat(
        [
            (row[:, None, None] * frequencies).expand(-1, size[1], -1),
            (column[None, :, None] * frequencies).expand(size[0], -1, -1),
        ],
        dim=-1,
    ).flatten(0, 1)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def slow_attention(x: Tensor, block: Block, span: tuple[float, float]) -> Tensor:
    """x: [H, W, C], one window or the map."""
    size, tokens = x.shape[:2], x.flatten(0, 1)
    a = block.attn
    q, k, v = (tokens @ p.weight.T + (0 if p.bias is None else p.bias) for p in (a.q_proj, a.k_proj, a.v_proj))
    q, k, v = (t.unflatten(-1, (a.num_heads, -1)).transpose(0, 1).contiguous() for t in (q, k, v))
    q, k = rotated(q, size, span), rotated(k, size, span)
    out = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    return (out.transpose(0, 1).flatten(1) @ a.proj.weight.T + a.proj.bias).unflatten(0, size)


def slow_block(x: Tensor, block: Block, canvas: float | None) -> Tensor:
    """x: [H, W, C]."""
    height, width = x.shape[:2]
    normal = F.layer_norm(x, x.shape[2:], block.norm1.weight, block.norm1.bias, 1e-6)
    if (window := block.window) is None:
        span = (height, width) if canvas is None else (canvas, canvas)
        x = x + slow_attention(normal, block, span)
    else:
        rows = []
        for top in range(0, height, window):
            row = []
            for left in range(0, width, window):
                part = normal[top : top + window, left : left + window]
                h, w = part.shape[:2]
                part = F.pad(part, (0, 0, 0, window - w, 0, window - h))
                row.append(slow_attention(part, block, (window, window))[:h, :w])
            rows.append(torch.cat(row, 1))
        x = x + torch.cat(rows)
    m = block.mlp
    normal = F.layer_norm(x, x.shape[2:], block.norm2.weight, block.norm2.bias, 1e-6)
    gate = normal @ m.fc1_g.weight.T + m.fc1_g.bias
    hidden = gate * gate.sigmoid() * (normal @ m.fc1_x.weight.T + m.fc1_x.bias)
    hidden = F.layer_norm(hidden, hidden.shape[2:], m.norm.weight, m.norm.bias, 1e-6)
    return x + hidden @ m.fc2.weight.T + m.fc2.bias


def slow(vit: ViT, image: Tensor) -> Tensor:
    """[C, H, W] for one image [3, h, w]."""
    side = vit.patch_embed.proj.weight.shape[-1]
    image = F.pad(image, (0, -image.shape[2] % side, 0, -image.shape[1] % side))
    patches = image.unfold(1, side, side).unfold(2, side, side)  # [3, H, W, side, side]
    x = torch.einsum("chwij,ocij->hwo", patches, vit.patch_embed.proj.weight) + vit.patch_embed.proj.bias
    table = vit.pos_embed[:, 1:].mT.unflatten(2, (4, 4))
    x = x + F.interpolate(table, x.shape[:2], mode="bicubic")[0].permute(1, 2, 0)
    canvas = None if vit.rotary_canvas is None else vit.rotary_canvas / side
    for block in vit.blocks:
        x = slow_block(x, block, canvas)
    return F.layer_norm(x, x.shape[2:], vit.norm.weight, vit.norm.bias, 1e-5).permute(2, 0, 1)


@pytest.mark.parametrize("canvas", [None, 80])
@pytest.mark.parametrize("size", SIZES)
def test_features_and_gradients_of_any_size_are_those_of_the_formulas(
    size: tuple[int, int], canvas: int | None
) -> None:
    vit = build(rotary_canvas=canvas).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    (features,), expected = vit(images), torch.stack([slow(vit, image) for image in images])
    assert features.shape[2:] == tuple(-(-side // 16) for side in size)
    close(features, expected, 2e-6)  # angles and positions are float32: with float64 ones the errors are below 1e-13
    upstream = torch.randn_like(expected)
    names, parameters = zip(*vit.named_parameters(), strict=True)
    gradients, truths = (torch.autograd.grad(f, parameters, upstream) for f in (features, expected))
    for name, gradient, truth in zip(names, gradients, truths, strict=True):
        assert (gradient - truth).abs().max() <= 2e-5 * truth.abs().max() + 1e-12, name
        if name == "pos_embed":
            assert not gradient[:, 0].any()
            assert gradient[:, 1:].any()


@pytest.mark.parametrize("canvas", [None, 64])
def test_attention_depends_on_relative_positions_only(
    canvas: int | None, attention_inputs: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    """Tokens of one content: moving both query and key by a cell leaves their logit as it is."""
    vit = build(window=5, rotary_canvas=canvas, depth=2).double()
    size = (4, 7)
    tables = vit._rotary_tables(size, torch.device("cpu"))
    for block, shape in zip(vit.blocks, [(5, 5), size], strict=True):
        content = torch.randn(32, dtype=torch.float64).expand(1, *(shape if block.window else size), 32)
        block._attend(content, tables[0] if block.window else tables[1])
        query, key, _ = attention_inputs.pop()
        logits = (query @ key.mT)[0].unflatten(2, shape).unflatten(1, shape)
        close(logits[:, 1:, :, 1:, :], logits[:, :-1, :, :-1, :], 1e-6)
        close(logits[:, :, 1:, :, 1:], logits[:, :, :-1, :, :-1], 1e-6)
        for axis in (3, 4):  # it does depend on them
            assert (logits.diff(dim=axis).abs() > 1e-4 * logits.abs().max()).any()


def test_a_canvas_fixes_steps_and_no_canvas_fixes_sides(
    attention_inputs: list[tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Keys of equal content: with a canvas, cell (i, j) turns alike in images of any size; without, what turns alike
    is the cell at the same part of the image."""
    content = torch.randn(32, dtype=torch.float64)

    def keys(canvas: int | None, size: tuple[int, int]) -> Tensor:
        vit.rotary_canvas = canvas
        vit.blocks[0]._attend(content.expand(1, *size, 32), vit._rotary_tables(size, torch.device("cpu"))[1])
        return attention_inputs.pop()[1][0].unflatten(1, size)

    vit = build(global_blocks=(0,), depth=1).double()
    own, twice = keys(None, (3, 5)), keys(None, (6, 10))
    fixed, larger = keys(96, (3, 5)), keys(96, (6, 10))
    close(larger[:, :3, :5], fixed, 1e-7)
    close(twice[:, ::2, ::2], own, 1e-7)
    assert (larger[:, ::2, ::2] - fixed).abs().max() > 0.1 * fixed.abs().max()
    assert (twice[:, :3, :5] - own).abs().max() > 0.1 * own.abs().max()
    close(keys(96, (6, 6)), keys(None, (6, 6)), 1e-12)


def perturbed_cells(vit: ViT) -> Tensor:
    """Which cells of a 5 x 7 map change with the pixels of cell (1, 4)."""
    images = torch.randn(1, 3, 80, 112)
    other = images.clone()
    other[:, :, 16:32, 64:80] += 1
    with torch.no_grad():
        return (vit(images)[0] != vit(other)[0]).any(1)[0]


def test_windows_are_closed_and_global_blocks_open_them() -> None:
    window = torch.zeros(5, 7, dtype=torch.bool)
    window[:3, 3:6] = True
    assert torch.equal(perturbed_cells(build(global_blocks=())), window)
    assert perturbed_cells(build(global_blocks=(2,))).all()


def test_an_image_alone_has_the_features_it_has_in_a_batch() -> None:
    vit, images = build().double(), torch.randn(3, 3, 61, 90, dtype=torch.float64)
    pyramid = SimplePyramid(vit.channels, width=8, num_levels=5).double()
    with torch.no_grad():
        together = pyramid(vit(images))
        for i, image in enumerate(images):
            for alone, level in zip(pyramid(vit(image[None])), together, strict=True):
                close(alone[0], level[i], 1e-12)


def test_checkpointing_changes_nothing_but_memory() -> None:
    images = torch.randn(1, 3, 50, 75)
    results = []
    for count in (0, 2):
        torch.manual_seed(3)
        vit, calls = build(checkpointed_blocks=count, drop_path_rate=0.5).train(), []
        for i, block in enumerate(vit.blocks):
            block.mlp.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.append(i))
        (features,) = vit(images)
        features.square().mean().backward()
        assert sorted(calls) == ([0, 0, 1, 1, 2] if count else [0, 1, 2])
        results.append([features, *(parameter.grad for parameter in vit.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_attention_is_fused_and_runs_in_bfloat16(attention_inputs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    vit, images = build(), torch.randn(2, 3, 50, 75)
    with torch.no_grad():
        (exact,) = vit(images)
        assert [query.shape[:3] for query, _, _ in attention_inputs] == [(8, 2, 9), (2, 2, 20), (8, 2, 9)]
        with torch.autocast("cpu", torch.bfloat16):
            (rough,) = vit(images)
    assert attention_inputs[-1][0].dtype == torch.bfloat16
    close(rough.float(), exact, 0.05)


@pytest.mark.parametrize(("num_levels", "strides"), [(5, (4, 8, 16, 32, 64)), (4, (8, 16, 32, 64)), (2, (32, 64))])
def test_levels_are_as_large_as_their_strides_say(num_levels: int, strides: tuple[int, ...]) -> None:
    pyramid = SimplePyramid((16,), width=8, num_levels=num_levels)
    assert pyramid.strides((16,)) == strides
    levels = pyramid([torch.randn(1, 16, 5, 7)])
    assert [level.shape for level in levels] == [(1, 8, -(-80 // s), -(-112 // s)) for s in strides]


@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [
        ("vit_large_patch16_224", (1,), "model.backbone.name=vit_large_patch16_224"),
        ("eva02_tiny_patch14_224", (1, 12), r"model.backbone.global_blocks=\[1, 12\]: .* has 12 blocks"),
    ],
)
def test_what_is_no_such_vit_is_refused(name: str, blocks: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViT(name, False, 3, blocks, None, 0, (0, 0, 0), (1, 1, 1), {})


@pytest.mark.parametrize(("channels", "num_levels"), [((16, 32), 4), ((16,), 6)])
def test_what_no_simple_pyramid_is_made_of_is_refused(channels: tuple[int, ...], num_levels: int) -> None:
    with pytest.raises(UserError, match=f"num_levels={num_levels} of {len(channels)}"):
        SimplePyramid(channels, width=8, num_levels=num_levels)
