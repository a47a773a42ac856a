"""Mask2Former of the `transformers` library, on its ResNets and Swins: its parameters' names, and ours.

The library counts levels from the coarsest on, we from the finest; where a tensor holds one part for each level, the
parts are turned around.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from codetr.convert import recognise, resnet
from codetr.convert.names import NameTable, Rules
from codetr.convert.official import Weights

NAME = "mask2former"
LEVELS, POINTS = 3, 4  # of the pixel decoder; the library has no others
_BODY, _PIXELS = "model.pixel_level_module.encoder.", "model.pixel_level_module.decoder."
_QUERIES = "model.transformer_module."
_LAYERS = f"{_QUERIES}decoder.layers."


def is_one(weights: Weights) -> bool:
    return f"{_QUERIES}queries_features.weight" in weights


def settings(weights: Weights) -> dict[str, object]:
    """What differs from conf/model/mask2former.yaml. Raises UserError for a variant that is not ours."""
    own = table().rename(cut(weights))

    def rows(name: str) -> int:
        return recognise.rows(own, name)

    swin = "backbone.norms.0.weight" in own
    backbone: dict[str, object] = {"model/backbone": "swin_tiny_4scale"} if swin else {}
    return backbone | {
        "model.detector.backbone.name": recognise.swin(own) if swin else recognise.resnet(own),
        "model.detector.backbone.pretrained": "false",
        "model.num_classes": rows("decoder.class_heads.0.bias") - 1,
        "model.width": rows("decoder.layers.0.norm1.weight"),
        "model.num_heads": rows("encoder.layers.0.attention.attention_weights.bias") // (LEVELS * POINTS),
        "model.ffn_width": rows("decoder.layers.0.ffn.linear1.weight"),
        "model.detector.encoder.ffn_width": rows("encoder.layers.0.ffn.linear1.weight"),
        "model.detector.encoder.num_layers": recognise.count(own, r"encoder\.layers\.(\d+)\."),
        "model.detector.encoder.mask_width": rows("encoder.pixels.bias"),
        "model.detector.decoder.mask_width": rows("encoder.pixels.bias"),
        "model.detector.decoder.num_layers": recognise.count(own, r"decoder\.layers\.(\d+)\."),
        "model.detector.main.num_queries": rows("queries.main.position.weight"),
    }


def cut(weights: Weights) -> Weights:
    """Their tensors, each one of ours: projections joined and taken apart, levels finest first."""
    out = dict(weights)
    for parts, whole in _JOINED.items():
        for name in [name for name in out if f".{parts[0]}." in name]:
            names = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            if all(part in out for part in names):
                out[name.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat([out.pop(part) for part in names])
    for name in [name for name in out if ".cross_attn.in_proj_" in name]:
        before, _, kind = name.partition("in_proj_")
        for part, tensor in zip(("query", "key", "value"), out.pop(name).chunk(3), strict=True):
            out[f"{before}{part}.{kind}"] = tensor
    return {name: _finest_first(name, tensor) for name, tensor in out.items()}


def join(weights: Weights) -> Weights:
    """The opposite of `cut`."""
    out = {name: _finest_first(name, tensor) for name, tensor in weights.items()}  # to turn around twice is nothing
    for parts, whole in _JOINED.items():
        for name in [name for name in out if f".{whole}." in name]:
            for part, tensor in zip(parts, out.pop(name).chunk(len(parts)), strict=True):
                out[name.replace(f".{whole}.", f".{part}.")] = tensor
    for name in [name for name in out if ".cross_attn.query." in name]:
        names = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        out[name.replace(".query.", ".in_proj_")] = torch.cat([out.pop(part) for part in names])
    return out


def _finest_first(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(("level_embed", "level_embed.weight")):
        return tensor.flip(0)
    for part, per_level in ((".sampling_offsets.", 2 * POINTS), (".attention_weights.", POINTS)):
        if part in name and len(tensor) % (LEVELS * per_level) == 0:
            return tensor.unflatten(0, (-1, LEVELS, per_level)).flip(1).flatten(0, 2)
    return tensor


def table() -> NameTable:
    return NameTable(
        (*_OURS, *resnet.of_transformers(_BODY), *_SWIN), (*resnet.counters_of_transformers(_BODY), *_IGNORED)
    )


_JOINED = {
    ("self_attn.q_proj", "self_attn.k_proj"): "query_key",
    ("attention.self.query", "attention.self.key", "attention.self.value"): "attention.qkv",
}
_FFN: Mapping[str, str] = {"fc1.*": "ffn.linear1.*", "fc2.*": "ffn.linear2.*", "final_layer_norm.*": "ffn.norm.*"}
_OURS: Rules = (
    *((f"{_PIXELS}input_projections.{i}.*.*", f"neck.lateral.{LEVELS - i}.*.*") for i in range(LEVELS)),
    (f"{_PIXELS}adapter_1.*.*", "neck.lateral.0.*.*"),
    (f"{_PIXELS}layer_1.*.*", "encoder.join.*.*"),
    (f"{_PIXELS}mask_projection.*", "encoder.pixels.*"),
    (f"{_PIXELS}level_embed", "encoder.level_embedding"),
    (f"{_QUERIES}level_embed.weight", "encoder.scale_embedding"),
    *(
        (f"{_PIXELS}encoder.layers.*.{theirs}", f"encoder.layers.*.{ours}")
        for theirs, ours in {"self_attn.*.*": "attention.*.*", "self_attn_layer_norm.*": "norm.*", **_FFN}.items()
    ),
    (f"{_QUERIES}queries_embedder.weight", "queries.main.position.weight"),
    (f"{_QUERIES}queries_features.weight", "queries.main.content.weight"),
    *(
        (f"{_LAYERS}*.{theirs}", f"decoder.layers.*.{ours}")
        for theirs, ours in {
            "query_key.*": "self_attention.query_key.*",  # see `cut`
            "self_attn.v_proj.*": "self_attention.value.*",
            "self_attn.out_proj.*": "self_attention.output.*",
            "self_attn_layer_norm.*": "norm1.*",
            "cross_attn.out_proj.*": "cross_attention.output.*",
            "cross_attn.*.*": "cross_attention.*.*",  # see `cut`
            "cross_attn_layer_norm.*": "norm2.*",
            **_FFN,
        }.items()
    ),
    (f"{_QUERIES}decoder.layernorm.*", "decoder.norm.*"),
    *(
        (f"{_QUERIES}decoder.mask_predictor.mask_embedder.{i}.0.*", f"decoder.mask_embedding.{2 * i}.*")
        for i in range(3)
    ),
    ("class_predictor.*", "decoder.class_heads.0.*"),
)
_SWIN: Rules = (
    (f"{_BODY}embeddings.patch_embeddings.projection.*", "backbone.body.patch_embed.proj.*"),
    (f"{_BODY}embeddings.norm.*", "backbone.body.patch_embed.norm.*"),
    *(
        (f"{_BODY}encoder.layers.{i}.blocks.*.{theirs}", f"backbone.body.layers_{i}.blocks.*.{ours}")
        for i in range(4)
        for theirs, ours in {
            "layernorm_before.*": "norm1.*",
            "layernorm_after.*": "norm2.*",
            "attention.self.relative_position_bias_table": "attn.relative_position_bias_table",
            "attention.qkv.*": "attn.qkv.*",  # see `cut`
            "attention.output.dense.*": "attn.proj.*",
            "intermediate.dense.*": "mlp.fc1.*",
            "output.dense.*": "mlp.fc2.*",
        }.items()
    ),
    # The library merges patches at the end of a stage, timm at the start of the next one.
    *((f"{_BODY}encoder.layers.{i}.downsample.*.*", f"backbone.body.layers_{i + 1}.downsample.*.*") for i in range(3)),
    *((f"{_BODY}hidden_states_norms.stage{i + 1}.*", f"backbone.norms.{i}.*") for i in range(4)),
)
_IGNORED: Rules = (
    ("criterion.empty_weight", "weights of the losses, which the configuration says"),
    (
        f"{_BODY}encoder.layers.*.blocks.*.attention.self.relative_position_index",
        "a constant that the window size determines",
    ),
    *((f"{_BODY}{prefix}layernorm.*", "part of the classifier, which a detector lacks") for prefix in ("", "swin.")),
)
