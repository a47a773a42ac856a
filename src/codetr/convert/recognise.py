"""What a state dict belongs to, from its names and shapes: official configurations, sizes of backbones."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt

import timm

from codetr.convert.official import Weights
from codetr.errors import UserError

_RESNETS = {
    (2, 2, 2, 2, False): "resnet18",
    (3, 4, 6, 3, False): "resnet34",
    (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101",
    (3, 8, 36, 3, True): "resnet152",
}
_SWIN = {(96, 6): "swin_tiny", (96, 18): "swin_small", (128, 18): "swin_base", (192, 18): "swin_large"}
_IMAGES = {7: 224, 12: 384}  # pixels per side, by window
LVIS = 1203
UNKNOWN = (
    "what this is could not be recognised; read are Co-DETR in the names of mmdet 2.x and 3.x, Conditional DETR, "
    "DAB-DETR, Deformable DETR and Mask2Former as transformers saves them, and ResNets and Swins as timm and "
    "torchvision save them"
)


@dataclass(frozen=True)
class Features:
    """What tells official configurations apart: their names say it, and so do the weights."""

    dino: bool
    backbone: str
    lvis: bool
    encoder_layers: int
    many_queries: bool
    mask_rcnn: bool
    instance: bool


def of_weights(weights: Weights) -> Features:
    """Raises UserError where this is no Co-DETR of the official repository."""
    dino = "query_head.label_embedding.weight" in weights
    queries = weights.get("query_head.query_embedding.weight")
    if not dino and queries is None:
        raise UserError(UNKNOWN)
    return Features(
        dino=dino,
        backbone=_backbone(weights),
        lvis=num_classes(weights) == LVIS,
        encoder_layers=count(weights, r"query_head\.transformer\.encoder\.layers\.(\d+)\."),
        many_queries=queries is not None and len(queries) == 900,
        mask_rcnn=any(name.startswith("roi_head.0.mask_head.") for name in weights),
        instance=any(name.startswith("mask_iou_head.") for name in weights),
    )


def of_name(config: str) -> Features:
    """Of an official configuration's file name."""
    (backbone,) = re.findall(r"r50|swin_tiny|swin_small|swin_base|swin_large|vit_large", config)
    return Features(
        dino=config.startswith("co_dino"),
        backbone=backbone,
        lvis=bool(re.search(r"lvis", config)),
        encoder_layers=9 if "9encoder" in config else 6,
        many_queries="900q" in config,
        mask_rcnn="_mask_" in config,
        instance=config.endswith("_instance"),
    )


def candidates(weights: Weights, configs: Iterable[str], file_name: str) -> list[str]:
    """The configurations that the weights fit, the one whose name the file bears first.

    Raises UserError when there is none.
    """
    features = of_weights(weights)
    found = [config for config in sorted(configs) if of_name(config) == features]
    if not found:
        raise UserError(f"no official configuration has these features: {features}; name the nearest with config=")
    return sorted(found, key=lambda config: (config not in file_name, -len(config) if config in file_name else 0))


def num_classes(weights: Weights) -> int:
    """Raises UserError where this is no Co-DETR of the official repository."""
    if "query_head.cls_branches.0.bias" not in weights:
        raise UserError(UNKNOWN)
    return len(weights["query_head.cls_branches.0.bias"])


def resnet(own: Weights) -> str:
    """timm's name of the backbone of a state dict of ours. Raises UserError for none of the usual ones."""
    depths = [count(own, rf"backbone\.body\.layer{i}\.(\d+)\.") for i in range(1, 5)]
    key = (*depths, any(name.endswith(".conv3.weight") for name in own))
    if key not in _RESNETS:
        raise UserError(f"a ResNet of {depths} blocks is none of {', '.join(_RESNETS.values())}")
    return _RESNETS[key]


def swin(own: Weights) -> str:
    """As `resnet`."""
    names = ("patch_embed.norm.weight", "layers_0.blocks.0.attn.relative_position_bias_table")
    width, offsets = (len(own[f"backbone.body.{name}"]) if f"backbone.body.{name}" in own else 0 for name in names)
    size, window = (
        _SWIN.get((width, count(own, r"backbone\.body\.layers_2\.blocks\.(\d+)\."))),
        (isqrt(offsets) + 1) // 2,
    )
    name = f"{size}_patch4_window{window}_{_IMAGES.get(window)}"
    if not timm.is_model(name):
        raise UserError(f"a Swin of {width} channels and windows of {window} is none of {', '.join(_SWIN.values())}")
    return name


def _backbone(weights: Weights) -> str:
    if "backbone.layer1.0.conv1.weight" in weights:
        return "r50"
    if "backbone.patch_embed.norm.weight" in weights:
        width = len(weights["backbone.patch_embed.norm.weight"])
        return _SWIN.get((width, count(weights, r"backbone\.layers\.2\.blocks\.(\d+)\.")), "an unknown Swin")
    return "vit_large"


def rows(own: Weights, name: str) -> int:
    """Of a tensor by our name. Raises UserError where it is missing."""
    if name not in own:
        raise UserError(f"a tensor is missing, and with it the size of the model: {name} by our name")
    return len(own[name])


def count(weights: Weights, pattern: str) -> int:
    numbers = {int(found[1]) for name in weights if (found := re.match(pattern, name))}
    return len(numbers)
