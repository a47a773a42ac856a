"""What a run ran on, for its report."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version

import torch

_PACKAGES = ("codetr", "torch", "torchvision", "lightning", "hotcoco", "triton", "numba")


def machine(**more: object) -> dict[str, str]:
    """Versions, system, devices and the command of this process; more: what else is worth a line, None for nothing."""
    about = {name: str(value) for name, value in more.items() if value is not None}
    about["command"] = shlex.join(sys.argv)
    about["versions"] = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES if _version(name))
    about["Python"] = f"{platform.python_version()}, {platform.platform()}"
    about["processor"] = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        about["GPUs"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return about


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:
        return ""
