"""Parameter groups and schedules."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from codetr.optim import Schedule, adamw, constant, cosine, multistep, parameter_groups
from toy_model import compose, detector

RULES = {
    "backbone": {"pattern": r"^backbone\.", "lr_multiplier": 0.1},
    "sampling": {"pattern": "sampling_offsets|reference_head", "lr_multiplier": 0.1},
}


def test_every_parameter_of_a_detector_is_in_one_group() -> None:
    options = OmegaConf.to_container(compose().optimizer, resolve=True)
    model = detector(("a", "b", "c"))
    model.backbone.body.conv1.requires_grad_(False)
    groups = parameter_groups(model, 1.0, 0.5, options["rules"], options["no_decay"])
    found = [id(p) for group in groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(set(found))
    assert set(found) == set(names)
    assert len(groups) == 4
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            slow = name.startswith("backbone.") or "sampling_offsets" in name
            assert group["lr"] == (0.1 if slow else 1.0), name
            if name.endswith(("bias", "level_embedding", "content.weight")) or "norm" in name:
                assert group["weight_decay"] == 0.0, name
            if name.endswith(("linear1.weight", "class_heads.0.weight", "layer1.0.conv1.weight")):
                assert group["weight_decay"] == 0.5, name


def test_kinds_and_first_rule() -> None:
    model = nn.ModuleDict(
        {"backbone": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2), "codes": nn.Embedding(3, 2), "last": nn.Linear(2, 1)}
    )
    rules = {**RULES, "late": {"pattern": "bone", "lr_multiplier": 7.0}}
    groups = parameter_groups(model, 2.0, 0.5, rules, ["norm", "embedding"])
    table = {(g["lr"], g["weight_decay"]): g["params"] for g in groups}
    assert {key: len(value) for key, value in table.items()} == {(0.2, 0.5): 2, (2.0, 0.0): 3, (2.0, 0.5): 2}
    assert table[2.0, 0.0][2] is model["codes"].weight
    undivided = parameter_groups(model, 2.0, 0.5, {}, [])
    assert len(undivided) == 1


def test_shared_parameter_counts_once() -> None:
    a = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": a, "again": a})
    assert sum(len(g["params"]) for g in parameter_groups(model, 1.0, 0.1, RULES, ["bias"])) == 2


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (constant, lambda e: 1.0),
        (lambda e, n: multistep(e, n, {f"e{n}": [2, 3]}, 0.5, 0.1), lambda e: 1.0 if e < 2 else 0.1 if e < 3 else 0.01),
        (lambda e, n: multistep(e, n, {"e5": [1]}, 0.5, 0.1), lambda e: 1.0 if e < 2 else 0.1),
        (lambda e, n: cosine(e, n, 0.2), lambda e: 0.6 + 0.4 * math.cos(math.pi * e / 4)),
    ],
)
def test_schedule_in_closed_form(decay, expected) -> None:
    schedule = Schedule(warmup_steps=10, warmup_start=0.1, decay=decay)
    for step in range(29):
        warmup = 0.1 + 0.09 * step if step < 10 else 1.0
        assert schedule.factor(step, step / 7, 4) == pytest.approx(warmup * expected(step / 7), abs=1e-12)


def test_schedule_depends_on_the_step_alone() -> None:
    schedule = Schedule(5, 0.01, lambda e, n: cosine(e, n, 0.0))

    def make() -> tuple:
        optimizer = adamw(nn.Linear(2, 2), False, 0.1, 0.01, (0.9, 0.999), RULES, ["bias"])
        return optimizer, schedule.attach(optimizer, lambda step: (step / 4, 5))

    (one, whole), (two, first), (three, second) = make(), make(), make()
    for optimizer, scheduler, steps in ((one, whole, 20), (two, first, 9)):
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
    second.load_state_dict(first.state_dict())
    three.load_state_dict(two.state_dict())
    for _ in range(11):
        three.step()
        second.step()
    assert [g["lr"] for g in one.param_groups] == [g["lr"] for g in three.param_groups] == [0.0, 0.0]
    assert whole.last_epoch == second.last_epoch == 20


def test_fused_is_the_same_update() -> None:
    torch.manual_seed(1)
    models = [nn.Linear(4, 4), nn.Linear(4, 4)]
    models[1].load_state_dict(models[0].state_dict())
    for model, fused in zip(models, (True, False), strict=True):
        optimizer = adamw(model, fused, 0.1, 0.1, (0.9, 0.999), RULES, ["bias"])
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert torch.allclose(models[0].weight, models[1].weight, atol=1e-6)
