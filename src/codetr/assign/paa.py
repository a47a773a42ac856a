"""Probabilistic anchor assignment (PAA, Kim and Lee 2020, sec. 3.1 and algorithm 1)."""

import torch
from torch import Tensor

from codetr.assign import BACKGROUND
from codetr.ops.gather import smallest

ITERATIONS, TOLERANCE, FLOOR = 100, 1e-3, 1e-6  # of the expectation maximisation: as scikit-learn's defaults


@torch.no_grad()
def assign_paa(matched_index: Tensor, cost: Tensor, level_sizes: list[int], num_objects: int, topk: int) -> Tensor:
    """Keep, of each object's candidates, those that two Gaussians over their costs call good.

    Per object: its `topk` cheapest candidates of each level, of equals the first ones; two Gaussians are fitted to
    their costs; positive are those of the cheaper Gaussian up to the most likely one. An object with fewer than two
    candidates gets none.

    matched_index: [B, N] the object whose candidate it is, BACKGROUND or IGNORED.
    cost: [B, N], finite on candidates.
    level_sizes: candidates per level.

    Returns [B, N], the matched index of what is left, else BACKGROUND.
    """
    objects = torch.arange(num_objects, device=matched_index.device)
    table = cost[:, None].masked_fill(matched_index[:, None] != objects[:, None], torch.inf)  # [B, M, N]
    parts, start = [], 0
    for size in level_sizes:
        parts.append(smallest(table[..., start : start + size], topk) + start)
        start += size
    index = torch.cat(parts, -1)
    costs, order = table.gather(-1, index).double().sort(dim=-1, stable=True)
    index = index.gather(-1, order)
    good = _cheaper_half(costs, costs.isfinite())
    chosen = torch.zeros_like(table, dtype=torch.bool).scatter_(-1, index, good).any(1)
    return matched_index.masked_fill((matched_index >= 0) & ~chosen, BACKGROUND)


def _cheaper_half(costs: Tensor, valid: Tensor) -> Tensor:
    """[..., n] ascending costs, [..., n] bool -> which are positive."""
    x = costs.where(valid, 0)
    count = valid.sum(-1, keepdim=True)
    means = torch.stack([x[..., 0], costs.masked_fill(~valid, -torch.inf).amax(-1).where(valid[..., 0], 0)], -1)
    weights, precisions = torch.full_like(means, 0.5), torch.ones_like(means)
    bound = means.new_full(count.shape, -torch.inf)
    running = count >= 2
    for _ in range(ITERATIONS):
        log_joint = _log_joint(x, weights, means, precisions)
        log_likelihood = log_joint.logsumexp(-1)
        new = _maximised(x, (log_joint - log_likelihood[..., None]).exp() * valid[..., None])
        weights, means, precisions = (
            a.where(running, b) for a, b in zip(new, (weights, means, precisions), strict=True)
        )
        average = log_likelihood.where(valid, 0).sum(-1, keepdim=True) / count.clamp(min=1)
        running, bound = running & ~((average - bound).abs() < TOLERANCE), average.where(running, bound)
    log_joint = _log_joint(x, weights, means, precisions)
    cheap = valid & (count >= 2) & (log_joint.argmax(-1) == 0)
    likelihood = log_joint.logsumexp(-1).masked_fill(~cheap, -torch.inf)
    places = torch.arange(x.shape[-1], device=x.device)
    return cheap & (places <= likelihood.argmax(-1, keepdim=True))


def _log_joint(x: Tensor, weights: Tensor, means: Tensor, precisions: Tensor) -> Tensor:
    """[..., n], [..., 2] each -> [..., n, 2] log(weight x density)."""
    exponent = (x[..., None] - means[..., None, :]) ** 2 * precisions[..., None, :]
    constant = torch.log(precisions * weights**2 / (2 * torch.pi))
    return 0.5 * (constant[..., None, :] - exponent)


def _maximised(x: Tensor, responsibility: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and precisions from responsibilities [..., n, 2]."""
    mass = responsibility.sum(-2) + 10 * torch.finfo(x.dtype).eps
    means = (responsibility * x[..., None]).sum(-2) / mass
    variance = (responsibility * x[..., None] ** 2).sum(-2) / mass - means**2 + FLOOR
    return mass / mass.sum(-1, keepdim=True), means, 1 / variance
