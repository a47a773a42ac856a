"""Co-Deformable-DETR against tensors recorded from the official code: encoder, proposals, decoder, detections."""

from pathlib import Path

import pytest
import torch
from official_weights import HEADS, Case, close, close_levels, close_losses, close_matching, load_case, stacked
from safetensors.torch import load_file

from codetr.assign.hungarian import Problem, match
from codetr.queries.two_stage import proposal_anchors
from codetr.types import Known, Output, Prediction


@pytest.fixture(scope="module")
def case(official: Path) -> Case:
    return load_case(official / "co_deformable_detr_r50", "co_deformable", 8)


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


def test_detections(case: Case, official: Path) -> None:
    expected = load_file(official / "co_deformable_detr_r50" / "detections.safetensors")
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
