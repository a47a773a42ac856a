"""Every preset of conf/model at toy size: it trains with everything added, of which inference knows nothing."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import codetr.conf
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from codetr.criterion import Criterion
from codetr.errors import UserError
from codetr.models.detector import Detector
from codetr.types import MAIN, Frames, Output, QueryContext, QueryGroup, Targets
from toy_model import NARROW, SIZES

CLASSES = 3
SMALL = [*SIZES, NARROW, "model.num_points=2", "model.detector.main.num_queries=12"]

PRESETS = sorted(f.stem for f in Path(codetr.conf.__path__[0], "model").glob("*.yaml") if f.stem != "base")
OF_MASKS = ("mask2former", "mask2former_tiny")
ONE_LEVEL, FOUR_FEATURES = ("conditional_detr", "dab_detr", "dn_detr"), ("dino_5scale", "co_dino", *OF_MASKS)
TRAINING_SCHEMES = ["model/auxiliary_head=[faster_rcnn_small,atss]", "model.query_groups=3"]
PLAIN = ["model/auxiliary_head=[]"]


def build(*overrides: str, model: str = "co_deformable_tiny") -> tuple[Detector, Criterion]:
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", [f"model={model}", f"model.num_classes={CLASSES}", *SMALL, *overrides])
    torch.manual_seed(0)
    return instantiate(config.model.detector, _convert_="all"), instantiate(config.criterion)


def batch(height: int = 64, width: int = 64, objects: bool = True) -> dict[str, Any]:
    torch.manual_seed(1)
    targets = Targets(
        boxes=torch.tensor([[0.5, 0.5, 0.4, 0.5], [0.3, 0.6, 0.3, 0.2]]).repeat(2, 1, 1),
        labels=torch.tensor([[0, 2], [1, 0]]),
        valid=torch.tensor([[True, True], [True, False]]) & objects,
        frames=Frames.unscaled(torch.tensor([[height, width]] * 2)),
        masks=torch.rand(2, 2, height // 8, width // 8).repeat_interleave(8, 2).repeat_interleave(8, 3) < 0.3,
    )
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    return {"images": images, "padding": torch.zeros(2, height, width, dtype=torch.bool), "targets": targets}


def everywhere(logits: torch.Tensor) -> torch.Tensor:
    """In place of points that are drawn, so that equal masks have equal losses."""
    places = (torch.arange(8) + 0.5) / 8
    return torch.cartesian_prod(places, places).expand(len(logits), -1, -1)


@dataclass
class Preset:
    """The detector of a preset, and the same with auxiliary heads and two more query groups."""

    plain: Detector
    full: Detector
    criterion: Criterion


@pytest.fixture(scope="module", params=PRESETS)
def preset(request: pytest.FixtureRequest) -> Preset:
    small = ["model/backbone=resnet10_small"]
    if request.param in ONE_LEVEL:
        small += ["model.detector.backbone.out_indices=[4]"]
    if request.param in FOUR_FEATURES:
        small += ["model.detector.backbone.out_indices=[1,2,3,4]"]
    if request.param in OF_MASKS:
        small += ["criterion=masks", "criterion.matching_cost.num_points=50"]
    plain, criterion = build(*small, *PLAIN, model=request.param)
    if request.param in OF_MASKS:
        criterion.points = everywhere
    full, _ = build(*small, *TRAINING_SCHEMES, model=request.param)
    return Preset(plain, full, criterion)


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("which", ["plain", "full"])
def test_every_parameter_has_a_gradient_with_and_without_objects(preset: Preset, which: str, objects: bool) -> None:
    """The promise behind find_unused_parameters=False: no process leaves a parameter out of the graph."""
    detector, given = getattr(preset, which), batch(objects=objects)
    detector.zero_grad(set_to_none=True)
    losses = preset.criterion(detector.train()(**given), given["targets"])
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    assert loss.isfinite()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_training_schemes_add_their_losses(preset: Preset) -> None:
    given = batch()
    added = preset.full(**given).predictions.keys() - preset.plain(**given).predictions.keys()
    assert added == {"group_2", "group_3", "faster_rcnn", "atss"}
    losses = preset.criterion(preset.full(**given), given["targets"])
    assert {name.split("/")[0] for name in losses} >= {MAIN, *added, "head_faster_rcnn", "head_atss"}


def test_main_predicts_the_same_with_and_without_what_training_adds(preset: Preset) -> None:
    """In float64: the plain detector with the full one's weights, at inference and in training."""
    plain, full = (copy.deepcopy(detector).double().eval() for detector in (preset.plain, preset.full))
    given = batch()
    with torch.no_grad():
        for parameter in full.parameters():  # box heads of zeros would hide differences
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        weights = full.state_dict()
        plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
        alone = plain(given["images"], given["padding"]).predictions
        assert alone.keys() == {MAIN}
        for output in (plain(**given), full(**given), full(given["images"], given["padding"])):
            torch.testing.assert_close(output.predictions[MAIN].logits, alone[MAIN].logits, rtol=0, atol=1e-12)
            torch.testing.assert_close(output.predictions[MAIN].boxes, alone[MAIN].boxes, rtol=0, atol=1e-12)


def test_equal_query_groups_cost_what_one_costs(preset: Preset) -> None:
    """Their losses are averaged, so K copies of the main group have its loss."""
    full, given = copy.deepcopy(preset.full).eval(), batch()
    for copied in ("group_2", "group_3"):
        full.queries[copied].load_state_dict(full.queries[MAIN].state_dict())
    plain = copy.deepcopy(preset.plain).eval()
    plain.load_state_dict({name: full.state_dict()[name] for name in plain.state_dict()})
    with torch.no_grad():
        outputs = [detector(**given) for detector in (plain, full)]
        one, three = (_losses(preset, output, given["targets"]) for output in outputs)
    for name, value in one.items():
        if name.startswith(f"{MAIN}/"):
            copies = sum(three[name.replace(MAIN, group, 1)] for group in (MAIN, "group_2", "group_3"))
            torch.testing.assert_close(copies, value, rtol=1e-5, atol=1e-6)


def _losses(preset: Preset, output: Output, targets: Targets) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)  # of the points at which masks are matched
    return preset.criterion(output, targets)


def test_inference_neither_needs_nor_runs_what_training_adds(preset: Preset) -> None:
    detector, given = copy.deepcopy(preset.full).eval(), batch()
    with torch.no_grad():
        expected = detector.detect(given["images"], given["padding"])
        for name, parameter in detector.named_parameters():
            if name.startswith(detector.training_only_prefixes()):
                parameter.fill_(float("nan"))
        found = detector.detect(given["images"], given["padding"])
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.logits, expected.logits)
    left = [
        {n for n in d.state_dict() if not n.startswith(d.training_only_prefixes())} for d in (preset.plain, detector)
    ]
    assert left[0] == left[1]


@pytest.mark.parametrize(("given", "heads"), [("[]", []), ("[atss]", ["atss"])])
def test_k_is_a_matter_of_config(given: str, heads: list[str]) -> None:
    detector, criterion = build(f"model/auxiliary_head={given}")
    output = detector(**batch())
    assert sorted(output.predictions) == sorted(["main", *heads])
    groups = {name.split("/")[0] for name in criterion(output, batch()["targets"])}
    assert groups == {"main", *heads, *(f"head_{h}" for h in heads)}


def test_lambda_2_and_the_number_of_layers_multiply_the_heads_losses() -> None:
    """lambda_2 is 2 for every head but those that have their own."""
    detector, criterion = build("model/auxiliary_head=[atss,fcos]")
    given = batch()
    output = detector(**given)
    criterion.lambda_2_by_head = {"fcos": 0.25}
    losses = criterion(output, given["targets"])
    for head, factor in (("atss", 2), ("fcos", 0.25)):
        for term, value in output.head_losses[head].items():
            torch.testing.assert_close(losses[f"head_{head}/{term}"], value * factor * 2)
    criterion.lambda_2_by_head = {"paa": 1.0}
    with pytest.raises(UserError, match=r"lambda_2_by_head names \['paa'\]; the heads are \['atss', 'fcos'\]"):
        criterion(output, given["targets"])


@pytest.mark.parametrize("head", ["faster_rcnn", "atss"])
@pytest.mark.parametrize("stride", [16, 32])
def test_heads_on_a_single_scale_memory_train_the_encoder(head: str, stride: int) -> None:
    """On C5 and dilated C5, of images that are no multiple of the stride."""
    single = ["model/backbone=resnet10_small", "model.detector.backbone.out_indices=[4]"]
    single += [f"+model.detector.backbone.arguments.output_stride={stride}"]
    detector, _ = build(*single, *TRAINING_SCHEMES, model="conditional_detr")
    given = batch(72, 88)
    memory = detector.encode(given["images"], given["padding"])
    assert memory.spatial_shapes == ((-(-72 // stride), -(-88 // stride)),)
    output = detector.heads[head](detector.adapter(memory), given["targets"])
    assert output.positives.positive.any()
    loss = torch.stack(list(output.losses.values())).sum()
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, list(detector.encoder.parameters())):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_boxes_become_points_where_main_has_points() -> None:
    """Collaborative queries in Deformable DETR without box refinement."""
    detector = build("model/backbone=resnet10_small", model="deformable_detr")[0].eval()
    given = batch()
    with torch.no_grad():
        memory = detector.encode(given["images"], given["padding"])
        main = detector.queries[MAIN](QueryContext(memory))
        boxes = torch.rand(2, 5, 4)
        content, position = torch.randn(2, 2, 5, 32)
        predictions = [
            detector.decoder({MAIN: main, "atss": QueryGroup(content, reference, position=position)}, memory)["atss"]
            for reference in (boxes, boxes[..., :2])
        ]
        torch.testing.assert_close(predictions[0].boxes[..., :2], boxes[None, ..., :2].expand(2, -1, -1, -1))
    assert torch.equal(predictions[0].boxes, predictions[1].boxes)
    assert torch.equal(predictions[0].logits, predictions[1].logits)


def test_points_beside_boxes_are_an_error() -> None:
    detector = build()[0].eval()
    given = batch()
    memory = detector.encode(given["images"], given["padding"])
    main = detector.queries[MAIN](QueryContext(memory))
    points = replace(main, reference=main.reference[..., :2])
    with pytest.raises(ValueError, match="'atss' refers to points, but the main group to boxes"):
        detector.decoder({MAIN: main, "atss": points}, memory)


def test_the_memory_of_an_image_does_not_depend_on_its_batch_mates() -> None:
    detector = build()[0].double().eval()
    images = batch(64, 96)["images"]
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[0, :, 64:] = True  # the first image is 64 x 64
    with torch.no_grad():
        together, alone = detector.encode(images, padding), detector.encode(images[:1], padding[:1])
    valid = ~alone.padding[0]
    torch.testing.assert_close(together.tokens[0, valid], alone.tokens[0, valid], rtol=0, atol=1e-10)
    torch.testing.assert_close(alone.valid_ratios[0, 0], torch.tensor([64 / 96, 1.0]).to(alone.valid_ratios))


def test_a_checkpointed_layer_computes_the_same_gradients() -> None:
    gradients = []
    for layers in (0, 2):
        flags = [f"model.detector.{part}.checkpointed_layers={layers}" for part in ("encoder", "decoder")]
        detector, criterion = build("model/auxiliary_head=[atss]", *flags)
        given = batch()
        torch.manual_seed(2)
        torch.stack(list(criterion(detector(**given), given["targets"]).values())).sum().backward()
        gradients.append([p.grad for p in detector.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_autocast_trains(preset: Preset) -> None:
    """The coarsest map must have more than one cell: PyTorch's bfloat16 convolution on CPUs leaves uninitialised memory
    in the weight's gradient where a 3x3 window of stride 2 meets a single one (2.15)."""
    given = batch(128, 128)
    preset.full.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = preset.full(**given)
        losses = preset.criterion(output, given["targets"])
    references = [group.reference for group in output.groups.values() if group.reference is not None]
    assert {x.dtype for x in [*references, *(p.boxes for p in output.predictions.values())]} == {torch.float32}
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in preset.full.parameters())
