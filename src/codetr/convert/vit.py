"""Names of the official ViT backbone and simple pyramid and ours: `*` stands for one dotted component, no tensor
changes."""

from __future__ import annotations

_BLOCK = "backbone.blocks.*."
_PARTS = {  # official, ours
    "norm1.*": "norm1.*",
    "norm2.*": "norm2.*",
    "attn.q_proj.weight": "attn.q_proj.weight",
    "attn.k_proj.weight": "attn.k_proj.weight",
    "attn.v_proj.weight": "attn.v_proj.weight",
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    "attn.proj.*": "attn.proj.*",
    "mlp.w1.*": "mlp.fc1_g.*",
    "mlp.w2.*": "mlp.fc1_x.*",
    "mlp.w3.*": "mlp.fc2.*",
    "mlp.ffn_ln.*": "mlp.norm.*",
}

RULES: tuple[tuple[str, str], ...] = (
    ("backbone.pos_embed", "backbone.pos_embed"),
    ("backbone.patch_embed.proj.*", "backbone.patch_embed.proj.*"),
    *((_BLOCK + official, _BLOCK + ours) for official, ours in _PARTS.items()),
    ("backbone.out_norm.*", "backbone.norm.*"),
    *((f"neck.p{i}.*.*", f"neck.levels.p{i}.*.*") for i in range(2, 7)),
)

IGNORED: tuple[tuple[str, str], ...] = (
    ("backbone.rope_win.*", "a table that the window size determines"),
    ("backbone.rope_glb.*", "a table that the canvas determines"),
    ("backbone.blocks.*.attn.rope.*", "one of the two tables once more"),
)
