"""A bundle of tensors that the official code computed, and our detector built and filled from it.

The detector comes from conf/experiment/official, at the bundle's sizes, with its weights through `codetr.convert`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import box_convert

from codetr.convert import official, weights
from codetr.criterion import Criterion
from codetr.models.detector import Detector
from codetr.ops.gather import take
from codetr.types import Frames, Known, Memory, Positives, QueryContext, QueryGroup, Targets, box_scale
from fixed_draws import fixed_draws


@dataclass
class Bundle:
    """inputs, forward (evaluation mode), aux, detections, train: the recorded tensors. floor: the relative error of the
    official run itself. memory: ours, from the images, with its graph. padding: [B, H, W]."""

    folder: Path
    sizes: dict[str, Any]
    detector: Detector
    criterion: Criterion
    inputs: dict[str, Tensor]
    forward: dict[str, Tensor]
    aux: dict[str, Tensor]
    detections: dict[str, Tensor]
    train: dict[str, Tensor]
    account: dict[str, Any]
    targets: Targets
    padding: Tensor

    @property
    def heads(self) -> tuple[str, ...]:
        """In the order of the official code's numbers."""
        return tuple(self.detector.heads)

    @property
    def floor(self) -> dict[str, float]:
        return self.account["fp64"]["forward_rel_diff"]

    def without_objects(self, *images: int) -> Bundle:
        valid = self.targets.valid.clone()
        valid[list(images)] = False
        most = max(1, int(valid.sum(1).max()))  # padded as a batch of these objects is
        cut = {name: getattr(self.targets, name)[:, :most] for name in ("boxes", "labels")}
        masks = None if self.targets.masks is None else self.targets.masks[:, :most]
        return replace(self, targets=replace(self.targets, **cut, valid=valid[:, :most], masks=masks))

    def double(self) -> Bundle:
        """In float64: what differs from the recording is then the recording's rounding, on any processor, and what
        it decided between two values that only rounding tells apart."""
        parts = {name: _double(getattr(self, name)) for name in ("inputs", "forward", "aux", "detections", "train")}
        targets = replace(self.targets, boxes=self.targets.boxes.double())
        return replace(self, detector=copy.deepcopy(self.detector).double(), targets=targets, **parts)

    def encode(self) -> Memory:
        detector, images = self.detector, self.inputs["img"].to(next(self.detector.parameters()))
        return detector.encoder(detector.neck(detector.backbone(images)), self.padding)

    def denoising(self, memory: Memory, which: str = "train") -> QueryGroup:
        """Our denoising queries with the recorded random draws."""
        source, targets = self.detector.queries["denoising"], self.targets
        context = QueryContext(memory, targets)
        select, labels, signs, amounts = (
            self.train[f"{which}.random.{name}"]
            for name in ("0.rand_like", "1.randint_like", "2.randint_like", "3.rand_like")
        )
        blocks = 2 * max(1, source.num_queries // targets.valid.shape[1])
        image, slot = targets.valid.nonzero().unbind(1)  # repeated as a whole, images in order
        place = (image.repeat(blocks), torch.arange(blocks).repeat_interleave(len(slot)), slot.repeat(blocks))

        def on_slots(draws: Tensor) -> Tensor:
            shape = (len(targets.valid), blocks, targets.valid.shape[1], *draws.shape[1:])
            return draws.new_zeros(shape).index_put(place, draws).unflatten(1, (blocks // 2, 2))

        every = labels.new_zeros(len(select)).masked_scatter(select < 0.25, labels)
        integers = iter([on_slots(signs), on_slots(every)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, **__: on_slots(select))
            patch.setattr(torch, "randint_like", lambda *_: next(integers))
            patch.setattr(torch, "rand_like", lambda *_: on_slots(amounts))
            return source(context)

    def knows_queries(self, number: int, which: str) -> bool:
        """Whether all that the positive queries of auxiliary head 0 or 1 are made of is recorded."""
        source = self.detector.queries[self.heads[number]]
        return source.features is None or f"{which}.aux_query.{number}.feats" in self.train

    def collaborative(self, number: int, which: str = "train", found: Positives | None = None) -> QueryGroup:
        """The recorded positive queries of auxiliary head 0 or 1, embedded by our query source.

        found: what our head hands over; the features then come from there, with their gradients.
        """
        record = {k.split(".")[-1]: v for k, v in self.train.items() if k.startswith(f"{which}.aux_query.{number}.")}
        boxes, labels = record["coords"], record["labels"]
        labels = labels.masked_fill(labels == self.sizes["num_classes"], -1)
        features = record.get("feats", torch.empty(0))
        if found is not None and "feats" in record:
            features = take(found.features, torch.cdist(features, found.features).argmin(-1))
            assert (features - record["feats"]).abs().max() < 1e-3 * record["feats"].abs().max()
        goals = record.get("targets")
        if goals is None:
            goals = self._targets_of(boxes, labels, found)
        content, position = self.detector.queries[self.heads[number]]._embed(boxes, features)
        return QueryGroup(content, boxes, Known(labels, goals), position)

    def _targets_of(self, boxes: Tensor, labels: Tensor, found: Positives) -> Tensor:
        """Where the goals are not recorded: those of our positives at the same places."""
        scale = box_scale(self.targets.frames.sizes)[:, None]
        ours = box_convert(found.boxes_xyxy / scale, "xyxy", "cxcywh")
        distance = (boxes[:, :, None] - ours[:, None]).abs().amax(-1).masked_fill(~found.positive[:, None], 1e3)
        nearest = distance.min(-1)
        assert (nearest.values[labels >= 0] < 1e-5).all()
        return box_convert(take(found.target_boxes_xyxy, nearest.indices) / scale, "xyxy", "cxcywh")


def _double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def load(folder: Path) -> Bundle:
    """Raises UserError where a tensor has no place, or a place no tensor."""
    sizes = json.loads((folder / "config.json").read_text())
    experiment = Path(sizes["official_config"]).stem
    settings = [f"model.{key}={value}" for key, value in _sizes(sizes).items()]
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", [f"experiment=official/{experiment}", *settings, *_backbone(sizes["backbone"])])
    detector = _detector(config, sizes)
    state = load_file(folder / "weights.safetensors")
    converted, report = weights.to_ours({name: tensor.float() for name, tensor in state.items()}, detector)
    report.require_fit(folder)
    detector.load_state_dict(converted)
    files = ("inputs", "forward", "aux_forward", "detections", "train")
    inputs, *recorded = (load_file(folder / f"{name}.safetensors") for name in files)
    canvas = "batch_hw" in sizes and "lsj" in experiment
    extent = inputs["img_shape"].long()
    if canvas:  # the official code then takes the canvas for the image
        extent = torch.tensor(inputs["img"].shape[2:]).expand_as(extent)
    rows, columns = (torch.arange(n) for n in inputs["img"].shape[2:])
    padding = (rows >= extent[:, :1])[:, :, None] | (columns >= extent[:, 1:])[:, None, :]
    account = json.loads((folder / "train.json").read_text())
    criterion = instantiate(config.criterion, _convert_="all")
    return Bundle(
        folder, sizes, detector.eval(), criterion, inputs, *recorded, account, padded_targets(inputs, extent), padding
    )


def _sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    region = "mask_rcnn" if sizes.get("mask_convs") else "faster_rcnn"
    head = f"detector.heads.{region}"
    small = {
        "num_classes": sizes["num_classes"],
        "width": sizes["embed_dims"],
        "num_heads": sizes["num_heads"],
        "num_points": sizes["num_points"],
        "ffn_width": sizes["ffn_dim"],
        "detector.encoder.num_layers": sizes["enc_layers"],
        "detector.encoder.checkpointed_layers": 0,
        "detector.decoder.num_layers": sizes["dec_layers"],
        "detector.main.num_queries": sizes["num_query"],
        f"{head}.box_head.hidden_width": sizes["fc_dim"],
        f"{head}.num_samples": sizes["rcnn_sample_num"],
        f"{head}.rpn.num_samples": sizes["rpn_sample_num"],
        f"{head}.proposals.per_level": sizes["rpn_nms_pre"],
        f"{head}.proposals.count": sizes["rpn_max_per_img"],
        "detector.backbone.pretrained": "false",
    }
    if "num_dn_queries" in sizes:
        small["detector.queries.denoising.num_queries"] = sizes["num_dn_queries"]
    if "max_pos_coords" in sizes:
        small["detector.collaborative.max_queries"] = sizes["max_pos_coords"]
    if "mask_iou_head" in sizes["official_model_config"]:
        small["detector.mask_head.num_candidates"] = sizes["max_per_img"]
        small["detector.mask_head.iou.hidden_width"] = sizes["fc_dim"]
    if region == "mask_rcnn":
        small[f"{head}.mask.num_convs"] = sizes["mask_convs"]
    return small


def _backbone(given: dict[str, Any]) -> list[str]:
    """Overrides for the bundle's small backbone."""
    prefix = "model.detector.backbone"
    if given["type"] == "ResNet":
        channels = [given["base_channels"] * 2**i for i in range(4)]
        return [f"{prefix}.name=resnet{given['depth']}", f"+{prefix}.arguments.channels={channels}"]
    if given["type"] == "SwinTransformerV1":
        names = {"embed_dim": "embed_dim", "depths": "depths", "num_heads": "num_heads", "window_size": "window_size"}
        extra = [f"++{prefix}.arguments.{ours}={given[theirs]}" for ours, theirs in names.items()]
        return [*extra, f"++{prefix}.arguments.drop_path_rate=0.0", f"{prefix}.checkpointing=false"]
    blocks = [i for i in range(given["depth"]) if i not in given["window_block_indexes"]]
    arguments = {name: given[name] for name in ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size")}
    arguments |= {"img_size": given["pretrain_img_size"], "drop_path_rate": 0.0}
    return [
        *(f"++{prefix}.arguments.{name}={value}" for name, value in arguments.items()),
        f"{prefix}.window={given['window_size']}",
        f"{prefix}.global_blocks={blocks}",
        f"{prefix}.rotary_canvas={given['img_size'] if given.get('use_lsj') else 'null'}",
        f"{prefix}.checkpointed_blocks=0",
    ]


def _detector(config: DictConfig, sizes: dict[str, Any]) -> Detector:
    detector = instantiate(config.model.detector, _convert_="all")
    if sizes["backbone"]["type"] == "ResNet":
        _narrow_stem(detector.backbone.body, sizes["backbone"]["base_channels"])
    return detector


def _narrow_stem(body: nn.Module, width: int) -> None:
    """timm's ResNets have a stem of 64 channels whatever their stages have; the bundles' have the first stage's."""
    first = body.layer1[0]
    body.conv1.weight = nn.Parameter(body.conv1.weight[:width])
    for name, buffer in body.bn1.named_buffers():
        setattr(body.bn1, name, buffer[:width])
    for conv in (first.conv1, first.downsample[0]):
        conv.weight = nn.Parameter(conv.weight[:, :width])
    for module in (body.conv1, first):
        module.requires_grad_(False)


def padded_targets(inputs: dict[str, Tensor], extent: Tensor) -> Targets:
    """The recorded objects. extent: [B, 2] (height, width) by which boxes are normalised."""
    counts = [len(inputs[f"gt_labels.{i}"]) for i in range(len(extent))]
    shape = (len(extent), max(counts))
    targets = Targets(
        torch.full((*shape, 4), 0.5),
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.bool),
        Frames.unscaled(extent),
    )
    for i, count in enumerate(counts):
        boxes = inputs[f"gt_boxes.{i}"] / extent[i].flip(0).repeat(2)
        targets.boxes[i, :count] = box_convert(boxes, "xyxy", "cxcywh")
        targets.labels[i, :count], targets.valid[i, :count] = inputs[f"gt_labels.{i}"], True
    if "gt_masks.0" in inputs:
        masks = [inputs[f"gt_masks.{i}"].bool() for i in range(len(extent))]
        targets.masks = nn.utils.rnn.pad_sequence(masks, batch_first=True)
    return targets


def recorded_draws() -> AbstractContextManager[None]:
    """With the bundles' stand-in for a random permutation."""
    return fixed_draws(lambda rank: rank * 7919 % 104729)


@contextmanager
def tie_rule(smallest: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """With ATSS choosing the nearest anchors by this function in place of `codetr.ops.gather.smallest`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codetr.assign.atss.smallest", smallest)
        yield


def recorded_ties(bundle: Bundle) -> AbstractContextManager[None]:
    """With anchors that are equally near to an object, to the last bit, in the order that makes the recorded choice
    possible: those that are positives there first. The official topk chooses among them by the tensor's shape; we by
    the anchor's index (docs/faithfulness.md)."""
    cells = [m.shape[-2] * m.shape[-1] for name, m in sorted(bundle.aux.items()) if name.startswith("atss.cls.")]
    positive = bundle.train["train.atss_target.labels"] < bundle.sizes["num_classes"]
    levels = dict(zip(cells, positive.split(cells, 1), strict=True))

    def smallest(values: Tensor, count: int) -> Tensor:
        number = values.shape[-1]
        order = torch.argsort(levels[number].int(), dim=1, descending=True, stable=True)
        order = order[:, None].expand(values.shape)
        first = values.gather(-1, order).sort(dim=-1, stable=True).indices[..., : min(count, number)]
        return order.gather(-1, first)

    return tie_rule(smallest)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` times the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def gradient_norms(bundle: Bundle, total: Tensor, which: str) -> dict[str, tuple[float, float]]:
    """Names of our parameters -> the norm of the gradient of `total`, ours and recorded; some of ours are several of
    theirs, or the reverse. Raises AssertionError where a parameter has a gradient on one side only."""
    names = weights.table(bundle.detector)
    squares: dict[tuple[str, ...], float] = {}
    state = load_file(bundle.folder / "weights.safetensors")
    for theirs, norm in bundle.account["grad_norm"][which].items():
        together = tuple(str(names.to_ours(name)) for name in official.split({theirs: state[theirs]}))
        squares[together] = squares.get(together, 0.0) + (norm or 0.0) ** 2
    learned = {name: p for name, p in bundle.detector.named_parameters() if p.requires_grad}
    recorded = {name for together in squares for name in together}
    assert recorded == set(learned), sorted(recorded ^ set(learned))
    found = torch.autograd.grad(total, list(learned.values()), allow_unused=True)
    gradients = dict(zip(learned, found, strict=True))
    return {
        ", ".join(together): (_norm([gradients[name] for name in together]), square**0.5)
        for together, square in squares.items()
    }


def _norm(gradients: list[Tensor | None]) -> float:
    return sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5
