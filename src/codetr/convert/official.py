"""The official Co-DETR's parameters (its repository's names, those of mmdet 2.x) and ours, behind the backbone."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from codetr.convert.names import NameTable

Weights = dict[str, Tensor]

_TRANSFORMER = "query_head.transformer."


def table(region_head: str, num_layers: int, dino: bool) -> NameTable:
    """Of a detector whose heads are named `region_head` (faster_rcnn or mask_rcnn) and atss.

    num_layers: of the decoder; the official code keeps the first stage's branches behind those of the layers. dino:
    Co-DINO, which keeps the queries' contents elsewhere than Co-Deformable-DETR.
    """
    contents = f"{_TRANSFORMER}query_embed.weight" if dino else "query_head.query_embedding.weight"
    heads = (region_head, "atss")
    rules = [
        (contents, "queries.main.content.weight"),
        *_NECK,
        *_ENCODER,
        *_DECODER,
        *_first_stage(num_layers),
        *_RPN,
        *_REGIONS,
        *_ATSS,
    ]
    rules += [pair for number, head in enumerate(heads) for pair in _positive_queries(number, head)]
    return NameTable([(theirs, ours.replace("{region_head}", region_head)) for theirs, ours in rules])


_NECK = (
    ("neck.convs.*.conv.*", "neck.lateral.*.0.*"),
    ("neck.convs.*.gn.*", "neck.lateral.*.1.*"),
    ("neck.extra_convs.*.conv.*", "neck.extra.*.0.*"),
    ("neck.extra_convs.*.gn.*", "neck.extra.*.1.*"),
)
_FFN = (("ffns.0.layers.0.0.*", "ffn.linear1.*"), ("ffns.0.layers.1.*", "ffn.linear2.*"))
_ENCODER = (
    (f"{_TRANSFORMER}level_embeds", "encoder.level_embedding"),
    (f"{_TRANSFORMER}encoder.layers.*.attentions.0.*.*", "encoder.layers.*.attention.*.*"),
    (f"{_TRANSFORMER}encoder.layers.*.norms.0.*", "encoder.layers.*.norm.*"),
    (f"{_TRANSFORMER}encoder.layers.*.norms.1.*", "encoder.layers.*.ffn.norm.*"),
    *((f"{_TRANSFORMER}encoder.layers.*.{theirs}", f"encoder.layers.*.{ours}") for theirs, ours in _FFN),
)
_DECODER = (
    *(
        (f"{_TRANSFORMER}decoder.layers.*.{theirs}", f"decoder.layers.*.{ours}")
        for theirs, ours in (
            *_FFN,
            ("attentions.0.query_key.*", "self_attention.query_key.*"),  # see `split`
            ("attentions.0.value.*", "self_attention.value.*"),
            ("attentions.0.attn.out_proj.*", "self_attention.output.*"),
            ("attentions.1.*.*", "cross_attention.attention.*.*"),
            ("norms.0.*", "norm1.*"),
            ("norms.1.*", "norm2.*"),
            ("norms.2.*", "ffn.norm.*"),
        )
    ),
    (f"{_TRANSFORMER}decoder.ref_point_head.*.*", "decoder.query_position.mlp.*.*"),
    (f"{_TRANSFORMER}decoder.norm.*", "decoder.norm.*"),
    (f"{_TRANSFORMER}enc_output.*", "queries.main.projection.0.*"),
    (f"{_TRANSFORMER}enc_output_norm.*", "queries.main.projection.1.*"),
    (f"{_TRANSFORMER}pos_trans.*", "queries.main.embedding.projection.0.*"),
    (f"{_TRANSFORMER}pos_trans_norm.*", "queries.main.embedding.projection.1.*"),
    ("query_head.label_embedding.weight", "queries.denoising.label_embedding.weight"),
    ("query_head.downsample.*.*", "adapter.downsample.0.*.*"),
)
_RPN = (
    ("rpn_head.rpn_conv.*", "heads.{region_head}.rpn.conv.*"),
    ("rpn_head.rpn_cls.*", "heads.{region_head}.rpn.objectness.*"),
    ("rpn_head.rpn_reg.*", "heads.{region_head}.rpn.deltas.*"),
)
_REGIONS = (
    ("roi_head.0.bbox_head.shared_fcs.0.*", "heads.{region_head}.box_head.hidden.1.*"),
    ("roi_head.0.bbox_head.shared_fcs.1.*", "heads.{region_head}.box_head.hidden.3.*"),
    *(
        (f"roi_head.0.bbox_head.shared_convs.{i}.{part}.*", f"heads.{{region_head}}.box_head.convs.{3 * i + number}.*")
        for i in range(4)
        for number, part in enumerate(("conv", "gn"))
    ),
    ("roi_head.0.bbox_head.fc_cls.*", "heads.{region_head}.box_head.classes.*"),
    ("roi_head.0.bbox_head.fc_reg.*", "heads.{region_head}.box_head.deltas.*"),
    *((f"roi_head.0.mask_head.convs.{i}.conv.*", f"heads.{{region_head}}.mask.convs.{2 * i}.*") for i in range(8)),
    ("roi_head.0.mask_head.upsample.*", "heads.{region_head}.mask.upsample.*"),
    ("roi_head.0.mask_head.conv_logits.*", "heads.{region_head}.mask.classes.*"),
)
_ATSS = (
    ("bbox_head.0.atss_cls.*", "heads.atss.predictor.classes.*"),
    ("bbox_head.0.atss_reg.*", "heads.atss.predictor.boxes.*"),
    ("bbox_head.0.atss_centerness.*", "heads.atss.predictor.quality.*"),
    ("bbox_head.0.scales", "heads.atss.predictor.scales"),  # see `split`
    *(
        (f"bbox_head.0.{theirs}_convs.{i}.{part}.*", f"heads.atss.predictor.{ours}_tower.{3 * i + number}.*")
        for theirs, ours in (("cls", "class"), ("reg", "box"))
        for i in range(4)
        for number, part in enumerate(("conv", "gn"))
    ),
)


def _first_stage(num_layers: int) -> list[tuple[str, str]]:
    """The branches of the decoder's layers, and of the first stage behind them."""
    return [
        (f"query_head.cls_branches.{num_layers}.*", "queries.main.class_head.*"),
        (f"query_head.reg_branches.{num_layers}.*.*", "queries.main.box_head.*.*"),
        ("query_head.cls_branches.*.*", "decoder.class_heads.*.*"),
        ("query_head.reg_branches.*.*.*", "decoder.box_heads.*.*.*"),
    ]


def _positive_queries(number: int, head: str) -> list[tuple[str, str]]:
    return [
        (f"{_TRANSFORMER}aux_pos_trans.{number}.*", f"queries.{head}.coordinates.0.*"),
        (f"{_TRANSFORMER}aux_pos_trans_norm.{number}.*", f"queries.{head}.coordinates.1.*"),
        (f"{_TRANSFORMER}pos_feats_trans.{number}.*", f"queries.{head}.features.0.*"),
        (f"{_TRANSFORMER}pos_feats_norm.{number}.*", f"queries.{head}.features.1.*"),
        (f"{_TRANSFORMER}head_pos_embed.{number}", f"queries.{head}.head_embedding"),  # see `split`
    ]


_IN_PROJ = re.compile(r"(.*\.attentions\.0\.)attn\.in_proj_(weight|bias)")
_QUERY_KEY = re.compile(r"(.*\.attentions\.0\.)query_key\.(weight|bias)")
_SCALE = re.compile(r"(bbox_head\.0\.scales)\.\d+\.scale")
_HEADS = f"{_TRANSFORMER}head_pos_embed"


def split(weights: Weights) -> Weights:
    """Official tensors, cut so that each is one of ours: attention's packed projection becomes `query_key` and `value`,
    the positive queries' table one number per head; the ATSS scales of the levels become one vector."""
    out: Weights = {}
    for name, tensor in weights.items():
        if packed := _IN_PROJ.fullmatch(name):
            width = len(tensor) // 3
            out[f"{packed[1]}query_key.{packed[2]}"], out[f"{packed[1]}value.{packed[2]}"] = tensor.split(
                [2 * width, width]
            )
        elif name == f"{_HEADS}.weight":
            out |= {f"{_HEADS}.{i}": row for i, row in enumerate(tensor)}
        elif scale := _SCALE.fullmatch(name):
            out[scale[1]] = torch.cat([out[scale[1]], tensor[None]]) if scale[1] in out else tensor[None]
        else:
            out[name] = tensor
    return out


def join(weights: Weights) -> Weights:
    """The inverse of `split`."""
    out: Weights = {}
    rows = {name: tensor for name, tensor in weights.items() if name.startswith(f"{_HEADS}.")}
    for name, tensor in weights.items():
        if packed := _QUERY_KEY.fullmatch(name):
            value = weights[f"{packed[1]}value.{packed[2]}"]
            out[f"{packed[1]}attn.in_proj_{packed[2]}"] = torch.cat([tensor, value])
        elif re.fullmatch(r".*\.attentions\.0\.value\.(weight|bias)", name):
            continue
        elif name in rows:
            out[f"{_HEADS}.weight"] = torch.stack([rows[key] for key in sorted(rows)])
        elif name == "bbox_head.0.scales":
            out |= {f"{name}.{i}.scale": scale for i, scale in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


IGNORED: tuple[tuple[str, str], ...] = (
    ("ema_*", "the last step's values; the plain names hold the average, which the official hook swaps in"),
)
