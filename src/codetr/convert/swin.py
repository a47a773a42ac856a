"""Names of the official Swin backbone and ours: `*` stands for one dotted component, no tensor changes."""

from __future__ import annotations

# The official code merges patches at the end of a stage, timm at the start of the next one.
RULES: tuple[tuple[str, str], ...] = (
    ("backbone.patch_embed.*.*", "backbone.body.patch_embed.*.*"),
    *(
        (f"backbone.layers.{i}.blocks.*.{part}", f"backbone.body.layers_{i}.blocks.*.{part}")
        for i in range(4)
        for part in ("norm1.*", "norm2.*", "attn.relative_position_bias_table", "attn.qkv.*", "attn.proj.*", "mlp.*.*")
    ),
    *((f"backbone.layers.{i}.downsample.*.*", f"backbone.body.layers_{i + 1}.downsample.*.*") for i in range(3)),
    *((f"backbone.norm{i}.*", f"backbone.norms.{i}.*") for i in range(4)),
)

IGNORED: tuple[tuple[str, str], ...] = (
    ("backbone.layers.*.blocks.*.attn.relative_position_index", "a constant that the window size determines"),
)
