"""What all benchmarks share: where results go, Markdown tables, the machine, measurements in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from codetr.benchmark.tables import table

__all__ = ["alone", "folder", "machine", "peak", "table", "write"]

P, T = ParamSpec("P"), TypeVar("T")
folder = Path(__file__).parent / "results"  # `python -m benchmarks --out FOLDER` changes it


def write(name: str, text: str, record: Any = None) -> None:
    """Write `text` to NAME.md among the results and print it; `record`, where there is one, to NAME.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if record is not None:
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text.rstrip("\n") + "\n")
    print(text)


def machine() -> str:
    """Processor, cores and version of torch, for the line below a table."""
    return f"{platform.machine()}, {os.cpu_count()} CPU cores, torch {version('torch')}"


def alone(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `function` in a fresh process: its memory and its caches are those of this call alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def peak() -> float:
    """The most memory that this process has had so far, in MiB. (`getrusage` counts the parent's as well.)"""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
