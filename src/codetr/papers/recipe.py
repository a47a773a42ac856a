"""A row's recipe, value by value: what its configuration says, and who says that it should."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from codetr.papers.rows import Row, read

LABEL = "the row's own line in the table"


@dataclass(frozen=True)
class Value:
    """A value of a recipe, in words."""

    subject: str
    value: str
    source: str


@dataclass(frozen=True)
class Subject:
    """What a recipe says something about. keys: of the configuration, by their beginnings; a row that sets one of them
    must bring a source of its own, or has it from its table's line. read: the value in words; empty: not applicable."""

    keys: tuple[str, ...]
    read: Callable[[DictConfig], str]


def recipe(row: Row, config: DictConfig) -> list[Value]:
    """config: the row's, composed. Values that do not apply are absent."""
    sources = sources_of(row.experiment)
    own = [override.lstrip("+") for override in row.overrides if not override.startswith("experiment=")]
    values = []
    for name, subject in SUBJECTS.items():
        said = sources.get(name, sources["recipe"])
        source = said if isinstance(said, str) else said["source"]
        if name == "epochs" or any(override.startswith(subject.keys) for override in own):
            source = LABEL
        if value := subject.read(config):
            values.append(Value(name, value, row.sources.get(name, source)))
    return values


def departures(row: Row, subjects: Collection[str]) -> dict[str, str]:
    """Where the row's recipe is not what the paper says, or the paper leaves a choice that matters, by subject.

    subjects: of the row's recipe, which are those that apply.
    """
    sources = sources_of(row.experiment) if row.experiment else {}
    said = {
        name: value["departs"] for name, value in sources.items() if not isinstance(value, str) and "departs" in value
    }
    return {name: text for name, text in (said | dict(row.departs)).items() if text and name in subjects}


def sources_of(experiment: str) -> dict[str, Any]:
    """Of an experiment, by subject; `recipe` is of all that are not named. What comes later in `like` counts."""
    every = read("sources")
    found: dict[str, Any] = {}
    for base in every[experiment].get("like", ()):
        found |= sources_of(base)
    return found | {key: value for key, value in every[experiment].items() if key != "like"}


def _weights(config: DictConfig) -> str:
    return str(config.model.detector.backbone.name)


def _drop_path(config: DictConfig) -> str:
    rate = config.model.detector.backbone.get("arguments", {}).get("drop_path_rate")
    return "" if rate is None else f"{rate:g}"


def _rate(config: DictConfig) -> str:
    rules, rate = config.optimizer.rules, f"{config.optimizer.lr:g}"
    if "rate" in rules:
        return f"{rate}, times {rules.rate:g} from block to block of the backbone"
    slow = [f"{name} x {rule.lr_multiplier:g}" for name, rule in rules.items() if rule.lr_multiplier != 1]
    return ", ".join([rate, *slow])


def _decay(config: DictConfig) -> str:
    kinds = config.optimizer.no_decay
    return f"{config.optimizer.weight_decay:g} of " + (f"all but {', '.join(kinds)}" if kinds else "all parameters")


def _batch(config: DictConfig) -> str:
    grouped = "wide or high images, not both, " if config.data.aspect_ratio_grouping else ""
    return f"{config.data.batch_size} images, {grouped}padded to multiples of {config.data.size_divisor}"


def _drops(config: DictConfig) -> str:
    decay, epochs = config.schedule.decay, config.trainer.max_epochs
    after = decay.milestones.get(f"e{epochs}", [epochs * decay.otherwise])
    warmup = f", {config.schedule.warmup_steps} steps of warm-up" if config.schedule.warmup_steps else ""
    return f"x {decay.gamma:g} after {' and '.join(f'{m:g}' for m in after)} epochs{warmup}"


def _queries(config: DictConfig) -> str:
    main = config.model.detector.main
    repeats = f", {main.repeats} matches per object" if main.get("repeats", 1) > 1 else ""
    patterns = f", of {main.patterns} patterns" if main.get("content") == "patterns" else ""
    return f"{main.num_queries}{patterns}{repeats}"


def _groups(config: DictConfig) -> str:
    groups = config.model.query_groups
    return "" if groups == 1 else f"{groups}, whose losses are averaged"


def _denoising(config: DictConfig) -> str:
    group = config.model.detector.queries.get("denoising")
    if group is None:
        return ""
    labels, boxes = group.label_noise, group.box_noise
    return f"{group.num_queries} objects, labels {labels:g}, boxes {boxes:g}, empty slots {group.unused}"


def _hybrid(config: DictConfig) -> str:
    group = config.model.detector.queries.get("hybrid")
    return "" if group is None else f"{group.num_queries} queries, {group.repeats} matches per object"


def _heads(config: DictConfig) -> str:
    heads = config.model.detector.heads
    return f"{', '.join(heads)}; lambda_2 = {config.criterion.lambda_2:g}" if heads else ""


def _positives(config: DictConfig) -> str:
    group = config.model.detector.collaborative
    if not config.model.detector.heads or group is None:
        return ""
    features = "places and features" if group.use_features else "places alone"
    filled = "filled up with negatives" if group.fill == "negatives" else "not filled up"
    return f"{features}, {filled}, at most {group.max_queries}; lambda_1 = {group.weight:g}"


def _losses(config: DictConfig) -> str:
    criterion = config.criterion
    if "no_object" in criterion:
        masks = f"masks {criterion.mask_weight:g}, Dice {criterion.dice_weight:g}, at {criterion.points.count} points"
        return f"cross entropy {criterion.class_weight:g}, no object {criterion.no_object:g}, {masks}"
    kind = criterion.class_loss._target_.rsplit(".", 1)[-1]
    fed = " with FedLoss" if criterion.get("fed_loss") else ""
    return f"{kind}{fed} {criterion.focal:g}, L1 {criterion.l1:g}, GIoU {criterion.giou:g}"


def _detections(config: DictConfig) -> str:
    suppression = config.postprocess.get("suppression")
    how = f"{suppression._target_.rsplit('.', 1)[-1]} {suppression.iou:g}" if suppression else "no suppression"
    return f"{config.postprocess.max_detections} per image, {how}"


def _images(config: DictConfig) -> str:
    train, test = config.data.train_transform, config.data.val_transform
    if "canvas" in train:
        paste = ", copy-paste" if config.data.get("copy_paste") else ""
        return (
            f"large-scale jitter on {train.canvas} pixels{paste}; evaluated at {test.get('canvas', test.get('size'))}"
        )
    short = train.short_sides
    return f"short side {short[0]} to {short[-1]}, long at most {train.long_side}; evaluated at {test.size}"


def _data(config: DictConfig) -> str:
    return f"{config.data.train_annotations}, {config.data.val_annotations}"


def _average(config: DictConfig) -> str:
    return f"{config.callbacks.ema.decay:g}" if "ema" in config.callbacks else "none"


BACKBONE, MAIN, HEADS = "model.detector.backbone", "model.detector.main", "model.detector.heads"
SUBJECTS: Mapping[str, Subject] = {
    "scales": Subject(("model=",), lambda config: str(config.model.num_levels)),
    "weights": Subject(("model/backbone=swin", f"{BACKBONE}.name"), _weights),
    "drop path": Subject((f"{BACKBONE}.arguments.drop_path_rate",), _drop_path),
    "learning rate": Subject(("optimizer=", "optimizer.lr", "optimizer.rules"), _rate),
    "weight decay": Subject(("optimizer.weight_decay", "optimizer.no_decay"), _decay),
    "gradient clip": Subject(("trainer.gradient_clip_val",), lambda config: f"{config.trainer.gradient_clip_val:g}"),
    "epochs": Subject(("trainer.max_epochs",), lambda config: str(config.trainer.max_epochs)),
    "rate drops": Subject(("schedule",), _drops),
    "batch": Subject(("data.aspect_ratio_grouping", "data.size_divisor"), _batch),
    "images": Subject(("augment@data",), _images),
    "average of weights": Subject(("callbacks",), _average),
    "queries": Subject((MAIN,), _queries),
    "groups": Subject(("model.query_groups",), _groups),
    "denoising": Subject(("model.detector.queries.denoising",), _denoising),
    "hybrid branch": Subject(("model.detector.queries.hybrid",), _hybrid),
    "auxiliary heads": Subject(("model/auxiliary_head", HEADS, "criterion.lambda_2"), _heads),
    "positive queries": Subject(("model.detector.collaborative",), _positives),
    "losses": Subject(("criterion=", "criterion/", "criterion.focal"), _losses),
    "detections": Subject(("postprocess", "evaluate_heads"), _detections),
    "data": Subject(("data=", "data.val_annotations"), _data),
}
