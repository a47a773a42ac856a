"""The door chooses as documented, and says so once."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from codetr.errors import UserError
from codetr.nn.deformable_attention import DeformableAttention
from codetr.ops import choice
from codetr.ops.msda import deformable_attention, multi_scale_deformable_attention
from codetr.types import Memory

SHAPES = ((4, 3), (2, 2))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CODETR_MSDA", raising=False)
    choice._decide.cache_clear()
    yield
    choice._decide.cache_clear()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    value, locations = torch.rand(1, 16, 2, 16, dtype=dtype), torch.rand(1, 3, 2, 2, 2, 2, dtype=dtype)
    return value, locations, torch.rand(1, 3, 2, 2, 2, dtype=dtype)


def call(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return multi_scale_deformable_attention(value, SHAPES, locations, weights)


@pytest.mark.parametrize(
    ("wish", "dtype", "said"),
    [
        ("", torch.float32, "on cpu: numba kernel"),
        ("numba", torch.float32, "on cpu: numba kernel"),
        ("reference", torch.float32, "on cpu: reference (CODETR_MSDA)"),
        ("", torch.float64, "on cpu: reference (it has no float64)"),
    ],
)
def test_says_once_what_runs(wish, dtype, said, monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("CODETR_MSDA", wish)
    args = inputs(dtype)
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        first, second = call(*args), call(*args)
    assert torch.equal(first, second)
    assert len(caplog.messages) == 1
    assert said in caplog.messages[0]


def test_both_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs()
    sizes = torch.tensor([[[3, 3], [2, 1]]], dtype=torch.int32)

    def both() -> tuple[Tensor, Tensor]:
        value, offsets, logits = args
        return call(*args), deformable_attention(value, SHAPES, torch.rand(1, 3, 2, 4), offsets, logits, sizes)

    torch.manual_seed(0)
    fast = both()
    monkeypatch.setenv("CODETR_MSDA", "reference")
    torch.manual_seed(0)
    for own, expected in zip(fast, both(), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(
    ("wish", "dtype"), [("cuda", torch.float32), ("triton", torch.float32), ("numba", torch.float64)]
)
def test_refuses_what_it_cannot_do(wish: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODETR_MSDA", wish)
    with pytest.raises(UserError, match="CODETR_MSDA"):
        call(*inputs(dtype))


def test_warns_without_numba(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    args = inputs()
    call(*args), call(*args)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    monkeypatch.setenv("CODETR_MSDA", "numba")
    with pytest.raises(UserError, match="not installed"):
        call(*args)


class Attend(torch.nn.Module):
    """Deformable attention as a decoder's layer has it, and the classic form of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = DeformableAttention(width=16, num_heads=2, num_levels=2, num_points=2)

    def forward(self, query: Tensor, reference: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        value, locations, weights = (
            memory.tokens.unflatten(-1, (2, 8)),
            reference[:, :, None, :, None, :2],
            query[..., :8],
        )
        slots = weights.unflatten(-1, (2, 2, 2))
        classic = multi_scale_deformable_attention(value, SHAPES, locations.expand(*slots.shape, 2), slots)
        return self.attention(query, reference, memory), classic


def attend_inputs() -> tuple[Tensor, Tensor, Memory]:
    tokens, sizes = torch.rand(1, 16, 16), torch.tensor([[[3, 3], [2, 1]]], dtype=torch.int32)
    memory = Memory(tokens, tokens, torch.zeros(1, 16, dtype=torch.bool), SHAPES, sizes, torch.ones(1, 2, 2))
    return torch.rand(1, 3, 16), torch.rand(1, 3, 2, 4), memory


def test_export_has_no_custom_op() -> None:
    """Other runtimes know `grid_sample`."""
    attend, (query, reference, memory) = Attend(), attend_inputs()

    class Plain(torch.nn.Module):  # an export takes no dataclasses
        def forward(self, query: Tensor, reference: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            return attend(query, reference, replace(memory, tokens=tokens))

    program = torch.export.export(Plain(), (query, reference, memory.tokens), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("grid_sampler" in t for t in targets)
    assert not any("codetr" in t for t in targets)
    found = program.module()(query, reference, memory.tokens)
    for own, expected in zip(found, attend(query, reference, memory), strict=True):
        torch.testing.assert_close(own, expected)


def test_compiles_into_one_graph() -> None:
    """With its gradients, and without a word in between."""
    attend, args = Attend(), attend_inputs()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, attend):
        outputs = function(*args)
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), list(attend.parameters()))
        results.append((*outputs, *gradients))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected)


def test_import_is_light() -> None:
    code = "import sys, codetr.ops.msda; raise SystemExit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
