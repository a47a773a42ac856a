"""`torch.compile` takes the losses of a step as one graph, by backends that need no compiler."""

import pytest
import torch
from hydra.utils import instantiate
from test_static_shapes import CO_DINO, batch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from codetr.ops.normaliser import measure, normalised_by
from codetr.task import compiled
from codetr.types import Targets
from toy_model import compose

ALL = "[faster_rcnn_small,atss,fcos,gfl,paa,retinanet]"
# Dynamo's own, of PyTorch 2.15
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Step:
    """A training step, eager and compiled, of the same weights."""

    def __init__(self, heads: str, backend: str) -> None:
        config = compose("model.num_classes=3", *CO_DINO, f"model/auxiliary_head={heads}", "static_shapes=true")
        torch.manual_seed(0)
        self.detector: nn.Module = instantiate(config.model.detector, _convert_="all")
        self.criterion = instantiate(config.criterion)
        torch._dynamo.reset()
        counters.clear()
        self.compiled = compiled(self.losses, backend)

    def losses(self, images: Tensor, padding: Tensor, targets: Targets) -> dict[str, Tensor]:
        return self.criterion(self.detector(images, padding, targets), targets)

    def check(self, *inputs: Tensor | Targets) -> None:
        """The compiled step's losses and gradients are the eager one's, but for the order of sums."""
        (losses, gradients), (same, also) = (self._run(f, *inputs) for f in (self.losses, self.compiled))
        torch.testing.assert_close(same, losses, rtol=1e-6, atol=1e-6)
        assert also.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (also[name] - gradient).norm() <= 1e-5 * gradient.norm(), name

    def _run(self, function, *inputs) -> tuple[dict, dict]:  # type: ignore[no-untyped-def]
        torch.manual_seed(1)
        self.detector.zero_grad()
        losses = function(*inputs)
        torch.stack(list(losses.values())).sum().backward()
        return losses, {name: p.grad for name, p in self.detector.named_parameters() if p.grad is not None}


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("heads", "backend"),
    [
        ("[atss]", "eager"),
        pytest.param(ALL, "eager", marks=pytest.mark.slow),
        pytest.param("[faster_rcnn_small,atss]", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_every_batch(heads: str, backend: str) -> None:
    """Whatever it holds: other objects, and none."""
    step = Step(heads, backend)
    images, padding, targets = batch(6)
    step.check(images, padding, targets)
    assert graphs() == 1
    for count in (1, 0):
        targets.valid[:, count:] = False
        step.check(images, padding, targets)
    assert graphs() == 1


@pytest.mark.slow
def test_the_normalisers_of_a_step_enter_the_graph_as_its_inputs() -> None:
    step = Step("[]", "eager")
    inputs = batch(4)
    means = measure([lambda: step.losses(*inputs)])
    for factor in (2, 3):
        found = []
        for function in (step.losses, step.compiled):
            torch.manual_seed(1)
            with normalised_by([mean * factor for mean in means]):
                found.append(function(*inputs))
        torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
    assert graphs() == 1
