"""Every kind of detector as a graph: what ONNX Runtime and PyTorch compute of it is what it computes itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from codetr.exporting import formats
from codetr.exporting.graph import Canvas, Graph, least_side, takes_any_size, traceable
from codetr.inference.about import FORM, About
from codetr.postprocess import PostProcess
from toy_model import detector

RESNET = (
    "model.detector.backbone.name=resnet10t",
    "+model.detector.backbone.arguments={channels:[8,16,32,32],stem_width:8}",
)
DETECTORS = {
    "conditional_detr": ("model=conditional_detr", *RESNET),
    "dab_detr": ("model=dab_detr", *RESNET),
    "dn_detr": ("model=dn_detr", *RESNET),
    "deformable_detr": ("model=deformable_detr", *RESNET),
    "deformable_detr_refine": ("model=deformable_detr_refine", *RESNET),
    "deformable_detr_two_stage": ("model=deformable_detr_two_stage", *RESNET),
    "deformable_pp": ("model=deformable_pp", *RESNET),
    "h_deformable": ("model=h_deformable", *RESNET),
    "dab_deformable_detr": ("model=dab_deformable_detr", *RESNET),
    "dn_deformable_detr": ("model=dn_deformable_detr", *RESNET),
    "dino": ("model=dino", *RESNET),
    "dino_5scale": ("model=dino_5scale", *RESNET),
    "co_dino": ("model=co_dino", *RESNET),
    "co_deformable": ("model=co_deformable", *RESNET),
    "group_dino": ("model=dino", "model.query_groups=3", *RESNET),
}
SWIN = (
    "model/backbone=swin_tiny",
    "+model.detector.backbone.arguments={embed_dim:16,depths:[1,2,1,1],num_heads:[1,2,2,2],window_size:4}",
)
VIT = (
    "model/backbone=vit_large",
    "model/neck=simple_pyramid",
    "model.detector.backbone.name=eva02_tiny_patch14_224",
    "model.detector.backbone.window=4",
    "model.detector.backbone.global_blocks=[1]",
    "model.detector.backbone.checkpointed_blocks=0",
    "+model.detector.backbone.arguments={img_size:64,patch_size:16,depth:2,embed_dim:32,num_heads:2}",
)
DETECTORS |= {"swin": ("model=deformable_pp", *SWIN), "vit": ("model=deformable_pp", *VIT)}
CASES = ((1, 160, 224), (3, 192, 192), (8, 192, 160))  # images, height, width
DETECTIONS = 20


def graph(name: str, form: str) -> tuple[Graph, Canvas]:
    torch.manual_seed(0)
    model = detector(["a", "b", "c"], *DETECTORS[name]).eval()
    with torch.no_grad():  # heads that start at zero would hide most of the graph
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    size = None if takes_any_size(model, form) else (192, 224)
    return Graph(model, PostProcess(DETECTIONS, None), None).eval(), Canvas(size, 32, least_side(model, 32))


def batch(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The first image fills the canvas; the padding of the others is not black."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    sizes = torch.stack([torch.randint(n // 2, n + 1, (count,), generator=generator) for n in (height, width)], 1)
    sizes[0] = torch.tensor([height, width])
    return images, sizes


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
    assert same.any(1).all()
    assert same.any(0).all()


def by_onnx_runtime(graph: Graph, canvas: Canvas, path: Path):  # type: ignore[no-untyped-def]
    about = About(FORM, ("a", "b", "c"), None, 32, canvas.least, None, "fp32", DETECTIONS, 0.3, 0, {})
    formats.FORMATS["onnx"].write(graph, canvas, about, 20, path)
    session = onnxruntime.InferenceSession(path)

    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        found = session.run(["boxes", "scores", "labels"], {"images": images.numpy(), "sizes": sizes.numpy()})
        return [torch.from_numpy(one) for one in found]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_onnx_runtime_computes_the_same(name: str, tmp_path: Path) -> None:
    own, canvas = graph(name, "onnx")
    check(by_onnx_runtime(own, canvas, tmp_path / "model.onnx"), own, canvas)


@pytest.mark.parametrize(
    "name",
    [
        "conditional_detr",
        *(pytest.param(name, marks=pytest.mark.slow) for name in DETECTORS if name != "conditional_detr"),
    ],
)
def test_torch_export_computes_the_same(name: str) -> None:
    own, canvas = graph(name, "torch")
    with traceable():
        program = torch.export.export(own, canvas.example(), dynamic_shapes=canvas.dynamic_shapes())
    check(program.module(), own, canvas)
