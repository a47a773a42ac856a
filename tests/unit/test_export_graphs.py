"""Every kind of detector as a graph: what ONNX Runtime and PyTorch compute of it is what it computes itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import pytest
import torch
from benchmarks.export import models
from benchmarks.export.models import batch
from torch import Tensor

from codetr.exporting import formats
from codetr.exporting.graph import Canvas, Graph, traceable
from codetr.inference.about import FORM, About

CASES = ((1, 160, 224), (3, 192, 192), (8, 192, 160))  # images, height, width
DETECTIONS = 20
SIZE = (192, 224)  # where it has to be fixed


def check(run, graph: Graph, canvas: Canvas) -> None:  # type: ignore[no-untyped-def]
    """On every case; and batch mates change nothing."""
    for count, *canvas_of_case in CASES:
        images, sizes = batch(count, *(canvas.size or canvas_of_case))
        with torch.no_grad():
            expected = graph(images, sizes)
        found = run(images, sizes)
        assert found[0].shape == (len(images), DETECTIONS, 4)
        assert found[0].std(1).min() > 1e-3
        for own, true in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
            assert_same(own, true)
        alone = run(images[-1:], sizes[-1:])
        assert_same([one[0] for one in alone], [one[-1] for one in found])


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Of one image: boxes within 1e-3 pixel, scores within 1e-5, in the same order, except that scores which are
    equal to that precision may have changed places."""
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    near = (found[1][:, None] - expected[1]).abs() <= 1e-5
    same = near & (found[2][:, None] == expected[2]) & ((found[0][:, None] - expected[0]).abs().amax(-1) <= 1e-3)
    if len(found) > 3:
        same &= (found[3][:, None] - expected[3]).abs().amax((-1, -2)) <= 1e-3
        same &= (found[4][:, None] - expected[4]).abs() <= 1e-5
    assert same.any(1).all()
    assert same.any(0).all()


def by_onnx_runtime(graph: Graph, canvas: Canvas, path: Path):  # type: ignore[no-untyped-def]
    about = About(FORM, ("a", "b", "c"), None, 32, canvas.least, None, "fp32", DETECTIONS, 0.3, 0, {})
    formats.FORMATS["onnx"].write(formats.Work(graph, canvas, about, 20), path)
    session = onnxruntime.InferenceSession(path)

    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        found = session.run(graph.outputs, {"images": images.numpy(), "sizes": sizes.numpy()})
        return [torch.from_numpy(one) for one in found]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", models.TOY)
def test_onnx_runtime_computes_the_same(name: str, tmp_path: Path) -> None:
    own, canvas = models.graph(models.TOY[name], "onnx", SIZE, DETECTIONS)
    check(by_onnx_runtime(own, canvas, tmp_path / "model.onnx"), own, canvas)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.TOY)
def test_torch_export_computes_the_same(name: str) -> None:
    own, canvas = models.graph(models.TOY[name], "torch", SIZE, DETECTIONS)
    with traceable():
        program = torch.export.export(own, canvas.example(), dynamic_shapes=canvas.dynamic_shapes())
    check(program.module(), own, canvas)
