"""Detectors that are too large to be run here: traced on PyTorch's meta device, where tensors have shapes alone."""

from __future__ import annotations

import time
from typing import Any

import torch
from hydra.utils import instantiate

from codetr import application
from codetr.costs.step import without_pretrained
from codetr.exporting.graph import Canvas, Graph, least_side, traceable
from codetr.models.detector import Detector
from codetr.postprocess import PostProcess

DETECTIONS = 100


def traced(overrides: tuple[str, ...], size: tuple[int, int]) -> dict[str, Any]:
    """What `torch.export` makes of the graph, with a symbolic batch: how many operations, and the outputs' shapes.

    Raises AssertionError where these are not [batch, 100, 4], [batch, 100] and [batch, 100].
    """
    config = application.compose("train", ["model.num_classes=80", "run_dir=nowhere", *overrides])
    begun = time.perf_counter()
    with torch.device("meta"):
        detector: Detector = instantiate(without_pretrained(config).model.detector, _convert_="all").eval()
    own = Graph(detector, PostProcess(DETECTIONS, None), None).eval()
    canvas = Canvas(size, 32, least_side(detector, 32))
    example = tuple(one.to("meta") for one in canvas.example())
    with traceable():
        program = torch.export.export(own, example, dynamic_shapes=canvas.dynamic_shapes())
    nodes: Any = program.graph.output_node().args[0]
    outputs = [node.meta["val"] for node in nodes]
    batch = outputs[0].shape[0]
    assert isinstance(batch, torch.SymInt), "the batch is not symbolic"
    assert [tuple(one.shape[1:]) for one in outputs] == [(DETECTIONS, 4), (DETECTIONS,), (DETECTIONS,)]
    assert all(one.shape[0] == batch for one in outputs)
    return {
        "size": list(size),
        "symbolic": False,
        "operations": sum(node.op == "call_function" for node in program.graph.nodes),
        "parameters": sum(one.numel() for one in own.parameters()),
        "export_seconds": time.perf_counter() - begun,
    }
