"""What a step costs, held against closed forms, PyTorch's own counters and a search that asks for every batch."""

import math

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from codetr import application
from codetr.costs.automatic import fitting_batch, largest_that_runs
from codetr.costs.estimate import Estimator, largest_batches
from codetr.costs.pretended import CPU, Pretence
from codetr.costs.step import Step, draw
from codetr.errors import UserError
from toy_model import TOY

SMALL = (*TOY, "model.detector.backbone.arguments.channels=[8,16,32,32]", "callbacks=without_ema", "data=shapes_tiny")
CLASSES, OBJECTS, SIZE = 3, 4, (64, 96)


def estimator(*overrides: str) -> Estimator:
    return Estimator(application.compose("train", [*SMALL, *overrides]), CLASSES, OBJECTS)


def step(*overrides: str, batch: int = 2, masks: bool = False) -> Step:
    """A real one."""
    config = application.compose("train", [*SMALL, "static_shapes=true", *overrides])
    return Step(config, draw(batch, SIZE, OBJECTS, CLASSES, CPU, masks), CLASSES, CPU)


def test_the_ledger_counts_what_lives() -> None:
    """By hand: views cost nothing, what nobody holds is given back, and the peak remembers it."""
    pretence = Pretence()
    with pretence() as ledger:
        x = torch.empty(100)
        y = x.view(10, 10).t()
        assert ledger.current == 400
        z = torch.empty(50)
        del z
        assert (ledger.current, ledger.peak) == (400, 600)
        del x
        assert ledger.current == 400  # y is of it
        del y
        assert ledger.current == 0


def test_a_layer_keeps_its_input_and_its_output() -> None:
    """By hand, of a linear layer with a ReLU: what backward needs, then the gradients, and nothing else."""
    pretence = Pretence()
    with pretence() as ledger:
        layer, x = nn.Linear(8, 16), torch.empty(32, 8)
        before = ledger.current
        assert before == 4 * (8 * 16 + 16 + 32 * 8)
        loss = layer(x).relu().sum()
        assert ledger.current - before == 4 * (32 * 16 + 1)  # the ReLU keeps its output
        loss.backward()
        del loss
        assert ledger.current - before == 4 * (8 * 16 + 16)  # gradients
        assert ledger.flops == 2 * 2 * 32 * 8 * 16  # forward, and the gradient of the weight


def test_it_counts_what_pytorch_counts() -> None:
    """The arithmetic of a real step, and the memory that PyTorch's tracker finds in one."""
    own, real = estimator(), step()
    found = own.training(2, SIZE)
    with FlopCounterMode(display=False) as counter:
        real.train()
    assert found.flops == counter.get_total_flops() > 0
    with FlopCounterMode(display=False) as counter:
        real.infer()
    assert own.inference(2, SIZE).flops == counter.get_total_flops() > 0
    tracker = MemTracker()
    tracker.track_external(real.detector, real.optimizer, real.inputs.images)
    with tracker:
        real.train()
    peak = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    assert found.memory == pytest.approx(peak, rel=0.02)


def test_it_counts_masks_of_queries() -> None:
    """The arithmetic of a real step, the second forward pass of the masks included."""
    few = ["criterion.points.count=50", "criterion.matching_cost.num_points=50"]
    masks = ("model=mask2former_tiny", "criterion=masks", "postprocess=masks", *few)
    found, real = estimator(*masks).training(2, SIZE), step(*masks, masks=True)
    with FlopCounterMode(display=False) as counter:
        real.train()
    assert found.flops == counter.get_total_flops() > 0


def test_weights_are_those_of_the_detector() -> None:
    found, real = estimator("callbacks=default", "freeze=[neck]").weights, step("freeze=[neck]")
    parameters = list(real.detector.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    left_out = real.detector.training_only_prefixes()
    kept = [p for name, p in real.detector.named_parameters() if not name.startswith(left_out)]
    assert found.parameters == sum(p.numel() for p in parameters)
    assert found.trained == trained < found.parameters
    assert found.at_inference == sum(p.numel() for p in kept) < found.parameters
    real.train()
    states = [value for state in real.optimizer.state.values() for value in state.values()]
    assert found.state == sum(value.nbytes for value in states)
    floats = [value for value in real.detector.state_dict().values() if value.is_floating_point()]
    assert found.average == 4 * sum(value.numel() for value in floats)
    assert estimator().weights.average == 0


def test_nothing_is_built_and_nothing_is_changed() -> None:
    """A detector of some terabytes is estimated, and the configuration stays as it was."""
    config = application.compose("train", SMALL)
    config.model.ffn_width = 10**10
    before = config.copy()
    found = Estimator(config, CLASSES, OBJECTS)
    assert config == before
    assert found.weights.bytes > 2**41


@pytest.mark.slow
def test_more_images_cost_more_and_recomputing_costs_less() -> None:
    plain = estimator("model.detector.encoder.num_layers=4")
    one, two = (plain.training(batch, SIZE) for batch in (1, 2))
    assert one.memory < two.memory
    assert two.flops == pytest.approx(2 * one.flops, rel=0.2)
    recomputed = estimator("model.detector.encoder.num_layers=4", "model.detector.encoder.checkpointed_layers=4")
    less = recomputed.training(2, SIZE)
    assert less.kept < two.kept
    assert less.flops > two.flops
    assert recomputed.inference(2, SIZE) == plain.inference(2, SIZE)


def test_frozen_parts_keep_nothing() -> None:
    plain, frozen = estimator(), estimator("freeze=[backbone]")
    assert frozen.training(2, SIZE).kept < plain.training(2, SIZE).kept
    assert frozen.weights.state < plain.weights.state


@pytest.mark.slow
def test_half_precision_keeps_less() -> None:
    assert estimator("trainer.precision=bf16-mixed").training(2, SIZE).kept < estimator().training(2, SIZE).kept


@pytest.mark.parametrize("memory_of", [lambda n: 100 + 7 * n, lambda n: max(500 + n, 100 + 13 * n)])
def test_the_largest_batch_is_found_with_few_questions(memory_of: object) -> None:
    """By asking for every batch; between two batches that were asked it may be less, never more."""
    asked = []

    def ask(batch: int) -> int:
        asked.append(batch)
        return memory_of(batch)  # type: ignore[operator]

    limits = [50, 107, 520, 1000, 99_999]
    found = largest_batches(ask, limits)
    exact = [max((n for n in range(1, 20_000) if memory_of(n) <= limit), default=0) for limit in limits]  # type: ignore[operator]
    assert all(0 <= one <= best for one, best in zip(found, exact, strict=True))
    assert found[0] == exact[0] == 0
    assert found[-1] == exact[-1]
    assert len(asked) <= 7
    if memory_of(1) < 500:  # type: ignore[operator]
        assert found == exact


@pytest.mark.slow
def test_the_largest_batch_of_a_detector_fits_and_the_next_does_not() -> None:
    own = estimator()
    limit = own.training(7, SIZE).memory + 100
    (found,) = largest_batches(lambda n: own.training(n, SIZE).memory, [limit])
    assert own.training(found, SIZE).memory <= limit < own.training(found + 1, SIZE).memory


def test_a_batch_that_does_not_run_is_made_smaller() -> None:
    tried = []

    def runs(batch: int) -> bool:
        tried.append(batch)
        return batch <= 17

    assert largest_that_runs(30, runs) == 16  # a tenth less each time
    assert tried == [30, 27, 24, 21, 18, 16]
    assert largest_that_runs(5, lambda batch: False) == 0


@pytest.mark.slow
def test_the_automatic_batch_runs_and_leaves_random_states_alone() -> None:
    config = application.compose("train", SMALL)
    before, state = config.copy(), torch.get_rng_state()
    memory = int(estimator().training(5, SIZE).memory / 0.9) + 1000
    assert fitting_batch(config, CLASSES, OBJECTS, SIZE, CPU, memory) == 5
    assert torch.equal(state, torch.get_rng_state())
    assert config == before


def test_masks_are_refused() -> None:
    with pytest.raises(UserError, match="learns from masks"):
        estimator("model/auxiliary_head=[mask_rcnn_small]")


def test_shapes_that_depend_on_images_are_refused() -> None:
    with pytest.raises(UserError, match="depends on what images show"), Pretence()():
        torch.empty(3).nonzero()
    assert math.isfinite(Pretence().ledger.flops)
