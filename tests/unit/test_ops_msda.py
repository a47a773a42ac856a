"""The door chooses as documented, and says so once."""

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from codetr.errors import UserError
from codetr.ops import msda as door
from codetr.ops.msda import multi_scale_deformable_attention

SHAPES = ((4, 3), (2, 2))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CODETR_MSDA", raising=False)
    door._decide.cache_clear()
    yield
    door._decide.cache_clear()


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
    with caplog.at_level(logging.INFO, logger=door.__name__):
        first, second = call(*args), call(*args)
    assert torch.equal(first, second)
    assert len(caplog.messages) == 1
    assert said in caplog.messages[0]


def test_both_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs()
    fast = call(*args)
    monkeypatch.setenv("CODETR_MSDA", "reference")
    torch.testing.assert_close(fast, call(*args))


@pytest.mark.parametrize(
    ("wish", "dtype"), [("cuda", torch.float32), ("triton", torch.float32), ("numba", torch.float64)]
)
def test_refuses_what_it_cannot_do(wish: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODETR_MSDA", wish)
    with pytest.raises(UserError, match="CODETR_MSDA"):
        call(*inputs(dtype))


def test_warns_without_numba(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(door.importlib.util, "find_spec", lambda name: None)
    args = inputs()
    call(*args), call(*args)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    monkeypatch.setenv("CODETR_MSDA", "numba")
    with pytest.raises(UserError, match="not installed"):
        call(*args)


def test_export_has_no_custom_op() -> None:
    class Attend(torch.nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return call(value, locations, weights)

    args = inputs()
    program = torch.export.export(Attend(), args)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("grid_sampler" in t for t in targets)
    assert not any("codetr" in t for t in targets)
    torch.testing.assert_close(program.module()(*args), call(*args))


def test_import_is_light() -> None:
    code = "import sys, codetr.ops.msda; raise SystemExit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
