"""Names of the official ResNet backbone (torchvision's) and ours (timm's); no tensor changes."""

from __future__ import annotations

RULES: tuple[tuple[str, str], ...] = (
    ("backbone.conv1.weight", "backbone.body.conv1.weight"),
    ("backbone.bn1.*", "backbone.body.bn1.*"),
    *((f"backbone.layer{i}.*.*.*", f"backbone.body.layer{i}.*.*.*") for i in range(1, 5)),
    *((f"backbone.layer{i}.*.downsample.*.*", f"backbone.body.layer{i}.*.downsample.*.*") for i in range(1, 5)),
)

# First match wins: what is ignored is asked for before the rules.
IGNORED: tuple[tuple[str, str], ...] = (
    ("backbone.bn1.num_batches_tracked", "a counter of training that frozen batch norms do not keep"),
    ("backbone.layer*.*.*.num_batches_tracked", "a counter of training that frozen batch norms do not keep"),
    ("backbone.layer*.*.downsample.*.num_batches_tracked", "a counter of training that frozen batch norms do not keep"),
)
