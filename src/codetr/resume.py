"""What may change when a run goes on, and where in the training it then is.

`RULES` answers the first question for every key of the configuration; docs/resume.md holds the same table, and
`python -m codetr.resume` prints it. Positions in an epoch are counted in images, so that neither the batch size nor the
number of processes has to stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from codetr.errors import UserError

_ABSENT = "absent"
_SHOWN = 5  # of the keys that are refused


class Effect(StrEnum):
    """What becomes of a key whose value is another than in the checkpoint."""

    QUIET = "may change"
    TAKES = "takes effect, and is said"
    EPOCH = "takes effect at an epoch's end, and is said; refused within an epoch"
    NONE = "has no effect, and is said"
    REFUSED = "refused"


class Rule(NamedTuple):
    """keys: patterns of dotted keys, `*` for anything. value: only where the old or the new value contains it."""

    keys: tuple[str, ...]
    effect: Effect
    why: str
    value: str = ""


# The first that fits counts.
RULES = (
    Rule(
        (
            *("name", "tags", "run_dir", "resume", "overwrite", "resumed_step", "paths.*", "logger.*", "trust"),
            *("trainer.default_root_dir", "callbacks.checkpoints.directory"),
        ),
        Effect.QUIET,
        "names and places",
    ),
    Rule(
        ("data.num_workers", "data.cache", "data.eval_batch_size", "trainer.enable_*", "callbacks.progress.*"),
        Effect.QUIET,
        "changes no number",
    ),
    Rule(
        ("optimized_metric", "callbacks.checkpoints.monitor"),
        Effect.REFUSED,
        "best.ckpt is the best by the former metric",
    ),
    Rule(("initialise.*",), Effect.NONE, "the weights are those of the run"),
    Rule(("seed", "data.seed"), Effect.EPOCH, "of the order and augmentation of the next epochs"),
    Rule(
        ("data.sampling.*", "data.aspect_ratio_grouping", "trainer.limit_train_batches", "trainer.overfit_batches"),
        Effect.EPOCH,
        "decides which images an epoch shows",
    ),
    Rule(
        ("data.batch_size", "trainer.devices", "trainer.num_nodes", "trainer.accumulate_grad_batches"),
        Effect.TAKES,
        "the images of the epoch that were shown are not shown again; refused within an epoch where they are no whole "
        "number of the new steps",
    ),
    Rule(
        (
            *("data.root", "data.train_images", "data.train_annotations", "data.reader*", "data.prepare*"),
            *("data.on_error", "data.classes"),
        ),
        Effect.TAKES,
        "the training set's content is compared instead: another one is taken at an epoch's end and refused within an "
        "epoch, other class names are refused",
    ),
    Rule(("data.*",), Effect.TAKES, "transforms, validation set, checks"),
    Rule(
        ("model.num_classes", "model.*.num_classes"), Effect.QUIET, "follows from the class names, which are compared"
    ),
    Rule(("model.detector.backbone.pretrained",), Effect.NONE, "the weights are those of the run"),
    Rule(
        (
            *("model.dropout", "model.*.dropout", "model.*.checkpointed_layers", "model.*.static"),
            *("model.detector.collaborative.weight", "model.detector.queries.*.weight"),
        ),
        Effect.TAKES,
        "no weight depends on it",
    ),
    Rule(("model.*",), Effect.REFUSED, "the weights and the optimizer's state would not fit, or mean something else"),
    Rule(("criterion.fed_loss*",), Effect.REFUSED, "the checkpoint holds what it draws classes by"),
    Rule(("criterion.*",), Effect.TAKES, "losses"),
    Rule(("optimizer.lr", "optimizer.weight_decay", "optimizer.betas"), Effect.TAKES, "from the next step on"),
    Rule(("optimizer.*",), Effect.REFUSED, "the optimizer's state belongs to its groups of parameters"),
    Rule(("freeze",), Effect.REFUSED, "the optimizer has a state of what was trained, and of nothing else"),
    Rule(("schedule.*",), Effect.TAKES, "a function of the position in the training, not of what was before"),
    Rule(
        ("trainer.strategy*",),
        Effect.REFUSED,
        "to or from FSDP: the optimizer's state is written in another form",
        value="FullyShardedStrategy",
    ),
    Rule(("trainer.*",), Effect.TAKES, "epochs, steps, precision, devices, validation, ..."),
    Rule(("*",), Effect.TAKES, "callbacks, metrics, post-processing, and what else there is"),
)


class Change(NamedTuple):
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} {self.old} -> {self.new}"


class Position(NamedTuple):
    """images: of epoch number `epoch`, which all processes have seen. complete: the epoch is over."""

    epoch: int
    images: int
    complete: bool


class Sampler(Protocol):
    """See `codetr.data.sampler.TrainSampler`."""

    batch_size: int
    world_size: int

    @property
    def order_key(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...


def rule_of(change: Change) -> Rule:
    """The rule for one key."""
    return next(
        rule
        for rule in RULES
        if any(fnmatchcase(change.key, pattern) for pattern in rule.keys)
        and (not rule.value or rule.value in f"{change.old} {change.new}")
    )


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every key whose value differs, by its dotted name, in the order of `now`; not a new key with an empty list."""
    old, new = dict(_leaves(saved)), dict(_leaves(now))
    keys = [*new, *(key for key in old if key not in new)]
    found = [Change(key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys]
    return [change for change in found if change.old != change.new and change[1:] != (_ABSENT, [])]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _leaves(child, f"{name}.{key}" if name else str(key))
    else:
        yield name, list(value) if isinstance(value, tuple) else value


def check_configuration(path: Path, checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What to say of the keys that have changed since `checkpoint`, a file `path`, was written: a line for each.

    now: the configuration in plain containers. Raises UserError for what may not change, before anything is built.
    """
    at = position(checkpoint)
    refused, said = [], []
    for change in changes(checkpoint["codetr"]["config"], now):
        rule = rule_of(change)
        if rule.effect is Effect.REFUSED or (rule.effect is Effect.EPOCH and not at.complete):
            refused.append((change, rule))
        elif rule.effect is not Effect.QUIET:
            said.append(f"{change}: {'has no effect' if rule.effect is Effect.NONE else 'takes effect'} ({rule.why})")
    if refused:
        raise UserError(_refusal(path, at, refused))
    return said


def _refusal(path: Path, at: Position, refused: list[tuple[Change, Rule]]) -> str:
    shown = ", ".join(str(change) for change, _ in refused[:_SHOWN])
    more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    why = "; ".join(dict.fromkeys(rule.why for _, rule in refused))
    if all(rule.effect is Effect.EPOCH for _, rule in refused):
        return (
            f"{path}: lies within epoch {at.epoch}, and what cannot change there has changed: {shown}{more} ({why}). "
            "Resume with the former values, or from the end of an epoch"
        )
    return (
        f"{path}: a resumed run cannot change {shown}{more} ({why}). Resume with the former values, or start a new run "
        f"from these weights: initialise.checkpoint={path}"
    )


def check_data(path: Path, checkpoint: Mapping[str, Any], class_names: list[str], train_set: str) -> list[str]:
    """What to say of a training set that has changed. Raises UserError for other classes, or within an epoch.

    train_set: its fingerprint.
    """
    about, at = checkpoint["codetr"], position(checkpoint)
    if list(about["class_names"]) != class_names:
        raise UserError(
            f"{path}: was trained on other classes, {_names(about['class_names'])}, and data.train_annotations has "
            f"{_names(class_names)}; a resumed run keeps their number and order. Start a new run from these weights, "
            f"which moves them by name: initialise.checkpoint={path}"
        )
    if about["train_set"] == train_set:
        return []
    if not at.complete:
        raise UserError(
            f"{path}: lies within epoch {at.epoch}, and data.train_annotations is not what it was then (images or "
            "objects differ). Resume with the former file, from the end of an epoch, or start a new run from these "
            f"weights: initialise.checkpoint={path}"
        )
    return ["data.train_annotations: images or objects are not what they were; the next epoch shows them as they are"]


def _names(names: list[str]) -> str:
    return f"[{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}] ({len(names)})"


def position(checkpoint: Mapping[str, Any]) -> Position:
    """Where in the training a checkpoint lies."""
    loop = checkpoint["loops"]["fit_loop"]
    (loader,) = loop["state_dict"]["combined_loader"]
    epochs = loop["epoch_progress"]["current"]
    complete = epochs["processed"] == epochs["ready"] or loop["epoch_loop.batch_progress"]["is_last_batch"]
    return Position(loader["epoch"], loader["images"], complete)


def go_on(checkpoint: dict[str, Any], sampler: Sampler, batches: int, accumulate: int) -> int:
    """Make the checkpoint count batches as the run does from now on.

    batches: of an epoch of this process; accumulate: batches of a step. Returns by how many steps the position in the
    training is ahead of the number of steps made: 0 unless an epoch had other steps before. Raises UserError within an
    epoch whose remaining images do not begin with a new step.
    """
    at, loop = position(checkpoint), checkpoint["loops"]["fit_loop"]
    per_batch = sampler.batch_size * sampler.world_size
    done = batches if at.complete else at.images // per_batch
    per_step = per_batch * accumulate
    if not at.complete and (at.images % per_step or done >= batches):
        raise UserError(
            f"the checkpoint lies within epoch {at.epoch}, after {at.images} images, and steps of {per_step} "
            f"(data.batch_size={sampler.batch_size}, {sampler.world_size} processes, trainer.accumulate_grad_batches="
            f"{accumulate}) cannot begin there: take steps whose number of images divides {at.images}, or resume from "
            "the end of an epoch"
        )
    (loader,) = loop["state_dict"]["combined_loader"]
    if at.complete and loader["order"] != sampler.order_key:
        loader |= {"images": len(sampler) * per_batch, "order": sampler.order_key}
    progress = loop["epoch_loop.batch_progress"]
    behind = {key: progress["current"]["ready"] - value for key, value in progress["current"].items()}
    for counts, ready in ((progress["current"], done), (progress["total"], at.epoch * batches + done)):
        counts.update({key: ready - less for key, less in behind.items()})
    steps_per_epoch = -(-batches // accumulate)
    return at.epoch * steps_per_epoch + -(-done // accumulate) - checkpoint["global_step"]


def begin_next_epoch(loop: Any) -> None:
    """Let Lightning's fit loop, resumed at an epoch's end, go on with the next.

    With `max_steps` it takes every checkpoint for one within an epoch (`_FitLoop.restarting`), ends the epoch a second
    time, and so leaves the next one out.
    """
    loop.epoch_progress.increment_completed()
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part.reset_restart_stage()
        part._restarting = False


def table() -> str:
    """`RULES` in Markdown."""
    rows = ["| key | when it changes | because |", "|---|---|---|"]
    for rule in RULES:
        keys = ", ".join(f"`{key}`" for key in rule.keys) + (f" with `{rule.value}`" if rule.value else "")
        rows.append(f"| {keys} | {rule.effect} | {rule.why} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
