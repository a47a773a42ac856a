"""Backbones alone: ResNets and Swins of timm, torchvision and Swin's authors, into the backbone of a detector."""

from __future__ import annotations

from codetr.convert import recognise, resnet, swin
from codetr.convert.names import NameTable, Rules
from codetr.convert.official import Weights

_CLASSIFIER = "part of the classifier, which a detector lacks"
_CONSTANT = "a constant that the window size determines"


def table(weights: Weights) -> NameTable | None:
    """Their names and ours (`backbone.body...`); None: this is none of them."""
    if "layer1.0.conv1.weight" in weights:
        return _alone(resnet.RULES, resnet.IGNORED, [("fc.*", _CLASSIFIER)])
    if "features.1.0.attn.qkv.weight" in weights:
        return NameTable(_TORCHVISION, [("features.*.*.attn.relative_position_index", _CONSTANT), *_SWIN_IGNORED])
    if "layers.0.blocks.0.attn.qkv.weight" not in weights:
        return None
    # The authors and old versions of timm merge patches at the end of a stage, like the official detectors.
    ends = "layers.0.downsample.reduction.weight" in weights
    return _alone(swin.RULES if ends else _TIMM_SWIN, swin.IGNORED, _SWIN_IGNORED)


def settings(own: Weights) -> dict[str, str]:
    """What makes a detector have this backbone. own: under our names."""
    if "backbone.body.conv1.weight" in own:
        return {"model/backbone": "resnet50", "model.detector.backbone.name": recognise.resnet(own)}
    return {"model/backbone": "swin_tiny", "model.detector.backbone.name": recognise.swin(own)}


_SWIN_IGNORED: Rules = (
    ("layers.*.blocks.*.attn_mask", "a constant that the image size determines"),
    ("norm.*", _CLASSIFIER),
    ("head.*", _CLASSIFIER),
    ("head.fc.*", _CLASSIFIER),
)
_TIMM_SWIN: Rules = (
    *((f"backbone.layers.{i}.downsample.*.*", f"backbone.body.layers_{i}.downsample.*.*") for i in range(1, 4)),
    *(rule for rule in swin.RULES if "downsample" not in rule[0]),
)
_TORCHVISION: Rules = (
    ("features.0.0.*", "backbone.body.patch_embed.proj.*"),
    ("features.0.2.*", "backbone.body.patch_embed.norm.*"),
    *(
        (f"features.{2 * i + 1}.*.{theirs}", f"backbone.body.layers_{i}.blocks.*.{ours}")
        for i in range(4)
        for theirs, ours in (
            ("mlp.0.*", "mlp.fc1.*"),
            ("mlp.3.*", "mlp.fc2.*"),
            *((part, part) for part in ("norm1.*", "norm2.*", "attn.relative_position_bias_table")),
            *((part, part) for part in ("attn.qkv.*", "attn.proj.*")),
        )
    ),
    *((f"features.{2 * i}.*.*", f"backbone.body.layers_{i}.downsample.*.*") for i in range(1, 4)),
)


def _alone(rules: Rules, ignored: Rules, more: Rules) -> NameTable:
    """The tables of a detector's backbone, without its prefix."""
    shorter = [[(theirs.removeprefix("backbone."), other) for theirs, other in pairs] for pairs in (rules, ignored)]
    return NameTable(shorter[0], [*shorter[1], *more])
