"""Detectors of the `transformers` library: its parameters' names, as its files have them, and ours.

Conditional DETR, DAB-DETR and Deformable DETR, plain, with box refinement and with two stages; on ResNets of timm or
of the library itself. Mask2Former: `codetr.convert.mask2former`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from codetr.convert import mask2former, recognise, resnet
from codetr.convert.names import NameTable
from codetr.convert.official import Weights
from codetr.convert.weights import shapes, translate
from codetr.errors import UserError
from codetr.models.detector import Detector
from codetr.tensor_report import TensorReport

CONDITIONAL, DAB = "conditional_detr", "dab_detr"
DEFORMABLE, REFINE, TWO_STAGE = "deformable_detr", "deformable_detr_refine", "deformable_detr_two_stage"
PATTERNS = "queries.main.content.weight"  # of DAB-DETR, by our name


def model(weights: Weights) -> str | None:
    """The model of conf/model that these are weights of; None: none of this library's."""
    if mask2former.is_one(weights):
        return mask2former.NAME
    if "class_labels_classifier.weight" in weights and any(".sa_qcontent_proj." in name for name in weights):
        return CONDITIONAL
    if "model.query_refpoint_embeddings.weight" in weights:
        return DAB
    if not {"model.level_embed", "model.input_proj.0.0.weight"} <= weights.keys():
        return None
    if "model.enc_output.weight" in weights:
        return TWO_STAGE
    boxes = [
        t for name, t in _one_name_each(weights).items() if re.fullmatch(r"bbox_embed\.\d+\.layers\.2\.bias", name)
    ]
    return DEFORMABLE if all(torch.equal(boxes[0], other) for other in boxes) else REFINE


def settings(weights: Weights, name: str, about: Mapping[str, Any]) -> list[str]:
    """What `codetr.train` needs to compose the detector.

    name: of `model`. about: the library's config.json, for what weights do not show: heads, dilation, the number of
    two-stage queries; empty: as in our conf/. Raises UserError for a variant that is not ours.
    """
    _refuse(about)
    if name == mask2former.NAME:
        given = mask2former.settings(weights)
        return [f"experiment={name}_r50", f"model={name}"] + [f"{key}={value}" for key, value in given.items()]
    own = _table(name, _count(weights, "decoder")).rename(_cut(weights, name))
    backbone = recognise.resnet(own)
    experiment = name if name in (CONDITIONAL, DAB) else DEFORMABLE
    given = {
        "model.num_classes": recognise.rows(own, "decoder.class_heads.0.bias"),
        "model.width": recognise.rows(own, "decoder.layers.0.norm1.weight"),
        "model.ffn_width": recognise.rows(own, "decoder.layers.0.ffn.linear1.weight"),
        "model.num_heads": _number(about, "decoder_attention_heads"),
        "model.eps": 1e-5,
        "model.detector.encoder.num_layers": _count(weights, "encoder"),
        "model.detector.decoder.num_layers": _count(weights, "decoder"),
        "model.detector.main.num_queries": _queries(own, name, about),
        "model.detector.backbone.name": backbone,
        "model.detector.backbone.pretrained": "false",
    }
    if name == DAB and (patterns := len(own.get(PATTERNS, ()))):
        given |= {"model.detector.main.content": "patterns", "model.detector.main.patterns": patterns}
    if about.get("dilation"):
        given["++model.detector.backbone.arguments.output_stride"] = 16
    if name in (CONDITIONAL, DAB):
        prelu = "decoder.layers.0.ffn.activation.weight" in own
        given["model.activation"] = "prelu" if prelu else "relu"
    else:
        given["model.num_levels"] = levels = recognise.rows(own, "encoder.level_embedding")
        given["model.num_points"] = _number(about, "decoder_n_points")
        if levels == 1:
            given["model/backbone"] = "resnet50_c5"
    settings = [f"experiment={experiment}_r50", f"model={name}"]
    return settings + [f"{key}={value}" for key, value in given.items() if value is not None]


def to_ours(weights: Weights, name: str, detector: Detector) -> tuple[Weights, TensorReport]:
    """Their weights under our names, and what became of each; name: what `model` calls them."""
    if name == mask2former.NAME:
        return translate(mask2former.cut(weights), mask2former.table(), shapes(detector))
    return translate(_cut(weights, name), _table(name, _count(weights, "decoder")), shapes(detector))


def class_names(about: Mapping[str, Any]) -> tuple[str | None, ...]:
    """Of config.json's `id2label`; None for its gaps, the numbers that COCO has no category for."""
    texts = about.get("id2label") or {}
    if not isinstance(texts, Mapping) or not all(re.fullmatch(r"\d{1,5}", str(label)) for label in texts):
        raise UserError("config.json: id2label is not a mapping of labels, up to 99999, to names")
    given = {int(label): str(text) for label, text in texts.items()}
    names = (given.get(label, GAP) for label in range(max(given, default=-1) + 1))
    return tuple(None if name == GAP else name for name in names)


def without_gaps(weights: Weights, names: Sequence[str | None]) -> Weights:
    """Our weights without the rows of classes that have no name. The first stage tells objects by its first row, whose
    number is no class; it keeps its first rows. A row of "no object" behind those of the classes stays."""
    kept = torch.tensor([label for label, name in enumerate(names) if name is not None])
    out = dict(weights)
    for name, tensor in weights.items():
        if name.startswith("decoder.class_heads."):
            out[name] = torch.cat([tensor[kept], tensor[len(names) :]])
        elif name.startswith("queries.main.class_head."):
            out[name] = tensor[: len(kept)]
    return out


def _count(weights: Weights, part: str) -> int:
    """Layers of `encoder` or `decoder`."""
    return recognise.count(weights, rf"model\.{part}\.layers\.(\d+)\.")


GAP = "N/A"

# What the library can vary and we cannot, with the values that ours have.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("relu", "prelu"),
    "position_embedding_type": ("sine",),
    "normalize_before": (False,),
    "sine_position_embedding_scale": (None,),
    "temperature_height": (20,),
    "temperature_width": (20,),
    "pre_norm": (False,),
    "common_stride": (4,),
}


def _refuse(about: Mapping[str, Any]) -> None:
    for key, values in _FIXED.items():
        if about.get(key, values[0]) not in values:
            raise UserError(
                f"config.json: {key} is {about[key]}; only {' or '.join(map(str, values))} can be converted"
            )


def _number(about: Mapping[str, Any], key: str) -> int | None:
    """It becomes part of an override, whose text could say more than a number does."""
    value = about.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(f"config.json: {key} is {str(value)[:80]}, not a whole number above 0")
    return value


def _queries(own: Weights, name: str, about: Mapping[str, Any]) -> int | None:
    if name == TWO_STAGE:
        return _number(about, "two_stage_num_proposals")
    if name == DAB:
        return recognise.rows(own, "queries.main.anchors.weight") * max(len(own.get(PATTERNS, ())), 1)
    return recognise.rows(own, "queries.main.position.weight")


def _cut(weights: Weights, name: str) -> Weights:
    """Their tensors, each one of ours: the projections that are one matrix here are joined, positions and contents of
    queries are taken apart, and heads have one name per layer that owns one."""
    out = _one_name_each(weights)
    for parts, whole in _PACKED[name]:
        for key in [key for key in out if f".{parts[0]}." in key]:
            keys = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            if all(part in out for part in keys):
                out[key.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat([out.pop(part) for part in keys])
    both = out.get(_QUERIES)
    if name in (DEFORMABLE, REFINE) and both is not None:
        del out[_QUERIES]
        out[f"{_QUERIES}.position"], out[f"{_QUERIES}.content"] = both.chunk(2, 1)
    _settle_heads(out, name, _count(weights, "decoder"))
    return out


_QUERIES = "model.query_position_embeddings.weight"


def _one_name_each(weights: Weights) -> Weights:
    """The library's decoders know the heads too, so that files have either name or both; timm's wrapper adds another
    component to names. A second name with other values is left alone."""
    out: Weights = {}
    for name in sorted(weights, key=lambda name: name.startswith("model.")):
        new = name.replace(".conv_encoder.model._backbone.", ".conv_encoder.model.")
        new = re.sub(r"^model\.decoder\.((?:class|bbox)_embed\.\d)", r"\1", new)
        new = new.replace("model.decoder.bbox_embed.layers.", "bbox_predictor.layers.")
        known = new in out and not torch.equal(out[new], weights[name])
        out[name if known else new] = weights[name]
    return out


def _settle_heads(weights: Weights, name: str, num_layers: int) -> None:
    """The library ties heads, and its files may hold a tied one under any number of its names."""
    if name not in (DEFORMABLE, REFINE):
        return
    for first in [key for key in weights if re.match(r"(class|bbox)_embed\.0\.", key)]:
        others = [first.replace(".0.", f".{i}.", 1) for i in range(1, num_layers)]
        if name == REFINE and not any(other in weights for other in others):
            weights |= dict.fromkeys(others, weights[first])
        for other in others if name == DEFORMABLE else ():
            if other in weights and torch.equal(weights[other], weights[first]):
                del weights[other]


_Packed = tuple[tuple[tuple[str, ...], str], ...]
_IN_PROJ: _Packed = ((("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.in_proj"),)
_QK: _Packed = ((("self_attn.q_proj", "self_attn.k_proj"), "query_key"),)
_PACKED: dict[str, _Packed] = {
    CONDITIONAL: (
        *_IN_PROJ,
        (("sa_qcontent_proj", "sa_kcontent_proj"), "query_key"),
        (("sa_qpos_proj", "sa_kpos_proj"), "position"),
    ),
    DAB: (
        *_IN_PROJ,
        (("self_attn.self_attn_query_content_proj", "self_attn.self_attn_key_content_proj"), "query_key"),
        (("self_attn.self_attn_query_pos_proj", "self_attn.self_attn_key_pos_proj"), "position"),
    ),
    **dict.fromkeys((DEFORMABLE, REFINE, TWO_STAGE), _QK),
}


def _mlp(theirs: str, ours: str, num_layers: int) -> list[tuple[str, str]]:
    return [(f"{theirs}.layers.{i}.*", f"{ours}.{2 * i}.*") for i in range(num_layers)]


def _layers(part: str, rules: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(f"model.{part}.layers.*.{theirs}", f"{part}.layers.*.{ours}") for theirs, ours in rules.items()]


_FFN = {
    "fc1.*": "ffn.linear1.*",
    "fc2.*": "ffn.linear2.*",
    "activation_fn.*": "ffn.activation.*",
    "final_layer_norm.*": "ffn.norm.*",
}
_BODY = "model.backbone.conv_encoder.model."
_TIMM = NameTable(
    [(theirs.replace("backbone.", _BODY, 1), ours) for theirs, ours in resnet.RULES],
    [(theirs.replace("backbone.", _BODY, 1), reason) for theirs, reason in resnet.IGNORED],
)
_RESNET = NameTable(resnet.of_transformers(_BODY))
_DENSE = [
    ("model.input_projection.*", "neck.lateral.0.0.*"),
    *_layers(
        "encoder",
        {
            "self_attn.in_proj.*": "attention.in_proj_*",  # see `_cut`
            "self_attn.out_proj.*": "attention.out_proj.*",
            "self_attn_layer_norm.*": "norm.*",
            **_FFN,
        },
    ),
    *_mlp("model.encoder.query_scale", "encoder.scale", 2),
    *_mlp("model.decoder.query_scale", "decoder.query_position.scale", 2),
    *_mlp("bbox_predictor", "decoder.box_heads.0", 3),
    ("model.decoder.layernorm.*", "decoder.norm.*"),
]
_CONDITIONAL = [
    *_DENSE,
    ("class_labels_classifier.*", "decoder.class_heads.0.*"),
    (_QUERIES, "queries.main.position.weight"),
    *_mlp("model.decoder.ref_point_head", "decoder.reference_head", 2),
    ("model.decoder.layers.0.ca_qpos_proj.*", "decoder.query_position.added.*"),
    *_layers(
        "decoder",
        {
            "query_key.*": "self_attention.query_key.*",
            "position.*": "self_attention.position.*",
            "sa_v_proj.*": "self_attention.value.*",
            "self_attn.out_proj.*": "self_attention.output.*",
            "self_attn_layer_norm.*": "norm1.*",
            "ca_qcontent_proj.*": "cross_attention.query.*",
            "ca_qpos_sine_proj.*": "cross_attention.query_location.*",
            "ca_kcontent_proj.*": "cross_attention.key.*",
            "ca_kpos_proj.*": "cross_attention.key_position.*",
            "ca_v_proj.*": "cross_attention.value.*",
            "encoder_attn.out_proj.*": "cross_attention.output.*",
            "encoder_attn_layer_norm.*": "norm2.*",
            **_FFN,
        },
    ),
]
_DAB = [
    *_DENSE,
    ("class_embed.*", "decoder.class_heads.0.*"),
    ("model.query_refpoint_embeddings.weight", "queries.main.anchors.weight"),
    ("model.patterns.weight", PATTERNS),
    *_mlp("model.decoder.ref_point_head", "decoder.query_position.mlp", 2),
    *_mlp("model.decoder.ref_anchor_head", "decoder.query_position.size", 2),
    ("model.decoder.layers.0.cross_attn.cross_attn_query_pos_proj.*", "decoder.query_position.added.*"),
    *_layers(
        "decoder",
        {
            "query_key.*": "self_attention.query_key.*",
            "position.*": "self_attention.position.*",
            "self_attn.self_attn_value_proj.*": "self_attention.value.*",
            "self_attn.self_attn.output_proj.*": "self_attention.output.*",
            "self_attn.self_attn_layer_norm.*": "norm1.*",
            "cross_attn.cross_attn_query_content_proj.*": "cross_attention.query.*",
            "cross_attn.cross_attn_query_pos_sine_proj.*": "cross_attention.query_location.*",
            "cross_attn.cross_attn_key_content_proj.*": "cross_attention.key.*",
            "cross_attn.cross_attn_key_pos_proj.*": "cross_attention.key_position.*",
            "cross_attn.cross_attn_value_proj.*": "cross_attention.value.*",
            "cross_attn.cross_attn.output_proj.*": "cross_attention.output.*",
            "cross_attn.cross_attn_layer_norm.*": "norm2.*",
            **{f"mlp.{theirs}": ours for theirs, ours in _FFN.items()},
        },
    ),
]
_DEFORMABLE = [
    ("model.level_embed", "encoder.level_embedding"),
    (f"{_QUERIES}.position", "queries.main.position.weight"),  # see `_cut`
    (f"{_QUERIES}.content", "queries.main.content.weight"),
    ("model.reference_points.*", "decoder.reference_head.0.*"),
    ("model.enc_output.*", "queries.main.projection.0.*"),
    ("model.enc_output_norm.*", "queries.main.projection.1.*"),
    ("model.pos_trans.*", "queries.main.embedding.projection.0.*"),
    ("model.pos_trans_norm.*", "queries.main.embedding.projection.1.*"),
    *((f"model.input_proj.{i}.*.*", f"neck.lateral.{i}.*.*") for i in range(3)),
    *((f"model.input_proj.{i}.*.*", f"neck.extra.{i - 3}.*.*") for i in range(3, 6)),
    *_layers(
        "encoder",
        {
            "self_attn.*.*": "attention.*.*",
            "self_attn_layer_norm.*": "norm.*",
            **_FFN,
        },
    ),
    *_layers(
        "decoder",
        {
            "query_key.*": "self_attention.query_key.*",
            "self_attn.v_proj.*": "self_attention.value.*",
            "self_attn.out_proj.*": "self_attention.output.*",
            "self_attn_layer_norm.*": "norm1.*",
            "encoder_attn.*.*": "cross_attention.attention.*.*",
            "encoder_attn_layer_norm.*": "norm2.*",
            **_FFN,
        },
    ),
]


def _table(name: str, num_layers: int) -> NameTable:
    """num_layers: of the decoder; the first stage's heads stand behind those of the layers."""
    if name in (CONDITIONAL, DAB):
        rules = _CONDITIONAL if name == CONDITIONAL else _DAB
    else:
        rules = [
            (f"class_embed.{num_layers}.*", "queries.main.class_head.*"),
            *_mlp(f"bbox_embed.{num_layers}", "queries.main.box_head", 3),
            ("class_embed.*.*", "decoder.class_heads.*.*"),
            *_mlp("bbox_embed.*", "decoder.box_heads.*", 3),
            *_DEFORMABLE,
        ]
    return NameTable(rules) + _TIMM + _RESNET
