"""Detectors as one graph each, of ours and of other libraries: uint8 pixels in, the best boxes out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from codetr.application import as_names, plain
from codetr.benchmark import rivals
from codetr.costs.step import Inputs, built, with_classes, without_pretrained
from codetr.errors import UserError
from codetr.exporting.formats import FORMATS, Work
from codetr.exporting.graph import Canvas, graph_of, padding_of
from codetr.inference.about import BOXES, FORM, About
from codetr.inference.model import Model, load_checkpoint
from codetr.postprocess import PostProcess
from codetr.types import Prediction

OPSET = 20
RANDOM = Path("random weights")


@dataclass(frozen=True)
class Drawn:
    """A graph: images [B, 3, H, W] uint8 and sizes [B, 2] -> boxes, scores, labels; and the rest of its detector.

    postprocess: of which suppression is outside of the graph. canvas: which images an exported file takes. classes: how
    many there are.
    """

    graph: nn.Module
    postprocess: PostProcess
    canvas: Canvas
    classes: int

    def write(self, path: Path) -> None:
        """As ONNX. Raises UserError where a package is not installed."""
        form = FORMATS["onnx"]
        form.check("onnx", "fp32")
        names = tuple(map(str, range(self.classes)))
        canvas, most = self.canvas, self.postprocess.max_detections
        about = About(FORM, names, None, canvas.divisor, canvas.least, canvas.size, "fp32", most, 0.3, 0, {})
        form.write(Work(cast(Any, self.graph), canvas, about, OPSET), path)


def ours(config: DictConfig, size: tuple[int, int]) -> Drawn:
    """Of config.checkpoint, or of the model with random weights. Raises UserError for what cannot be exported."""
    if config.checkpoint is None:
        model = _random(config)
    else:
        model = load_checkpoint(config.checkpoint, device="cpu", trust=as_names(config.trust))
    graph = graph_of(model, None, "fp32")
    return Drawn(graph, graph.postprocess, Canvas.of(model, size, "onnx"), len(model.class_names))


def _random(config: DictConfig) -> Model:
    config.model.num_classes = classes = with_classes(config)
    detector, _ = built(without_pretrained(config), torch.device("cpu"))
    return Model(
        path=RANDOM,
        class_names=tuple(map(str, range(classes))),
        category_ids=None,
        transform=instantiate(config.data.val_transform),
        size_divisor=config.data.size_divisor,
        config=plain(config),
        step=0,
        detector=detector.eval(),
        postprocess=instantiate(config.postprocess),
    )


@dataclass(frozen=True)
class Still(Canvas):
    """Of batches of one size and number: what other libraries compute in Python is then a constant."""

    batch: int

    def example(self) -> tuple[Tensor, Tensor]:
        assert self.size is not None
        return torch.zeros(self.batch, 3, *self.size, dtype=torch.uint8), torch.tensor([self.size] * self.batch)

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        return {"images": {}, "sizes": {}}


def rival(name: str, classes: int, size: tuple[int, int], batch: int, postprocess: PostProcess) -> Drawn:
    """Of another library, with random weights, and with our first half of post-processing inside.

    Raises UserError for a name that is none, and for a library that is not installed.
    """
    inputs = Inputs(torch.zeros(1), torch.zeros(1), cast(Any, None))
    found = rivals.build(name, inputs, classes, None, dropout=0.0)
    own = PostProcess(postprocess.max_detections, None)
    return Drawn(_RivalGraph(found.model.eval(), found.predict, own).eval(), own, Still(size, 1, 1, batch), classes)


class _RivalGraph(nn.Module):
    outputs = BOXES

    def __init__(self, model: nn.Module, predict: Callable[[nn.Module, Inputs], Any], postprocess: PostProcess) -> None:
        super().__init__()
        self.model, self.predict, self.postprocess = model, predict, postprocess

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padding = padding_of(sizes, images.shape[2], images.shape[3])
        found = self.predict(self.model, Inputs(images, padding, cast(Any, None)))
        logits, boxes = (found[key] for key in (("pred_logits" if "pred_logits" in found else "logits"), "pred_boxes"))
        scores, labels, boxes = self.postprocess.pairs(Prediction(logits, boxes), sizes)
        return boxes, scores, labels


def require(package: str, extra: str) -> None:
    """Raises UserError where a runtime is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"runtimes: {package} is not installed: pip install 'codetr[{extra}]', or leave it out")
