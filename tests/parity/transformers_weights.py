"""The names of the `transformers` library's detectors as ours: Conditional DETR, DAB-DETR, Deformable DETR."""

import re

import torch
from torch import Tensor

Renames = list[tuple[str, str]]

MLP = [(rf"{theirs}\.layers\.{i}", f"{ours}.{2 * i}") for i in range(3) for theirs, ours in (
    (r"encoder\.query_scale", "encoder.scale"),
    (r"decoder\.query_scale", "decoder.query_position.scale"),
    (r"decoder\.ref_anchor_head", "decoder.query_position.size"),
)]  # fmt: skip

BACKBONE: Renames = [  # of timm, as ours
    (r"^model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?", "backbone.body."),
]

DENSE: Renames = [
    *BACKBONE,
    (r"^model\.", ""),
    *MLP,
    (r"^input_projection", "neck.lateral.0.0"),
    (r"decoder\.layernorm", "decoder.norm"),
    (r"(?:mlp\.)?final_layer_norm", "ffn.norm"),
    (r"(?:mlp\.)?fc(\d)", r"ffn.linear\1"),
    (r"(?:mlp\.)?activation_fn", "ffn.activation"),
    (r"^encoder(.*)self_attn_layer_norm", r"encoder\1norm"),
    (r"^encoder(.*)self_attn\.(?:o_proj|out_proj)", r"encoder\1attention.out_proj"),
]

CONDITIONAL: Renames = [
    *DENSE,
    (r"^query_position_embeddings", "queries.main.position"),
    (r"^class_labels_classifier", "decoder.class_heads.0"),
    *[(rf"^bbox_predictor\.layers\.{i}", f"decoder.box_heads.0.{2 * i}") for i in range(3)],
    *[(rf"decoder\.ref_point_head\.layers\.{i}", f"decoder.reference_head.{2 * i}") for i in range(2)],
    (r"self_attn_layer_norm", "norm1"),
    (r"encoder_attn_layer_norm", "norm2"),
    (r"decoder\.layers\.0\.encoder_attn\.q_pos_proj", "decoder.query_position.added"),
    (r"encoder_attn\.q_content_proj", "cross_attention.query"),
    (r"encoder_attn\.q_pos_sine_proj", "cross_attention.query_location"),
    (r"encoder_attn\.k_content_proj", "cross_attention.key"),
    (r"encoder_attn\.k_pos_proj", "cross_attention.key_position"),
    (r"encoder_attn\.v_proj", "cross_attention.value"),
    (r"encoder_attn\.o_proj", "cross_attention.output"),
    (r"self_attn\.([qk])_content_proj", r"self_attention.query_key.@\1"),
    (r"self_attn\.([qk])_pos_proj", r"self_attention.position.@\1"),
    (r"^decoder(.*)self_attn\.v_proj", r"decoder\1self_attention.value"),
    (r"^decoder(.*)self_attn\.o_proj", r"decoder\1self_attention.output"),
    (r"^encoder(.*)self_attn\.([qkv])_proj", r"encoder\1attention.in_proj_.@\2"),
]

DAB: Renames = [
    *DENSE,
    (r"^query_refpoint_embeddings", "queries.main.anchors"),
    (r"^class_embed", "decoder.class_heads.0"),
    *[(rf"^decoder\.bbox_embed\.layers\.{i}", f"decoder.box_heads.0.{2 * i}") for i in range(3)],
    *[(rf"decoder\.ref_point_head\.layers\.{i}", f"decoder.query_position.mlp.{2 * i}") for i in range(2)],
    (r"self_attn\.self_attn_layer_norm", "norm1"),
    (r"cross_attn\.cross_attn_layer_norm", "norm2"),
    (r"decoder\.layers\.0\.cross_attn\.cross_attn_query_pos_proj", "decoder.query_position.added"),
    (r"cross_attn\.cross_attn_query_content_proj", "cross_attention.query"),
    (r"cross_attn\.cross_attn_query_pos_sine_proj", "cross_attention.query_location"),
    (r"cross_attn\.cross_attn_key_content_proj", "cross_attention.key"),
    (r"cross_attn\.cross_attn_key_pos_proj", "cross_attention.key_position"),
    (r"cross_attn\.cross_attn_value_proj", "cross_attention.value"),
    (r"cross_attn\.cross_attn\.output_proj", "cross_attention.output"),
    (r"self_attn\.self_attn_(query|key)_content_proj", r"self_attention.query_key.@\1"),
    (r"self_attn\.self_attn_(query|key)_pos_proj", r"self_attention.position.@\1"),
    (r"self_attn\.self_attn_value_proj", "self_attention.value"),
    (r"self_attn\.self_attn\.output_proj", "self_attention.output"),
    (r"^encoder(.*)self_attn\.([qkv])_proj", r"encoder\1attention.in_proj_.@\2"),
]

DEFORMABLE: Renames = [
    *BACKBONE,
    (r"^model\.", ""),
    (r"^level_embed", "encoder.level_embedding"),
    (r"^input_proj\.([0-2])", r"neck.lateral.\1"),
    (r"^input_proj\.3", "neck.extra.0"),
    (r"^reference_points", "decoder.reference_head.0"),
    (r"^enc_output_norm", "queries.main.projection.1"),
    (r"^enc_output", "queries.main.projection.0"),
    (r"^pos_trans_norm", "queries.main.embedding.projection.1"),
    (r"^pos_trans", "queries.main.embedding.projection.0"),
    (r"^(?:decoder\.)?class_embed\.(\d)", r"decoder.class_heads.\1"),
    *[(rf"^(?:decoder\.)?bbox_embed\.(\d)\.layers\.{i}", rf"decoder.box_heads.\1.{2 * i}") for i in range(3)],
    (r"mlp\.fc(\d)", r"ffn.linear\1"),
    (r"final_layer_norm", "ffn.norm"),
    (r"^encoder(.*)self_attn_layer_norm", r"encoder\1norm"),
    (r"^encoder(.*)self_attn", r"encoder\1attention"),
    (r"self_attn_layer_norm", "norm1"),
    (r"encoder_attn_layer_norm", "norm2"),
    (r"encoder_attn", "cross_attention.attention"),
    (r"self_attn\.([qk])_proj", r"self_attention.query_key.@\1"),
    (r"self_attn\.v_proj", "self_attention.value"),
    (r"self_attn\.o_proj", "self_attention.output"),
]

PARTS = ["q", "k", "v", "query", "key"]  # of a projection that is one matrix here, marked with @


def ours(weights: dict[str, Tensor], renames: Renames, num_layers: int) -> dict[str, Tensor]:
    """Their tensors under our names.

    Their detectors hold every head once per layer, also where all layers share one: `decoder.class_heads.1` and so on
    are then the tensors of `decoder.class_heads.0`.
    """
    out: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        for theirs, new in renames:
            name = re.sub(theirs, new, name)
        if match := re.match(rf"(.*)\.@({'|'.join(PARTS)})\.(weight|bias)$", name):
            whole = f"{match[1]}.{match[3]}".replace("in_proj_.", "in_proj_")
            pieces.setdefault(whole, {})[PARTS.index(match[2])] = tensor
        else:
            out[name] = tensor
    out |= {name: torch.cat([parts[i] for i in sorted(parts)]) for name, parts in pieces.items()}
    if (both := out.pop("query_position_embeddings.weight", None)) is not None:
        out["queries.main.position.weight"], out["queries.main.content.weight"] = both.chunk(2, 1)
    first_stage = {"class_heads": "queries.main.class_head", "box_heads": "queries.main.box_head"}
    for kind, new in first_stage.items():  # the layer after the last is the first stage's
        prefix = f"decoder.{kind}.{num_layers}."
        out = {n.replace(prefix, f"{new}.") if n.startswith(prefix) else n: t for n, t in out.items()}
    return out
