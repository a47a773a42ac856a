"""A state dict of other code to one of ours, and back to the official one, with an account of every tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text
from torch import nn

from codetr.convert import instance, official, resnet, swin, vit
from codetr.convert.names import NameTable
from codetr.convert.official import Weights
from codetr.errors import UserError
from codetr.models.detector import Detector
from codetr.models.swin import Swin
from codetr.models.vit import ViT
from codetr.names import shown

Shapes = dict[str, tuple[int, ...]]

_SHOWN = 8


@dataclass
class Conversion:
    """weights: under the new names. ignored: reason -> names. missing: new names that no tensor went to; unexpected:
    old names that have no new one; misshapen: both shapes."""

    weights: Weights
    ignored: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """For `rich.print`."""
        table = Table("what became of the tensors", "number", "names")
        table.add_row("mapped", str(len(self.weights) - len(self.misshapen)), "")
        for reason, names in self.ignored.items():
            table.add_row(f"left out: {reason}", str(len(names)), Text(shown(_abridged(names))))
        for label in ("missing", "unexpected", "misshapen"):
            if names := getattr(self, label):
                table.add_row(f"[red]{label}", str(len(names)), Text(shown(_abridged(names))))
        return table

    def settle(self, source: str) -> None:
        """Raises UserError unless every tensor is accounted for."""
        wrong = {label: getattr(self, label) for label in ("missing", "unexpected", "misshapen")}
        if any(wrong.values()):
            lines = [f"  {label} ({len(names)}): {_abridged(names)}" for label, names in wrong.items() if names]
            raise UserError("\n".join([f"{source} does not fit the model:", *lines]))


def _abridged(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def to_ours(weights: Weights, detector: Detector) -> Conversion:
    """Of official weights; `detector` says under which names and of which shapes. Values are not copied."""
    return translate(official.split(weights), table(detector), shapes(detector))


def translate(weights: Weights, names: NameTable, shapes: Shapes) -> Conversion:
    """weights: each one of ours, under their names. shapes: that are wanted, by our names."""
    result = Conversion({})
    for name, tensor in weights.items():
        if reason := names.reason_to_ignore(name):
            result.ignored.setdefault(reason, []).append(name)
        elif new := names.to_ours(name):
            result.weights[new] = tensor
        else:
            result.unexpected.append(name)
    _compare(result, shapes)
    return result


def shapes(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def to_official(weights: Weights, detector: Detector) -> Conversion:
    """Of our weights. What the official code computes on its own (counters, index tables) is not among the result."""
    names, result = table(detector), Conversion({})
    for name, tensor in weights.items():
        if new := names.to_theirs(name):
            result.weights[new] = tensor
        else:
            result.unexpected.append(name)
    result.weights = official.join(result.weights)
    return result


def table(detector: Detector) -> NameTable:
    """The official names of a detector's parts."""
    backbone = {Swin: swin, ViT: vit}.get(type(detector.backbone), resnet)
    names = NameTable((*backbone.RULES, *instance.RULES), (*backbone.IGNORED, *official.IGNORED))
    region_head = next((name for name in detector.heads if name != "atss"), "faster_rcnn")
    num_layers = len(detector.decoder.layers)
    return names + official.table(region_head, num_layers, dino="denoising" in detector.queries)


def _compare(result: Conversion, shapes: Shapes) -> None:
    result.unexpected += [name for name in result.weights if name not in shapes]
    for name, shape in shapes.items():
        if name not in result.weights:
            result.missing.append(name)
        elif tuple(result.weights[name].shape) != shape:
            result.misshapen.append(f"{name} {list(result.weights[name].shape)} for {list(shape)}")
