"""The one graph of an exported detector: from the pixels of a padded batch to the best pairs of queries and classes,
and their masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from codetr.errors import UserError
from codetr.inference import Model
from codetr.inference.about import BOXES, MASKS
from codetr.models.detector import Detector
from codetr.models.swin import Swin
from codetr.models.vit import ViT
from codetr.postprocess import PostProcess
from codetr.queries.two_stage import TwoStageQueries
from codetr.types import MAIN

INPUTS = ("images", "sizes")
_TRACED = 512, 640  # height and width of the images, at least, of which the graph is made; their values do not matter
_LARGEST = 8192  # side in pixels


class Graph(nn.Module):
    """What `Model.detect` does between the batch and suppression, of the main group alone.

    postprocess: whose first half is inside: the best pairs, with boxes in pixels of the network.
    narrow: the dtype of the weights, to which operations that can are cast; None: float32 throughout.
    """

    def __init__(self, detector: Detector, postprocess: PostProcess, narrow: torch.dtype | None) -> None:
        super().__init__()
        self.detector, self.postprocess, self.narrow = inference_part(detector), postprocess, narrow

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `forward` returns."""
        return BOXES if self.detector.mask_head is None else BOXES + MASKS

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """images: [B, 3, H, W] uint8, padded right and below. sizes: [B, 2] int64 (height, width) without the padding.

        Returns boxes [B, n, 4] xyxy in network pixels, scores [B, n], best first, and labels [B, n]; with a mask head
        also masks [B, n, s, s], the share of each cell of a box that shows the object, and mask_ious [B, n], by which
        a box's score is multiplied to be its mask's.
        """
        padding = padding_of(sizes, images.shape[2], images.shape[3])
        with self._cast(images):
            output = self.detector(images, padding)
        scores, labels, boxes = self.postprocess.pairs(output.predictions[MAIN].last, sizes)
        if self.detector.mask_head is None:
            return boxes, scores, labels
        with self._cast(images):
            masks, mask_ious = self.detector.segment_all(output.memory, boxes, labels)
        return boxes, scores, labels, masks, mask_ious

    def _cast(self, images: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self.narrow is None else torch.autocast(images.device.type, self.narrow)


def inference_part(detector: Detector) -> Detector:
    """`detector` without what only trains; the parts that are left are shared."""
    part = Detector(
        backbone=detector.backbone,
        neck=detector.neck,
        encoder=detector.encoder,
        adapter=detector.adapter if detector.mask_head is not None else None,
        heads={},
        queries={MAIN: cast(Any, detector.queries[MAIN])},
        decoder=detector.decoder,
        mask_head=cast(Any, detector.mask_head),
        mask_groups=(),
    )
    return part.eval()


def padding_of(sizes: Tensor, height: int, width: int) -> Tensor:
    """[B, H, W] bool, True beside and below images of (height, width) `sizes`, [B, 2]."""
    below = torch.arange(height, device=sizes.device)[:, None] >= sizes[:, 0, None, None]
    beside = torch.arange(width, device=sizes.device) >= sizes[:, 1, None, None]
    return below | beside


@dataclass(frozen=True)
class Canvas:
    """Which heights and widths a graph takes.

    size: (height, width) where they are fixed; None: multiples of `divisor`, from `least` pixels on.
    """

    size: tuple[int, int] | None
    divisor: int
    least: int

    @classmethod
    def of(cls, model: Model, size: tuple[int, int] | None, form: str) -> Canvas:
        """Raises UserError for a size that the detector cannot take, and for none where the format needs one."""
        if size is None and not takes_any_size(model.detector, form):
            raise UserError(
                f"size=null: PyTorch does not understand the windows of this detector's "
                f"{type(model.detector.backbone).__name__} on images of any size, with format={form}: give height and "
                "width of all batches, size=[800,1344]"
            )
        divisor, least = model.size_divisor, least_side(model.detector, model.size_divisor)
        for side in size or ():
            if side % divisor or side < least:
                raise UserError(f"size={list(size or ())}: give multiples of {divisor}, of at least {least} pixels")
        return cls(size, divisor, least)

    def example(self) -> tuple[Tensor, Tensor]:
        """A batch of two that the graph takes."""
        height, width = self.size or (max(self.least, -(-n // self.divisor) * self.divisor) for n in _TRACED)
        sizes = torch.tensor([[height, width], [height - self.divisor // 2, width // 2]])
        return torch.zeros(2, 3, height, width, dtype=torch.uint8), sizes

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """The batch is symbolic, and so are height and width unless they are fixed."""
        batch = Dim("batch", min=1, max=_LARGEST)
        shapes: dict[str, dict[int, Any]] = {"images": {0: batch}, "sizes": {0: batch}}
        if self.size is None:
            for axis, name in ((2, "rows"), (3, "columns")):
                units = Dim(name, min=self.least // self.divisor, max=_LARGEST // self.divisor)
                shapes["images"][axis] = units * self.divisor if self.divisor > 1 else units
        return shapes


def takes_any_size(detector: Detector, form: str) -> bool:
    """Whether height and width can be symbolic.

    Tracing Swin's windows takes longer than anybody waits. Those of ViT are traced, but `torch.export` guards what it
    learned from the example: one image in a batch, or another width, is then refused.
    """
    windowed = Swin if form != "torch" else (Swin, ViT)
    return not isinstance(detector.backbone, windowed)


def least_side(detector: Detector, divisor: int) -> int:
    """The side of the smallest square, a multiple of `divisor`, with two cells on the coarsest level and as many cells
    as the first stage selects."""
    main = detector.queries[MAIN]
    needed = main.num_queries if isinstance(main, TwoStageQueries) else 1
    strides = detector.neck.strides(detector.backbone.strides)
    side = -(-(strides[-1] + 1) // divisor) * divisor
    while sum((-(-side // stride)) ** 2 for stride in strides) < needed:
        side += divisor
    return side


def graph_of(model: Model, max_detections: int | None, precision: str) -> Graph:
    """Raises UserError for what cannot be part of a graph."""
    postprocess = model.postprocess
    if not isinstance(postprocess, PostProcess):
        raise UserError(f"{model.path}: its postprocess is a {type(postprocess).__name__}, which is no part of a graph")
    most = postprocess.max_detections if max_detections is None else max_detections
    if precision == "fp16":
        model.half()
    return Graph(
        model.detector, PostProcess(most, postprocess.suppression), torch.float16 if precision == "fp16" else None
    ).eval()


@contextmanager
def traceable() -> Iterator[None]:
    """In which PyTorch's fused encoder layers, which no other runtime has, are written out."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
