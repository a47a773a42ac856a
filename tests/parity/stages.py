"""Every stage of the detector against a bundle: what we compute, what the official code recorded, how far it may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from bundle import Bundle, gradient_norms, recorded_draws, recorded_ties, tie_rule
from torch import Tensor

from codetr.assign.hungarian import match
from codetr.assign.max_iou import assign_max_iou
from codetr.ops.gather import smallest
from codetr.postprocess import NMS, PostProcess, SoftNMS
from codetr.types import (
    MAIN,
    Detections,
    Memory,
    Output,
    Positives,
    Prediction,
    Problem,
    Pyramid,
    QueryContext,
    QueryGroup,
)

TOLERANCE = 1e-5
HEAD_LOSSES = {
    "class": "loss_cls{}",
    "giou": "loss_bbox{}",
    "centerness": "loss_centerness{}",
    "mask": "loss_mask{}",
    "rpn_class": "loss_rpn_cls",
    "rpn_l1": "loss_rpn_bbox",
}


@dataclass
class Line:
    """difference: the largest one. relative: to the largest recorded value; of decisions, how many differ. note: what
    the two may decide differently, and did."""

    stage: str
    difference: float
    relative: float
    tolerance: float
    note: str = ""

    @property
    def passes(self) -> bool:
        return self.relative <= self.tolerance


def close(stage: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> Line:
    assert actual.shape == expected.shape, (stage, actual.shape, expected.shape)
    difference = float((actual - expected).abs().max()) if actual.numel() else 0.0
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return Line(stage, difference, difference / largest if largest else difference, tolerance)


def equal(stage: str, actual: Tensor, expected: Tensor, note: str = "") -> Line:
    assert actual.shape == expected.shape, (stage, actual.shape, expected.shape)
    count = float((actual != expected).sum())
    return Line(stage, count, count, 0.0, note)


def _floor(bundle: Bundle, name: str) -> float:
    return max(TOLERANCE, 4 * bundle.floor.get(name, 0.0))


@torch.no_grad()
def encoder(bundle: Bundle) -> Iterator[Line]:
    """Backbone, neck, masks, positions, memory and the pyramid's extra level."""
    detector, forward = bundle.detector, bundle.forward
    features = detector.backbone(bundle.inputs["img"].float())
    for i, level in enumerate(features):
        yield close(f"backbone {i}", level, forward[f"backbone.{i}"])
    levels = detector.neck(features)
    flat = detector.encoder.flatten(levels, bundle.padding)
    cells = [level.shape[2] * level.shape[3] for level in levels]
    split = zip(levels, flat.padding.split(cells, 1), flat.position.split(cells, 1), strict=True)
    for i, (level, padding, position) in enumerate(split):
        mask = forward[f"mask.{i}"].flatten(1)
        yield close(f"neck {i}", level, forward[f"neck.{i}"])
        yield equal(f"mask {i}", padding, mask)
        expected = forward[f"pos.{i}"].flatten(2).transpose(1, 2)
        own = position - detector.encoder.level_embedding[i]
        yield close(f"position {i}", own[~mask], expected[~mask])
    yield close("valid ratios", flat.valid_ratios, forward["valid_ratios"])
    memory = bundle.encode()
    valid = ~memory.padding
    yield close("memory", memory.tokens[valid], forward["memory"][valid], _floor(bundle, "memory"))
    pyramid, last = detector.adapter(_recorded_memory(bundle, memory)), len(levels)
    name = f"pyramid.{last}"
    yield close(f"pyramid {last}", pyramid.levels[last], forward[name], _coarsest(bundle, last))


def _recorded_memory(bundle: Bundle, memory: Memory) -> Memory:
    """The recorded values, with our gradients. What lies behind the encoder is compared on them: a group norm over the
    one or two cells of the coarsest level makes ten times as much of a rounding error, and the order of two proposals
    may hang on the seventh digit of their scores."""
    return replace(memory, tokens=memory.tokens + (bundle.forward["memory"] - memory.tokens).detach())


def _coarsest(bundle: Bundle, level: int) -> float:
    """For the same reason twice the tolerance where this level takes part."""
    return max(2 * TOLERANCE, _floor(bundle, f"pyramid.{level}"))


@torch.no_grad()
def decoder(bundle: Bundle) -> Iterator[Line]:
    """Proposals, their selection, every layer."""
    forward, memory = bundle.forward, bundle.encode()
    main = bundle.detector.queries[MAIN](QueryContext(memory, bundle.targets))  # targets: with its proposals
    first = main.proposals.prediction
    if "enc_topk_class" in forward:
        yield close("proposals, classes", first.logits, forward["enc_topk_class"])
        yield close("proposals, boxes", first.boxes, forward["enc_topk_boxes"])
    else:
        yield close("proposals, classes", first.logits, forward["enc_class_all"])
        yield close("proposals, boxes", first.boxes, forward["enc_boxes_all"])
        yield close("query positions", main.position, forward["dec_query_pos"])
    yield close("queries", main.content, forward["dec_init_query"])
    yield close("references", main.reference, forward["dec_init_reference"])
    prediction = bundle.detector.decoder({MAIN: main}, memory)[MAIN]
    for i, (logits, boxes) in enumerate(zip(prediction.logits, prediction.boxes, strict=True)):
        yield close(f"layer {i}, classes", logits, forward["cls_logits"][i], _floor(bundle, "cls_logits"))
        yield close(f"layer {i}, boxes", boxes, forward["boxes"][i], _floor(bundle, "boxes"))


@torch.no_grad()
def detections(bundle: Bundle) -> Iterator[Line]:
    """Every variant of the test settings, in pixels of the original image."""
    memory = bundle.encode()
    main = bundle.detector.queries[MAIN](QueryContext(memory))
    last = bundle.detector.decoder({MAIN: main}, memory)[MAIN].last
    frames = replace(bundle.targets.frames, scale=bundle.inputs["scale_factor"][:, :2].flip(1))
    for variant, settings in bundle.sizes["detection_variants"].items():
        found = PostProcess(settings["max_per_img"], _suppression(settings.get("nms")))(last, frames.sizes)
        for i, own in enumerate(frames.to_files(found)):
            recorded = {k: bundle.detections[f"{variant}.original.img{i}.{k}"] for k in ("boxes", "scores", "labels")}
            keep = own.scores > settings.get("score_thr", -1.0)
            stage = f"detections {variant}, image {i}"
            yield equal(f"{stage}, labels", own.labels[keep], recorded["labels"].long())
            yield close(f"{stage}, scores", own.scores[keep], recorded["scores"])
            pixels = (own.boxes_xyxy[keep] - recorded["boxes"]).abs().max() if keep.any() else torch.zeros(())
            yield Line(f"{stage}, boxes (pixels)", float(pixels), float(pixels), 1e-2)


def _suppression(nms: dict | None) -> NMS | SoftNMS | None:
    if nms is None:
        return None
    iou = nms["iou_threshold"]
    return NMS(iou) if nms["type"] == "nms" else SoftNMS("linear", iou, 0.5, nms.get("min_score", 1e-3))


def _per_cell(tensors: dict[str, Tensor], name: str, per_cell: int) -> Tensor:
    maps = [tensors[key] for key in sorted(tensors) if key.startswith(f"{name}.")]
    return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, m.shape[1] // per_cell) for m in maps], 1)


@torch.no_grad()
def heads(bundle: Bundle) -> Iterator[Line]:
    """The auxiliary heads' predictions."""
    aux, head = bundle.aux, bundle.detector.heads[bundle.heads[0]]
    pyramid = bundle.detector.adapter(_recorded_memory(bundle, bundle.encode()))
    extra = _coarsest(bundle, len(pyramid.levels) - 1)
    atss = bundle.detector.heads["atss"]
    if "rpn.anchors" in aux:
        yield close("RPN, anchors", torch.cat(head.rpn.grid(pyramid)), aux["rpn.anchors"])
    yield close("ATSS, anchors", torch.cat(atss.grid(pyramid)), aux["atss.anchors"])
    inside = atss.grid.valid(pyramid, bundle.targets.frames.sizes)
    yield equal("ATSS, valid anchors", inside, aux["atss.valid_flags"].bool())
    logits, deltas = head.rpn(pyramid)
    yield close("RPN, objectness", logits, _per_cell(aux, "rpn.cls", 9)[..., 0], extra)
    yield close("RPN, deltas", deltas, _per_cell(aux, "rpn.reg", 9), extra)
    rois = aux["roi.rois"]
    images, boxes = rois[:, 0].long(), rois[:, 1:]
    yield equal("RoI, levels", head.pool.levels(boxes, pyramid.strides[:-1]), aux["roi.levels"])
    pooled = head.pool.regions(pyramid, images, boxes)
    yield close("RoI, features", pooled.mean((-2, -1)), aux["roi.feats_mean"])
    logits, deltas = head.box_head(pooled[None])
    yield close("RoI, classes", logits[0], aux["roi.cls"])
    yield close("RoI, deltas", deltas[0].flatten(1), aux["roi.reg"])
    if head.mask is not None:
        masks = head.mask(pyramid, images[:8], boxes[:8])
        yield close("RoI, masks", masks, aux["roi.mask_logits_first8"])
    yield from _alone(bundle, pyramid)
    logits, deltas, centerness = atss.predictor(pyramid)
    yield close("ATSS, classes", logits, _per_cell(aux, "atss.cls", 1), extra)
    yield close("ATSS, deltas", deltas, _per_cell(aux, "atss.reg", 1), extra)
    yield close("ATSS, centerness", centerness, _per_cell(aux, "atss.centerness", 1)[..., 0], extra)


def _alone(bundle: Bundle, pyramid: Pyramid) -> Iterator[Line]:
    """Proposals and detections of each head, where the bundle's test settings are hard suppression at the thresholds of
    training: ours are the same in both (docs/faithfulness.md)."""
    head, sizes = bundle.detector.heads[bundle.heads[0]], bundle.targets.frames.sizes
    *_, regions, cells = bundle.sizes["official_model_config"]["test_cfg"]
    if regions["rpn"]["nms"]["iou_threshold"] == head.proposals.nms_iou:
        boxes, valid = head.rpn.propose(*head.rpn(pyramid), pyramid, sizes, head.proposals)
        for i in range(len(sizes)):
            recorded = bundle.aux[f"rpn.proposals.img{i}"][:, :4]
            yield close(f"RPN, proposals, image {i}", boxes[i, valid[i]], recorded)
    for name, settings in {bundle.heads[0]: regions["rcnn"], "atss": cells}.items():
        if settings["nms"]["type"] != "nms":
            continue
        kind = "atss" if name == "atss" else "roi"
        for i, found in enumerate(bundle.detector.heads[name].detect(pyramid, sizes)):
            recorded = {k: bundle.aux[f"{kind}.detections.img{i}.{k}"] for k in ("boxes", "scores", "labels")}
            yield from _detected(f"{name} alone, image {i}", found, recorded, bundle.inputs["scale_factor"][i])


def _detected(stage: str, found: Detections, recorded: dict[str, Tensor], scale: Tensor) -> Iterator[Line]:
    """The official code keeps boxes without height or width, which suppress none and only take up places in the list;
    others take these in ours."""
    solid = (recorded["boxes"][:, 2:] > recorded["boxes"][:, :2]).all(1)
    labels, scores, boxes = (recorded[k][solid] for k in ("labels", "scores", "boxes"))
    flat, count = int((~solid).sum()), int(solid.sum())
    assert count <= len(found.labels) <= len(solid), (stage, len(found.labels), len(solid))
    note = f"{flat} recorded boxes without height or width, which we drop" if flat else ""
    yield equal(f"{stage}, labels", found.labels[:count], labels.long(), note)
    yield close(f"{stage}, scores", found.scores[:count], scores)
    yield close(f"{stage}, boxes", found.boxes_xyxy[:count] / scale, boxes)


@torch.no_grad()
def assignment(bundle: Bundle) -> Iterator[Line]:
    """Who gets which target: anchors, regions, positive queries, denoising queries, matching."""
    train, targets, detector = bundle.train, bundle.targets, bundle.detector
    memory = _recorded_memory(bundle, bundle.encode())
    pyramid, head = detector.adapter(memory), detector.heads[bundle.heads[0]]
    anchors = torch.cat(head.rpn.grid(pyramid))
    inside = head.rpn.grid.valid(pyramid, targets.frames.sizes)
    matched_index = assign_max_iou(anchors, inside, targets.boxes_xyxy, targets.valid, *head.rpn.thresholds)
    sampled, labels = train["train.rpn_target.label_weights"] > 0, train["train.rpn_target.labels"]
    yield equal("RPN, positive anchors", (matched_index >= 0)[sampled], (labels == 0)[sampled])
    regions = head(pyramid, targets).positives
    used = regions.positive | regions.negative
    for i in range(len(targets.frames.sizes)):
        source = {k: train[f"train.aux_src.0.{k}.img{i}"] for k in ("coords", "labels", "feats", "targets")}
        expected = source["labels"].masked_fill(source["labels"] == bundle.sizes["num_classes"], -1)
        yield close(f"sampled regions, image {i}", regions.boxes_xyxy[i, used[i]], source["coords"])
        yield equal(f"their labels, image {i}", regions.labels[i, used[i]], expected)
        yield close(f"their features, image {i}", regions.features[i, used[i]], source["feats"])
        own = regions.positive[i]
        yield close(f"their objects, image {i}", regions.target_boxes_xyxy[i, own], source["targets"][expected >= 0])
    found = detector.heads["atss"](pyramid, targets).positives
    expected = train["train.atss_target.labels"]
    with tie_rule(smallest):
        note = _ties_note(found, detector.heads["atss"](pyramid, targets).positives)
    expected = expected.masked_fill(expected == bundle.sizes["num_classes"], -1)
    yield equal("ATSS, labels", found.labels, expected, note)
    for i in range(len(targets.frames.sizes)):
        own, goals = found.positive[i], train[f"train.aux_src.1.pos_targets.img{i}"]
        yield close(f"ATSS, objects, image {i}", found.target_boxes_xyxy[i, own], goals)
    for number, name in enumerate(bundle.heads):
        yield from _positive_queries(bundle, memory, number, {"atss": found}.get(name, regions))
    if "denoising" in detector.queries:
        made = bundle.denoising(memory)
        yield close("denoising queries", made.content, train["train.dn.label_query"])
        yield close("denoising boxes", made.reference, train["train.dn.bbox_query"].sigmoid())
        yield equal(
            "denoising, who sees whom", _hidden(made, len(train["train.dn.attn_mask"])), train["train.dn.attn_mask"]
        )
    yield from _matching(bundle)


def _ties_note(recorded: Positives, ours: Positives) -> str:
    count = int((recorded.labels != ours.labels).sum())
    return f"{count} anchors differ from ours, equally near ones being chosen as recorded" if count else ""


def _positive_queries(bundle: Bundle, memory: Memory, number: int, found: Positives) -> Iterator[Line]:
    """The same number of queries, and the same positives among them; what fills up the rest is drawn."""
    name = bundle.heads[number]
    made = bundle.detector.queries[name](QueryContext(memory, bundle.targets, {name: found}))
    recorded = {k: bundle.train[f"train.aux_query.{number}.{k}"] for k in ("coords", "labels")}
    own, theirs = made.targets.labels >= 0, recorded["labels"] < bundle.sizes["num_classes"]
    yield equal(
        f"positive queries of {name}", torch.tensor(made.reference.shape), torch.tensor(recorded["coords"].shape)
    )
    yield equal(f"positive queries of {name}, positives", own.sum(1), theirs.sum(1))
    for i in range(len(own)):
        ours = made.reference[i, own[i]]
        distance = (ours[:, None] - recorded["coords"][i, theirs[i]]).abs().amax(-1).amin(1)
        yield close(f"positive queries of {name}, boxes, image {i}", distance, torch.zeros_like(distance))


def _hidden(made: QueryGroup, total: int) -> Tensor:
    """True where a query is hidden from another one; denoising queries first."""
    own = made.content.shape[1]
    part = torch.arange(total) // (own // made.blocks)
    part[own:] = made.blocks
    hidden = part[:, None] != part[None]
    hidden[:own, own:] = MAIN not in made.sees
    return hidden


def _matching(bundle: Bundle) -> Iterator[Line]:
    train, forward, targets = bundle.train, bundle.forward, bundle.targets
    known = train["train.boxes"].shape[2] - forward["boxes"].shape[2]  # denoising queries come first
    last = Prediction(train["train.cls_logits"][:, :, known:], train["train.boxes"][:, :, known:])
    agnostic = "enc_topk_class" not in forward
    names = ("enc_class_all", "enc_boxes_all") if agnostic else ("enc_topk_class", "enc_topk_boxes")
    first = Prediction(*(forward[name][None] for name in names))
    layers, stage = match(
        [Problem(last), Problem(first, class_agnostic=agnostic)], targets, bundle.criterion.matching_cost
    )
    solved = {f"dec{i}": (layers.labels[i], layers.boxes[i], False) for i in range(len(layers.labels))}
    solved["enc"] = (stage.labels[0], stage.boxes[0], agnostic)
    for name, (labels, boxes, one_class) in solved.items():
        for i in range(len(labels)):
            matched_index = train[f"train.match.{name}.img{i}.gt_inds"] - 1
            expected = (targets.labels[i] * (not one_class))[matched_index.clamp(min=0)].masked_fill(
                matched_index < 0, -1
            )
            yield equal(f"matching {name}, image {i}", labels[i], expected)
            yield equal(
                f"matching {name}, image {i}, boxes",
                boxes[i, matched_index >= 0],
                targets.boxes[i, matched_index[matched_index >= 0]],
            )


def training(bundle: Bundle) -> Iterator[Line]:
    """Whole training steps: with everything, without denoising, with one and with all images empty."""
    yield from _step(bundle, "train")
    if "no_cdn" in bundle.account["losses"]:
        yield from _step(bundle, "no_cdn")
    everyone = range(len(bundle.targets.frames.sizes))
    for which, empty in {"last_image_empty": everyone[-1:], "all_images_empty": everyone}.items():
        if which in bundle.account["losses"]:
            yield from _step(bundle.without_objects(*empty), which)


def _step(bundle: Bundle, which: str) -> Iterator[Line]:
    memory = _recorded_memory(bundle, bundle.encode())
    pyramid = bundle.detector.adapter(memory)
    outputs = {name: head(pyramid, bundle.targets) for name, head in bundle.detector.heads.items()}
    recorded = "train" if which == "no_cdn" else which
    groups = {MAIN: bundle.detector.queries[MAIN](QueryContext(memory, bundle.targets))}
    if "denoising" in bundle.detector.queries and which != "no_cdn":
        groups["denoising"] = bundle.denoising(memory, which)
    # Of the steps without objects, the queries' features are not recorded: of detectors that use them, these groups,
    # and with them the sum, are left out.
    whole = all(bundle.knows_queries(number, recorded) for number in range(len(bundle.heads)))
    for number, name in enumerate(bundle.heads if whole else ()):
        groups[name] = bundle.collaborative(number, recorded, outputs[name].positives)
    predictions = bundle.detector.decoder(groups, memory)
    if which == "train":
        yield from _predictions(bundle, predictions)
    head_losses = {name: output.losses for name, output in outputs.items()}
    mask_head, mask_losses = bundle.detector.mask_head, {}
    if mask_head is not None:
        terms = mask_head.losses(pyramid, bundle.detector._candidates(predictions), bundle.targets)
        mask_losses = {"iou": terms.pop("iou"), "stages": torch.stack(list(terms.values())).sum()}
    losses = bundle.criterion(Output(groups, predictions, head_losses, mask_losses), bundle.targets)
    for name, value in losses.items():
        yield close(f"{which}: loss {name}", value.detach(), _recorded_loss(bundle, which, name))
    if not whole:
        return
    total = sum(losses.values())
    yield close(f"{which}: total loss", total.detach(), torch.tensor(bundle.account["loss_total"][which]))
    norms = gradient_norms(bundle, total, which)
    # What float32 leaves of a gradient that is zero in theory: that of a convolution before a group norm over one cell.
    noise = 1e-6 * max(theirs for _, theirs in norms.values())
    for name, (own, theirs) in norms.items():
        difference, size = abs(own - theirs), max(theirs, 1e-12)
        yield Line(f"{which}: gradient {name}", difference, difference / size, 1e-3 + noise / size)


def _predictions(bundle: Bundle, predictions: dict[str, Prediction]) -> Iterator[Line]:
    """One pass of all groups; the official code takes one for the denoising and main queries and one per head."""
    train = bundle.train
    known = train["train.boxes"].shape[2] - predictions[MAIN].boxes.shape[2]
    expected = {MAIN: slice(known, None), "denoising": slice(known)}
    for name, prediction in predictions.items():
        if name in expected:
            logits, boxes = (train[f"train.{key}"][:, :, expected[name]] for key in ("cls_logits", "boxes"))
        else:
            logits, boxes = (train[f"train.aux_out.{bundle.heads.index(name)}.{k}"] for k in ("cls_logits", "boxes"))
        yield close(f"train: classes of {name}", prediction.logits.detach(), logits)
        yield close(f"train: boxes of {name}", prediction.boxes.detach(), boxes)


def _recorded_loss(bundle: Bundle, which: str, name: str) -> Tensor:
    """By our name: group/layer/term or head_name/term."""
    group, *rest = name.split("/")
    if group == "masks":
        key = {"iou": "loss_mask_iou", "stages": "loss_mask"}[rest[0]]
    elif group.startswith("head_"):
        number = bundle.heads.index(group.removeprefix("head_"))
        key = HEAD_LOSSES[rest[0]].format(number)
    else:
        layer, term = rest
        last = str(bundle.sizes["dec_layers"] - 1)
        key = {"encoder": "enc_", last: ""}.get(layer, f"d{layer}.") + "dn_" * (group == "denoising")
        key += {"class": "loss_cls", "l1": "loss_bbox", "giou": "loss_iou"}[term]
        key += f"_aux{bundle.heads.index(group)}" if group in bundle.heads else ""
    stem = f"{which}.loss.{key}"
    return sum(v for k, v in bundle.train.items() if k == stem or k.startswith(stem + ".lvl"))


STAGES = {stage.__name__: stage for stage in (encoder, decoder, detections, heads, assignment, training)}


def lines(stage: str, bundle: Bundle) -> list[Line]:
    with recorded_draws(), recorded_ties(bundle):
        return list(STAGES[stage](bundle))
