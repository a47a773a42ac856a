"""The assignment op against scipy: the kernel in Triton's interpreter, or on a GPU where there is one."""

import numpy as np
import pytest
import torch
from codetr.kernels.assignment import assign, gpu
from scipy.optimize import linear_sum_assignment
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORST = 1e9


def run(costs: Tensor, counts: list[int], repeats: int = 1) -> Tensor:
    owners = gpu.solve(costs.to(DEVICE), torch.tensor(counts, device=DEVICE), repeats)
    return owners.cpu()


def clean(costs: Tensor) -> np.ndarray:
    return costs.double().nan_to_num(WORST, WORST, WORST).numpy()


def check(costs: Tensor, counts: list[int], repeats: int = 1) -> None:
    """A valid assignment of as many queries as can be, at scipy's cost: costs of float32 differ by more than the
    rounding of sums in float64."""
    for owner, matrix, count in zip(run(costs, counts, repeats), clean(costs), counts, strict=True):
        queries = torch.nonzero(owner >= 0)[:, 0].numpy()
        objects = owner.numpy()[queries]
        assert len(queries) == min(count * repeats, matrix.shape[1])
        assert np.all(np.bincount(objects, minlength=count)[count:] == 0)
        assert np.all(np.bincount(objects, minlength=1) <= repeats)
        stacked = np.tile(matrix[:count], (repeats, 1))
        best = stacked[linear_sum_assignment(stacked)].sum()
        assert matrix[objects, queries].sum() == pytest.approx(best, rel=1e-12, abs=1e-12)


SIZES = {
    "one": (1, 1, 1),
    "square": (6, 6, 1),
    "wide": (5, 40, 1),
    "tall": (9, 4, 1),
    "repeated": (4, 30, 5),
    "repeated, and too many": (5, 12, 3),
    "more columns than a warp has": (7, 130, 1),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_random(size: tuple[int, int, int]) -> None:
    """And what is unique is scipy's own matching."""
    rows, columns, repeats = size
    costs = torch.randn(4, rows, columns)
    counts = [rows, 0, max(rows // 2, 1), rows]
    check(costs, counts, repeats)
    expected = assign(costs, torch.tensor(counts), repeats)
    assert torch.equal(run(costs, counts, repeats), expected)


def test_rows_beyond_the_count_are_never_read() -> None:
    costs = torch.randn(2, 6, 10)
    full = run(costs, [4, 2])
    costs[0, 4:], costs[1, 2:] = float("nan"), -1e30
    assert torch.equal(run(costs, [4, 2]), full)


@pytest.mark.parametrize("repeats", [1, 2])
def test_ties(repeats: int) -> None:
    """Small integers: many optimal assignments."""
    check(torch.randint(3, (4, 6, 14)).float(), [6, 5, 3, 1], repeats)
    check(torch.randint(3, (2, 7, 5)).float(), [7, 6], repeats)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e9, float("nan")])
def test_all_equal(value: float) -> None:
    """Every object is served on its first look, by a query that is free."""
    check(torch.full((2, 8, 20), value), [8, 3])
    check(torch.full((1, 8, 5), value), [8])


def test_nearly_equal() -> None:
    """As at initialisation, where float32 duals would already choose wrongly: differences of some units in the last
    place."""
    costs = torch.full((3, 8, 20), 7.0) + torch.randint(-8, 8, (3, 8, 20)) * 2.0**-21
    assert len(costs.unique()) > 8
    check(costs, [8, 8, 5])


def test_one_query_is_best_for_all() -> None:
    """The longest searches: every object passes by all that are held."""
    costs = torch.arange(24.0).expand(1, 9, 24) * torch.arange(1.0, 10)[:, None]
    check(costs, [9])
    check(costs.flip(1), [9])


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(odd: float) -> None:
    """The highest cost: beside it, finite ones are still told apart."""
    costs = torch.rand(3, 5, 12)
    costs[torch.rand(costs.shape) < 0.3] = odd
    costs[1, :, 2:] = odd  # more objects than queries that are finite
    costs[2] = odd
    known = assign(costs, torch.full((3,), 5), 1)
    for owner, matrix, expected in zip(run(costs, [5] * 3), clean(costs), known, strict=True):
        found, best = (matrix[o[o >= 0].numpy(), torch.nonzero(o >= 0)[:, 0].numpy()] for o in (owner, expected))
        assert (found == WORST).sum() == (best == WORST).sum()
        # beside duals of 1e9 float64 has 1e-7 left, scipy's too
        assert found[found < WORST].sum() == pytest.approx(best[best < WORST].sum(), abs=1e-5)


def test_nothing() -> None:
    assert run(torch.empty(0, 3, 4), []).shape == (0, 4)
    assert run(torch.empty(2, 3, 0), [3, 0]).shape == (2, 0)
    assert torch.equal(run(torch.empty(1, 0, 4), [0]), torch.full((1, 4), -1))


def test_a_permuted_matrix() -> None:
    """Memory in another order."""
    costs = torch.randn(2, 9, 4)
    turned = costs.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(turned, [9, 2]), run(costs, [9, 2]))


def test_the_op_is_an_op() -> None:
    """Schema, fake tensors, dispatch; on the CPU scipy solves."""
    costs, counts = torch.randn(2, 3, 5), torch.tensor([3, 1])
    torch.library.opcheck(torch.ops.codetr.assign.default, (costs, counts, 2))
    rows, columns = linear_sum_assignment(costs[0].numpy())
    assert assign(costs, counts, 1)[0, columns].tolist() == rows.tolist()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_op_on_a_device_waits_for_nothing() -> None:
    costs, counts = torch.randn(14, 100, 900), torch.randint(1, 101, (14,))
    expected = assign(costs, counts, 1)
    costs, counts = costs.cuda(), counts.cuda()
    assign(costs, counts, 1)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = assign(costs, counts, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), expected)
