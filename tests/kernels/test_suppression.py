"""The suppression op against torchvision: the kernels in Triton's interpreter, or on a GPU where there is one."""

import pytest
import torch
from codetr.kernels.suppression import gpu, survivors
from torch import Tensor
from torchvision.ops import box_iou, nms

# NumPy's, where the interpreter divides zero by zero, as the kernel does
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    return gpu.suppress(*(x.to(DEVICE) for x in (boxes, scores, groups)), iou).cpu()


def expected(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """torchvision, group by group: boxes are not shifted apart, which would round them."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(len(boxes)):
        for group in groups[image].unique():
            own = torch.nonzero(groups[image] == group)[:, 0]
            kept[image, own[nms(boxes[image, own], scores[image, own], iou)]] = True
    return kept


def draw(batch: int, count: int, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that overlap often."""
    corner = torch.rand(batch, count, 2) * 60
    boxes = torch.cat([corner, corner + torch.rand(batch, count, 2) * 60], -1)
    return boxes, torch.rand(batch, count), torch.randint(groups, (batch, count))


@pytest.mark.parametrize("count", [1, 31, 32, 33, 150])
@pytest.mark.parametrize("iou", [0.3, 0.7])
def test_random(count: int, iou: float) -> None:
    """Words that are full, not full, and several."""
    inputs = draw(2, count)
    assert torch.equal(run(*inputs, iou), expected(*inputs, iou))


def test_ties_in_score() -> None:
    """The first of them is the better one."""
    boxes, _, groups = draw(2, 70)
    scores = torch.randint(3, (2, 70)).float()
    assert torch.equal(run(boxes, scores, groups, 0.4), expected(boxes, scores, groups, 0.4))


def test_the_same_box_many_times() -> None:
    """One of each group is left, however long the chain."""
    boxes = torch.tensor([2.0, 3, 10, 9]).expand(1, 80, 4)
    scores, groups = torch.rand(1, 80), torch.arange(80)[None] % 3
    kept = run(boxes, scores, groups, 0.5)
    assert groups[kept].sort().values.tolist() == [0, 1, 2]
    assert torch.equal(kept, expected(boxes, scores, groups, 0.5))


def test_a_chain() -> None:
    """Each box overlaps the next alone: every other one is left, across words."""
    left = torch.arange(90.0) * 4
    boxes = torch.stack([left, torch.zeros(90), left + 10, torch.full((90,), 10.0)], -1)[None]
    scores, groups = torch.linspace(1, 0, 90)[None], torch.zeros(1, 90, dtype=torch.int64)
    assert box_iou(boxes[0], boxes[0])[0, 1] > 0.4 > box_iou(boxes[0], boxes[0])[0, 2]
    assert run(boxes, scores, groups, 0.4)[0].tolist() == [i % 2 == 0 for i in range(90)]


def test_an_overlap_that_is_the_threshold_suppresses_nothing() -> None:
    """Thresholds that float32 rounds up and down: a fourth, a third and a tenth of a side of one."""
    for share in (0.25, 1 / 3, 0.1, 0.7):
        boxes = torch.tensor([[[0.0, 0, 1, 1], [0, 0, share, 1]]])
        scores, groups = torch.tensor([[1.0, 0.5]]), torch.zeros(1, 2, dtype=torch.int64)
        for iou in (share, share * (1 - 1e-9), share * (1 + 1e-9)):
            assert torch.equal(run(boxes, scores, groups, iou), expected(boxes, scores, groups, iou))


def test_boxes_without_area() -> None:
    """Neither suppress nor are suppressed, not even by their like."""
    boxes, scores, groups = draw(1, 40)
    boxes[0, ::3, 2] = boxes[0, ::3, 0]
    boxes[0, 1::6] = 0
    kept = run(boxes, scores, groups, 0.2)
    assert kept[0, ::3].all()
    assert kept[0, 1::6].all()
    assert torch.equal(kept, expected(boxes, scores, groups, 0.2))


def test_nothing() -> None:
    assert run(*draw(2, 0), 0.5).shape == (2, 0)
    assert run(*draw(0, 3), 0.5).shape == (0, 3)


def test_the_op_is_an_op() -> None:
    inputs = draw(2, 20)
    torch.library.opcheck(torch.ops.codetr.survivors.default, (*inputs, 0.5))
    assert torch.equal(survivors(*inputs, 0.5), expected(*inputs, 0.5))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_op_on_a_device_waits_for_nothing() -> None:
    inputs = draw(2, 5000, groups=5)
    known = expected(*inputs, 0.7)
    inputs = tuple(x.cuda() for x in inputs)
    survivors(*inputs, 0.7)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = survivors(*inputs, 0.7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), known)
