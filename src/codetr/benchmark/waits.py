"""Where the host waits for a CUDA device in a training step."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

import codetr
from codetr.benchmark.timing import synchronise
from codetr.costs.step import Step

SOURCE = Path(codetr.__file__).parent


def host_waits(step: Step) -> list[tuple[int, str]] | None:
    """(times in a step, file and innermost function of codetr); None where the device is no GPU.

    PyTorch warns of every call that makes the host wait for all that the device was given.
    """
    if step.device.type != "cuda":
        return None
    places: Counter[str] = Counter()

    def show(message: Warning | str, *_: object) -> None:
        if "synchronizing" in str(message):
            frames = [frame for frame in traceback.extract_stack() if SOURCE in Path(frame.filename).parents]
            own = [frame for frame in frames if "benchmark" not in Path(frame.filename).parts]
            where = f"{Path(own[-1].filename).relative_to(SOURCE)} {own[-1].name}" if own else "outside of codetr"
            places[where] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    synchronise(step.device)
    return [(count, place) for place, count in places.most_common()]
