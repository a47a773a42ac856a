"""Which parameter learns how fast, and when."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.lr_scheduler import LambdaLR

# (epochs so far, epochs in all) -> factor of the learning rate
Decay = Callable[[float, float], float]

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def parameter_groups(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    rules: Mapping[str, Mapping[str, Any]],
    no_decay: Collection[str],
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group; as few groups as rules and kinds make, whatever the numbers.

    rules: by any name, a regular expression `pattern` that is searched in the parameter's name, and its
    `lr_multiplier`; the first that is found counts. no_decay: kinds without weight decay, of "norm", "bias",
    "embedding".
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter, kind in _kinds(module):
        found = (rule["lr_multiplier"] for rule in rules.values() if re.search(rule["pattern"], name))
        factor = next(found, 1.0)
        decays = kind not in no_decay
        decay = weight_decay if decays else 0.0
        group = groups.setdefault((factor, decays), {"params": [], "lr": lr * factor, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def layer_decay(rate: float, blocks: str, num_blocks: int, before: str) -> dict[str, dict[str, Any]]:
    """Rules of layer-wise decay (Clark et al. 2020, ELECTRA, appendix A; BEiT): block i = 0..n - 1 of n learns
    rate^(n - i) times as fast as what comes after the blocks, what comes before them rate^(n + 1) times.

    blocks: a regular expression for names up to the block's number; before: one for what comes before.
    """
    rules = {"before": {"pattern": before, "lr_multiplier": rate ** (num_blocks + 1)}}
    for i in range(num_blocks):
        rules[f"block_{i}"] = {"pattern": rf"{blocks}{i}\.", "lr_multiplier": rate ** (num_blocks - i)}
    return rules


def _kinds(module: nn.Module) -> list[tuple[str, nn.Parameter, str]]:
    """(name, parameter, kind) of every trainable parameter; a shared one counts under its first name."""
    kinds = {}
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(prefix, recurse=False):
            kinds[name] = (name, parameter, _kind(owner, name.rpartition(".")[2]))
    return [kinds[name] for name, parameter in module.named_parameters() if parameter.requires_grad]


def _kind(owner: nn.Module, name: str) -> str:
    if isinstance(owner, NORMS):
        return "norm"
    if isinstance(owner, nn.Embedding) or "embed" in name or "token" in name:
        return "embedding"
    return "bias" if name.endswith("bias") else "weight"


def adamw(
    module: nn.Module,
    fused: bool,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    rules: Mapping[str, Mapping[str, Any]],
    no_decay: Collection[str],
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over `parameter_groups`. fused: one kernel per step; otherwise
    PyTorch's choice, a kernel per operation on a GPU."""
    groups = parameter_groups(module, lr, weight_decay, rules, no_decay)
    return torch.optim.AdamW(groups, betas=(betas[0], betas[1]), fused=fused or None)


@dataclass(frozen=True)
class Schedule:
    """A factor of the learning rate: linear warm-up by the step, times `decay` by the epoch.

    The factor rises from `warmup_start` at step 0 to 1 at step `warmup_steps`.
    """

    warmup_steps: int
    warmup_start: float
    decay: Decay

    def factor(self, step: int, epoch: float, epochs: float) -> float:
        """epoch: the position in the training, with the part of the current one."""
        done = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        warmup = self.warmup_start + (1 - self.warmup_start) * done
        return warmup * self.decay(epoch, epochs)

    def attach(self, optimizer: torch.optim.Optimizer, position: Callable[[int], tuple[float, float]]) -> LambdaLR:
        """To be stepped once per optimizer step. position: of a step, in epochs; and epochs in all."""
        return LambdaLR(optimizer, lambda step: self.factor(step, *position(step)))


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Learning rate, weight decay and so on of every parameter group."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def set_again(scheduler: LambdaLR, settings: list[dict[str, Any]]) -> None:
    """After a state was loaded, which brings old settings with it: keep its moments and its step, and no more."""
    for group, given in zip(scheduler.optimizer.param_groups, settings, strict=True):
        group.update(given)
    scheduler.base_lrs = [group["initial_lr"] for group in settings]
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    lrs = [lr * factor for lr, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    scheduler._last_lr = lrs


def constant(epoch: float, epochs: float) -> float:
    return 1.0


def multistep(
    epoch: float, epochs: float, milestones: Mapping[str, Collection[float]], otherwise: float, gamma: float
) -> float:
    """Times gamma at each milestone.

    milestones: in epochs, by the length of the training: {"e12": [11], "e36": [30]}.
    otherwise: the only milestone of a training of any other length, as a share of it.
    """
    passed = milestones.get(f"e{epochs:g}", [otherwise * epochs])
    return gamma ** sum(epoch >= milestone for milestone in passed)


def cosine(epoch: float, epochs: float, final: float) -> float:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter, 2017, eq. 5, without restarts)."""
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, epoch / epochs))) / 2
