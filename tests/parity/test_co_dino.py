"""Co-DINO (five scales) against tensors recorded from the official code, composed from conf/: encoder, two-stage
selection, decoder with denoising and positive queries in one pass, matching, losses with quality focal loss."""

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

from codetr.assign.hungarian import Problem, match
from codetr.ops.gather import take
from codetr.queries.two_stage import proposal_anchors
from codetr.types import MAIN, Known, Output, Prediction, QueryGroup

QUERIES, EPS = 50, 1e-3


@pytest.fixture(scope="module")
def case(official: Path) -> Case:
    return load_case(
        official / "co_dino_5scale_r50",
        "dino_5scale",
        4,
        "model/collaborator=[faster_rcnn,atss]",
        *(f"model.detector.queries.{head}.use_features=false" for head in HEADS),
        "model.detector.queries.denoising.unused=background",
        "criterion=quality_focal",
        "criterion.focal=1.0",
    )


def every_group(case: Case) -> dict[str, QueryGroup]:
    collaborative = {head: case.collaborative(number) for number, head in enumerate(HEADS)}
    return {MAIN: case.main(), "denoising": case.denoising(), **collaborative}


def test_neck_and_masks(case: Case) -> None:
    close_levels(case)


def test_memory_and_pyramid(case: Case) -> None:
    valid = ~case.memory.padding
    close(case.memory.tokens[valid], case.forward["memory"][valid])
    pyramid = case.detector.adapter(case.memory)
    assert pyramid.strides == (4, 8, 16, 32, 64, 128)
    # A group norm over one cell: the floor of float32 itself is 4e-6 (the bundle's README).
    close(pyramid.levels[5], case.forward["pyramid.5"], 2e-5)


def test_two_stage_selection(case: Case) -> None:
    """Ranked by the best class; of the proposals only the selected ones go to the loss."""
    anchors, legal = proposal_anchors(case.memory, EPS)
    expected = case.forward["enc_proposals_unact"]
    assert torch.equal(legal, expected.isfinite().all(-1))
    close(anchors[legal], expected[legal])
    main, chosen = case.main(), case.forward["enc_topk_indices"]
    assert torch.equal(case.forward["enc_class_all"].amax(-1).topk(QUERIES).indices, chosen)
    close(main.content, case.forward["dec_init_query"])
    close(main.reference, case.forward["dec_init_reference"])
    assert main.position is None
    assert main.proposals is not None
    close(main.proposals.prediction.logits, case.forward["enc_topk_class"])
    close(main.proposals.prediction.boxes, case.forward["enc_topk_boxes"])
    close(main.proposals.prediction.logits, take(case.forward["enc_class_all"], chosen))


def test_inference(case: Case) -> None:
    prediction = case.detector(case.inputs["img"], case.padding).predictions[MAIN]
    close(prediction.logits, case.forward["cls_logits"])
    close(prediction.boxes, case.forward["boxes"])


def test_the_groups_see_what_the_official_mask_allows(case: Case) -> None:
    """The recorded mask (True = hidden), denoising queries first, from blocks and sees."""
    group, total = case.denoising(), len(case.train["train.dn.attn_mask"])
    own = group.content.shape[1]
    part = torch.arange(total) // (own // group.blocks)
    part[own:] = group.blocks
    hidden = part[:, None] != part[None]
    hidden[:own, own:] = MAIN not in group.sees
    assert torch.equal(hidden, case.train["train.dn.attn_mask"])


def test_one_pass_of_all_groups(case: Case) -> None:
    """Main, denoising and both groups of positive queries; the official code takes three passes."""
    groups = every_group(case)
    predictions = case.detector.decoder(groups, case.memory)
    known = groups["denoising"].content.shape[1]
    for name, part in {"denoising": slice(known), MAIN: slice(known, None)}.items():
        close(predictions[name].logits, case.train["train.cls_logits"][:, :, part])
        close(predictions[name].boxes, case.train["train.boxes"][:, :, part])
    for number, head in enumerate(HEADS):
        close(predictions[head].logits, case.train[f"train.aux_out.{number}.cls_logits"])
        close(predictions[head].boxes, case.train[f"train.aux_out.{number}.boxes"])


def test_denoising_queries_are_made_alike(case: Case) -> None:
    """Our noise with the recorded draws; blocks of positives, then negatives."""
    made = case.denoising()
    assert made.blocks == int(case.train["train.dn.num_groups"])
    close(made.content, case.train["train.dn.label_query"])
    close(made.reference, case.train["train.dn.bbox_query"].sigmoid())


def test_matching(case: Case) -> None:
    known = case.denoising().content.shape[1]
    decoder = Prediction(case.train["train.cls_logits"][:, :, known:], case.train["train.boxes"][:, :, known:])
    encoder = stacked(Prediction(case.forward["enc_topk_class"], case.forward["enc_topk_boxes"]))
    by_layer, first = match([Problem(decoder), Problem(encoder)], case.targets, case.criterion.matching_cost)
    solved = {f"dec{i}": Known(by_layer.labels[i], by_layer.boxes[i]) for i in range(2)}
    close_matching(case, {**solved, "enc": Known(first.labels[0], first.boxes[0])})


def test_losses_of_all_groups(case: Case) -> None:
    """Two layers of four groups and the first stage."""
    groups = every_group(case)
    losses = case.criterion(Output(groups, case.detector.decoder(groups, case.memory)), case.targets)
    assert len(losses) == 3 * (1 + 2 * 4)
    close_losses(case, losses)


def test_a_whole_training_step(case: Case) -> None:
    """With the auxiliary heads: the sum of all losses, and every gradient."""
    memory = case.detector.encode(case.inputs["img"], case.padding)
    step = replace(case, memory=memory)
    pyramid, groups = case.detector.adapter(memory), every_group(step)
    head_losses = {name: head(pyramid, case.targets).losses for name, head in case.detector.heads.items()}
    output = Output(groups, case.detector.decoder(groups, memory), head_losses)
    total = sum(case.criterion(output, case.targets).values())
    close(total, case.train["train.loss_total"])
    close_gradients(case, total)


def test_losses_without_denoising(case: Case) -> None:
    groups = every_group(case)
    del groups["denoising"]
    losses = case.criterion(Output(groups, case.detector.decoder(groups, case.memory)), case.targets)
    close_losses(case, losses, "no_cdn")


def test_losses_where_the_last_image_is_empty(case: Case) -> None:
    valid = case.targets.valid.clone()
    valid[1] = False
    groups = {MAIN: case.main()}
    output = Output(groups, case.detector.decoder(groups, case.memory))
    close_losses(case, case.criterion(output, replace(case.targets, valid=valid)), "last_image_empty")


def test_losses_where_all_images_are_empty(case: Case) -> None:
    """The recorded positive queries are then negatives."""
    valid = torch.zeros_like(case.targets.valid)
    groups = {h: case.collaborative(number, "all_images_empty") for number, h in enumerate(HEADS)}
    groups = {MAIN: case.main(), **groups}
    output = Output(groups, case.detector.decoder(groups, case.memory))
    losses = case.criterion(output, replace(case.targets, valid=valid))
    assert len(losses) == 3 * (1 + 2 * 3)
    close_losses(case, losses, "all_images_empty")
