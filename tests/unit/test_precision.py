"""Half precision: every detector stays finite on hostile inputs, its gradients follow float32, coordinates keep it."""

import math
from collections import defaultdict
from statistics import median

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
LAYERS = 16  # with a kink, between an image and its loss
STEPS_IN_A_ROW = 4 * LAYERS  # roundings: of a product, a sum, a norm and an activation in each


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


def follows_float32(case: tuple[str, tuple[str, ...]], dtype: torch.dtype, seeds: tuple[int, ...]) -> None:
    """The loss is off by as many roundings as follow one another. Of a gradient, rounding also decides about every unit
    at the kink of its ReLU and every sample on the border of a cell. Of the terms of a sum that is a share of about u,
    the rounding, and exchanging a share u of random terms moves the sum by the root of u; of `LAYERS` in a row, by that
    of LAYERS * u. One kink may be a large part of a toy, so the median of several images counts."""
    detector, criterion = build(*case)
    apart: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        decisions, inputs = Decisions(), hostile(seed)["usual"]
        with decisions.made():
            expected = step(detector, criterion, inputs, None)
        with decisions.taken():
            found = step(detector, criterion, inputs, dtype, SCALE[dtype])
        assert found.loss == pytest.approx(expected.loss, rel=STEPS_IN_A_ROW * ROUNDING[dtype])
        for name, gradient in expected.gradients.items():
            apart[name].append(off(found.gradients[name], gradient))
    assert max(map(median, apart.values())) < math.sqrt(LAYERS * ROUNDING[dtype]), apart


@half
@pytest.mark.parametrize("case", FEW, ids=named)
def test_gradients_follow_float32(case: tuple[str, tuple[str, ...]], dtype: torch.dtype) -> None:
    follows_float32(case, dtype, (0,))


@pytest.mark.slow
@half
@pytest.mark.parametrize("case", CASES, ids=named)
def test_gradients_of_every_detector_follow_float32(case: tuple[str, tuple[str, ...]], dtype: torch.dtype) -> None:
    follows_float32(case, dtype, (0, 1, 2, 3, 4))


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
