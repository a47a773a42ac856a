"""Half precision: every detector stays finite on hostile inputs, its gradients follow float32, coordinates keep it."""

import pytest
import torch
from torch import Tensor

from codetr.nn.boxes import refine
from codetr.nn.mlp import CoordinateLinear, CoordinateMLP
from precision_cases import CASES, HEADS, Decisions, Step, build, hostile, off, step

ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # the largest relative one of a number
SCALE = {torch.bfloat16: 1.0, torch.float16: 2.0**12}  # where the search for a scale begins
half = pytest.mark.parametrize("dtype", ROUNDING, ids=["bf16", "fp16"])
INPUTS = list(hostile())
FEW = [("conditional_detr", ()), ("deformable_detr", ()), ("co_dino", HEADS)]
STEPS_IN_A_ROW = 64  # roundings between an image and its gradient, at most: layers of toy size, there and back


def named(case: tuple[str, tuple[str, ...]]) -> str:
    return f"{case[0]}{'-heads' if case[1] else ''}"


def stays_finite(case: tuple[str, tuple[str, ...]], kinds: list[str]) -> None:
    detector, criterion = build(*case)
    for kind in kinds:
        for dtype in ROUNDING:
            found = step(detector, criterion, hostile()[kind], dtype, SCALE[dtype])
            assert found.finite, (kind, dtype)


@pytest.mark.parametrize("case", FEW, ids=named)
def test_finite_on_hostile_inputs(case: tuple[str, tuple[str, ...]]) -> None:
    stays_finite(case, ["no object", "neck x 100"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_detector_is_finite_on_hostile_inputs(case: tuple[str, tuple[str, ...]]) -> None:
    stays_finite(case, INPUTS)


def follows_float32(case: tuple[str, tuple[str, ...]], dtype: torch.dtype) -> None:
    """Roundings that follow one another add up to at most so many. A sample that crosses the border of a cell, or a
    side of a box that crosses its target's, changes a gradient by more; parts that all levels share have few such."""
    detector, criterion = build(*case)
    decisions = Decisions()
    with decisions.made():
        expected = step(detector, criterion, hostile()["usual"], None)
    with decisions.taken():
        found = step(detector, criterion, hostile()["usual"], dtype, SCALE[dtype])
    assert found.loss == pytest.approx(expected.loss, rel=STEPS_IN_A_ROW * ROUNDING[dtype])
    apart = {name: off(found.gradients[name], expected.gradients[name]) for name in expected.gradients}
    assert max(apart.values()) < STEPS_IN_A_ROW * ROUNDING[dtype], apart


@half
@pytest.mark.parametrize("case", FEW, ids=named)
def test_gradients_follow_float32(case: tuple[str, tuple[str, ...]], dtype: torch.dtype) -> None:
    follows_float32(case, dtype)


@pytest.mark.slow
@half
@pytest.mark.parametrize("case", CASES, ids=named)
def test_gradients_of_every_detector_follow_float32(case: tuple[str, tuple[str, ...]], dtype: torch.dtype) -> None:
    follows_float32(case, dtype)


def test_a_gradient_that_is_off_is_seen() -> None:
    """Of the bound: it would not let a layer's missing gradient pass."""
    gradient = torch.randn(100)
    assert off(gradient, gradient) == 0
    assert off(gradient * 0, gradient) == 1
    assert not Step(1.0, {"neck": torch.tensor([1.0, torch.inf])}, 1.0).finite


def in_double(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return x.double() @ layer.weight.detach().double().T + layer.bias.detach().double()


@half
def test_coordinates_are_not_rounded(dtype: torch.dtype) -> None:
    layer = CoordinateLinear(256, 4)
    features = torch.randn(1000, 256).to(dtype)
    with torch.autocast("cpu", dtype):
        found = layer(features)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, in_double(layer, features).float(), rtol=1e-5, atol=1e-5)
    assert layer.double()(features.double()).dtype == torch.float64


@half
def test_boxes_move_by_less_than_half_precision_could_tell(dtype: torch.dtype) -> None:
    """A box regressor in half precision moves boxes by a good part of the steps of its own output; ours, which only
    rounds what it hides, by a fraction of them."""
    mlp = CoordinateMLP(256, 256, 4, 3)
    with torch.no_grad():
        mlp[-1].bias.fill_(2.0)
    x, reference = torch.randn(1000, 256), torch.rand(1000, 4) * 0.8 + 0.1
    expected = refine(reference, mlp(x), 1e-5)
    with torch.autocast("cpu", dtype):
        found = refine(reference, mlp(x), 1e-5)
        hidden = torch.nn.Sequential(*list(mlp)[:-1])(x)
        rounded = refine(reference, torch.nn.functional.linear(hidden, mlp[-1].weight, mlp[-1].bias).float(), 1e-5)
    assert found.dtype == torch.float32
    assert (found - expected).square().mean() < (rounded - expected).square().mean() / 9  # three times as exact
