"""Co-Deformable-DETR against tensors recorded from the official code, with Faster R-CNN and with Mask R-CNN: encoder,
proposals, decoder, detections, a training step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from official_weights import (
    HEADS,
    Case,
    close,
    close_gradients,
    close_levels,
    close_losses,
    close_matching,
    load_case,
    stacked,
)
from safetensors.torch import load_file

from codetr.assign.hungarian import Problem, match
from codetr.queries.two_stage import proposal_anchors
from codetr.types import Known, Output, Prediction


@pytest.fixture(scope="module", params=["co_deformable_detr_r50", "co_deformable_detr_mask_r50"])
def case(official: Path, request: pytest.FixtureRequest) -> Case:
    return load_case(official / request.param, "co_deformable", 8)


def test_neck_and_masks(case: Case) -> None:
    close_levels(case)


def test_memory_and_pyramid(case: Case) -> None:
    valid = ~case.memory.padding
    close(case.memory.tokens[valid], case.forward["memory"][valid])
    pyramid = case.detector.adapter(case.memory)
    assert pyramid.strides == (8, 16, 32, 64, 128)
    close(pyramid.levels[4], case.forward["pyramid.4"], 2e-5)


def test_proposals(case: Case) -> None:
    anchors, legal = proposal_anchors(case.memory, 1e-5)
    expected = case.forward["enc_proposals_unact"]
    assert torch.equal(legal, expected.isfinite().all(-1))
    close(anchors[legal], expected[legal])
    group = case.main()
    close(group.content, case.forward["dec_init_query"])
    close(group.reference, case.forward["dec_init_reference"])
    close(group.position, case.forward["dec_query_pos"])
    close(group.proposals.prediction.logits, case.forward["enc_class_all"])
    close(group.proposals.prediction.boxes, case.forward["enc_boxes_all"])


def test_decoder(case: Case) -> None:
    prediction = case.detector(case.inputs["img"], case.padding).predictions["main"]
    close(prediction.logits, case.forward["cls_logits"])
    close(prediction.boxes, case.forward["boxes"])


def test_detections(case: Case) -> None:
    expected = load_file(case.folder / "detections.safetensors")
    last = Prediction(case.forward["cls_logits"][-1], case.forward["boxes"][-1])
    detections = case.postprocess(last, case.inputs["ori_shape"])
    for i, found in enumerate(detections):
        key = f"config.network.img{i}."
        scale = case.inputs["img_shape"][i] / case.inputs["ori_shape"][i]
        close(found.scores, expected[key + "scores"])
        assert torch.equal(found.labels, expected[key + "labels"].long())
        close(found.boxes_xyxy * scale.flip(0).repeat(2), expected[key + "boxes"])


def test_matching(case: Case) -> None:
    decoder = Prediction(case.train["train.cls_logits"], case.train["train.boxes"])
    encoder = stacked(Prediction(case.forward["enc_class_all"], case.forward["enc_boxes_all"]))
    problems = [Problem(decoder), Problem(encoder, class_agnostic=True)]
    by_layer, first = match(problems, case.targets, case.criterion.matching_cost)
    solved = {f"dec{i}": Known(by_layer.labels[i], by_layer.boxes[i]) for i in range(2)}
    close_matching(case, {**solved, "enc": Known(first.labels[0], first.boxes[0])}, class_agnostic=("enc",))


@pytest.mark.parametrize(("number", "head"), list(enumerate(HEADS)))
def test_collaborative_queries_through_the_decoder(case: Case, number: int, head: str) -> None:
    """The recorded positive queries, embedded and decoded in one pass beside the main group."""
    groups = {"main": case.main(), head: case.collaborative(number)}
    predictions = case.detector.decoder(groups, case.memory)
    close(predictions[head].logits, case.train[f"train.aux_out.{number}.cls_logits"])
    close(predictions[head].boxes, case.train[f"train.aux_out.{number}.boxes"])
    close(predictions["main"].boxes, case.train["train.boxes"])


def test_decoder_losses(case: Case) -> None:
    """Every loss of the decoder: two layers, first stage, both groups of positive queries, lambda_1 = 1."""
    groups = {"main": case.main(), "faster_rcnn": case.collaborative(0), "atss": case.collaborative(1)}
    losses = case.criterion(Output(groups, case.detector.decoder(groups, case.memory)), case.targets)
    assert len(losses) == 3 * (1 + 2 + 2 + 2)
    close_losses(case, losses, tolerance=2e-5)


def test_mask_branch(case: Case) -> None:
    head = case.detector.heads["faster_rcnn"]
    if head.mask is None:
        return
    aux = load_file(case.folder / "aux_forward.safetensors")
    rois = aux["roi.rois"][:8]
    logits = head.mask(case.detector.adapter(case.memory), rois[:, 0].long(), rois[:, 1:])
    close(logits, aux["roi.mask_logits_first8"])


def test_a_whole_training_step(case: Case) -> None:
    """With the auxiliary heads: their losses by name, the sum of all losses, and every gradient."""
    memory = case.detector.encode(case.inputs["img"], case.padding)
    step = replace(case, memory=memory)
    pyramid = case.detector.adapter(memory)
    outputs = {name: head(pyramid, case.targets) for name, head in case.detector.heads.items()}
    head_losses = {name: output.losses for name, output in outputs.items()}
    positive = {h: step.collaborative(i, found=outputs[h].positives) for i, h in enumerate(HEADS)}
    groups = {"main": step.main(), **positive}
    losses = case.criterion(Output(groups, case.detector.decoder(groups, memory), head_losses), case.targets)
    names = {"class": "loss_cls0", "giou": "loss_bbox0", "mask": "loss_mask0"}
    for term in head_losses["faster_rcnn"].keys() & names:
        close(losses[f"head_faster_rcnn/{term}"], case.train[f"train.loss.{names[term]}"])
    total = sum(losses.values())
    close(total, case.train["train.loss_total"])
    close_gradients(case, total)
