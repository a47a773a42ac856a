"""Random subsets of candidates, the same number for every image (Faster R-CNN, sec. 3.1.3)."""

from collections.abc import Callable

import torch
from torch import Tensor

Priority = Callable[[Tensor], Tensor]


def sample(mask: Tensor, count: int | Tensor, priority: Priority | None = None) -> Tensor:
    """At most `count` random members of each image's mask.

    mask: [B, N] bool. count: for all images, or [B]. priority: from the rank of every member within its image's
    mask ([B, N]) to its key, the lowest keys win; None: random keys. Returns [B, N] bool.
    """
    keys = torch.rand(mask.shape, device=mask.device) if priority is None else priority(mask.cumsum(1) - 1).float()
    keys = keys.masked_fill(~mask, torch.inf)
    if isinstance(count, int):
        order = keys.topk(min(count, keys.shape[1]), dim=1, largest=False).indices
        winners = torch.zeros_like(mask).scatter_(1, order, True)
    else:
        order = keys.argsort(1)
        places = torch.arange(keys.shape[1], device=keys.device) < count[:, None]
        winners = torch.zeros_like(mask).scatter_(1, order, places)
    return winners & mask


def sample_both(
    positive: Tensor, negative: Tensor, most_positive: int, total: int, priority: Priority | None = None
) -> tuple[Tensor, Tensor]:
    """At most `most_positive` random positives, filled up to `total` with random negatives.

    positive, negative: [B, N] bool, disjoint. Returns their random subsets.
    """
    chosen = sample(positive, most_positive, priority)
    return chosen, sample(negative, total - chosen.sum(1), priority)


def pack(first: Tensor, second: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Members of two disjoint masks [B, N] as min(size, N) indices: the first mask's, then the second's, ascending.

    Returns (index [B, size], valid [B, size]); where an image has too few members the rest is not valid.
    """
    num = first.shape[1]
    key = torch.arange(num, 0, -1, device=first.device) + (first * 2 + second * 1) * num
    index = key.topk(min(size, num), dim=1).indices
    return index, (first | second).gather(1, index)
