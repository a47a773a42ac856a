"""Names of mmdet 3.x's CO-DETR project in those of the official repository (mmdet 2.x), which are a superset.

They differ in the denoising table and in the Swin, which is mmdet's own: it has other names and reads the four patches
that it merges in another order.
"""

from __future__ import annotations

from torch import Tensor

from codetr.convert.names import NameTable
from codetr.convert.official import Weights

_SWIN = tuple(
    (f"backbone.stages.*.blocks.*.{theirs}", f"backbone.layers.*.blocks.*.{ours}")
    for theirs, ours in (
        ("attn.w_msa.relative_position_bias_table", "attn.relative_position_bias_table"),
        ("attn.w_msa.relative_position_index", "attn.relative_position_index"),
        ("attn.w_msa.qkv.*", "attn.qkv.*"),
        ("attn.w_msa.proj.*", "attn.proj.*"),
        ("norm1.*", "norm1.*"),
        ("norm2.*", "norm2.*"),
        ("ffn.layers.0.0.*", "mlp.fc1.*"),
        ("ffn.layers.1.*", "mlp.fc2.*"),
    )
)
_NAMES = NameTable(
    (
        ("query_head.dn_generator.label_embedding.weight", "query_head.label_embedding.weight"),
        ("backbone.patch_embed.projection.*", "backbone.patch_embed.proj.*"),
        ("backbone.stages.*.downsample.*.*", "backbone.layers.*.downsample.*.*"),
        *_SWIN,
    )
)


def to_mmdet2(weights: Weights) -> Weights:
    """Weights of either version, under mmdet 2.x's names."""
    out: Weights = {}
    for name, tensor in weights.items():
        if name.startswith("backbone.stages.") and ".downsample." in name:
            tensor = _patches_in_order(tensor)
        out[_NAMES.to_ours(name) or name] = tensor
    return out


def _patches_in_order(tensor: Tensor) -> Tensor:
    """[..., C x 4 patches, row by row] -> [..., 4 patches, column by column x C], as the original Swin merges them."""
    patches = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return patches[..., [0, 2, 1, 3], :].flatten(-2)
