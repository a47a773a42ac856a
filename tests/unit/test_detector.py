"""The whole detector, composed from conf/ at toy size: what training adds, and that inference does not know it."""

from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from codetr.criterion import Criterion
from codetr.models.detector import Detector
from codetr.types import Targets

CLASSES = 3
SMALL = ["model.width=32", "model.num_heads=2", "model.ffn_width=32", "model.norm_groups=4", "model.num_points=2"]
SMALL += ["model.detector.encoder.num_layers=1", "model.detector.decoder.num_layers=2"]
SMALL += ["model.detector.backbone.arguments.channels=[8,16,32,32]", "model.detector.main.num_queries=12"]


def build(*overrides: str) -> tuple[Detector, Criterion]:
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", ["model=co_deformable_tiny", f"model.num_classes={CLASSES}", *SMALL, *overrides])
    torch.manual_seed(0)
    return instantiate(config.model.detector, _convert_="all"), instantiate(config.criterion)


def batch(height: int = 64, width: int = 64, objects: bool = True) -> dict[str, Any]:
    torch.manual_seed(1)
    targets = Targets(
        boxes=torch.tensor([[0.5, 0.5, 0.4, 0.5], [0.3, 0.6, 0.3, 0.2]]).repeat(2, 1, 1),
        labels=torch.tensor([[0, 2], [1, 0]]),
        valid=torch.tensor([[True, True], [True, False]]) & objects,
        sizes=torch.tensor([[height, width]] * 2),
    )
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    return {"images": images, "padding": torch.zeros(2, height, width, dtype=torch.bool), "targets": targets}


@pytest.mark.parametrize(("collaborators", "heads"), [("[]", []), ("[atss]", ["atss"])])
def test_k_is_a_matter_of_config(collaborators: str, heads: list[str]) -> None:
    detector, criterion = build(f"model/collaborator={collaborators}")
    output = detector(**batch())
    assert sorted(output.predictions) == sorted(["main", *heads])
    groups = {name.split("/")[0] for name in criterion(output, batch()["targets"])}
    assert groups == {"main", *heads, *(f"head_{h}" for h in heads)}


@pytest.mark.parametrize("objects", [True, False])
def test_every_parameter_has_a_gradient_with_and_without_objects(objects: bool) -> None:
    """The promise behind find_unused_parameters=False: no process leaves a parameter out of the graph."""
    detector, criterion = build()
    given = batch(objects=objects)
    losses = criterion(detector(**given), given["targets"])
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    assert loss.isfinite()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_lambda_2_and_the_number_of_layers_multiply_the_heads_losses() -> None:
    detector, criterion = build("model/collaborator=[atss]")
    given = batch()
    output = detector(**given)
    losses = criterion(output, given["targets"])
    for term, value in output.head_losses["atss"].items():
        torch.testing.assert_close(losses[f"head_atss/{term}"], value * 2 * 2)


def test_inference_neither_needs_nor_runs_what_training_adds() -> None:
    detector = build()[0].eval()
    given = batch()
    with torch.no_grad():
        expected = detector.detect(given["images"], given["padding"])
        for name, parameter in detector.named_parameters():
            if name.startswith(detector.training_only_prefixes()):
                parameter.fill_(float("nan"))
        found = detector.detect(given["images"], given["padding"])
        together = detector(**given).predictions["main"]
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(together.boxes[-1], expected.boxes, rtol=0, atol=1e-6)
    baseline = set(build("model/collaborator=[]")[0].state_dict())
    left = {n for n in detector.state_dict() if not n.startswith(detector.training_only_prefixes())}
    assert left == baseline


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
        detector, criterion = build("model/collaborator=[atss]", *flags)
        given = batch()
        torch.manual_seed(2)
        torch.stack(list(criterion(detector(**given), given["targets"]).values())).sum().backward()
        gradients.append([p.grad for p in detector.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_autocast_trains() -> None:
    detector, criterion = build()
    given = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion(detector(**given), given["targets"])
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    assert loss.isfinite()
