"""Where the host waits for the device in a training step, on a pretended device."""

from collections import Counter
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torchvision.ops import nms

from codetr.callbacks.non_finite import not_finite
from codetr.types import Frames, Targets
from host_syncs import ELSEWHERE, Pretended
from toy_model import compose

CO_DINO = (
    "model=co_dino",
    "model/backbone=resnet10_small",
    "model/auxiliary_head=[faster_rcnn_small,atss]",
    "criterion=quality_focal",
)
COLLABORATIVE = ("queries/collaborative.py", "CollaborativeQueries._choose", "aten::_local_scalar_dense")
IMAGES = 2
# What is left, how often in a step, and why.
LEFT = {
    COLLABORATIVE: 2,  # one per head: padded to `max_queries`, a step of the demo takes 30 % longer
}
STATIC = "static_shapes=true"  # nothing is left
MASKS = {  # but where masks are learned: the branches take positive regions alone, and only the objects that are there
    ("heads/mask.py", "MaskBranch.loss", "aten::nonzero"): 1,
    ("heads/mask.py", "MaskBranch.loss", "aten::_to_copy"): 1,  # of how many there are
    ("heads/mask.py", "objects_and_rois", "aten::index"): 2,
    ("heads/refine_mask.py", "RefineMaskHead.region_losses", "aten::nonzero"): 1,
}
ATTENTION = ("nn/deformable_attention.py", "ops/msda.py")  # its reference stands in for a kernel, which sends nothing


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CODETR_MSDA", "CODETR_ROI_ALIGN"):
        monkeypatch.setenv(variable, "reference")  # kernels take no pretended tensors
    # What recomputes activations asks the module of a device for its random states: this one has none.
    monkeypatch.setattr(torch, ELSEWHERE.type, ModuleType(ELSEWHERE.type), raising=False)


def batch(masks: bool = False) -> tuple[Tensor, Tensor, Targets]:
    """Three objects and two."""
    torch.manual_seed(0)
    padding = torch.zeros(IMAGES, 64, 64, dtype=torch.bool)
    padding[1, :, 48:] = True
    boxes = torch.cat([torch.rand(IMAGES, 3, 2) * 0.4 + 0.3, torch.rand(IMAGES, 3, 2) * 0.3 + 0.1], -1)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    targets = Targets(boxes, torch.randint(3, (IMAGES, 3)), valid, Frames.unscaled(torch.tensor([[64, 64], [64, 48]])))
    targets.masks = torch.rand(IMAGES, 3, 64, 64) > 0.5 if masks else None
    return torch.randint(0, 256, (IMAGES, 3, 64, 64), dtype=torch.uint8), padding, targets


def step(detector: nn.Module, criterion: nn.Module, images: Tensor, padding: Tensor, targets: Targets) -> Tensor:
    """The losses, after their gradients were made and clipped."""
    torch.manual_seed(1)
    losses = torch.stack(list(criterion(detector(images, padding, targets), targets).values()))
    losses.sum().backward()
    nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
    return losses.detach()


def build(*overrides: str) -> tuple[nn.Module, nn.Module]:
    config = compose("model.num_classes=3", *overrides)
    torch.manual_seed(0)
    return instantiate(config.model.detector, _convert_="all"), instantiate(config.criterion)


def waits(*overrides: str, masks: bool = False) -> tuple[Counter, Tensor]:
    """Of a training step on the pretended device: where, and its losses."""
    detector, criterion = build(*overrides)
    with Pretended() as device:
        device.send(detector)
        inputs = [x.to(ELSEWHERE, non_blocking=True) for x in batch(masks)]
        losses = step(detector, criterion, *inputs)
        places = {place: count for place, count in device.places.items() if place.file not in ATTENTION}
        return Counter(places), losses.cpu()


def test_a_step_of_co_dino_waits_where_it_must_and_nowhere_else() -> None:
    """And the pretended device computes what the CPU computes: the list is that of a step that works."""
    places, losses = waits(*CO_DINO)
    assert places == Counter(LEFT)
    torch.testing.assert_close(losses, step(*build(*CO_DINO), *batch()), rtol=1e-6, atol=1e-6)


def test_a_step_of_static_shapes_waits_for_nothing() -> None:
    places, losses = waits(*CO_DINO, STATIC)
    assert not places
    torch.testing.assert_close(losses, step(*build(*CO_DINO, STATIC), *batch()), rtol=1e-6, atol=1e-6)


def test_masks_make_the_host_wait() -> None:
    heads = ("model/auxiliary_head=[mask_rcnn_small]", "model/mask_head=refine_mask")
    places, _ = waits(*CO_DINO, *heads, STATIC, masks=True)
    assert places == Counter(MASKS)


@pytest.mark.parametrize("model", ["h_deformable", "dn_deformable_detr"])
def test_other_detectors_of_static_shapes_wait_for_nothing(model: str) -> None:
    options = ["model.detector.queries.hybrid.num_queries=20"] if model == "h_deformable" else []
    places, _ = waits(f"model={model}", "model/backbone=resnet10_small", STATIC, *options)
    assert not places


def test_masks_of_queries_do_not_make_the_host_wait() -> None:
    small = ["model=mask2former_tiny", "criterion=masks", "criterion.points.count=40"]
    small += ["criterion.matching_cost.num_points=40", "model.query_groups=2"]
    places, losses = waits(*small, masks=True)
    assert not places
    assert losses.isfinite().all()


@pytest.mark.parametrize("head", ["paa", "gfl", "fcos", "retinanet"])
def test_one_stage_heads_do_not_wait(head: str) -> None:
    """Only their queries' number makes the host wait, where it is not static."""
    places, _ = waits(*CO_DINO, f"model/auxiliary_head=[{head}]")
    assert places == Counter({COLLABORATIVE: 1})
    places, _ = waits(*CO_DINO, f"model/auxiliary_head=[{head}]", STATIC)
    assert not places


X = torch.arange(8.0).view(4, 2)


# What an expression of a tensor x on the device makes the host do, on a real one: CUDA's documentation and PyTorch's.
@pytest.mark.parametrize(
    ("run", "operators"),
    [
        (lambda x: x.sum().item(), ["aten::_local_scalar_dense"]),
        (lambda x: bool((x > 0).any()), ["aten::_local_scalar_dense"]),
        (lambda x: x.tolist(), ["aten::_to_copy"]),
        (lambda x: x.cpu().numpy(), ["aten::_to_copy"]),
        (lambda x: torch.zeros(4, 2).copy_(x), ["aten::copy_"]),
        (lambda x: torch.tensor([1.0, 2], device=x.device), ["aten::_to_copy"]),
        (lambda x: x.new_tensor([1.0, 2]), ["aten::_to_copy"]),
        (lambda x: torch.zeros(2).to(x.device), ["aten::_to_copy"]),
        (lambda x: torch.zeros(2).to(x.device, non_blocking=True), []),
        (lambda x: x.nonzero(), ["aten::nonzero"]),
        (lambda x: x[x > 2], ["aten::index"]),
        (lambda x: x.masked_select(x > 2), ["aten::masked_select"]),
        (lambda x: x.clone().index_put_((x > 2,), x[:, 0].sum()[None]), ["aten::index_put_"]),
        (lambda x: x.clone().masked_fill_(x > 2, 0), []),
        (lambda x: x.where(x > 2, 0).topk(2, 0).values.gather(0, (x[:2] > 2).long()), []),
        (lambda x: x[x[:, 0].long().clamp(max=3)], []),
        (lambda x: x[torch.tensor([0, 1])], ["aten::index"]),
        (lambda x: x.unique(), ["aten::_unique2"]),
        (lambda x: x.repeat_interleave(2, 0), []),
        (lambda x: x.repeat_interleave(x[:, 0].long(), 0), ["aten::repeat_interleave"]),
        (lambda x: x.repeat_interleave(torch.ones_like(x[:, 0]).long(), 0, output_size=4), []),
        (lambda x: nms(x.repeat(1, 2), x[:, 0], 0.5), ["torchvision::nms"]),
        (lambda x: x.t().add_(1).matmul(x).softmax(-1), []),
    ],
)
def test_the_pretended_device_sees_what_waits(run: Callable[[Tensor], object], operators: list[str]) -> None:
    expected = run(X.clone())
    with Pretended() as device:
        x = X.to(ELSEWHERE, non_blocking=True)
        found = run(x)
        assert [place.operator for place in device.places.elements()] == operators
        if isinstance(expected, Tensor):
            assert torch.equal(found.cpu(), expected)  # type: ignore[attr-defined]


def test_the_pretended_device_refuses_tensors_of_another() -> None:
    with Pretended():
        x = X.to(ELSEWHERE)
        x * torch.tensor(2.0)  # a number may be anywhere
        with pytest.raises(RuntimeError, match="same device"):
            x + X


def test_whether_a_gradient_is_finite_is_decided_on_the_device() -> None:
    """And the optimizer's kernels take the verdict: nothing of theirs moves where a single number is not finite."""
    for value, moves in ((1.0, True), (float("inf"), False), (float("nan"), False)):
        weights = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
        optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1, fused=True)
        weights[0].grad, weights[1].grad = torch.ones(3), torch.tensor([1.0, value])
        optimizer.found_inf = not_finite([w.grad for w in weights if w.grad is not None]).float()
        optimizer.step()
        assert all(bool((w != 1).all()) == moves for w in weights)
        assert all(
            bool(state["exp_avg"].any()) == moves and state["step"] == moves for state in optimizer.state.values()
        )
    with Pretended() as device:
        verdict = not_finite([torch.ones(3).to(ELSEWHERE, non_blocking=True)] * 2)
        assert verdict.device.type != "cpu"
        assert not device.places
