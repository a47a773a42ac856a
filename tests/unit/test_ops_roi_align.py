"""The door to RoIAlign chooses as documented, and a head trains the same with either implementation."""

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from codetr.errors import UserError
from codetr.ops import choice
from codetr.ops.roi_align import roi_align_pyramid
from codetr.types import Frames, Pyramid, Targets
from fixed_draws import fixed_draws
from toy_model import compose

STRIDES = (8, 16, 32, 64, 128)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CODETR_ROI_ALIGN", raising=False)
    choice._decide.cache_clear()
    yield
    choice._decide.cache_clear()


def call(dtype: torch.dtype = torch.float32) -> Tensor:
    levels = [torch.ones(1, 3, 8, 8, dtype=dtype), torch.ones(1, 3, 4, 4, dtype=dtype)]
    boxes = torch.tensor([[8.0, 8, 40, 40], [0, 0, 60, 60]])
    return roi_align_pyramid(levels, (8, 16), torch.zeros(2).long(), boxes, torch.tensor([0, 1]), 2, 0)


@pytest.mark.parametrize(
    ("wish", "dtype", "said"),
    [
        ("", torch.float32, "RoIAlign on cpu: numba kernel"),
        ("numba", torch.bfloat16, "RoIAlign on cpu: numba kernel"),
        ("reference", torch.float32, "RoIAlign on cpu: reference (CODETR_ROI_ALIGN)"),
        ("", torch.float64, "RoIAlign on cpu: reference (it has no float64)"),
    ],
)
def test_says_once_what_runs(wish, dtype, said, monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("CODETR_ROI_ALIGN", wish)
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        assert torch.equal(call(dtype), call(dtype))
    assert caplog.messages == [said]


def test_warns_without_numba(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    call(), call()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "pip install numba" in caplog.text
    monkeypatch.setenv("CODETR_ROI_ALIGN", "numba")
    with pytest.raises(UserError, match="not installed"):
        call()


@pytest.mark.parametrize(("wish", "message"), [("triton", "reference or numba"), ("numba", "no float64")])
def test_refuses_what_it_cannot_do(wish: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODETR_ROI_ALIGN", wish)
    with pytest.raises(UserError, match=message):
        call(torch.float64)


def test_export_has_torchvisions_operator() -> None:
    """Other runtimes know it."""

    class Pool(torch.nn.Module):
        def forward(self, level: Tensor, boxes: Tensor) -> Tensor:
            return roi_align_pyramid([level], (8,), torch.zeros(1).long(), boxes, torch.zeros(1).long(), 2, 2)

    program = torch.export.export(Pool(), (torch.ones(1, 3, 8, 8), torch.tensor([[8.0, 8, 40, 40]])))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("torchvision" in t for t in targets)
    assert not any("codetr" in t for t in targets)


def test_import_is_light() -> None:
    code = "import sys, codetr.ops.roi_align; raise SystemExit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def losses_and_gradients(head: str, dtype: torch.dtype) -> list[Tensor]:
    """Of a head, and of the pyramid that it sees; three images, the last without objects."""
    config = compose("model=co_deformable_tiny", f"model/auxiliary_head=[{head}]", "model.num_classes=3")
    torch.manual_seed(0)
    module = instantiate(config.model.detector.heads.faster_rcnn, _convert_="all").to(dtype)
    width = config.model.width
    levels = [torch.randn(3, width, 128 // s, 128 // s).to(dtype).requires_grad_() for s in STRIDES]
    corners, sides = torch.rand(3, 6, 2) * 0.6 + 0.2, torch.rand(3, 6, 2) * 0.3 + 0.05
    boxes, valid = torch.cat([corners, sides], -1).to(dtype), torch.arange(6) < torch.tensor([6, 3, 0])[:, None]
    frames = Frames.unscaled(torch.tensor([[128, 128], [128, 96], [64, 128]]))
    with fixed_draws():
        found = module(Pyramid(levels, STRIDES), Targets(boxes, torch.randint(3, (3, 6)), valid, frames))
    leaves = [*levels, *module.parameters()]
    total = torch.stack([*found.losses.values(), found.positives.features.sum() / 1000]).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*found.losses.values(), *(torch.zeros(()) if g is None else g for g in gradients)]


@pytest.mark.parametrize("head", ["faster_rcnn_small", "faster_rcnn"])
def test_a_head_has_the_same_losses_and_gradients(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As close to those in float64 as with torchvision: in float32 hidden units near zero may change sides."""
    truth, own = (losses_and_gradients(head, dtype) for dtype in (torch.float64, torch.float32))
    monkeypatch.setenv("CODETR_ROI_ALIGN", "reference")
    theirs = losses_and_gradients(head, torch.float32)
    assert sum(bool(t.any()) for t in truth) > 10
    for a, b, true in zip(own, theirs, truth, strict=True):
        error, usual = ((x.double() - true.double()).abs().max().item() for x in (a, b))
        assert error <= 2 * usual + 1e-6 * true.abs().max().item()
        if not true.ndim:  # a loss
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
