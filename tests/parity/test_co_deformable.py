"""Co-Deformable-DETR against tensors recorded from the official code: encoder, proposals, decoder, detections.

The official names are mapped here; the backbone and the auxiliary heads have tests of their own.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from codetr.assign.hungarian import MatchingCost, Problem, match
from codetr.criterion import Criterion
from codetr.losses import Focal
from codetr.models.cross_attention import DeformableCrossAttention
from codetr.models.decoder import Decoder, DecoderLayer
from codetr.models.encoder import DeformableEncoder
from codetr.models.neck import ChannelMapper
from codetr.models.pyramid import PyramidAdapter
from codetr.models.query_position import GivenPosition
from codetr.postprocess import PostProcess
from codetr.queries.collaborative import CollaborativeQueries
from codetr.queries.two_stage import TwoStageQueries, proposal_anchors
from codetr.types import Known, Memory, Output, Prediction, QueryContext, QueryGroup, Targets

WIDTH, HEADS, LEVELS, POINTS, FFN, CLASSES, LAYERS = 64, 8, 4, 4, 128, 6, 2

RENAMES = [
    (r"neck\.convs\.(\d)\.conv", r"neck.lateral.\1.0"),
    (r"neck\.convs\.(\d)\.gn", r"neck.lateral.\1.1"),
    (r"neck\.extra_convs\.(\d)\.conv", r"neck.extra.\1.0"),
    (r"neck\.extra_convs\.(\d)\.gn", r"neck.extra.\1.1"),
    (r"query_head\.transformer\.", ""),
    (r"level_embeds", "encoder.level_embedding"),
    (r"encoder\.layers\.(\d)\.attentions\.0", r"encoder.layers.\1.attention"),
    (r"encoder\.layers\.(\d)\.norms\.0", r"encoder.layers.\1.norm"),
    (r"encoder\.layers\.(\d)\.norms\.1", r"encoder.layers.\1.ffn.norm"),
    (r"decoder\.layers\.(\d)\.attentions\.1", r"decoder.layers.\1.cross_attention.attention"),
    (r"decoder\.layers\.(\d)\.attentions\.0\.attn\.out_proj", r"decoder.layers.\1.self_attention.output"),
    (r"decoder\.layers\.(\d)\.norms\.0", r"decoder.layers.\1.norm1"),
    (r"decoder\.layers\.(\d)\.norms\.1", r"decoder.layers.\1.norm2"),
    (r"decoder\.layers\.(\d)\.norms\.2", r"decoder.layers.\1.ffn.norm"),
    (r"ffns\.0\.layers\.0\.0", "ffn.linear1"),
    (r"ffns\.0\.layers\.1", "ffn.linear2"),
    (r"enc_output_norm", "main.projection.1"),
    (r"enc_output", "main.projection.0"),
    (r"query_head\.query_embedding", "main.content"),
    (r"^pos_trans_norm", "main.embedding.projection.1"),
    (r"^pos_trans", "main.embedding.projection.0"),
    (r"query_head\.cls_branches\.2", "main.class_head"),
    (r"query_head\.reg_branches\.2", "main.box_head"),
    (r"query_head\.cls_branches", "decoder.class_heads"),
    (r"query_head\.reg_branches", "decoder.box_heads"),
    (r"query_head\.downsample\.0", "adapter.downsample.0.0"),
    (r"query_head\.downsample\.1", "adapter.downsample.0.1"),
    (r"aux_pos_trans_norm\.(\d)", r"aux\1.coordinates.1"),
    (r"aux_pos_trans\.(\d)", r"aux\1.coordinates.0"),
    (r"pos_feats_norm\.(\d)", r"aux\1.features.1"),
    (r"pos_feats_trans\.(\d)", r"aux\1.features.0"),
]


def ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in weights.items():
        if not name.startswith(("neck", "query_head")):
            continue
        for old, new in RENAMES:
            name = re.sub(old, new, name)
        if match_ := re.match(r"(.*)attentions\.0\.attn\.in_proj_(weight|bias)", name):
            stem = f"{match_[1]}self_attention."
            out[f"{stem}query_key.{match_[2]}"] = tensor[: 2 * WIDTH]
            out[f"{stem}value.{match_[2]}"] = tensor[2 * WIDTH :]
        elif name == "head_pos_embed.weight":  # one scalar per head, broadcast over the channels
            for head in range(2):
                out[f"aux{head}.head_embedding"] = tensor[head].expand(WIDTH)
        else:
            out[name] = tensor
    return {name: tensor.float() for name, tensor in out.items()}


class Case(NamedTuple):
    parts: nn.ModuleDict
    forward: dict[str, Tensor]
    train: dict[str, Tensor]
    inputs: dict[str, Tensor]
    padding: Tensor
    memory: Memory
    targets: Targets


def collaborative(head: str) -> CollaborativeQueries:
    return CollaborativeQueries(head, WIDTH, 9, 300, "negatives", True, True, 10000, 1e-5, 1.0)


@pytest.fixture(scope="module")
def case(official: Path) -> Case:
    folder = official / "co_deformable_detr_r50"
    config = json.loads((folder / "config.json").read_text())
    parts = nn.ModuleDict(
        {
            "neck": ChannelMapper(tuple(config["neck_in_channels"]), WIDTH, LEVELS, 32, False),
            "encoder": DeformableEncoder(WIDTH, HEADS, LEVELS, POINTS, FFN, LAYERS, 0.0, 10000, -0.5, 0),
            "adapter": PyramidAdapter(WIDTH, (8, 16, 32, 64), 8, 5, 32),
            "main": TwoStageQueries(WIDTH, CLASSES, config["num_query"], True, True, True, 10000, 1e-5, 1, 1.0),
            "aux0": collaborative("faster_rcnn"),
            "aux1": collaborative("atss"),
            "decoder": Decoder(
                WIDTH,
                CLASSES,
                LAYERS,
                partial(
                    DecoderLayer,
                    WIDTH,
                    HEADS,
                    FFN,
                    0.0,
                    "relu",
                    False,
                    partial(DeformableCrossAttention, WIDTH, HEADS, LEVELS, POINTS),
                ),
                GivenPosition(),
                None,
                "look_forward_twice",
                False,
                False,
                0.0,
                1e-5,
                0,
            ),
        }
    )
    parts.load_state_dict(ours(load_file(folder / "weights.safetensors")))
    parts.eval()
    forward, train, inputs = (load_file(folder / f"{f}.safetensors") for f in ("forward", "train", "inputs"))
    sizes = inputs["img_shape"]
    rows, columns = torch.arange(inputs["img"].shape[2]), torch.arange(inputs["img"].shape[3])
    padding = (rows >= sizes[:, :1])[:, :, None] | (columns >= sizes[:, 1:])[:, None, :]
    with torch.no_grad():
        memory = parts["encoder"](parts["neck"]([forward[f"backbone.{i}"] for i in range(3)]), padding)
    boxes, labels = ([inputs[f"gt_{kind}.{i}"] for i in range(2)] for kind in ("boxes", "labels"))
    return Case(parts, forward, train, inputs, padding, memory, padded_targets(boxes, labels, sizes))


def padded_targets(boxes: list[Tensor], labels: list[Tensor], sizes: Tensor) -> Targets:
    most = max(len(b) for b in boxes)
    out = Targets(
        torch.full((2, most, 4), 0.5),
        torch.zeros(2, most, dtype=torch.long),
        torch.zeros(2, most, dtype=torch.bool),
        sizes.long(),
    )
    for i, (b, lab) in enumerate(zip(boxes, labels, strict=True)):
        height, width = sizes[i].tolist()
        scaled = b / torch.tensor([width, height, width, height])
        out.boxes[i, : len(b)] = torch.cat([(scaled[:, :2] + scaled[:, 2:]) / 2, scaled[:, 2:] - scaled[:, :2]], 1)
        out.labels[i, : len(b)], out.valid[i, : len(b)] = lab.long(), True
    return out


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` times the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_neck_and_masks(case: Case) -> None:
    levels = case.parts["neck"]([case.forward[f"backbone.{i}"] for i in range(3)])
    flat = case.parts["encoder"].flatten(levels, case.padding)
    start = 0
    for i, level in enumerate(levels):
        close(level, case.forward[f"neck.{i}"])
        cells = level.shape[2] * level.shape[3]
        mask = case.forward[f"mask.{i}"].bool()
        assert torch.equal(flat.padding[:, start : start + cells], mask.flatten(1))
        position = flat.position[:, start : start + cells] - case.parts["encoder"].level_embedding[i]
        valid = ~mask.flatten(1)
        close(position[valid], case.forward[f"pos.{i}"].flatten(2).transpose(1, 2)[valid])
        start += cells
    close(flat.valid_ratios, case.forward["valid_ratios"])


def test_memory_and_pyramid(case: Case) -> None:
    valid = ~case.memory.padding
    close(case.memory.tokens[valid], case.forward["memory"][valid])
    pyramid = case.parts["adapter"](case.memory)
    assert pyramid.strides == (8, 16, 32, 64, 128)
    close(pyramid.levels[4], case.forward["pyramid.4"], 2e-5)


def test_proposals(case: Case) -> None:
    anchors, legal = proposal_anchors(case.memory, 1e-5)
    expected = case.forward["enc_proposals_unact"]
    assert torch.equal(legal, expected.isfinite().all(-1))
    close(anchors[legal], expected[legal])
    group = case.parts["main"](QueryContext(case.memory, case.targets))
    close(group.content, case.forward["dec_init_query"])
    close(group.reference, case.forward["dec_init_reference"])
    close(group.position, case.forward["dec_query_pos"])
    close(group.proposals.prediction.logits, case.forward["enc_class_all"])
    close(group.proposals.prediction.boxes, case.forward["enc_boxes_all"])


def test_decoder(case: Case) -> None:
    groups = {"main": case.parts["main"](QueryContext(case.memory))}
    prediction = case.parts["decoder"](groups, case.memory)["main"]
    close(prediction.logits, case.forward["cls_logits"])
    close(prediction.boxes, case.forward["boxes"])


def test_detections(case: Case, official: Path) -> None:
    expected = load_file(official / "co_deformable_detr_r50" / "detections.safetensors")
    last = Prediction(case.forward["cls_logits"][-1], case.forward["boxes"][-1])
    detections = PostProcess(max_detections=100, nms_iou=None)(last, case.inputs["ori_shape"])
    for i, found in enumerate(detections):
        key = f"config.network.img{i}."
        scale = case.inputs["img_shape"][i] / case.inputs["ori_shape"][i]
        close(found.scores, expected[key + "scores"])
        assert torch.equal(found.labels, expected[key + "labels"].long())
        close(found.boxes_xyxy * scale.flip(0).repeat(2), expected[key + "boxes"])


def test_matching(case: Case) -> None:
    cost = MatchingCost(2.0, 5.0, 2.0, 0.25, 2.0)
    decoder = Prediction(case.train["train.cls_logits"], case.train["train.boxes"])
    encoder = Prediction(case.forward["enc_class_all"][None], case.forward["enc_boxes_all"][None])
    solved = match([Problem(decoder), Problem(encoder, class_agnostic=True)], case.targets, cost)
    for known, names in zip(solved, (("dec0", "dec1"), ("enc",)), strict=True):
        for layer, name in enumerate(names):
            for image in range(2):
                owner = case.train[f"train.match.{name}.img{image}.gt_inds"].long() - 1
                labels = case.targets.labels[image] * (name != "enc")
                expected = labels[owner.clamp(min=0)].masked_fill(owner < 0, -1)
                assert torch.equal(known.labels[layer, image], expected)
                positive = owner >= 0
                assert torch.equal(known.boxes[layer, image, positive], case.targets.boxes[image, owner[positive]])


@pytest.mark.parametrize("head", [0, 1])
def test_collaborative_queries_through_the_decoder(case: Case, head: int) -> None:
    """The recorded positive queries, embedded and decoded in one pass beside the main group."""
    source = case.parts[f"aux{head}"]
    boxes = case.train[f"train.aux_query.{head}.coords"]
    content, position = source._embed(boxes, case.train[f"train.aux_query.{head}.feats"])
    known = Known(case.train[f"train.aux_query.{head}.labels"], case.train[f"train.aux_query.{head}.targets"])
    group = QueryGroup(content, boxes, known, position)
    groups = {"main": case.parts["main"](QueryContext(case.memory)), "aux": group}
    predictions = case.parts["decoder"](groups, case.memory)
    close(predictions["aux"].logits, case.train[f"train.aux_out.{head}.cls_logits"])
    close(predictions["aux"].boxes, case.train[f"train.aux_out.{head}.boxes"])
    close(predictions["main"].boxes, case.train["train.boxes"])


def test_decoder_losses(case: Case) -> None:
    """Every loss of the decoder: two layers, first stage, both groups of positive queries, lambda_1 = 1."""
    criterion = Criterion(MatchingCost(2.0, 5.0, 2.0, 0.25, 2.0), Focal(0.25, 2.0), 2.0, 5.0, 2.0, 2.0)
    main = case.parts["main"](QueryContext(case.memory, case.targets))
    groups, predictions = (
        {"main": main},
        {"main": Prediction(case.train["train.cls_logits"], case.train["train.boxes"])},
    )
    for i in range(2):
        query = {k: case.train[f"train.aux_query.{i}.{k}"] for k in ("coords", "labels", "targets")}
        labels = query["labels"].long()
        known = Known(labels.masked_fill(labels == CLASSES, -1), query["targets"])
        groups[f"aux{i}"] = QueryGroup(query["coords"], query["coords"], known)
        out = {k: case.train[f"train.aux_out.{i}.{k}"] for k in ("cls_logits", "boxes")}
        predictions[f"aux{i}"] = Prediction(out["cls_logits"], out["boxes"])
    losses = criterion(Output(groups, predictions), case.targets)
    assert len(losses) == 3 * (1 + 2 + 2 + 2)
    for name, value in losses.items():
        group, layer, term = name.split("/")
        term = {"class": "loss_cls", "l1": "loss_bbox", "giou": "loss_iou"}[term]
        prefix = {"encoder": "enc_", "0": "d0.", "1": ""}[layer]
        suffix = "" if group == "main" else f"_{group}"
        close(value, case.train[f"train.loss.{prefix}{term}{suffix}"].reshape(()), 2e-5)
