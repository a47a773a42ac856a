"""A state dict of other code to one of ours, and back to the official one, with an account of every tensor."""

from __future__ import annotations

from torch import nn

from codetr.convert import instance, mask2former, official, resnet, swin, vit
from codetr.convert.names import NameTable
from codetr.convert.official import Weights
from codetr.models.detector import Detector
from codetr.models.swin import Swin
from codetr.models.vit import ViT
from codetr.tensor_report import TensorReport, misshapen

Shapes = dict[str, tuple[int, ...]]


def to_ours(weights: Weights, detector: Detector) -> tuple[Weights, TensorReport]:
    """Official weights under our names, and what became of each.

    detector: says which names and shapes are wanted. Values are not copied.
    """
    return translate(official.split(weights), table(detector), shapes(detector))


def translate(weights: Weights, names: NameTable, shapes: Shapes) -> tuple[Weights, TensorReport]:
    """Weights under our names, and what became of each.

    weights: each one of ours, under their names.
    names: which of ours is which of theirs.
    shapes: those that are wanted, by our names.
    """
    result, report = {}, TensorReport()
    for name, tensor in weights.items():
        if reason := names.reason_to_ignore(name):
            report.note(f"left out: {reason}", name)
        elif new := names.to_ours(name):
            result[new] = tensor
        else:
            report.unexpected.append(name)
    for name, tensor in result.items():
        if name not in shapes:
            report.unexpected.append(name)
        elif tuple(tensor.shape) != shapes[name]:
            report.misshapen.append(misshapen(name, tensor.shape, shapes[name]))
        else:
            report.taken.append(name)
    report.missing += [name for name in shapes if name not in result]
    return result, report


def shapes(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def to_official(weights: Weights, detector: Detector) -> tuple[Weights, TensorReport]:
    """Our weights under official names, of Mask2Former under those of transformers, and what became of each.

    What the official code computes on its own (counters, index tables) is not among the result.
    """
    names, join = (
        (mask2former.table(), mask2former.join) if detector.decoder.predicts_masks else (table(detector), official.join)
    )
    result, report = {}, TensorReport()
    for name, tensor in weights.items():
        if new := names.to_theirs(name):
            result[new] = tensor
            report.taken.append(name)
        else:
            report.unexpected.append(name)
    return join(result), report


def table(detector: Detector) -> NameTable:
    """The official names of a detector's parts."""
    backbone = {Swin: swin, ViT: vit}.get(type(detector.backbone), resnet)
    names = NameTable((*backbone.RULES, *instance.RULES), (*backbone.IGNORED, *official.IGNORED))
    region_head = next((name for name in detector.heads if name != "atss"), "faster_rcnn")
    num_layers = len(detector.decoder.layers)
    return names + official.table(region_head, num_layers, dino="denoising" in detector.queries)
