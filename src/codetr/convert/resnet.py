"""Names of the official ResNet backbone (torchvision's), of that of transformers, and ours (timm's); no tensor
changes."""

from __future__ import annotations

RULES: tuple[tuple[str, str], ...] = (
    ("backbone.conv1.weight", "backbone.body.conv1.weight"),
    ("backbone.bn1.*", "backbone.body.bn1.*"),
    *((f"backbone.layer{i}.*.*.*", f"backbone.body.layer{i}.*.*.*") for i in range(1, 5)),
    *((f"backbone.layer{i}.*.downsample.*.*", f"backbone.body.layer{i}.*.downsample.*.*") for i in range(1, 5)),
)

_COUNTER = "a counter of training that frozen batch norms do not keep"


def of_transformers(prefix: str) -> list[tuple[str, str]]:
    """The ResNet of the `transformers` library itself. prefix: of its names."""
    rules = []
    for theirs, ours, number in (("convolution", "conv", "0"), ("normalization", "bn", "1")):
        rules.append((f"{prefix}embedder.embedder.{theirs}.*", f"backbone.body.{ours}1.*"))
        parts = {"shortcut": f"downsample.{number}", **{f"layer.{j}": f"{ours}{j + 1}" for j in range(3)}}
        rules += [
            (f"{prefix}encoder.stages.{i}.layers.*.{their_part}.{theirs}.*", f"backbone.body.layer{i + 1}.*.{part}.*")
            for i in range(4)
            for their_part, part in parts.items()
        ]
    return rules


def counters_of_transformers(prefix: str) -> list[tuple[str, str]]:
    """What has no counterpart, with the reason."""
    norms = ("embedder.embedder", "encoder.stages.*.layers.*.layer.*", "encoder.stages.*.layers.*.shortcut")
    return [(f"{prefix}{norm}.normalization.num_batches_tracked", _COUNTER) for norm in norms]


# First match wins: what is ignored is asked for before the rules.
IGNORED: tuple[tuple[str, str], ...] = (
    ("backbone.bn1.num_batches_tracked", _COUNTER),
    ("backbone.layer*.*.*.num_batches_tracked", _COUNTER),
    ("backbone.layer*.*.downsample.*.num_batches_tracked", _COUNTER),
)
