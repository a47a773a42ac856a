"""Assignment on the host, by scipy."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

WORST = 1e9  # of costs that are not finite; the kernel has the same number


def solve(costs: Tensor, counts: Tensor, repeats: int) -> Tensor:
    """As `assign`."""
    matrices, numbers = costs.cpu().numpy(), counts.tolist()
    owners = np.full((len(matrices), matrices.shape[2]), -1, dtype=np.int64)
    for owner, matrix, count in zip(owners, matrices, numbers, strict=True):
        real = matrix[:count]
        if not np.isfinite(real).all():
            real = np.nan_to_num(real, nan=WORST, posinf=WORST, neginf=WORST)
        objects, queries = linear_sum_assignment(np.tile(real, (repeats, 1)) if repeats > 1 else real)
        owner[queries] = objects % max(count, 1)
    return torch.from_numpy(owners).to(counts.device, non_blocking=True)
