"""Federated loss: which classes are drawn, how often, and what the criterion makes of them."""

from itertools import permutations

import pytest
import torch
from test_criterion import CLASSES, COST, LAYERS, group, prediction, targets
from torch import Tensor

from codetr.application import compose
from codetr.criterion import Criterion
from codetr.losses import ClassLoss, FedLoss, Focal, QualityFocal
from codetr.types import Known, Matching, Output, Prediction, Proposals, Targets

NONE = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)


def fed_loss(classes: int, counts: list[int], power: float = 0.5) -> FedLoss:
    loss = FedLoss(classes, power)
    loss.weigh(counts)
    return loss


def test_classes_that_are_there_are_always_drawn() -> None:
    loss = fed_loss(5, [0, *range(1, 30)])
    for _ in range(50):
        labels, valid = torch.randint(30, (4, 3)), torch.rand(4, 3) < 0.6
        drawn, present = loss(labels, valid), labels[valid].unique()
        assert drawn[present].all()
        assert drawn.sum() == max(5, len(present))
    everything = loss(torch.arange(30)[None], torch.ones(1, 30, dtype=torch.bool))
    assert everything.all()


def test_probabilities_are_those_of_draws_without_replacement() -> None:
    """Two of four classes one after the other, by hand; a class without images never."""
    counts, power, draws = [1, 4, 9, 100, 0], 0.5, 10_000
    loss, seen = fed_loss(2, counts, power), torch.zeros(5)
    for _ in range(draws):
        seen += loss(*NONE)
    rates = torch.tensor(counts) ** power
    expected = torch.zeros(5)
    for first, second in permutations(range(5), 2):
        chance = rates[first] / rates.sum() * rates[second] / (rates.sum() - rates[first])
        expected[[first, second]] += chance
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((seen / draws - expected).abs() <= 4 * deviation).all()
    assert seen[4] == 0


def test_a_present_class_leaves_its_place_to_no_other() -> None:
    """Of three drawn, one is there: the two others are drawn as if it did not exist."""
    loss, draws, seen = fed_loss(3, [1, 1, 1, 1, 1]), 10_000, torch.zeros(5)
    for _ in range(draws):
        seen += loss(torch.tensor([[3, 0]]), torch.tensor([[True, False]]))
    assert seen[3] == draws
    others = seen[[0, 1, 2, 4]] / draws
    assert ((others - 0.5).abs() < 4 * (0.25 / draws) ** 0.5).all()


def criterion(class_loss: ClassLoss, sampled: FedLoss | None) -> Criterion:
    return Criterion(COST, class_loss, 2.0, 5.0, 3.0, lambda_2=0.5, lambda_2_by_head={}, fed_loss=sampled)


def scene() -> tuple[Output, Targets]:
    goals = targets(2, 0, 1)
    goals.labels[:] = torch.where(goals.valid, 2, 0)  # of all classes, only this one is there
    main = group(Matching(), proposals=Proposals(prediction(len(goals.labels)), Matching()))
    agnostic = group(Matching(), proposals=Proposals(prediction(len(goals.labels)), Matching(), class_agnostic=True))
    known = Known(torch.tensor([2, -1, -1, 2, -1, -1]).expand(3, -1), main.reference)
    groups = {"main": main, "agnostic": agnostic, "denoising": group(known)}
    return Output(groups, {name: prediction(LAYERS, 3) for name in groups}), goals


def all_logits(output: Output) -> list[tuple[str, Prediction]]:
    first = [(n, g.proposals.prediction) for n, g in output.groups.items() if g.proposals is not None]
    return [*output.predictions.items(), *((f"{name}/encoder", own) for name, own in first)]


@pytest.mark.parametrize("class_loss", [Focal(0.25, 2.0), QualityFocal(2.0)])
def test_only_drawn_classes_count_and_the_same_everywhere(class_loss: ClassLoss) -> None:
    """Class by class, the plain loss has the gradients of the drawn ones; the rest has none."""
    output, goals = scene()
    plain, sampled = criterion(class_loss, None), criterion(class_loss, fed_loss(2, [5, 5, 5, 5]))

    def gradients(one: Criterion) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses = one(output, goals)
        own = [(name, found.logits) for name, found in all_logits(output)]
        found = torch.autograd.grad(sum(losses.values()), [logits for _, logits in own])
        return losses, dict(zip([name for name, _ in own], found, strict=True))

    plain_losses, whole = gradients(plain)
    losses, parts = gradients(sampled)
    drawn = parts["main"].flatten(0, -2).abs().sum(0) > 0
    assert drawn.sum() == 2
    assert drawn[2]
    for name, part in parts.items():
        mask = torch.ones(CLASSES, dtype=torch.bool) if name == "agnostic/encoder" else drawn
        assert torch.equal(part, whole[name] * mask), name
    assert {n for n in losses if losses[n] != plain_losses[n]} == {
        n for n in losses if n.endswith("class") and n != "agnostic/encoder/class"
    }


def test_with_all_classes_it_is_the_plain_loss() -> None:
    output, goals = scene()
    plain = criterion(Focal(0.25, 2.0), None)(output, goals)
    sampled = criterion(Focal(0.25, 2.0), fed_loss(50, [0, 3, 0, 1]))(output, goals)
    assert {n: v.item() for n, v in plain.items()} == {n: v.item() for n, v in sampled.items()}


def test_a_checkpoint_keeps_the_weights() -> None:
    state = criterion(Focal(0.25, 2.0), fed_loss(2, [4, 9])).state_dict()
    assert torch.equal(state["fed_loss.weights"], torch.tensor([2.0, 3.0]))
    assert not criterion(Focal(0.25, 2.0), None).state_dict()


@pytest.mark.parametrize("kind", ["focal", "quality_focal"])
def test_from_the_command_line(kind: str) -> None:
    from hydra.utils import instantiate

    config = compose("train", ["model=dino", f"criterion={kind}", "+criterion/fed_loss=sampled"])
    made = instantiate(config.criterion, _convert_="all")
    assert (made.fed_loss.classes, made.fed_loss.power) == (50, 0.5)
    assert instantiate(compose("train", ["model=dino", f"criterion={kind}"]).criterion).fed_loss is None
