"""The Swin backbone against tensors recorded from the official code, and against the `transformers` library, which pads
before it shifts as well."""

import re
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
from transformers.models.swin.configuration_swin import SwinConfig
from transformers.models.swin.modeling_swin import SwinBackbone

from codetr.convert.names import NameTable
from codetr.convert.swin import RULES
from codetr.errors import UserError
from codetr.models.swin import Block, Swin

TINY = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "drop_path_rate": 0.0}
SIZES = [(64, 96), (50, 75), (33, 97), (130, 121), (9, 13)]  # of which only the first fits the patches
CONFIGS = ["swin_tiny", "swin_small", "swin_base", "swin_large", "swin_large_5scale"]

TRANSFORMERS = [
    (r"body\.patch_embed\.proj", "swin.embeddings.patch_embeddings.projection"),
    (r"body\.patch_embed\.norm", "swin.embeddings.norm"),
    (r"norms\.(\d)", lambda found: f"hidden_states_norms.stage{int(found[1]) + 1}"),
    (r"body\.layers_(\d)\.downsample", lambda found: f"swin.encoder.layers.{int(found[1]) - 1}.downsample"),
    (r"body\.layers_(\d)", r"swin.encoder.layers.\1"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"attn\.relative", "attention.relative_position_bias.relative"),
    (r"attn\.proj", "attention.o_proj"),
]


def build(window: int, out_indices: tuple[int, ...] = (0, 1, 2, 3), checkpointing: bool = False) -> Swin:
    """A small one with random weights, also where the initialisation has zeros or ones."""
    swin = Swin(
        "swin_tiny_patch4_window7_224",
        out_indices,
        pretrained=False,
        frozen_stages=0,
        checkpointing=checkpointing,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        arguments={**TINY, "window_size": window},
    )
    with torch.no_grad():
        for parameter in swin.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter == 1))
    return swin


def composed(config: str, *overrides: str) -> Swin:
    """From conf/, without memory."""
    overrides = (f"model/backbone={config}", "model.detector.backbone.pretrained=false", *overrides)
    with initialize_config_module("codetr.conf", version_base="1.3"):
        given = compose("train", list(overrides)).model.detector.backbone
    with torch.device("meta"):
        return instantiate(given, _convert_="all")


def from_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = NameTable(RULES).rename(weights)
    return {name.removeprefix("backbone."): tensor.float() for name, tensor in renamed.items()}


def for_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of ours under the library's names."""
    out = {}
    for name, tensor in tensors.items():
        for old, new in TRANSFORMERS:
            name = re.sub(old, new, name)
        if "attn.qkv" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[name.replace("attn.qkv", f"attention.{part}_proj")] = rows
        else:
            out[name] = tensor
    return out


def reference(swin: Swin, window: int) -> SwinBackbone:
    """The library's model with our weights."""
    model = SwinBackbone(SwinConfig(**TINY, window_size=window, out_indices=[1, 2, 3, 4]))
    model.swin.layernorm = torch.nn.Identity()  # for classification
    model.load_state_dict(for_transformers(swin.state_dict()))
    return model.eval()


def test_features_of_the_official_code(official: Path) -> None:
    folder = official / "co_dino_5scale_swin"
    weights, inputs, forward = (load_file(folder / f"{f}.safetensors") for f in ("weights", "inputs", "forward"))
    swin = build(window=4).eval()
    swin.load_state_dict(from_official(weights))
    with torch.no_grad():
        levels = swin(inputs["img"].float())
    assert len(levels) == 4
    for i, level in enumerate(levels):
        close(level, forward[f"backbone.{i}"], 2e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_drop_path_rises_to_the_rate_of_the_last_block(config: str) -> None:
    swin = composed(config, "model.detector.backbone.arguments.drop_path_rate=0.46")
    blocks = [module for module in swin.modules() if isinstance(module, Block)]
    assert len(blocks) == (12 if config == "swin_tiny" else 24)
    for i, block in enumerate(blocks):
        for drop in (block.drop_path1, block.drop_path2):
            assert getattr(drop, "drop_prob", 0.0) == pytest.approx(0.46 * i / (len(blocks) - 1), abs=1e-7)


def test_dropped_paths_leave_the_features_as_they_are() -> None:
    block = next(module for module in build(window=4).modules() if isinstance(module, Block)).train()
    block.drop_path1, block.drop_path2 = DropPath(1.0), DropPath(0.0)
    x, mask = torch.randn(2, 8, 8, 8), torch.empty(0)
    assert torch.equal(block(x, mask), x + block.mlp(block.norm2(x)))
    block.drop_path2 = DropPath(1.0)
    assert torch.equal(block(x, mask), x)


@pytest.mark.parametrize("window", [4, 7])
@pytest.mark.parametrize("size", SIZES)
def test_features_and_gradients_of_any_size_are_those_of_transformers(size: tuple[int, int], window: int) -> None:
    swin = build(window).double().eval()
    library = reference(swin, window).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    copied = images.detach().clone().requires_grad_()
    levels, expected = swin(images), library(copied).feature_maps
    for level, truth, stride in zip(levels, expected, swin.strides, strict=True):
        assert level.shape[2:] == tuple(-(-side // stride) for side in size)
        close(level, truth, 1e-12)
    upstream = [torch.randn_like(level) for level in levels]
    torch.autograd.backward(levels, upstream)
    torch.autograd.backward(expected, upstream)
    close(images.grad, copied.grad, 1e-10)
    gradients = for_transformers({name: parameter.grad for name, parameter in swin.named_parameters()})
    for name, parameter in library.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_an_image_alone_has_the_features_it_has_in_a_batch() -> None:
    swin, images = build(window=7).double().eval(), torch.randn(3, 3, 61, 90, dtype=torch.float64)
    with torch.no_grad():
        together = swin(images)
        for i, image in enumerate(images):
            for alone, level in zip(swin(image[None]), together, strict=True):
                close(alone[0], level[i], 1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_changes_nothing_but_memory(training: bool) -> None:
    images = torch.randn(1, 3, 50, 75)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        swin = build(4, out_indices=(1, 2, 3), checkpointing=checkpointing).train(training)
        calls: list[object] = []
        swin.body["layers_3"].blocks[1].register_forward_pre_hook(lambda *given, calls=calls: calls.append(given))
        levels = swin(images)
        torch.stack([level.square().mean() for level in levels]).sum().backward()
        results.append((levels, [parameter.grad for parameter in swin.parameters()]))
        assert len(calls) == 1 + checkpointing
    for plain, recomputed in zip(*results, strict=True):
        for a, b in zip(plain, recomputed, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swin_huge"])
def test_a_name_that_is_no_swin_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"model.backbone.name={name}"):
        Swin(name, (1, 2, 3), False, 0, False, (0, 0, 0), (1, 1, 1), {})


def test_attention_is_fused_and_runs_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, masks = F.scaled_dot_product_attention, []

    def spy(*args: Tensor, **kwargs: Tensor) -> Tensor:
        masks.append(kwargs["attn_mask"].shape)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    swin, images = build(window=4).eval(), torch.randn(2, 3, 50, 75)
    with torch.no_grad():
        exact = swin(images)
        assert len(masks) == 8
        with torch.autocast("cpu", torch.bfloat16):
            rough = swin(images)
    for a, b in zip(rough, exact, strict=True):
        close(a.float(), b, 0.05)
