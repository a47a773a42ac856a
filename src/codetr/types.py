"""The data that the parts of a detector hand to one another.

Shape letters, here and in every docstring: B images, N queries or candidates, L levels, P points, H heads,
C width, S memory tokens, M objects (padded), K classes.

Boxes are normalised `cxcywh` of the image without its padding inside the model, and absolute `xyxy` pixels of
the network input wherever a name ends in `_xyxy`. Masks named `padding` are True on padding; masks named
`valid` are True on real entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, NotRequired, Protocol, TypedDict

import torch
from torch import Tensor
from torchvision.ops import box_convert

Shapes = tuple[tuple[int, int], ...]  # (height, width) per level


@dataclass
class _Movable:
    """`.to(device)` and `.pin_memory()` for a dataclass of tensors, so that Lightning moves it like a tensor.

    What is pinned is copied while the device works: Lightning asks for that with plain tensors only.
    """

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any:
        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking or value.is_pinned())
            return value.to(device, non_blocking) if isinstance(value, _Movable) else value

        return type(self)(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    def pin_memory(self) -> Any:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{k: v.pin_memory() if isinstance(v, (Tensor, _Movable)) else v for k, v in parts.items()})


@dataclass
class Frames(_Movable):
    """How the images of a batch lie in the network's input, and how they came there from their files.

    The model works in network pixels or in normalised boxes alone; `to_files` is the way back. An image begins in the
    upper left corner both of the input and, where nothing was cropped, of its file; a canvas around it counts as image.

    sizes: [B, 2] (height, width) of each image in network pixels, without the padding of the batch.
    scale: [B, 2] (rows, columns) network pixels per pixel of the file, float.
    file_sizes: [B, 2] (height, width) of the files, int64.
    """

    sizes: Tensor
    scale: Tensor
    file_sizes: Tensor

    @classmethod
    def unscaled(cls, sizes: Tensor) -> Frames:
        """Of images that enter the network as their files are. sizes: [B, 2] (height, width)."""
        return cls(sizes, torch.ones_like(sizes, dtype=torch.float32), sizes)

    def to_files(self, detections: Sequence[Detections]) -> list[Detections]:
        """The detections of each image, whose boxes are in network pixels, with boxes in pixels of the files."""
        scale = box_scale(self.scale)
        return [replace(found, boxes_xyxy=found.boxes_xyxy / own) for found, own in zip(detections, scale, strict=True)]


@dataclass
class Targets(_Movable):
    """The objects of a batch, padded to the same number M >= 1 so that every step runs the same graph.

    boxes: [B, M, 4] normalised cxcywh; padded rows hold a valid dummy box.
    labels: [B, M] int64, padded rows 0.
    valid: [B, M] bool.
    frames: of the images; the boxes are shares of `frames.sizes`.
    masks: [B, M, H, W] bool of the padded images, padded rows empty; None unless the data set reads them.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    frames: Frames
    masks: Tensor | None = None

    @cached_property
    def boxes_xyxy(self) -> Tensor:
        """[B, M, 4] absolute xyxy in network pixels."""
        return box_convert(self.boxes, "cxcywh", "xyxy") * box_scale(self.frames.sizes)[:, None]

    @property
    def counts(self) -> Tensor:
        """[B] number of objects per image."""
        return self.valid.sum(1)


class Truth(TypedDict):
    """What is known of an image: all its objects, crowds included, in pixels of its file.

    boxes: [m, 4] xyxy float64. labels: [m] int64. iscrowd: [m] bool. area: [m] float64, as in the file.
    ignore: [m] bool, objects that count neither as found nor as missed.
    rle: m compressed COCO run lengths, where the data set reads them.
    neg_labels, not_exhaustive_labels: what the image was searched for, in files that say so (LVIS), int64.
    """

    boxes: Tensor
    labels: Tensor
    iscrowd: Tensor
    area: Tensor
    ignore: NotRequired[Tensor]
    rle: NotRequired[list[dict[str, Any]]]
    neg_labels: NotRequired[Tensor]
    not_exhaustive_labels: NotRequired[Tensor]


@dataclass
class Batch(_Movable):
    """What the data loader yields.

    images: [B, 3, H, W] uint8, padded right and below. padding: [B, H, W] bool.
    truth: per image, what the evaluator needs and the model must not see, on the CPU.
    ahead: in training, the other batches of the optimizer step that begins with this one; they stay on the CPU.
    pixels: in a validation by views, each image as its file has it, [3, H, W] uint8, on the CPU; else none.
    """

    images: Tensor
    padding: Tensor
    targets: Targets
    image_ids: Tensor
    truth: list[Truth]
    ahead: tuple[Batch, ...] = ()
    pixels: list[Tensor] = field(default_factory=list)

    @property
    def frames(self) -> Frames:
        """How the images lie in the network's input and in their files."""
        return self.targets.frames


@dataclass
class Seen:
    """What a training step computed for a batch, for reports. names: of the losses [n]. image_ids: [B]."""

    names: tuple[str, ...]
    losses: Tensor
    image_ids: Tensor


@dataclass
class Pixels:
    """Embeddings of the cells of the images: the product of a query's with a cell's is the logit of the query's mask.

    maps: [B, E, h, w], right and below of the images too. stride: network pixels per cell. tokens: [B, S, E], the same
    at the places of the memory's tokens, without gradient.
    """

    maps: Tensor
    stride: int
    tokens: Tensor


@dataclass
class Memory:
    """The encoder's output, or its input: all levels flattened, finest first.

    tokens: [B, S, C]. position: [B, S, C]. padding: [B, S], right and below on each level. spatial_shapes: (height,
    width) per level, plain integers. valid_sizes: [B, L, 2] int32 (height, width) of the part of each level that is
    not padding. valid_ratios: [B, L, 2] (width, height), its share of the level. pixels: what masks are made of, None
    where none are predicted.
    """

    tokens: Tensor
    position: Tensor
    padding: Tensor
    spatial_shapes: Shapes
    valid_sizes: Tensor
    valid_ratios: Tensor
    pixels: Pixels | None = None

    def levels(self) -> list[Tensor]:
        """The tokens as feature maps: [B, C, H_l, W_l] per level."""
        sizes = [h * w for h, w in self.spatial_shapes]
        return [
            tokens.transpose(1, 2).unflatten(2, shape)
            for tokens, shape in zip(self.tokens.split(sizes, 1), self.spatial_shapes, strict=True)
        ]


@dataclass
class Pyramid:
    """{F_1..F_J} of the Co-DETR paper, section 3.2. levels: [B, C, H_j, W_j]; strides: network pixels per cell.

    pad_divisor: an image's cells reach to its sides rounded up to multiples of this many pixels.
    """

    levels: list[Tensor]
    strides: tuple[int, ...]
    pad_divisor: int = 1

    @property
    def shapes(self) -> Shapes:
        """(height, width) of each level, plain integers."""
        return tuple((level.shape[-2], level.shape[-1]) for level in self.levels)

    @property
    def cells(self) -> list[int]:
        """Of each level."""
        return [height * width for height, width in self.shapes]

    @property
    def device(self) -> torch.device:
        return self.levels[0].device


@dataclass
class QueryMasks:
    """Masks of queries, as factors: a mask for every query and cell would be the largest tensor by far.

    embeddings: [..., N, E]. pixels: of the images, shared by all queries.
    """

    embeddings: Tensor
    pixels: Pixels


@dataclass
class Prediction:
    """Of queries in stacked layers, [L, B, N, ...], or in one, [B, N, ...].

    logits: [..., N, K] before the sigmoid; beside masks [..., N, K + 1] before the softmax, "no object" last. boxes:
    [..., N, 4] normalised cxcywh; beside masks [..., N, 0], none. masks: where they are what is predicted.
    """

    logits: Tensor
    boxes: Tensor
    masks: QueryMasks | None = None

    @property
    def last(self) -> Prediction:
        """That of the last of the stacked layers."""
        return self._map(lambda part: part[-1])

    @property
    def stacked(self) -> Prediction:
        """One layer as the only one of a stack."""
        return self._map(lambda part: part[None])

    def split(self, sizes: Sequence[int] | int, dim: int) -> list[Prediction]:
        """Parts of these sizes along layers (0) or queries (2)."""
        logits, boxes = self.logits.split(sizes, dim), self.boxes.split(sizes, dim)
        if self.masks is None:
            return [Prediction(*part) for part in zip(logits, boxes, strict=True)]
        masks = [QueryMasks(e, self.masks.pixels) for e in self.masks.embeddings.split(sizes, dim)]
        return [Prediction(*part) for part in zip(logits, boxes, masks, strict=True)]

    @staticmethod
    def joined(parts: Sequence[Prediction], dim: int) -> Prediction:
        """The opposite of `split`, of predictions on the same images."""
        logits, boxes = torch.cat([part.logits for part in parts], dim), torch.cat([part.boxes for part in parts], dim)
        masks = [part.masks for part in parts if part.masks is not None]
        if not masks:
            return Prediction(logits, boxes)
        return Prediction(logits, boxes, QueryMasks(torch.cat([m.embeddings for m in masks], dim), masks[0].pixels))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Prediction:
        masks = None if self.masks is None else QueryMasks(change(self.masks.embeddings), self.masks.pixels)
        return Prediction(change(self.logits), change(self.boxes), masks)


@dataclass(frozen=True)
class Problem:
    """Stacked predictions, logits [L, B, N, K], to be matched one-to-one against every object repeated `repeats` times.

    class_agnostic: only tell object from background, by the first logit.
    """

    prediction: Prediction
    repeats: int = 1
    class_agnostic: bool = False


@dataclass
class Positives:
    """What an auxiliary head hands to the collaborative queries: its candidates with their assignment.

    boxes_xyxy: [B, N, 4] candidate boxes (anchors, points, RoIs). features: [B, N, C]. labels: [B, N], -1 where
    the candidate is not positive. target_boxes_xyxy: [B, N, 4], meaningful on positives. positive, negative:
    [B, N] bool; a candidate that is neither (ignored, padding) is never used. objects: [B, N], which of the targets a
    positive is of; None: not told, and decoders that predict masks cannot use them.
    """

    boxes_xyxy: Tensor
    features: Tensor
    labels: Tensor
    target_boxes_xyxy: Tensor
    positive: Tensor
    negative: Tensor
    objects: Tensor | None = None


@dataclass
class HeadOutput:
    """losses: term -> scalar, weighted inside the head but not yet by lambda_2."""

    losses: dict[str, Tensor]
    positives: Positives


class TargetRule(Protocol):
    """How a group of queries gets its targets. The criterion asks every group for its problems, solves those of all
    groups in one go, and hands the solutions back; a further kind of targets is one more class with these members.
    """

    def problems(self, prediction: Prediction, class_agnostic: bool) -> list[Problem]:
        """What has to be matched. prediction: of the stacked layers, [L, B, N, ...]."""
        ...

    def known(self, solutions: list[Known], num_layers: int) -> Known:
        """The targets of every layer, labels [L, B, N], from the solutions of the problems."""
        ...

    def most(self, num_objects: int, num_queries: int) -> int:
        """How many of an image's queries can be positive at most."""
        ...


@dataclass
class Known:
    """Targets that are known: those that come with the queries (denoising, collaborative), and what matching found.

    labels: [B, N], or [L, B, N] of stacked layers; -1 for background.
    boxes: [B, N, 4] or [L, B, N, 4] normalised cxcywh, meaningful where labels >= 0.
    objects: like labels, which of the image's objects it is, meaningful there too; None: not told, and there are no
        masks to learn.
    """

    labels: Tensor
    boxes: Tensor
    objects: Tensor | None = None

    def problems(self, prediction: Prediction, class_agnostic: bool) -> list[Problem]:
        return []

    def known(self, solutions: list[Known], num_layers: int) -> Known:
        objects = None if self.objects is None else self.objects.expand(num_layers, -1, -1)
        return Known(self.labels.expand(num_layers, -1, -1), self.boxes.expand(num_layers, -1, -1, -1), objects)

    def most(self, num_objects: int, num_queries: int) -> int:
        return num_queries

    def split(self, layers: Sequence[int]) -> list[Known]:
        """Of stacked layers so many each."""
        parts = [part.split(list(layers)) for part in (self.labels, self.boxes)]
        objects = [None] * len(layers) if self.objects is None else self.objects.split(list(layers))
        return [Known(*part) for part in zip(*parts, objects, strict=True)]


@dataclass(frozen=True)
class Matching:
    """Targets found by one-to-one matching against every object repeated `repeats` times."""

    repeats: int = 1

    def problems(self, prediction: Prediction, class_agnostic: bool) -> list[Problem]:
        return [Problem(prediction, self.repeats, class_agnostic)]

    def known(self, solutions: list[Known], num_layers: int) -> Known:
        (solution,) = solutions
        return solution

    def most(self, num_objects: int, num_queries: int) -> int:
        return min(num_objects * self.repeats, num_queries)


@dataclass
class Proposals:
    """First-stage predictions of a query source, their targets, and whether they only tell object from background."""

    prediction: Prediction
    targets: TargetRule
    class_agnostic: bool = False


@dataclass
class QueryGroup:
    """A group of decoder queries with its own way of getting targets (DESIGN: one idea, query groups).

    content: [B, N, C]. reference: [B, N, 2 or 4] normalised, after the sigmoid, or None when the decoder predicts it
    from the position. position: [B, N, C], or None when the decoder derives it from the reference. valid: [B, N] or
    None for all. sees: names of further groups whose queries it may attend to. blocks: the group falls into this many
    equal parts that do not see each other; parts: [N], into those of the same number, where they are not equal, nor
    their size known to the host. weight: factor of its losses (lambda_1 for collaborative groups).
    """

    content: Tensor
    reference: Tensor | None = None
    targets: TargetRule = field(default_factory=Matching)
    position: Tensor | None = None
    valid: Tensor | None = None
    sees: tuple[str, ...] = ()
    blocks: int = 1
    parts: Tensor | None = None
    weight: float = 1.0
    proposals: Proposals | None = None


@dataclass
class QueryContext:
    """What a query source may look at. targets, positives and groups are None and empty at inference.

    groups: those that exist already, the main one first.
    """

    memory: Memory
    targets: Targets | None = None
    positives: dict[str, Positives] = field(default_factory=dict)
    groups: dict[str, QueryGroup] = field(default_factory=dict)


@dataclass
class Output:
    """The result of a detector.

    predictions: per group, of the stacked layers, [layers, B, N, ...].
    head_losses: per auxiliary head, not yet by lambda_2. mask_losses: of the mask head.
    """

    groups: dict[str, QueryGroup]
    predictions: dict[str, Prediction]
    head_losses: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    mask_losses: dict[str, Tensor] = field(default_factory=dict)
    memory: Memory | None = None


@dataclass
class CellMasks(_Movable):
    """Masks on the cells of a padded image. logits: [n, h, w]. stride: network pixels per cell."""

    logits: Tensor
    stride: int


@dataclass
class Detections(_Movable):
    """What was found in one image, best first.

    scores: [n]. labels: [n]. boxes_xyxy: [n, 4], in network pixels from every part of a detector, in pixels of the file
    behind `Frames.to_files`. With instance masks, in files alone: rle: n compressed COCO run lengths {size, counts}.
    mask_scores: [n]. cells: masks of queries, before `codetr.instances` takes them to the file; the scores are then
    those of the classes alone, and the boxes enclose the cells.
    """

    scores: Tensor
    labels: Tensor
    boxes_xyxy: Tensor
    rle: list[dict[str, Any]] | None = None
    mask_scores: Tensor | None = None
    cells: CellMasks | None = None

    def above(self, score: float) -> Detections:
        """Those with at least this box score."""
        return self.at((self.scores >= score).nonzero()[:, 0])

    def at(self, index: Tensor) -> Detections:
        """Those at these places, [m], in their order."""
        rle = None if self.rle is None else [self.rle[i] for i in index.tolist()]
        mask_scores = None if self.mask_scores is None else self.mask_scores[index]
        cells = None if self.cells is None else replace(self.cells, logits=self.cells.logits[index])
        return Detections(self.scores[index], self.labels[index], self.boxes_xyxy[index], rle, mask_scores, cells)


class QuerySource(Protocol):
    """Makes one query group. The source named MAIN is what inference keeps; the others only run in training.

    brings_reference: whether its groups have references; a detector asks when it is built.
    """

    brings_reference: bool

    def __call__(self, context: QueryContext) -> QueryGroup: ...


class ImageBackbone(Protocol):
    """Feature maps of images. channels, strides: of the maps, finest first.

    normalize: [B, 3, H, W] uint8 and the padding [B, H, W] -> float images, zero on the padding.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def normalize(self, images: Tensor, padding: Tensor) -> Tensor: ...

    def __call__(self, images: Tensor) -> list[Tensor]: ...


class Neck(Protocol):
    """Feature maps of a backbone -> levels of one width."""

    def strides(self, in_strides: tuple[int, ...]) -> tuple[int, ...]: ...

    def __call__(self, features: list[Tensor]) -> list[Tensor]: ...


class Encoder(Protocol):
    """The levels of a neck and the padding of the images [B, H, W] -> memory.

    num_levels: that it takes. memory_levels: so many of them, the coarsest, are levels of the memory.
    """

    num_levels: int
    memory_levels: int

    def __call__(self, levels: list[Tensor], padding: Tensor) -> Memory: ...


class AuxiliaryHead(Protocol):
    """A head with one-to-many assignment on the pyramid.

    detect: what it finds on its own, best first, in network pixels; sizes: [B, 2] (height, width) of the images, as in
        `Frames`. Whether its scores keep a gradient is the caller's choice.
    """

    def __call__(self, pyramid: Pyramid, targets: Targets) -> HeadOutput: ...

    def detect(self, pyramid: Pyramid, sizes: Tensor) -> list[Detections]: ...


class Masks(NamedTuple):
    """Of one image's detections.

    inside: [n, s, s] in 0..1, how much each cell of a box shows of the object; `paste_masks` puts it into the image.
    scores: [n], box score x mask IoU.
    """

    inside: Tensor
    scores: Tensor


class MaskHead(Protocol):
    """Instance masks of boxes, on the pyramid.

    losses: weighted inside the head; prediction: the boxes from which it learns, of one decoder layer, [B, N, ...].
    segment: masks of detections in network pixels.
    segment_all: the same of boxes [B, n, 4] with labels [B, n], so many in every image: masks [B, n, s, s] in 0..1 and
        their IoU [B, n], by which the score of a box is multiplied.
    """

    def losses(self, pyramid: Pyramid, prediction: Prediction, targets: Targets) -> dict[str, Tensor]: ...

    def segment(self, pyramid: Pyramid, detections: list[Detections]) -> list[Masks]: ...

    def segment_all(self, pyramid: Pyramid, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...


NormKind = Literal["frozen", "batch", "group"]
MAIN = "main"  # the group that inference keeps


def box_scale(sizes: Tensor) -> Tensor:
    """[B, 2] (height, width) -> [B, 4] (width, height, width, height)."""
    return sizes.flip(1).repeat(1, 2)
