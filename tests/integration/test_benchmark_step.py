"""`codetr benchmark step`: its parts add up to the whole, each gets its own, and the command writes what it says."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import forked
from codetr import application
from codetr.benchmark import parts
from codetr.benchmark.commands import step as command
from codetr.costs.flops import flops
from codetr.costs.step import Step, draw
from codetr.errors import UserError
from toy import environment
from toy_model import SIZES

SMALL = (
    "model=co_deformable",
    "model/backbone=resnet10_small",
    "model/auxiliary_head=[faster_rcnn_small,atss]",
    *SIZES,
)
ARGUMENTS = ["size=[64,96]", "batch=2", "objects=4", "classes=3", "repeats=1"]


@pytest.fixture(scope="module")
def step() -> Step:
    config = application.compose("benchmark", [*SMALL, *ARGUMENTS, "model.detector.backbone.pretrained=false"])
    device = torch.device("cpu")
    return Step(config, draw(2, (64, 96), 4, 3, device), 3, device)


@pytest.fixture(scope="module")
def found(step: Step) -> parts.Profile:
    return parts.measure(step)


def test_every_part_is_there_and_has_a_backward_pass(found: parts.Profile) -> None:
    backward = {name for name, part in found.parts.items() if part.backward > 0}
    trained = {"backbone", "neck", "encoder", "adapter", "heads.faster_rcnn", "heads.atss", "decoder", "criterion"}
    assert trained | {"queries.main", "queries.atss"} <= backward
    assert {"matching", "optimizer"} <= found.parts.keys() - backward
    assert all(part.forward > 0 for part in found.parts.values())


def test_their_arithmetic_adds_up_to_that_of_the_step(step: Step, found: parts.Profile) -> None:
    """As PyTorch's own counter has it."""
    with FlopCounterMode(display=False) as counter:
        step.train()
    assert sum(part.flops for part in found.parts.values()) == counter.get_total_flops() > 0
    assert found.parts["matching"].flops == found.parts["optimizer"].flops == 0


@pytest.mark.parametrize("groups", [1, 4, 32])
def test_the_gradients_of_a_convolution_cost_twice_its_forward_pass(groups: int) -> None:
    """Counted by hand: every output takes `32 / groups` channels of 3 x 3 cells, twice as a product and a sum."""
    x, convolution = torch.randn(2, 32, 16, 16, requires_grad=True), torch.nn.Conv2d(32, 64, 3, 1, 1, groups=groups)

    class Counted(TorchDispatchMode):
        numbers = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.numbers += flops(func._overloadpacket, args, kwargs or {}, result)
            return result

    with Counted() as counted:
        convolution(x).sum().backward()
    assert counted.numbers == 3 * 2 * (2 * 64 * 16 * 16) * (32 // groups * 9)


def test_a_part_that_is_not_trained_has_no_backward_pass(step: Step, found: parts.Profile) -> None:
    """Its operators and its arithmetic in the forward pass remain, and nothing of it is kept."""
    backbone = step.detector.get_submodule("backbone")
    backbone.requires_grad_(False)
    try:
        own = parts.measure(step).parts["backbone"]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(torch.zeros(2, 3, 64, 96))
    finally:
        backbone.requires_grad_(True)
    assert (own.backward, own.saved, own.flops) == (0, 0, counter.get_total_flops())
    assert own.calls < found.parts["backbone"].calls / 1.5


def test_marks_leave_nothing_behind(step: Step, found: parts.Profile) -> None:
    assert not any("forward" in vars(module) for module in step.detector.modules())
    assert "update" not in vars(step)


def test_what_is_kept_for_the_backward_pass() -> None:
    """Of a linear layer its input, once, whoever keeps it; parameters do not count."""
    marks, found = parts.Marks(), {"layer": parts.Part()}
    layers = [torch.nn.Linear(8, 8) for _ in range(2)]
    x = torch.randn(16, 8)
    with marks.part("layer"), parts.kept(marks, found, layers):
        y = layers[0](x) + layers[1](x)
        y.square()
    assert found["layer"].saved == 2 * 16 * 8 * 4  # x, and y


def test_the_command(tmp_path: Path) -> None:
    arguments = [*SMALL, *ARGUMENTS, "against=[reference]", f"out={tmp_path / 'new'}"]
    process = forked.run("codetr", "benchmark", "step", *arguments, cwd=tmp_path, env=environment())
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "new.json").read_text())
    assert set(result["times"]) == {"training step", "inference"}
    for own in result["times"].values():
        assert set(own) == {"ours", "reference"}
        assert all(0 < one["least"] <= one["seconds"] for one in own.values())
    assert {"backbone", "decoder", "matching"} <= set(result["parts"])
    page = (tmp_path / "new.md").read_text()
    assert page.rstrip() in process.stdout
    assert "| decoder |" in page
    assert " ".join(arguments) in page


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("against=[mmdet]", "against=mmdet: give some of reference, transformers/deformable_detr"),
        ("trainer.precision=64-true", "trainer.precision=64-true: give one of 32-true, bf16-mixed, 16-mixed"),
        ("sizes=3", "Could not override 'sizes'"),
        *([] if torch.cuda.is_available() else [("trainer=gpu", "there is no CUDA device here")]),
    ],
)
def test_what_cannot_be_measured_is_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        command.main([*SMALL, *ARGUMENTS, override])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deformable_detr", "conditional_detr", "dab_detr", "rt_detr", "mask2former"])
def test_steps_of_transformers(name: str) -> None:
    """Their losses are finite, and a step changes their weights."""
    from codetr.benchmark import rivals

    rival = rivals.build(f"transformers/{name}", draw(2, (64, 96), 4, 3, torch.device("cpu")), 3, None, 0.1)
    before = [parameter.clone() for parameter in rival.model.parameters() if parameter.requires_grad]
    assert rival.losses(rival.model, rival.inputs).isfinite()
    rival.train()
    rival.infer()
    after = [parameter for parameter in rival.model.parameters() if parameter.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Dropped(TorchDispatchMode):
    """Counts the random numbers that dropout draws."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("bernoulli", "native_dropout")):
            self.numbers += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("conditional_detr", "conditional_detr"),
        ("dab_detr", "dab_detr"),
        ("deformable_detr_two_stage", "deformable_detr"),
    ],
)
def test_the_same_detector_of_transformers_drops_as_much(model: str, name: str) -> None:
    """As it comes it drops no attention weights, which are most of the numbers."""
    from codetr.benchmark import rivals

    config = application.compose("benchmark", [f"model={model}", "model.detector.backbone.pretrained=false"])
    inputs = draw(1, (128, 128), 4, 3, torch.device("cpu"))
    ours = Step(config, inputs, 3, torch.device("cpu"))
    theirs = rivals.build(f"transformers/{name}", inputs, 3, None, config.model.dropout)
    drawn = []
    for losses in (ours.loss, partial(theirs.losses, theirs.model, inputs)):
        with Dropped() as dropped:
            losses()
        drawn.append(dropped.numbers)
    assert (drawn[0] > 0) == (config.model.dropout > 0)
    assert drawn[1] == pytest.approx(drawn[0], rel=0.03)
