"""Backbones of timm and torchvision, converted through the command, yield the feature maps that they yield there."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.swin_transformer import SwinTransformer

from codetr import application
from codetr.checkpoint import initialise_from, load_weights
from codetr.convert.__main__ import convert
from codetr.errors import UserError

IMAGE = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(3)).double()
RESNET = ["model/backbone=resnet50", "model.detector.backbone.name=resnet18"]
OTHERS = ["model.num_classes=2", "model.detector.backbone.pretrained=false"]


def converted(state: dict, folder: Path) -> Path:
    torch.save(state, folder / "theirs.pth")
    values = {
        "source": str(folder / "theirs.pth"),
        "out": str(folder / "ours.ckpt"),
        "config": None,
        "overwrite": False,
    }
    return convert(OmegaConf.create(values))


def started(checkpoint: Path, overrides: list[str]) -> nn.Module:
    """The backbone of a detector that starts from it, as codetr.train does with initialise.strict=false."""
    config = application.compose("train", ["model=co_deformable_tiny", *overrides, *OTHERS])
    detector = instantiate(config.model.detector, _convert_="all")
    report = initialise_from(detector, load_weights(checkpoint), ("a", "b"), strict=False)
    assert not report.unexpected
    assert not report.misshapen
    assert not [name for name in report.missing if name.startswith("backbone.body.")]
    return detector.backbone.eval()


def random_statistics(model: nn.Module) -> nn.Module:
    """Batch norms that do something, so that each of their tensors matters."""
    for name, tensor in model.state_dict().items():
        if ".bn" in name or name.startswith("bn") or "downsample.1" in name:
            tensor += torch.rand_like(tensor.float()).to(tensor.dtype)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_resnet(library: str, tmp_path: Path) -> None:
    make = (lambda: timm.create_model("resnet18")) if library == "timm" else torchvision.models.resnet18
    model = random_statistics(make())
    backbone = started(converted(model.state_dict(), tmp_path), RESNET).double()
    expected = IntermediateLayerGetter(model.double(), {f"layer{i}": str(i) for i in (2, 3, 4)})(IMAGE)
    for found, level in zip(backbone(IMAGE), expected.values(), strict=True):
        torch.testing.assert_close(found, level, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_swin_of_torchvision(tmp_path: Path) -> None:
    """Stage by stage. Unlike ours, torchvision's windows do not shift on maps of one window, so the image is large."""
    image = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(4)).double()
    model = torchvision.models.swin_t().eval()
    _random_tables(model)
    backbone = started(converted(model.state_dict(), tmp_path), ["model/backbone=swin_tiny"]).double()
    x, expected = image, []
    for number, stage in enumerate(model.double().features):
        x = stage(x)
        expected += [x] if number in (3, 5, 7) else []
    for found, level in zip(backbone.body(image), expected, strict=True):
        torch.testing.assert_close(found, level, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("merged", ["first", "last"])
def test_swin_of_timm_and_of_its_authors(merged: str, tmp_path: Path) -> None:
    """Who merges patches at the end of a stage counts that merging to the stage before."""
    model = timm.create_model("swin_tiny_patch4_window7_224").eval()
    _random_tables(model)
    state: dict[str, Tensor] = model.state_dict()
    if merged == "last":
        parts = {name: name.split(".") for name in state}
        moved = {n: ".".join(["layers", str(int(p[1]) - 1), *p[2:]]) for n, p in parts.items() if "downsample" in p}
        state = {"model": {moved.get(name, name): tensor for name, tensor in state.items()}}
    backbone = started(converted(state, tmp_path), ["model/backbone=swin_tiny"])
    own = backbone.body.state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith(("norm.", "head.")):
            assert torch.equal(own[name.replace("layers.", "layers_")], tensor)


def _random_tables(model: SwinTransformer | nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.normal_(parameter)


def test_what_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    changed = {**state, "layer1.0.se.weight": torch.zeros(2)}
    del changed["layer2.0.bn1.bias"]
    wrong = r"missing \(1\): backbone.body.layer2.0.bn1.bias\n *unexpected \(1\): backbone.body.layer1.0.se.weight"
    with pytest.raises(UserError, match=wrong):
        converted(changed, tmp_path)
    with pytest.raises(UserError, match=r"\[2, 2, 2, 1\] blocks is none of resnet18"):
        converted({n: t for n, t in state.items() if not n.startswith("layer4.1.")}, tmp_path)
    with pytest.raises(UserError, match="could not be recognised; read are Co-DETR"):
        converted({"encoder.weight": torch.zeros(2)}, tmp_path)
