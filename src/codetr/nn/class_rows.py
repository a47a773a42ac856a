"""Which rows of a layer belong to which class, so that a checkpoint of other classes can be taken over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class ClassRows:
    """The rows of a layer's tensors: `repeats` times `per_class` rows for every class, then `rest` rows of none.

    agnostic: rows for classes that tell only object from background, by the first one.
    """

    per_class: int = 1
    rest: int = 0
    repeats: int = 1
    agnostic: bool = False

    def count(self, classes: int) -> int:
        """How many rows there are for so many classes."""
        return self.repeats * (classes * self.per_class + self.rest)

    def move(self, value: Tensor, target: Tensor, old: list[str], new: list[str]) -> None:
        """Copy what both know, in place. value: rows of the classes `old`; target: rows of the classes `new`."""
        if self.agnostic:
            shared = min(len(value), len(target))
            target[:shared].copy_(value[:shared])
            return
        value, target = value.unflatten(0, (self.repeats, -1)), target.unflatten(0, (self.repeats, -1))
        source = {name: label for label, name in enumerate(old)}
        for label, name in enumerate(new):
            if name in source:
                rows = value[:, source[name] * self.per_class : (source[name] + 1) * self.per_class]
                target[:, label * self.per_class : (label + 1) * self.per_class].copy_(rows)
        if self.rest:
            target[:, -self.rest :].copy_(value[:, -self.rest :])


def by_class(layer: Layer, rows: ClassRows = ClassRows()) -> Layer:
    """`layer`, declaring that the rows of all its tensors belong to classes. `declared_rows` finds it."""
    layer.class_rows = rows  # type: ignore[assignment]
    return layer


def declared_rows(module: nn.Module) -> dict[str, ClassRows]:
    """What the layers of `module` declare, by the name of every tensor."""
    return {
        f"{name}.{tensor}": layer.class_rows
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "class_rows", None), ClassRows)
        for tensor in layer.state_dict()
    }
