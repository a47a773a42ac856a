"""Calls in turns, and their times."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from rich.progress import track

from codetr.errors import UserError

WARMUP = 2


class Measured(Protocol):
    """What can be timed: ours, and what other libraries have."""

    def train(self) -> None:
        """One step: forward, losses, backward, clipping, optimizer."""
        ...

    def infer(self) -> None: ...


def in_turns(
    cases: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, title: str
) -> dict[str, list[float]]:
    """Seconds of every call, without those that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in track(range(repeats + WARMUP), title):
        for name, call in cases.items():
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            if number >= WARMUP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arithmetic(device: torch.device, precision: torch.dtype | None) -> float:
    """Operations a second that products of matrices reach here, the best of some: the limit of all arithmetic."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=precision or torch.float32)
    return max(2 * size**3 / seconds for seconds in in_turns({"": lambda: a @ a}, 5, device, "Arithmetic")[""])


def medians(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    return {
        name: {"seconds": statistics.median(own), "least": min(own, default=math.nan)} for name, own in seconds.items()
    }


def device_of(accelerator: str) -> torch.device:
    """trainer.accelerator: auto, cpu, gpu or cuda. Raises UserError for a GPU that is not there."""
    there = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not there:
        raise UserError(f"trainer.accelerator={accelerator}: there is no CUDA device here; trainer.accelerator=cpu")
    return torch.device("cuda" if there and accelerator != "cpu" else "cpu")
