"""Random subsets of candidates, the same number for every image (Faster R-CNN, sec. 3.1.3)."""

import torch
from torch import Tensor


def random_keys(mask: Tensor) -> Tensor:
    """[B, N] numbers for the members of each image's mask [B, N]; the lowest are drawn first."""
    return torch.rand(mask.shape, device=mask.device)


def sample(mask: Tensor, count: int | Tensor) -> Tensor:
    """Draw at most `count` random members of each image's mask.

    mask: [B, N] bool.
    count: for all images, or [B].

    Returns [B, N] bool.
    """
    keys = random_keys(mask).masked_fill(~mask, torch.inf)
    if isinstance(count, int):
        order = keys.topk(min(count, keys.shape[1]), dim=1, largest=False).indices
        winners = torch.zeros_like(mask).scatter_(1, order, True)
    else:
        order = keys.argsort(1)
        places = torch.arange(keys.shape[1], device=keys.device) < count[:, None]
        winners = torch.zeros_like(mask).scatter_(1, order, places)
    return winners & mask


def sample_both(positive: Tensor, negative: Tensor, most_positive: int, total: int) -> tuple[Tensor, Tensor]:
    """Draw at most `most_positive` random positives, filled up to `total` with random negatives.

    positive, negative: [B, N] bool, disjoint. Returns their random subsets.
    """
    chosen = sample(positive, most_positive)
    return chosen, sample(negative, total - chosen.sum(1))


def pack(first: Tensor, second: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Members of two disjoint masks [B, N] as min(size, N) indices: the first mask's, then the second's, ascending.

    Returns (index [B, size], valid [B, size]); where an image has too few members the rest is not valid.
    """
    num = first.shape[1]
    key = torch.arange(num, 0, -1, device=first.device) + (first * 2 + second * 1) * num
    index = key.topk(min(size, num), dim=1).indices
    return index, (first | second).gather(1, index)
